"""The flow of labelled objects: heat that diffuses from each object's centre.

Arrays in, arrays out. Each object diffuses within its own box and for a time set by that box, so its
flow is the same wherever it lies.

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

__all__ = ["box_pixels", "flat_steps", "label_flows", "object_boxes", "object_flow"]

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float32]

_jit = nb.njit(cache=True, nogil=True)


def object_boxes(labels: IntArray, n_labels: int) -> npt.NDArray[np.int64]:
    """Bounding box of every label.

    Parameters
    ----------
    labels : array of integers, shape (*spatial)
        Labels 1..n_labels, 0 background.
    n_labels : int
        Largest label.

    Returns
    -------
    boxes : array of int64, shape (n_labels, 2, ndim)
        First and one-past-last index per axis; ``start >= stop`` for a label that is absent.
    """
    ndim = labels.ndim
    boxes = np.empty((n_labels, 2, ndim), np.int64)
    boxes[:, 0] = np.iinfo(np.int64).max
    boxes[:, 1] = -1
    shape = np.array(labels.shape, np.int64)
    _grow_boxes(np.ascontiguousarray(labels).reshape(-1), shape, boxes)
    return boxes


@_jit
def _grow_boxes(flat: Any, shape: Any, boxes: Any) -> None:
    ndim = shape.size
    index = np.zeros(ndim, np.int64)
    for i in range(flat.size):
        label = flat[i]
        if label > 0:
            box = boxes[label - 1]
            for axis in range(ndim):
                if index[axis] < box[0, axis]:
                    box[0, axis] = index[axis]
                if index[axis] >= box[1, axis]:
                    box[1, axis] = index[axis] + 1
        for axis in range(ndim - 1, -1, -1):
            index[axis] += 1
            if index[axis] < shape[axis]:
                break
            index[axis] = 0


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
        where, values = object_flow(flat, shape, boxes[i], i + 1)
        for k in range(where.size):
            for axis in range(ndim):
                flows[axis, where[k]] = values[axis, k]


@_jit
def object_flow(flat: Any, shape: Any, box: Any, label: int) -> Any:
    """Pixels of one object (flat indices into the image) and the unit flow at each."""
    ndim = shape.size
    sides = box[1] - box[0] + 2
    steps = flat_steps(sides)
    where, local = box_pixels(flat, shape, box, label)
    heat = _diffuse(local, steps, steps[0] * sides[0], _centre(local, steps, sides), 2 * (sides.sum() - ndim))
    values = np.empty((ndim, where.size), np.float32)
    for k in range(where.size):
        norm = 0.0
        for axis in range(ndim):
            slope = heat[local[k] + steps[axis]] - heat[local[k] - steps[axis]]
            norm += slope * slope
        norm = np.sqrt(norm) + 1e-60
        for axis in range(ndim):
            slope = heat[local[k] + steps[axis]] - heat[local[k] - steps[axis]]
            values[axis, k] = slope / norm
    return where, values


@_jit
def flat_steps(sides: Any) -> Any:
    """Flat index step along each axis of an array in C order."""
    steps = np.ones(sides.size, np.int64)
    for axis in range(sides.size - 2, -1, -1):
        steps[axis] = steps[axis + 1] * sides[axis + 1]
    return steps


@_jit
def box_pixels(flat: Any, shape: Any, box: Any, label: int) -> Any:
    """Pixels of a box with one label: flat indices of the image, and of the box with a margin of 1."""
    ndim = shape.size
    sides = box[1] - box[0]
    image_steps = flat_steps(shape)
    steps = flat_steps(sides + 2)
    volume = 1
    for side in sides:
        volume *= side
    where = np.empty(volume, np.int64)
    local = np.empty(volume, np.int64)
    n_pixels = 0
    index = np.zeros(ndim, np.int64)
    for _ in range(volume // sides[-1]):
        at = np.sum((index + box[0]) * image_steps)
        in_box = np.sum((index + 1) * steps)
        for k in range(sides[-1]):
            if flat[at + k] == label:
                where[n_pixels] = at + k
                local[n_pixels] = in_box + k
                n_pixels += 1
        for axis in range(ndim - 2, -1, -1):
            index[axis] += 1
            if index[axis] < sides[axis]:
                break
            index[axis] = 0
    return where[:n_pixels], local[:n_pixels]


@_jit
def _centre(local: Any, steps: Any, sides: Any) -> int:
    """The pixel nearest to the mean position, the first in raster order if tied."""
    mean = np.zeros(steps.size, np.float64)
    for axis in range(steps.size):
        for i in local:
            mean[axis] += i // steps[axis] % sides[axis] - 1
    centre = 0
    best = np.inf
    for i in local:
        distance = 0.0
        for axis in range(steps.size):
            difference = (i // steps[axis] % sides[axis] - 1) - mean[axis] / local.size
            distance += difference * difference
        if distance < best:
            best = distance
            centre = i
    return centre


@_jit
def _diffuse(local: Any, steps: Any, volume: int, centre: int, n_iter: int) -> Any:
    """Heat after `n_iter` rounds of adding 1 at the centre and averaging over neighbours."""
    heat = np.zeros(volume, np.float64)
    after = np.zeros(volume, np.float64)
    # Runs of pixels along the last axis: the loop over one becomes vector instructions.
    starts, stops = _runs(local)
    for _ in range(n_iter):
        heat[centre] += 1.0
        for k in range(starts.size):
            if steps.size == 2:
                _average_9(heat, after, steps[0], starts[k], stops[k])
            else:
                _average_faces(heat, after, steps, starts[k], stops[k])
        heat, after = after, heat
    return heat


@_jit
def _runs(local: Any) -> Any:
    """First and one-past-last index of each run of consecutive indices."""
    is_start = np.ones(local.size, np.bool_)
    is_start[1:] = local[1:] != local[:-1] + 1
    starts = local[is_start]
    stops = np.append(local[np.flatnonzero(is_start)[1:] - 1], local[-1]) + 1
    return starts, stops


@_jit
def _average_9(heat: Any, after: Any, row: int, start: int, stop: int) -> None:
    """Mean over the 3 x 3 pixels round each of a run."""
    n = stop - start
    above = heat[start - row - 1 :]
    here = heat[start - 1 :]
    below = heat[start + row - 1 :]
    out = after[start:]
    for k in range(n):
        total_above = above[k] + above[k + 1] + above[k + 2]
        total_here = here[k] + here[k + 1] + here[k + 2]
        total_below = below[k] + below[k + 1] + below[k + 2]
        out[k] = (total_above + total_here + total_below) / 9.0


@_jit
def _average_faces(heat: Any, after: Any, steps: Any, start: int, stop: int) -> None:
    """Mean over each pixel of a run and its neighbours across faces."""
    for i in range(start, stop):
        total = heat[i]
        for step in steps:
            total += heat[i - step] + heat[i + step]
        after[i] = total / (2 * steps.size + 1)
