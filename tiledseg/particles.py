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

CHECK_EVERY = 10  # Euler steps between looks at whether a particle has settled
SETTLED = np.float32(0.01**2)  # squared pixels moved between two looks
MAX_STEP = 1e6  # pixels; beyond it, or not a number, a flow is an error
MAX_PIXELS = 2**30  # of a block: indices into interleaved flows are int32

# Starts that move together: near each other, so that the flows they read stay in the cache.
GROUP = (32, 64)

_jit = nb.njit(cache=True, nogil=True)


def follow_flows(flows: FloatArray, is_foreground: BoolArray, niter: int, cores: Cores = ALONE) -> Labels:
    """Pixel in which the particle started at each foreground pixel ends.

    Parameters
    ----------
    flows : array of float32, shape (2, *spatial)
        Flow in pixels per step; taken as 0 outside the foreground.
    is_foreground : array of bool, shape (*spatial)
        Where particles start.
    niter : int
        Steps at most; a particle that moves less than 0.01 px in 10 steps has settled and stops.
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
        If the arrays are not 2D, or hold 2**30 pixels or more.
    """
    flat, starts = check_flows(flows, is_foreground).reshape(-1), np.ascontiguousarray(is_foreground)
    ends = np.full(starts.shape, -1, np.int32)

    def follow(first_row: int) -> None:
        _follow_2d(flat, starts, niter, first_row, ends.reshape(-1))

    cores.run(follow, range(0, len(starts), GROUP[0]))
    return ends


def check_flows(flows: FloatArray, is_foreground: BoolArray) -> FloatArray:
    """The flows as particles read them, or an error: parameters and errors of :func:`follow_flows`.

    Returns
    -------
    masked : array of float32, shape (*(n + 1 for n in spatial), 2)
        0 outside the foreground. Interleaved, so that the flow of a pixel is in one place, and with a
        margin at the far ends, which a particle on the last row or column reads with weight 0.
    """
    shape = is_foreground.shape
    if len(shape) != 2:
        raise SettingsError(f"flows over {len(shape)} axes cannot be followed; give arrays of two axes, y and x.")
    if is_foreground.size >= MAX_PIXELS:
        raise SettingsError(f"a block of shape {shape} has 2**30 pixels or more; use a smaller block.")
    masked = np.zeros((*(n + 1 for n in shape), len(shape)), np.float32)
    inner = masked[tuple(slice(0, n) for n in shape)]
    np.copyto(inner, np.moveaxis(flows, 0, -1), where=is_foreground[..., None])
    # In two reductions, which pass NaN on, instead of arrays of comparisons.
    if not max(masked.max(initial=0), -masked.min(initial=0)) <= MAX_STEP:
        *where, axis = np.argwhere(~(np.abs(inner) <= MAX_STEP))[0].tolist()
        raise ImageError(
            f"the flow at pixel {tuple(where)} of the block is {inner[*where, axis]}, which is no step; "
            "look for NaN or infinity in the image there, or in the model's weights."
        )
    return masked


@_jit
def _follow_2d(flows: Any, is_foreground: Any, niter: int, first_row: int, ends: Any) -> None:
    """Paths of the particles that start in GROUP[0] rows, one group after the other."""
    height, width = is_foreground.shape
    n_most = GROUP[0] * GROUP[1]
    first = np.empty(n_most, np.int32)
    offset = np.empty(n_most, np.int32)
    bounds = np.empty((n_most, 4), np.float32)
    moved = np.empty((n_most, 4), np.float32)  # now, and at the last look
    row_step = np.int32(2 * (width + 1))
    for first_column in range(0, width, GROUP[1]):
        n_moving = 0
        for y in range(first_row, min(first_row + GROUP[0], height)):
            for x in range(first_column, min(first_column + GROUP[1], width)):
                if is_foreground[y, x]:
                    first[n_moving] = y * width + x
                    offset[n_moving] = y * row_step + 2 * x
                    # Relative to the start: at the image's border the same in every block.
                    bounds[n_moving, 0], bounds[n_moving, 1] = -y, height - 1 - y
                    bounds[n_moving, 2], bounds[n_moving, 3] = -x, width - 1 - x
                    moved[n_moving] = np.float32(0.0)
                    n_moving += 1
        n_steps = 0
        while n_moving > 0:
            n_now = min(CHECK_EVERY, niter - n_steps)
            for _ in range(n_now):
                _step_2d(flows, offset, row_step, bounds, moved, n_moving)
            n_steps += n_now
            n_left = 0
            for k in range(n_moving):
                net_y, net_x = moved[k, 0] - moved[k, 2], moved[k, 1] - moved[k, 3]
                if net_y * net_y + net_x * net_x < SETTLED or n_steps >= niter:
                    rows, columns = np.int32(np.floor(moved[k, 0])), np.int32(np.floor(moved[k, 1]))
                    ends[first[k]] = first[k] + rows * width + columns
                    continue
                first[n_left], offset[n_left], bounds[n_left] = first[k], offset[k], bounds[k]
                moved[n_left, 0] = moved[n_left, 2] = moved[k, 0]
                moved[n_left, 1] = moved[n_left, 3] = moved[k, 1]
                n_left += 1
            n_moving = n_left


@_jit
def _step_2d(flows: Any, offset: Any, row_step: Any, bounds: Any, moved: Any, n_moving: int) -> None:
    """One Euler step of the first `n_moving` particles; float32 throughout, in this order."""
    one = np.float32(1.0)
    two, row = np.uint64(2), np.uint64(row_step)
    for k in range(n_moving):
        dy, dx = moved[k, 0], moved[k, 1]
        floor_y, floor_x = np.floor(dy), np.floor(dx)
        weight_y, weight_x = dy - floor_y, dx - floor_x
        # Unsigned: numba would look at each index whether it counts from the end.
        y00 = np.uint64(offset[k] + np.int32(floor_y) * row_step + np.int32(2) * np.int32(floor_x))
        x00 = y00 + np.uint64(1)
        y10, x10 = y00 + row, x00 + row
        w00, w01 = (one - weight_y) * (one - weight_x), (one - weight_y) * weight_x
        w10, w11 = weight_y * (one - weight_x), weight_y * weight_x
        dy += (w00 * flows[y00] + w01 * flows[y00 + two]) + (w10 * flows[y10] + w11 * flows[y10 + two])
        dx += (w00 * flows[x00] + w01 * flows[x00 + two]) + (w10 * flows[x10] + w11 * flows[x10 + two])
        moved[k, 0] = min(max(dy, bounds[k, 0]), bounds[k, 1])
        moved[k, 1] = min(max(dx, bounds[k, 2]), bounds[k, 3])
