"""What is done to labelled objects one at a time: boxes, numbering, holes.

Arrays in, arrays out, over any number of axes: kernels work on flattened arrays with one index step
per axis.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from .cores import ALONE, Cores

__all__ = [
    "BATCH",
    "N_INTENSITIES",
    "box_pixels",
    "fill_holes",
    "first_pixels",
    "flat_steps",
    "look_up",
    "measure_objects",
    "object_boxes",
    "object_extents",
    "renumber",
]

IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int32]
Boxes = npt.NDArray[np.int64]

BATCH = 64
"""Objects that one core takes at a time."""
N_INTENSITIES = 5
"""Columns of a channel in what is measured: sum, number of values, sum of squared deviations, least, largest."""

_jit = nb.njit(cache=True, nogil=True)


@_jit
def flat_steps(sides: Any) -> Any:
    """Flat index step along each axis of an array in C order."""
    steps = np.ones(sides.size, np.int64)
    for axis in range(sides.size - 2, -1, -1):
        steps[axis] = steps[axis + 1] * sides[axis + 1]
    return steps


@_jit
def _to_next_row(index: Any, sides: Any) -> None:
    """Advance the index of a row in C order; its last axis stays as it is."""
    for axis in range(sides.size - 2, -1, -1):
        index[axis] += 1
        if index[axis] < sides[axis]:
            break
        index[axis] = 0


@_jit
def _run_end(flat: Any, start: int, stop: int) -> int:
    """One past the last index of the run of equal values that begins at `start`."""
    end = start + 1
    while end < stop and flat[end] == flat[start]:
        end += 1
    return end


def object_extents(labels: IntArray, n_labels: int) -> tuple[Boxes, npt.NDArray[np.int64]]:
    """Bounding box and size of every label, in one pass.

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
    sizes : array of int64, shape (n_labels,)
        Pixels.
    """
    boxes = np.empty((n_labels, 2, labels.ndim), np.int64)
    boxes[:, 0] = np.iinfo(np.int64).max
    boxes[:, 1] = -1
    sizes = np.zeros(n_labels, np.int64)
    shape = np.array(labels.shape, np.int64)
    _extents(np.ascontiguousarray(labels).reshape(-1), shape, boxes, sizes)
    return boxes, sizes


def object_boxes(labels: IntArray, n_labels: int) -> Boxes:
    """The boxes of :func:`object_extents` alone."""
    return object_extents(labels, n_labels)[0]


@_jit
def _extents(flat: Any, shape: Any, boxes: Any, sizes: Any) -> None:
    """Runs of one label along the last axis; background is passed over."""
    ndim = shape.size
    width = shape[ndim - 1]
    index = np.zeros(ndim, np.int64)
    for row in range(0, flat.size, max(width, 1)):
        k = 0
        while k < width:
            label, start = flat[row + k], k
            k = _run_end(flat, row + k, row + width) - row
            if label <= 0:
                continue
            sizes[label - 1] += k - start
            box = boxes[label - 1]
            for axis in range(ndim - 1):
                box[0, axis] = min(box[0, axis], index[axis])
                box[1, axis] = max(box[1, axis], index[axis] + 1)
            box[0, ndim - 1] = min(box[0, ndim - 1], start)
            box[1, ndim - 1] = max(box[1, ndim - 1], k)
        _to_next_row(index, shape)


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
    n_pixels = np.uint64(0)
    index = np.zeros(ndim, np.int64)
    for _ in range(volume // sides[-1]):
        at, in_box = 0, 0
        for axis in range(ndim):
            at += (index[axis] + box[0, axis]) * image_steps[axis]
            in_box += (index[axis] + 1) * steps[axis]
        for k in range(sides[-1]):
            # Written in any case, and kept if it is of the object: without a branch that cannot be foretold.
            where[n_pixels] = at + k
            local[n_pixels] = in_box + k
            n_pixels += np.uint64(flat[np.uint64(at + k)] == label)
        _to_next_row(index, sides)
    return where[:n_pixels], local[:n_pixels]


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
    result = np.empty(labels.size, np.int32)
    _renumber(np.ascontiguousarray(labels).reshape(-1), is_kept, result)
    return result.reshape(labels.shape)


@_jit
def _renumber(flat: Any, is_kept: Any, result: Any) -> None:
    numbers = np.zeros(is_kept.size + 1, np.int32)
    n_kept = 0
    for i in range(flat.size):
        label = flat[i]
        if label > 0 and is_kept[label - 1]:
            if numbers[label] == 0:
                n_kept += 1
                numbers[label] = n_kept
            result[i] = numbers[label]
        else:
            result[i] = 0


def look_up(table: IntArray, labels: IntArray) -> Any:
    """``table[labels]``, several times as fast.

    Parameters
    ----------
    table : array of int32 or uint32, shape (n + 1,)
    labels : array of int32 or uint32, shape (*spatial)
        Labels 0..n.

    Returns
    -------
    values : array of the dtype of `table`, shape (*spatial)

    Raises
    ------
    IndexError
        If there is a label above n.
    """
    values = np.empty(labels.shape, table.dtype)
    largest = _look_up(_flat(table), _flat(labels), _flat(values))
    if largest >= table.size:
        raise IndexError(f"label {largest} has no entry in a table of {table.size}")
    return values


@_jit
def _look_up(table: Any, flat: Any, values: Any) -> int:
    """The largest label, if it is found to be too large nothing is looked up any more."""
    for i in range(flat.size):
        if flat[i] >= table.size:
            return int(flat[i])
        values[i] = table[flat[i]]
    return -1


def first_pixels(labels: IntArray, n_labels: int) -> npt.NDArray[np.int64]:
    """Where each label occurs first.

    Parameters
    ----------
    labels : array of int32 or uint32, shape (*spatial)
        Labels 0..n.
    n_labels : int
        n.

    Returns
    -------
    first : array of int64, shape (n + 1,)
        Flat index of the first pixel in raster order of each label; -1 for those that do not occur, and for 0.
    """
    first = np.full(n_labels + 1, -1, np.int64)
    _first_pixels(_flat(labels), first)
    return first


@_jit
def _first_pixels(flat: Any, first: Any) -> None:
    for i in range(flat.size):
        if flat[i] > 0 and first[flat[i]] < 0:
            first[flat[i]] = i


def _flat(values: IntArray) -> npt.NDArray[np.uint32]:
    """In a row, for kernels that are compiled once; not negative."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint32)


def fill_holes(labels: Labels, cores: Cores = ALONE) -> Labels:
    """Give background that an object encloses to that object.

    Parameters
    ----------
    labels : array of int32, shape (*spatial)
        Labels 1..n in raster order of their first pixel, 0 background.
    cores : Cores
        To share the work.

    Returns
    -------
    labels : array of int32, shape (*spatial)
        The same with holes filled. A pixel is in a hole if every path over faces out of the
        object's box crosses the object. Pixels of other objects stay theirs; of several objects
        round a pixel the lowest label has it.
    """
    flat = labels.flatten()
    n_labels = int(labels.max(initial=0))
    boxes = object_boxes(labels, n_labels)
    shape = np.array(labels.shape, np.int64)

    def find(first: int) -> tuple[npt.NDArray[np.int64], Labels]:
        found: tuple[npt.NDArray[np.int64], Labels] = _holes_of(flat, shape, boxes, first)
        return found

    # Holes are found in the labels as given, and filled afterwards in the order of the labels.
    for where, owners in cores.run(find, range(0, n_labels, BATCH)):
        is_free = flat[where] == 0
        flat[where[is_free][::-1]] = owners[is_free][::-1]
    return flat.reshape(labels.shape)


@_jit
def _holes_of(flat: Any, shape: Any, boxes: Any, first: int) -> Any:
    """Enclosed background of a batch of objects, as flat indices, and the object round each."""
    all_where = [np.empty(0, np.int64)]
    all_owners = [np.empty(0, np.int32)]
    for i in range(first, min(first + BATCH, boxes.shape[0])):
        if boxes[i, 0, 0] < boxes[i, 1, 0] and _may_enclose(flat, shape, boxes[i], i + 1):
            where = _enclosed(flat, shape, boxes[i], i + 1)
            all_where.append(where)
            all_owners.append(np.full(where.size, i + 1, np.int32))
    n = 0
    for part in all_where:
        n += part.size
    where, owners = np.empty(n, np.int64), np.empty(n, np.int32)
    n = 0
    for k in range(len(all_where)):
        where[n : n + all_where[k].size] = all_where[k]
        owners[n : n + all_where[k].size] = all_owners[k]
        n += all_where[k].size
    return where, owners


@_jit
def _may_enclose(flat: Any, shape: Any, box: Any, label: int) -> bool:
    """Whether some background has the object on both sides along the last axis: most have none."""
    ndim = shape.size
    sides = box[1] - box[0]
    steps = flat_steps(shape)
    n_rows = 1
    for side in sides[:-1]:
        n_rows *= side
    index, one = np.zeros(ndim, np.int64), np.uint64(1)
    for _ in range(n_rows):
        at = 0
        for axis in range(ndim):
            at += (index[axis] + box[0, axis]) * steps[axis]
        first, stop = np.uint64(at), np.uint64(at + sides[-1])
        while first < stop and flat[first] != label:
            first += one
        while first < stop and flat[stop - one] != label:
            stop -= one
        n_between = 0
        for k in range(first, stop):
            n_between += flat[k] == 0
        if n_between:
            return True
        _to_next_row(index, sides)
    return False


@_jit
def _enclosed(flat: Any, shape: Any, box: Any, label: int) -> Any:
    """Flood the object's box from its margin; background that stays dry is enclosed."""
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
    n_dry = 0
    for k in range(where.size):
        if not is_closed[local[k]]:
            where[n_dry] = where[k]
            n_dry += 1
    return where[:n_dry]


def measure_objects(labels: IntArray, intensities: npt.NDArray[Any], ids: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Measure the objects of a region, in one pass over its pixels; sums, so that parts add up.

    Parameters
    ----------
    labels : array of integers, shape (*spatial)
        Labels 1..n, 0 background.
    intensities : array, shape (channels, *spatial)
        The image. Values that are not finite are left out.
    ids : array of integers, shape (n,)
        What the labels are called in the result.

    Returns
    -------
    measured : array of float64, shape (n, 2 + 3 * ndim + 5 * channels)
        Per label: id, pixels, sum of coordinates per axis, box start per axis, box stop per axis,
        then per channel of the finite values the sum, their number, the sum of squared deviations from their mean,
        the least and the largest; a label that is absent has 0 pixels.
    """
    ndim, n_channels = labels.ndim, len(intensities)
    measured = np.zeros((ids.size, 2 + 3 * ndim + N_INTENSITIES * n_channels), np.float64)
    measured[:, 0] = ids
    measured[:, 2 + ndim : 2 + 2 * ndim] = np.inf
    shape = np.array(labels.shape, np.int64)
    flat = np.ascontiguousarray(labels).reshape(-1)
    _measure_shapes(flat, shape, measured)
    for channel, values in enumerate(intensities):
        columns = measured[:, 2 + 3 * ndim + N_INTENSITIES * channel :]
        _measure_values(flat, np.array(values, np.float64).reshape(-1), columns)
    return measured


@_jit
def _measure_shapes(flat: Any, shape: Any, measured: Any) -> None:
    ndim = shape.size
    width = shape[ndim - 1]
    index = np.zeros(ndim, np.int64)
    for row in range(0, flat.size, max(width, 1)):
        k = 0
        while k < width:
            label, start = flat[row + k], k
            k = _run_end(flat, row + k, row + width) - row
            if label <= 0:
                continue
            n = k - start
            found = measured[label - 1]
            found[1] += n
            index[ndim - 1] = start
            for axis in range(ndim):
                found[2 + axis] += n * index[axis]
                found[2 + ndim + axis] = min(found[2 + ndim + axis], index[axis])
                found[2 + 2 * ndim + axis] = max(found[2 + 2 * ndim + axis], index[axis] + 1)
            found[1 + ndim] += n * (n - 1) // 2
            found[1 + 3 * ndim] = max(found[1 + 3 * ndim], k)
        index[ndim - 1] = 0
        _to_next_row(index, shape)


@_jit
def _measure_values(flat: Any, values: Any, columns: Any) -> None:
    # Deviations are taken from an object's first value: squares of the values themselves would lose what is small
    # beside a large mean.
    firsts, shifted = np.zeros(columns.shape[0]), np.zeros(columns.shape[0])
    for i in range(flat.size):
        label, value = flat[i] - 1, values[i]
        if label < 0 or not np.isfinite(value):
            continue
        found = columns[label]
        if found[1] == 0.0:
            firsts[label] = found[3] = found[4] = value
        off = value - firsts[label]
        shifted[label] += off
        found[0] += value
        found[1] += 1.0
        found[2] += off * off
        found[3] = min(found[3], value)
        found[4] = max(found[4], value)
    for label in range(columns.shape[0]):
        found = columns[label]
        if found[1] > 0.0:
            found[2] = max(0.0, found[2] - shifted[label] ** 2 / found[1])
        else:
            found[3], found[4] = np.inf, -np.inf
