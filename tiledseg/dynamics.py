"""From flows to labels and back: Cellpose's dynamics, made independent of where a block lies.

Arrays in, arrays out. The method is Cellpose's (every pixel follows the
flow to a sink, sinks are grown into objects, objects whose flow disagrees with the network are
dropped), but each step is local, so an object wholly inside two overlapping blocks is the same
set of pixels in both:

- a particle is an integer start pixel plus a float32 displacement, so moving the block by whole
  pixels changes no bit of its path;
- the reference flow of an object diffuses for a time set by its own box, and errors are summed
  over its pixels in raster order;
- ties are broken by raster order. It needs no global position: raster order compares indices axis
  by axis, a block subtracts one constant per axis, so any two pixels of a block are in the same
  order as in the whole image.

All but the Euler step works on flattened arrays with one index step per axis: 3D is one kernel more.

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

from .errors import ImageError, SettingsError
from .heat import box_pixels, flat_steps, label_flows, object_boxes, object_flow

__all__ = [
    "compute_masks",
    "fill_holes",
    "find_sinks",
    "finish_masks",
    "flow_errors",
    "follow_flows",
    "gather_pixels",
    "grow_sinks",
    "renumber",
    "warm_up",
]

IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]

PEAK_COUNT = 10  # a sink needs more than this many particles in its pixel,
PEAK_RADIUS = 2  # the most of all pixels this near,
GROW_COUNT = 2  # and takes in pixels with more than this many
GROW_ROUNDS = 5  # in so many rounds
CHECK_EVERY = 10  # Euler steps between looks at whether a particle has settled
MAX_STEP = 1e6  # pixels; beyond it, or not a number, a flow is an error
SETTLED = np.float32(0.01**2)  # squared pixels moved between two looks

_jit = nb.njit(cache=True, nogil=True)


def compute_masks(
    flows: FloatArray,
    cellprob: FloatArray,
    *,
    cellprob_threshold: float = 0.0,
    flow_threshold: float = 0.4,
    niter: int = 200,
    min_size: int = 15,
) -> npt.NDArray[np.uint32]:
    """Objects of one block.

    Parameters
    ----------
    flows : array of float32, shape (ndim, *spatial)
        Flow in pixels per step, about unit length: the network's output already divided by 5.
    cellprob : array of float32, shape (*spatial)
        Logit of being inside an object.
    cellprob_threshold : float
        Pixels above this are foreground.
    flow_threshold : float
        Objects with a larger flow error are dropped; 0 keeps all.
    niter : int
        Euler steps at most.
    min_size : int
        Objects of fewer pixels, before their holes are filled, are dropped; 0 keeps all.

    Returns
    -------
    labels : array of uint32, shape (*spatial)
        Labels 1..n without gaps, in raster order of each object's first pixel; 0 background.

    Raises
    ------
    ImageError
        If a foreground flow is not finite, or beyond 1e6.
    SettingsError
        If the shapes do not fit, the arrays are not 2D, or hold 2**31 pixels or more.
    """
    if flows.shape != (cellprob.ndim, *cellprob.shape):
        raise SettingsError(
            f"flows of shape {flows.shape} do not fit a cellprob of shape {cellprob.shape}; "
            f"give shape {(cellprob.ndim, *cellprob.shape)}."
        )
    gathered = gather_pixels(flows, cellprob, cellprob_threshold=cellprob_threshold, niter=niter)
    return finish_masks(gathered, flows, flow_threshold=flow_threshold, min_size=min_size)


def gather_pixels(flows: FloatArray, cellprob: FloatArray, *, cellprob_threshold: float, niter: int) -> Labels:
    """The first half of :func:`compute_masks`: which foreground pixels flow to the same sink.

    Parameters are those of :func:`compute_masks`.

    Returns
    -------
    labels : array of int32, shape (*spatial)
        One label per sink in no particular order, 0 background.
    """
    is_foreground = cellprob > cellprob_threshold
    ends = follow_flows(flows, is_foreground, niter)
    if not is_foreground.any():
        return np.zeros(cellprob.shape, np.int32)
    counts = np.bincount(ends[ends >= 0], minlength=ends.size).astype(np.int32).reshape(ends.shape)
    regions = grow_sinks(counts, find_sinks(counts))
    return np.where(ends >= 0, regions.reshape(-1)[ends], np.int32(0))


def finish_masks(
    gathered: Labels, flows: FloatArray, *, flow_threshold: float, min_size: int
) -> npt.NDArray[np.uint32]:
    """The second half of :func:`compute_masks`: drop what is no object, fill holes, number.

    Parameters
    ----------
    gathered : array of int32, shape (*spatial)
        From :func:`gather_pixels`.
    flows, flow_threshold, min_size
        As for :func:`compute_masks`.

    Returns
    -------
    labels : array of uint32, shape (*spatial)
        As of :func:`compute_masks`.
    """
    labels = gathered
    sizes = np.bincount(labels.reshape(-1), minlength=1)[1:]
    labels = renumber(labels, sizes >= max(min_size, 1))
    if flow_threshold > 0:
        labels = renumber(labels, flow_errors(labels, flows) <= flow_threshold)
    # Filling takes no pixel from another object and adds none before an object's first: no object
    # becomes too small (Cellpose looks again) and the numbering stays in order.
    return fill_holes(labels).view(np.uint32)


def follow_flows(flows: FloatArray, is_foreground: BoolArray, niter: int) -> Labels:
    """Pixel in which the particle started at each foreground pixel ends.

    Parameters
    ----------
    flows : array of float32, shape (2, *spatial)
        Flow in pixels per step; taken as 0 outside the foreground.
    is_foreground : array of bool, shape (*spatial)
        Where particles start.
    niter : int
        Steps at most; a particle that moves less than 0.01 px in 10 steps has settled and stops.

    Returns
    -------
    ends : array of int32, shape (*spatial)
        Flat index of the end pixel, -1 outside the foreground.

    Raises
    ------
    ImageError
        If a foreground flow is not finite, or beyond 1e6.
    SettingsError
        If the arrays are not 2D, or hold 2**31 pixels or more.
    """
    shape = is_foreground.shape
    if len(shape) != 2:
        raise SettingsError(f"flows over {len(shape)} axes cannot be followed; give arrays of two axes, y and x.")
    if is_foreground.size >= 2**31:
        raise SettingsError(f"a block of shape {shape} has 2**31 pixels or more; use a smaller block.")
    # Interleaved, so that the flow of a pixel is one read.
    masked = np.zeros((*shape, len(shape)), np.float32)
    np.copyto(masked, np.moveaxis(flows, 0, -1), where=is_foreground[..., None])
    # In two reductions, which pass NaN on, instead of arrays of comparisons.
    if not max(masked.max(initial=0), -masked.min(initial=0)) <= MAX_STEP:
        *where, axis = np.argwhere(~(np.abs(masked) <= MAX_STEP))[0].tolist()
        raise ImageError(
            f"the flow at pixel {tuple(where)} of the block is {masked[*where, axis]}, which is no step; "
            "look for NaN or infinity in the image there, or in the model's weights."
        )
    ends = np.full(shape, -1, np.int32)
    _follow(masked, np.ascontiguousarray(is_foreground), niter, ends.reshape(-1))
    return ends


@_jit
def _follow(flows: Any, is_foreground: Any, niter: int, ends: Any) -> None:
    """Steps of all particles, one row of starts at a time: independent of each other, yet near."""
    ndim = is_foreground.ndim
    shape = np.array(is_foreground.shape)
    width = shape[-1]
    steps = flat_steps(shape)
    start = np.empty((ndim, width), np.int64)
    for row in range(0, is_foreground.size, max(width, 1)):
        first = np.flatnonzero(is_foreground.reshape(-1)[row : row + width]) + row
        n_moving = first.size
        for axis in range(ndim):
            start[axis, :n_moving] = first // steps[axis] % shape[axis]
        moved = np.zeros((ndim, n_moving), np.float32)
        before = np.zeros((ndim, n_moving), np.float32)
        n_steps = 0
        while n_moving > 0:
            n_steps += 1
            if n_steps <= niter:
                _step_2d(flows, start, moved, n_moving)
            if n_steps < niter and n_steps % CHECK_EVERY:
                continue
            n_left = 0
            for k in range(n_moving):
                net = np.float32(0.0)
                for axis in range(ndim):
                    net += (moved[axis, k] - before[axis, k]) ** 2
                if net < SETTLED or n_steps >= niter:
                    end = first[k]
                    for axis in range(ndim):
                        end += np.int64(np.floor(moved[axis, k])) * steps[axis]
                    ends[first[k]] = end
                    continue
                first[n_left] = first[k]
                for axis in range(ndim):
                    start[axis, n_left] = start[axis, k]
                    moved[axis, n_left] = before[axis, n_left] = moved[axis, k]
                n_left += 1
            n_moving = n_left


@_jit
def _step_2d(flows: Any, start: Any, moved: Any, n_moving: int) -> None:
    """One Euler step of the first `n_moving` particles; float32 throughout, in this order."""
    height, width = flows.shape[:2]
    one = np.float32(1.0)
    for k in range(n_moving):
        y, x, dy, dx = start[0, k], start[1, k], moved[0, k], moved[1, k]
        floor_y, floor_x = np.floor(dy), np.floor(dx)
        weight_y, weight_x = dy - floor_y, dx - floor_x
        y0, x0 = y + np.int64(floor_y), x + np.int64(floor_x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        w00, w01 = (one - weight_y) * (one - weight_x), (one - weight_y) * weight_x
        w10, w11 = weight_y * (one - weight_x), weight_y * weight_x
        f00, f01, f10, f11 = flows[y0, x0], flows[y0, x1], flows[y1, x0], flows[y1, x1]
        dy += (w00 * f00[0] + w01 * f01[0]) + (w10 * f10[0] + w11 * f11[0])
        dx += (w00 * f00[1] + w01 * f01[1]) + (w10 * f10[1] + w11 * f11[1])
        # Bounds relative to the start: at the image's border the same in every block.
        moved[0, k] = min(max(dy, np.float32(-y)), np.float32(height - 1 - y))
        moved[1, k] = min(max(dx, np.float32(-x)), np.float32(width - 1 - x))


def find_sinks(counts: Labels) -> Indices:
    """Pixels where particles gather.

    Parameters
    ----------
    counts : array of int32, shape (*spatial)
        Particles that end in each pixel.

    Returns
    -------
    sinks : array of int64, shape (n_sinks,)
        Flat indices, ascending, of pixels with more than 10 particles that hold the most of their
        5 x 5 neighbourhood; of equal ones the first in raster order counts.
    """
    padded = np.pad(counts, PEAK_RADIUS)
    sinks = _peaks(padded.reshape(-1), _window(padded.shape, PEAK_RADIUS))
    return _reindex(sinks, padded.shape, counts.shape, -PEAK_RADIUS)


def _reindex(flat: Indices, source: tuple[int, ...], target: tuple[int, ...], shift: int) -> Indices:
    """Flat indices of an array as those of another, shifted along every axis."""
    places = tuple(axis + shift for axis in np.unravel_index(flat, source))
    return np.asarray(np.ravel_multi_index(places, target), np.int64)


def _window(shape: tuple[int, ...], radius: int) -> Indices:
    """Flat index offsets of the pixels within `radius` along every axis, without the middle."""
    middle = int(np.ravel_multi_index((radius,) * len(shape), shape))
    places = np.indices((2 * radius + 1,) * len(shape)).reshape(len(shape), -1)
    offsets: Indices = np.asarray(np.ravel_multi_index(tuple(places), shape), np.int64) - middle
    is_other = offsets != 0
    around: Indices = offsets[is_other]
    return around


@_jit
def _peaks(counts: Any, offsets: Any) -> Any:
    """Flat indices whose count is the largest around, the first in raster order among equals."""
    peaks = np.empty(np.sum(counts > PEAK_COUNT), np.int64)
    n_peaks = 0
    for i in range(counts.size):
        if counts[i] <= PEAK_COUNT:
            continue
        is_peak = True
        for offset in offsets:
            other = counts[i + offset]
            if other > counts[i] or (other == counts[i] and offset < 0):
                is_peak = False
                break
        if is_peak:
            peaks[n_peaks] = i
            n_peaks += 1
    return peaks[:n_peaks]


def grow_sinks(counts: Labels, sinks: Indices) -> Labels:
    """Regions round the sinks: particles that end in one region are one object.

    Parameters
    ----------
    counts : array of int32, shape (*spatial)
        Particles that end in each pixel.
    sinks : array of int64, shape (n_sinks,)
        Flat indices, ascending.

    Returns
    -------
    regions : array of int32, shape (*spatial)
        1 + index of the sink whose region a pixel is in, 0 for none. A region spreads 5 times to
        the neighbours that hold more than 2 particles; where regions meet, the sink with more
        particles has the pixel, the first in raster order of equal ones.
    """
    padded = np.pad(counts, 1)
    starts = _reindex(sinks, counts.shape, padded.shape, 1)
    regions = np.zeros(padded.shape, np.int32)
    _grow(padded.reshape(-1), _window(padded.shape, 1), starts, regions.reshape(-1))
    return np.ascontiguousarray(regions[(slice(1, -1),) * counts.ndim])


@_jit
def _grow(counts: Any, offsets: Any, sinks: Any, regions: Any) -> None:
    """Breadth-first growth of each sink over the counts, see grow_sinks."""
    seen = np.zeros(counts.size, np.int32)
    window = 1
    while 3**window < offsets.size + 1:
        window += 1
    queue = np.empty((2 * GROW_ROUNDS + 1) ** window, np.int64)
    for k in range(sinks.size):
        queue[0] = sinks[k]
        seen[sinks[k]] = k + 1
        n_queued = 1
        n_done = 0
        for _ in range(GROW_ROUNDS):
            end_of_round = n_queued
            while n_done < end_of_round:
                for offset in offsets:
                    i = queue[n_done] + offset
                    if counts[i] > GROW_COUNT and seen[i] != k + 1:
                        seen[i] = k + 1
                        queue[n_queued] = i
                        n_queued += 1
                n_done += 1
        for i in queue[:n_queued]:
            if regions[i] == 0 or counts[sinks[k]] > counts[sinks[regions[i] - 1]]:
                regions[i] = k + 1


def flow_errors(labels: Labels, flows: FloatArray) -> npt.NDArray[np.float64]:
    """How far the flow of each object's shape is from the network's.

    Parameters
    ----------
    labels : array of int32, shape (*spatial)
        Labels 1..n, 0 background.
    flows : array of float32, shape (ndim, *spatial)
        The network's flow, about unit length.

    Returns
    -------
    errors : array of float64, shape (n,)
        Squared length of the difference to :func:`label_flows`, mean over the object's pixels;
        0 for a label that is absent.
    """
    boxes = object_boxes(labels, int(labels.max(initial=0)))
    errors = np.zeros(len(boxes), np.float64)
    flat = np.ascontiguousarray(flows, np.float32).reshape(labels.ndim, -1)
    flat.flags.writeable = False  # else numba would compile once more for callers' read-only arrays
    _all_errors(labels.reshape(-1), np.array(labels.shape, np.int64), boxes, flat, errors)
    return errors


@_jit
def _all_errors(flat: Any, shape: Any, boxes: Any, flows: Any, errors: Any) -> None:
    for i in range(boxes.shape[0]):
        if boxes[i, 0, 0] >= boxes[i, 1, 0]:
            continue
        where, values = object_flow(flat, shape, boxes[i], i + 1)
        total = 0.0
        for k in range(where.size):
            for axis in range(shape.size):
                difference = np.float64(values[axis, k]) - np.float64(flows[axis, where[k]])
                total += difference * difference
        errors[i] = total / where.size


def renumber(labels: Labels, is_kept: BoolArray) -> Labels:
    """Drop labels and number the others in raster order of their first pixel.

    Parameters
    ----------
    labels : array of int32, shape (*spatial)
        Labels 1..n, 0 background.
    is_kept : array of bool, shape (n,)
        Whether label ``i + 1`` stays.

    Returns
    -------
    labels : array of int32, shape (*spatial)
        Labels 1..n_kept without gaps.
    """
    flat = labels.flatten()
    _renumber(flat, is_kept)
    return flat.reshape(labels.shape)


@_jit
def _renumber(flat: Any, is_kept: Any) -> None:
    numbers = np.zeros(is_kept.size + 1, np.int32)
    n_kept = 0
    for i in range(flat.size):
        label = flat[i]
        if label > 0 and is_kept[label - 1]:
            if numbers[label] == 0:
                n_kept += 1
                numbers[label] = n_kept
            flat[i] = numbers[label]
        else:
            flat[i] = 0


def fill_holes(labels: Labels) -> Labels:
    """Give background that an object encloses to that object.

    Parameters
    ----------
    labels : array of int32, shape (*spatial)
        Labels 1..n in raster order of their first pixel, 0 background.

    Returns
    -------
    labels : array of int32, shape (*spatial)
        The same with holes filled. A pixel is in a hole if every path over faces out of the
        object's box crosses the object. Pixels of other objects stay theirs; of several objects
        round a pixel the lowest label has it.
    """
    flat = labels.flatten()
    boxes = object_boxes(labels, int(labels.max(initial=0)))
    _fill_all(flat, np.array(labels.shape, np.int64), boxes)
    return flat.reshape(labels.shape)


@_jit
def _fill_all(flat: Any, shape: Any, boxes: Any) -> None:
    for i in range(boxes.shape[0]):
        if boxes[i, 0, 0] < boxes[i, 1, 0]:
            _fill_object(flat, shape, boxes[i], i + 1)


@_jit
def _fill_object(flat: Any, shape: Any, box: Any, label: int) -> None:
    """Flood the object's box from its margin; what stays dry and is background is filled."""
    sides = box[1] - box[0] + 2
    steps = flat_steps(sides)
    volume = steps[0] * sides[0]
    is_closed = np.zeros(volume, np.bool_)  # to the flood: the object, and what is wet already
    for i in box_pixels(flat, shape, box, label)[1]:
        is_closed[i] = True
    stack = np.empty(volume, np.int64)
    stack[0] = 0
    is_closed[0] = True
    n_stacked = 1
    while n_stacked > 0:
        n_stacked -= 1
        here = stack[n_stacked]
        for step in steps:
            for i in (here - step, here + step):
                # A step over the end of a row lands in the margin again, which is all outside.
                if 0 <= i < volume and not is_closed[i]:
                    is_closed[i] = True
                    stack[n_stacked] = i
                    n_stacked += 1
    where, local = box_pixels(flat, shape, box, 0)
    for k in range(where.size):
        if not is_closed[local[k]]:
            flat[where[k]] = label


def warm_up() -> None:
    """Compile every kernel, or load it from numba's cache: once, before workers start."""
    labels = np.zeros((16, 16), np.int32)
    labels[2:14, 2:14] = 1
    labels[8, 8] = 0
    flows = label_flows(labels)
    compute_masks(flows, labels.astype(np.float32), min_size=1)
