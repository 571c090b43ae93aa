"""The flow of labelled objects: heat that diffuses from each object's centre.

Arrays in, arrays out. Each object diffuses within its own box and for a time set by that box, so its
flow is the same wherever it lies, and objects run on as many cores as there are.

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
from .objects import BATCH, box_pixels, flat_steps, object_boxes

__all__ = ["SINGLE_ROUNDS", "flow_errors", "label_flows", "object_centres", "sum_errors"]

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float32]
Boxes = npt.NDArray[np.int64]

SINGLE_ROUNDS = 256
"""Up to so many rounds the heat of flow errors is in single precision, which takes half the time. In larger objects
there may be too little of it for that: along a thread of one pixel it falls to an eighth from pixel to pixel."""

_jit = nb.njit(cache=True, nogil=True)


def label_flows(labels: IntArray) -> FloatArray:
    """Unit flow of every labelled pixel toward the centre of its object.

    Heat is added at the object's centre and diffuses inside it; the flow is the direction of the
    gradient of the heat. Each object diffuses for twice the sum of its box's sides.

    Parameters
    ----------
    labels : array of integers, shape (*spatial)
        Labels 1..n, 0 background; not every one need occur.

    Returns
    -------
    flows : array of float32, shape (ndim, *spatial)
        Unit vectors inside objects, 0 outside.
    """
    n_labels = int(labels.max(initial=0))
    flows = np.zeros((labels.ndim, *labels.shape), np.float32)
    boxes = object_boxes(labels, n_labels)
    flat = np.ascontiguousarray(labels).reshape(-1)
    _all_object_flows(flat, np.array(labels.shape, np.int64), boxes, flows.reshape(labels.ndim, -1))
    return flows


@_jit
def _all_object_flows(flat: Any, shape: Any, boxes: Any, flows: Any) -> None:
    ndim = shape.size
    for i in range(boxes.shape[0]):
        if boxes[i, 0, 0] >= boxes[i, 1, 0]:
            continue
        where, values = _object_flow(flat, shape, boxes[i], i + 1, 0)
        for k in range(where.size):
            for axis in range(ndim):
                flows[axis, where[k]] = values[axis, k]


def flow_errors(
    labels: npt.NDArray[np.int32], flows: FloatArray, boxes: Boxes | None = None, cores: Cores = ALONE
) -> npt.NDArray[np.float64]:
    """How far the flow of each object's shape is from the network's.

    Parameters
    ----------
    labels : array of int32, shape (*spatial)
        Labels 1..n, 0 background.
    flows : array of float32, shape (ndim, *spatial)
        The network's flow, about unit length.
    boxes : array of int64, shape (n, 2, ndim), optional
        Of :func:`tiledseg.objects.object_boxes`; a label whose box is empty is passed over.
    cores : Cores
        To share the work.

    Returns
    -------
    errors : array of float64, shape (n,)
        Squared length of the difference to :func:`label_flows`, mean over the object's pixels, but for
        rounding: the heat of most objects is in single precision here. 0 for a label that is passed over.
    """
    if boxes is None:
        boxes = object_boxes(labels, int(labels.max(initial=0)))
    errors = np.zeros(len(boxes), np.float64)
    flat_flows = np.ascontiguousarray(flows, np.float32).reshape(labels.ndim, -1)
    flat_flows.flags.writeable = False  # else numba would compile once more for callers' read-only arrays
    flat, shape = np.ascontiguousarray(labels).reshape(-1), np.array(labels.shape, np.int64)

    def measure(first: int) -> None:
        _errors_of(flat, shape, boxes, flat_flows, first, errors)

    cores.run(measure, range(0, len(boxes), BATCH))
    return errors


@_jit
def _errors_of(flat: Any, shape: Any, boxes: Any, flows: Any, first: int, errors: Any) -> None:
    """Flow errors of a batch of objects, summed over their pixels in raster order."""
    for i in range(first, min(first + BATCH, boxes.shape[0])):
        if boxes[i, 0, 0] >= boxes[i, 1, 0]:
            continue
        where, values = _object_flow(flat, shape, boxes[i], i + 1, SINGLE_ROUNDS)
        squares = np.empty((where.size, shape.size), np.float64)
        for axis in range(shape.size):
            own, given = values[axis], flows[axis]
            for k in range(where.size):
                # Unsigned: numba would look at each index whether it counts from the end.
                difference = np.float64(own[k]) - np.float64(given[np.uint64(where[k])])
                squares[k, axis] = difference * difference
        total = 0.0
        for square in squares.reshape(-1):
            total += square
        errors[i] = total / where.size


def object_centres(labels: npt.NDArray[np.int32], boxes: Boxes) -> npt.NDArray[np.int64]:
    """Where heat is added to each object.

    Parameters
    ----------
    labels, boxes
        As for :func:`flow_errors`.

    Returns
    -------
    centres : array of int64, shape (n,)
        Flat index of the pixel nearest to the mean position, -1 for a label whose box is empty.
    """
    centres = np.full(len(boxes), -1, np.int64)
    _all_centres(np.ascontiguousarray(labels).reshape(-1), np.array(labels.shape, np.int64), boxes, centres)
    return centres


@_jit
def _all_centres(flat: Any, shape: Any, boxes: Any, centres: Any) -> None:
    for i in range(boxes.shape[0]):
        if boxes[i, 0, 0] < boxes[i, 1, 0]:
            sides = boxes[i, 1] - boxes[i, 0] + 2
            where, local = box_pixels(flat, shape, boxes[i], i + 1)
            centres[i] = where[np.searchsorted(local, _centre(local, flat_steps(sides), sides))]


def sum_errors(
    flat: npt.NDArray[np.int32],
    pixels: npt.NDArray[np.int64],
    values: FloatArray,
    flows: FloatArray,
    n_labels: int,
) -> npt.NDArray[np.float64]:
    """Flow errors from the flow of the objects' shapes.

    Parameters
    ----------
    flat : array of int32, shape (n_image,)
        Labels, flattened.
    pixels : array of int64, shape (n,)
        Flat indices of pixels of objects, ascending.
    values : array of float32, shape (ndim, n)
        Flow of the shapes at those pixels.
    flows : array of float32, shape (ndim, *spatial)
        The network's flow.
    n_labels : int
        Largest label.

    Returns
    -------
    errors : array of float64, shape (n_labels,)
        As of :func:`flow_errors`.
    """
    totals, counts = np.zeros(n_labels, np.float64), np.zeros(n_labels, np.int64)
    _add_errors(flat, pixels, values, np.ascontiguousarray(flows, np.float32).reshape(len(values), -1), totals, counts)
    return totals / np.maximum(counts, 1)


@_jit
def _add_errors(flat: Any, pixels: Any, values: Any, flows: Any, totals: Any, counts: Any) -> None:
    for k in range(pixels.size):
        label = flat[pixels[k]]
        counts[label - 1] += 1
        for axis in range(values.shape[0]):
            difference = np.float64(values[axis, k]) - np.float64(flows[axis, pixels[k]])
            totals[label - 1] += difference * difference


@_jit
def _object_flow(flat: Any, shape: Any, box: Any, label: int, single_rounds: int) -> Any:
    """Pixels of one object (flat indices into the image) and the unit flow at each.

    Up to so many rounds its heat is in single precision.
    """
    ndim = shape.size
    sides = box[1] - box[0] + 2
    steps = flat_steps(sides)
    where, local = box_pixels(flat, shape, box, label)
    centre, n_iter, volume = _centre(local, steps, sides), 2 * (sides.sum() - ndim), steps[0] * sides[0]
    units = np.empty((ndim, volume), np.float32)
    if n_iter <= single_rounds:
        _unit_slopes(_diffuse(np.zeros((4, volume), np.float32), local, steps, centre, n_iter), local, steps, units)
    else:
        _unit_slopes(_diffuse(np.zeros((4, volume), np.float64), local, steps, centre, n_iter), local, steps, units)
    values = np.empty((ndim, where.size), np.float32)
    for axis in range(ndim):
        for k in range(where.size):
            values[axis, k] = units[axis, local[k]]
    return where, values


@_jit
def _unit_slopes(heat: Any, local: Any, steps: Any, units: Any) -> None:
    """The direction in which heat rises; in double precision, whichever the heat is in.

    From the first pixel of the object to the last, as one long row: see `_diffuse`.
    """
    first, n = local[0], local[-1] + 1 - local[0]
    norm = np.zeros(n, np.float64)
    for step in steps:
        before, behind = heat[first - step :], heat[first + step :]
        for k in range(n):
            slope = np.float64(behind[k]) - np.float64(before[k])
            norm[k] += slope * slope
    for k in range(n):
        norm[k] = np.sqrt(norm[k]) + 1e-60
    for axis in range(steps.size):
        before, behind, out = heat[first - steps[axis] :], heat[first + steps[axis] :], units[axis, first:]
        for k in range(n):
            out[k] = (np.float64(behind[k]) - np.float64(before[k])) / norm[k]


@_jit
def _centre(local: Any, steps: Any, sides: Any) -> int:
    """The pixel nearest to the mean position, the first in raster order if tied.

    Positions are whole numbers: their sums are exact. They are worked out for every row, not for every pixel, since
    divisions take as long as all else.
    """
    last, ndim = sides[-1], steps.size
    at, total = np.empty(ndim, np.int64), np.zeros(ndim, np.int64)
    start, stop = 0, 0
    for i in local:
        if i >= stop:
            start = i - i % last
            stop = start + last
            _position(start, steps, sides, at)
        for axis in range(ndim - 1):
            total[axis] += at[axis]
        total[ndim - 1] += i - start - 1
    mean = total / local.size
    centre, best, before, stop = 0, np.inf, 0.0, 0
    for i in local:
        if i >= stop:
            start = i - i % last
            stop = start + last
            _position(start, steps, sides, at)
            before = 0.0
            for axis in range(ndim - 1):
                before += (at[axis] - mean[axis]) ** 2
        distance = before + (i - start - 1 - mean[ndim - 1]) ** 2
        if distance < best:
            best = distance
            centre = i
    return centre


@_jit
def _position(start: int, steps: Any, sides: Any, at: Any) -> None:
    """Where a row of a box begins, without the margin of 1."""
    for axis in range(steps.size):
        at[axis] = start // steps[axis] % sides[axis] - 1


@_jit
def _diffuse(room: Any, local: Any, steps: Any, centre: int, n_iter: int) -> Any:
    """Heat after `n_iter` rounds of adding 1 at the centre and averaging over neighbours.

    The whole box is averaged as one long row, with a weight of 0 outside the object: that is more
    arithmetic than visiting the object's pixels, and faster, for it becomes vector instructions. `room` are four such
    rows of zeros, in the precision to compute in.
    """
    ndim = steps.size
    heat, after, weights, sums = room[0], room[1], room[2], room[3]
    n_neighbours = 9 if ndim == 2 else 2 * ndim + 1
    for i in local:
        weights[i] = 1.0 / n_neighbours
    first, n = local[0], local[-1] + 1 - local[0]
    for _ in range(n_iter):
        heat[centre] += 1.0
        if ndim == 2:
            _average_9(heat, after, weights, first, n, steps[0], sums)
        else:
            _average_faces(heat, after, weights, first, n, steps, sums)
        heat, after = after, heat
    return heat


@_jit
def _average_9(heat: Any, after: Any, weights: Any, first: int, n: int, row: int, sums: Any) -> None:
    """Weighted sum over the 3 x 3 pixels round each of `n`: of columns first, then of three columns."""
    above, here, below = heat[first - 1 - row :], heat[first - 1 :], heat[first - 1 + row :]
    for k in range(n + 2):
        sums[k] = above[k] + here[k] + below[k]
    out, weight = after[first:], weights[first:]
    middle, right = sums[1:], sums[2:]
    for k in range(n):
        out[k] = (sums[k] + middle[k] + right[k]) * weight[k]


@_jit
def _average_faces(heat: Any, after: Any, weights: Any, first: int, n: int, steps: Any, sums: Any) -> None:
    """Weighted sum over each of `n` pixels and its neighbours across faces, one axis after the other."""
    here = heat[first:]
    for k in range(n):
        sums[k] = here[k]
    for step in steps:
        before, behind = heat[first - step :], heat[first + step :]
        for k in range(n):
            sums[k] += before[k] + behind[k]
    out, weight = after[first:], weights[first:]
    for k in range(n):
        out[k] = sums[k] * weight[k]
