"""Particles that follow the flow: one starts in every foreground pixel and moves until it settles.

Arrays in, arrays out. A particle is an integer start pixel plus a float32 displacement, so moving
the block by whole pixels changes no bit of its path, and no particle knows of another: groups of
them run on as many cores as there are.

References
----------
Stringer et al. (2021), "Cellpose: a generalist algorithm for cellular segmentation",
Nature Methods 18, 100-106.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from .cores import ALONE, Cores
from .errors import ImageError, SettingsError

__all__ = ["CHECK_EVERY", "SETTLED", "check_flows", "follow_flows"]

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]

CHECK_EVERY = 5  # Euler steps between looks at whether a particle has settled
SETTLED = np.float32(0.005**2)  # squared pixels moved between two looks
MAX_STEP = 1e6  # pixels; beyond it, or not a number, a flow is an error
LIMITS = {2: "2**30", 3: "2**31 / 3"}  # pixels of a block, by its axes: indices into interleaved flows are int32
COPIED = 2**16  # pixels that are interleaved at a time: they stay in the cache until they are checked

# Starts that move together: near each other, so that the flows they read stay in the cache.
GROUP = (32, 64)
GROUP_3D = (8, 16, 32)

_jit = nb.njit(cache=True, nogil=True)


def follow_flows(flows: FloatArray, is_foreground: BoolArray, niter: int, cores: Cores = ALONE) -> Labels:
    """Pixel in which the particle started at each foreground pixel ends.

    Parameters
    ----------
    flows : array of float32, shape (ndim, *spatial)
        Flow in pixels per step, of any length; taken as 0 outside the foreground.
    is_foreground : array of bool, shape (*spatial)
        Where particles start; axes y and x, or z, y and x.
    niter : int
        Steps at most; a particle that moves less than 0.005 px in 5 steps has settled and stops.
    cores : Cores
        To share the work.

    Returns
    -------
    ends : array of int32, shape (*spatial)
        Flat index of the end pixel, -1 outside the foreground.

    Raises
    ------
    ImageError
        If a foreground flow is not finite, or beyond 1e6.
    SettingsError
        If the arrays have neither two axes nor three, or hold 2**30 pixels or more, in 3D 2**31 / 3.
    """
    flat, starts = check_flows(flows, is_foreground, cores).reshape(-1), np.ascontiguousarray(is_foreground)
    ends = np.full(starts.shape, -1, np.int32)
    kernel: Any = _follow_2d if starts.ndim == 2 else _follow_3d
    group = GROUP if starts.ndim == 2 else GROUP_3D

    def follow(corner: tuple[int, ...]) -> None:
        kernel(flat, starts, niter, *corner, ends.reshape(-1))

    # Pieces run through the last axis; over the others, so that a thin volume has pieces for all cores too.
    steps = zip(starts.shape[:-1], group[:-1], strict=True)
    cores.run(follow, itertools.product(*(range(0, n, step) for n, step in steps)))
    return ends


def check_flows(flows: FloatArray, is_foreground: BoolArray, cores: Cores = ALONE) -> FloatArray:
    """The flows as particles read them, or an error: parameters and errors of :func:`follow_flows`.

    Returns
    -------
    masked : array of float32, shape (*(n + 1 for n in spatial), ndim)
        0 outside the foreground. Interleaved, so that the flow of a pixel is in one place, and with a
        margin at the far ends, which a particle on the last plane, row or column reads with weight 0.
    """
    shape = is_foreground.shape
    if len(shape) not in LIMITS:
        raise SettingsError(
            f"flows over {len(shape)} axes cannot be followed; give arrays of two axes, y and x, or three, z, y and x."
        )
    if math.prod(n + 1 for n in shape) * len(shape) > 2**31:
        raise SettingsError(
            f"a block of shape {shape} has {LIMITS[len(shape)]} pixels or more; use a smaller block "
            "(one more pixel along each axis is counted)."
        )
    masked = np.zeros((*(n + 1 for n in shape), len(shape)), np.float32)
    inner = masked[tuple(slice(0, n) for n in shape)]

    def copy(part: slice) -> float:
        for axis, values in enumerate(flows):
            np.copyto(inner[part, ..., axis], values[part], where=is_foreground[part])
        # In two reductions, which pass NaN on, instead of arrays of comparisons.
        return float(max(inner[part].max(initial=0), -inner[part].min(initial=0)))

    n_at_once = max(1, COPIED // max(1, math.prod(shape[1:])))
    largest = cores.run(copy, (slice(first, first + n_at_once) for first in range(0, shape[0], n_at_once)))
    if not np.max(largest, initial=0) <= MAX_STEP:
        *where, axis = np.argwhere(~(np.abs(inner) <= MAX_STEP))[0].tolist()
        raise ImageError(
            f"the flow at pixel {tuple(where)} of the block is {inner[*where, axis]}, which is no step; "
            "look for NaN or infinity in the image there, or in the model's weights."
        )
    return masked


@_jit
def _follow_2d(flows: Any, is_foreground: Any, niter: int, first_row: int, ends: Any) -> None:
    """Paths of the particles that start in GROUP[0] rows, one group after the other.

    Numbers of one kind lie together, and a step is made in three rounds over the group: two of them become vector
    instructions, which is nearly twice as fast as one round.
    """
    height, width = is_foreground.shape
    n_most = GROUP[0] * GROUP[1]
    first = np.empty(n_most, np.int32)
    offset = np.empty(n_most, np.int32)
    low, high = np.empty((2, n_most), np.float32), np.empty((2, n_most), np.float32)
    moved, before = np.empty((2, n_most), np.float32), np.empty((2, n_most), np.float32)  # now, at the last look
    corner, weights = np.empty(n_most, np.int32), np.empty((4, n_most), np.float32)
    row_step = np.int32(2 * (width + 1))
    for first_column in range(0, width, GROUP[1]):
        n_moving = 0
        for y in range(first_row, min(first_row + GROUP[0], height)):
            for x in range(first_column, min(first_column + GROUP[1], width)):
                if is_foreground[y, x]:
                    first[n_moving] = y * width + x
                    offset[n_moving] = y * row_step + 2 * x
                    # Relative to the start: at the image's border the same in every block.
                    low[0, n_moving], high[0, n_moving] = -y, height - 1 - y
                    low[1, n_moving], high[1, n_moving] = -x, width - 1 - x
                    n_moving += 1
        moved[:, :n_moving] = before[:, :n_moving] = np.float32(0.0)
        n_steps = 0
        while n_moving > 0:
            n_now = min(CHECK_EVERY, niter - n_steps)
            for _ in range(n_now):
                _weigh_2d(moved, offset, row_step, n_moving, corner, weights)
                _step_2d(flows, corner, weights, row_step, n_moving, moved)
                _stay_inside(low, high, n_moving, moved)
            n_steps += n_now
            n_left = 0
            for k in range(n_moving):
                y, x = moved[0, k], moved[1, k]
                net_y, net_x = y - before[0, k], x - before[1, k]
                if net_y * net_y + net_x * net_x < SETTLED or n_steps >= niter:
                    rows, columns = np.int32(np.floor(y)), np.int32(np.floor(x))
                    ends[first[k]] = first[k] + rows * width + columns
                    continue
                first[n_left], offset[n_left] = first[k], offset[k]
                for axis in range(2):
                    low[axis, n_left], high[axis, n_left] = low[axis, k], high[axis, k]
                    moved[axis, n_left] = before[axis, n_left] = moved[axis, k]
                n_left += 1
            n_moving = n_left


@_jit
def _weigh_2d(moved: Any, offset: Any, row_step: Any, n_moving: int, corner: Any, weights: Any) -> None:
    """Where the flows round each particle begin, and the weights of the four pixels there in raster order."""
    one = np.float32(1.0)
    moved_y, moved_x = moved[0], moved[1]
    w00, w01, w10, w11 = weights[0], weights[1], weights[2], weights[3]
    for k in range(n_moving):
        dy, dx = moved_y[k], moved_x[k]
        floor_y, floor_x = np.floor(dy), np.floor(dx)
        corner[k] = offset[k] + np.int32(floor_y) * row_step + np.int32(2) * np.int32(floor_x)
        weight_y, weight_x = dy - floor_y, dx - floor_x
        other_y, other_x = one - weight_y, one - weight_x
        w00[k], w01[k], w10[k], w11[k] = other_y * other_x, other_y * weight_x, weight_y * other_x, weight_y * weight_x


@_jit
def _step_2d(flows: Any, corner: Any, weights: Any, row_step: Any, n_moving: int, moved: Any) -> None:
    """One Euler step of the first `n_moving` particles; float32 throughout, in this order."""
    x, column, row = np.uint64(1), np.uint64(2), np.uint64(row_step)
    moved_y, moved_x = moved[0], moved[1]
    for k in range(n_moving):
        # Unsigned: numba would look at each index whether it counts from the end.
        i00 = np.uint64(corner[k])
        i10 = i00 + row
        i01, i11 = i00 + column, i10 + column
        w00, w01, w10, w11 = weights[0, k], weights[1, k], weights[2, k], weights[3, k]
        moved_y[k] += (w00 * flows[i00] + w01 * flows[i01]) + (w10 * flows[i10] + w11 * flows[i11])
        moved_x[k] += (w00 * flows[i00 + x] + w01 * flows[i01 + x]) + (w10 * flows[i10 + x] + w11 * flows[i11 + x])


@_jit
def _nearest(moved: Any) -> Any:
    """The pixel that a coordinate is nearest to, of two that are as near the higher one.

    In a volume the particles of a sink that lies on a pixel would fall into eight if coordinates were cut off, as
    they are in planes, after Cellpose: fewer cells fall apart so.
    """
    return np.int32(np.floor(moved + np.float32(0.5)))


@_jit
def _follow_3d(flows: Any, is_foreground: Any, niter: int, first_plane: int, first_row: int, ends: Any) -> None:
    """Paths of the particles that start in GROUP_3D[0] planes of GROUP_3D[1] rows, as `_follow_2d` has them."""
    depth, height, width = is_foreground.shape
    n_most = GROUP_3D[0] * GROUP_3D[1] * GROUP_3D[2]
    first = np.empty(n_most, np.int32)
    offset = np.empty(n_most, np.int32)
    low, high = np.empty((3, n_most), np.float32), np.empty((3, n_most), np.float32)
    moved, before = np.empty((3, n_most), np.float32), np.empty((3, n_most), np.float32)  # now, at the last look
    corner, weights = np.empty(n_most, np.int32), np.empty((8, n_most), np.float32)
    row_step = np.int32(3 * (width + 1))
    plane_step = np.int32(row_step * (height + 1))
    for first_column in range(0, width, GROUP_3D[2]):
        n_moving = 0
        for z in range(first_plane, min(first_plane + GROUP_3D[0], depth)):
            for y in range(first_row, min(first_row + GROUP_3D[1], height)):
                for x in range(first_column, min(first_column + GROUP_3D[2], width)):
                    if is_foreground[z, y, x]:
                        first[n_moving] = (z * height + y) * width + x
                        offset[n_moving] = z * plane_step + y * row_step + 3 * x
                        low[0, n_moving], high[0, n_moving] = -z, depth - 1 - z
                        low[1, n_moving], high[1, n_moving] = -y, height - 1 - y
                        low[2, n_moving], high[2, n_moving] = -x, width - 1 - x
                        n_moving += 1
        moved[:, :n_moving] = before[:, :n_moving] = np.float32(0.0)
        n_steps = 0
        while n_moving > 0:
            n_now = min(CHECK_EVERY, niter - n_steps)
            for _ in range(n_now):
                _weigh_3d(moved, offset, plane_step, row_step, n_moving, corner, weights)
                _step_3d(flows, corner, weights, plane_step, row_step, n_moving, moved)
                _stay_inside(low, high, n_moving, moved)
            n_steps += n_now
            n_left = 0
            for k in range(n_moving):
                z, y, x = moved[0, k], moved[1, k], moved[2, k]
                net_z, net_y, net_x = z - before[0, k], y - before[1, k], x - before[2, k]
                if (net_z * net_z + net_y * net_y) + net_x * net_x < SETTLED or n_steps >= niter:
                    planes, rows, columns = _nearest(z), _nearest(y), _nearest(x)
                    ends[first[k]] = first[k] + (planes * height + rows) * width + columns
                    continue
                first[n_left], offset[n_left] = first[k], offset[k]
                for axis in range(3):
                    low[axis, n_left], high[axis, n_left] = low[axis, k], high[axis, k]
                    moved[axis, n_left] = before[axis, n_left] = moved[axis, k]
                n_left += 1
            n_moving = n_left


@_jit
def _weigh_3d(
    moved: Any, offset: Any, plane_step: Any, row_step: Any, n_moving: int, corner: Any, weights: Any
) -> None:
    """Where the flows round each particle begin, and the weights of the eight pixels there in raster order."""
    one = np.float32(1.0)
    moved_z, moved_y, moved_x = moved[0], moved[1], moved[2]
    w000, w001, w010, w011 = weights[0], weights[1], weights[2], weights[3]
    w100, w101, w110, w111 = weights[4], weights[5], weights[6], weights[7]
    for k in range(n_moving):
        dz, dy, dx = moved_z[k], moved_y[k], moved_x[k]
        floor_z, floor_y, floor_x = np.floor(dz), np.floor(dy), np.floor(dx)
        at = offset[k] + np.int32(floor_z) * plane_step + np.int32(floor_y) * row_step
        corner[k] = at + np.int32(3) * np.int32(floor_x)
        weight_z, weight_y, weight_x = dz - floor_z, dy - floor_y, dx - floor_x
        other_z, other_y, other_x = one - weight_z, one - weight_y, one - weight_x
        w00, w01, w10, w11 = other_z * other_y, other_z * weight_y, weight_z * other_y, weight_z * weight_y
        w000[k], w001[k], w010[k], w011[k] = w00 * other_x, w00 * weight_x, w01 * other_x, w01 * weight_x
        w100[k], w101[k], w110[k], w111[k] = w10 * other_x, w10 * weight_x, w11 * other_x, w11 * weight_x


@_jit
def _step_3d(flows: Any, corner: Any, weights: Any, plane_step: Any, row_step: Any, n_moving: int, moved: Any) -> None:
    """One Euler step of the first `n_moving` particles; float32 throughout, in this order."""
    y, x, column = np.uint64(1), np.uint64(2), np.uint64(3)
    plane, row = np.uint64(plane_step), np.uint64(row_step)
    moved_z, moved_y, moved_x = moved[0], moved[1], moved[2]
    for k in range(n_moving):
        # Unsigned, as in 2D.
        i000 = np.uint64(corner[k])
        i010, i100 = i000 + row, i000 + plane
        i110 = i100 + row
        i001, i011, i101, i111 = i000 + column, i010 + column, i100 + column, i110 + column
        w000, w001, w010, w011 = weights[0, k], weights[1, k], weights[2, k], weights[3, k]
        w100, w101, w110, w111 = weights[4, k], weights[5, k], weights[6, k], weights[7, k]
        near = (w000 * flows[i000] + w001 * flows[i001]) + (w010 * flows[i010] + w011 * flows[i011])
        far = (w100 * flows[i100] + w101 * flows[i101]) + (w110 * flows[i110] + w111 * flows[i111])
        moved_z[k] += near + far
        near = (w000 * flows[i000 + y] + w001 * flows[i001 + y]) + (w010 * flows[i010 + y] + w011 * flows[i011 + y])
        far = (w100 * flows[i100 + y] + w101 * flows[i101 + y]) + (w110 * flows[i110 + y] + w111 * flows[i111 + y])
        moved_y[k] += near + far
        near = (w000 * flows[i000 + x] + w001 * flows[i001 + x]) + (w010 * flows[i010 + x] + w011 * flows[i011 + x])
        far = (w100 * flows[i100 + x] + w101 * flows[i101 + x]) + (w110 * flows[i110 + x] + w111 * flows[i111 + x])
        moved_x[k] += near + far


@_jit
def _stay_inside(low: Any, high: Any, n_moving: int, moved: Any) -> None:
    """Hold particles within the array."""
    for axis in range(len(moved)):
        least, most, places = low[axis], high[axis], moved[axis]
        for k in range(n_moving):
            places[k] = min(max(places[k], least[k]), most[k])
