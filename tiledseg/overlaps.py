"""Objects of two label arrays and how they overlap, streamed a fixed number of pixels at a time.

What is kept is one row per object and one per pair of objects that overlap, so memory grows with
neither the image nor the largest id.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import SettingsError

__all__ = ["Contents", "LabelArray", "LabelPair", "Objects", "read_contents"]

Int64 = npt.NDArray[np.int64]
Region = tuple[slice, ...]
Listener = Callable[[str, int, int], None]


class LabelArray(Protocol):
    """Anything with a shape and a dtype that gives pixels when sliced: NumPy, Zarr, Dask."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, region: Any, /) -> Any: ...


class LabelPair:
    """Two label arrays of one shape, read together a region at a time."""

    def __init__(self, predicted: LabelArray, truth: LabelArray) -> None:
        for name, array in (("predicted", predicted), ("truth", truth)):
            if np.dtype(array.dtype).kind not in "ui":
                raise SettingsError(f"{name} is an array of {array.dtype}; give labels, which are integers.")
        shapes = tuple(predicted.shape), tuple(truth.shape)
        self.ndim = min(map(len, shapes))
        extra = [shape[: len(shape) - self.ndim] for shape in shapes]
        short = [shape[len(shape) - self.ndim :] for shape in shapes]
        if self.ndim == 0 or short[0] != short[1] or set(extra[0] + extra[1]) - {1}:
            raise SettingsError(
                f"predicted has shape {shapes[0]} and truth {shapes[1]}; give two arrays of the same pixels."
            )
        self.shape = short[0]
        self._arrays = [(predicted, len(extra[0])), (truth, len(extra[1]))]

    def read(self, region: Region) -> list[npt.NDArray[Any]]:
        """Both arrays' pixels of a region."""
        return [np.asarray(array[(0,) * n_extra + region]) for array, n_extra in self._arrays]

    def regions(self, pixels_at_once: int, progress: Listener | None) -> Iterator[Region]:
        """Regions that partition the arrays, whole chunks where they fit."""
        piece = self._piece_shape(pixels_at_once)
        starts = [range(0, length, side) for length, side in zip(self.shape, piece, strict=True)]
        n_regions = int(np.prod([len(of_axis) for of_axis in starts]))
        for i, corner in enumerate(itertools.product(*starts)):
            ends = (min(at + side, n) for at, side, n in zip(corner, piece, self.shape, strict=True))
            yield tuple(itertools.starmap(slice, zip(corner, ends, strict=True)))
            if progress is not None:
                progress("compare", i + 1, n_regions)

    def _piece_shape(self, pixels_at_once: int) -> tuple[int, ...]:
        """Sides of a region: the larger chunks, halved until they fit, then grown from the last axis."""
        chunks = [_chunk_shape(array)[-self.ndim :] for array, _ in self._arrays]
        limits = [max(length, 1) for length in self.shape]
        sides = [min(max(pair), limit) for *pair, limit in zip(*chunks, limits, strict=True)]
        while int(np.prod(sides)) > pixels_at_once:
            longest = sides.index(max(sides))
            sides[longest] = (sides[longest] + 1) // 2
        for axis in reversed(range(self.ndim)):
            while sides[axis] < limits[axis] and 2 * int(np.prod(sides)) <= pixels_at_once:
                sides[axis] = min(2 * sides[axis], limits[axis])
        return tuple(sides)


def _chunk_shape(array: LabelArray) -> tuple[int, ...]:
    """Chunk sides of a Zarr or Dask array, 1s for one without chunks."""
    chunks = getattr(array, "chunks", None)
    if chunks is None:
        return (1,) * len(array.shape)
    return tuple(chunk if isinstance(chunk, int) else max(chunk, default=1) for chunk in chunks)


class _Table:
    """Rows of integers, keys first; rows of equal keys are folded into one, column by column."""

    def __init__(self, n_keys: int, folds: Sequence[np.ufunc]) -> None:
        self._n_keys = n_keys
        self._folds = folds
        self._rows = np.empty((0, n_keys + len(folds)), np.int64)
        self._waiting: list[Int64] = []

    def add(self, rows: Int64) -> None:
        """Take in rows."""
        self._waiting.append(self._folded(rows))
        # Merging only once as much waits as is there keeps the total work near linear.
        if sum(map(len, self._waiting)) > len(self._rows):
            self.rows()

    def rows(self) -> Int64:
        """All rows, sorted by key."""
        self._rows = self._folded(np.concatenate([self._rows, *self._waiting]))
        self._waiting = []
        return self._rows

    def _folded(self, rows: Int64) -> Int64:
        """Rows with unique keys, sorted by key."""
        rows = rows[np.lexsort(rows[:, : self._n_keys].T[::-1])]
        keys = rows[:, : self._n_keys]
        starts = np.flatnonzero(np.any(keys[1:] != keys[:-1], axis=1)) + 1
        starts = np.append(0, starts)[: len(rows)]
        folded = rows[starts]
        for column, fold in enumerate(self._folds, self._n_keys):
            folded[:, column] = fold.reduceat(rows[:, column], starts)
        return folded


@dataclass(frozen=True)
class Objects:
    """All objects of one array, by rising id."""

    ids: Int64
    sizes: Int64
    boxes: Int64  # (n, 2, n_spatial), first and last pixel; no axes if boxes were not asked for


@dataclass(frozen=True)
class Contents:
    """Objects of both arrays and their overlaps, which name an object by its place in the id array."""

    truth: Objects
    predicted: Objects
    pair_truth: Int64
    pair_predicted: Int64
    pair_sizes: Int64


def read_contents(
    pair: LabelPair, n_box_axes: int, pixels_at_once: int, progress: Listener | None
) -> tuple[Contents, int]:
    """Stream both arrays once into tables of objects and overlaps; also count differing pixels."""
    folds = [np.add] + [np.minimum] * n_box_axes + [np.maximum] * n_box_axes
    tables = _Table(1, folds), _Table(1, folds)
    pair_table = _Table(2, [np.add])
    n_different = 0
    for region in pair.regions(pixels_at_once, progress):
        predicted, truth = pair.read(region)
        n_different += int(np.count_nonzero(predicted != truth))
        runs = _runs(_as_ids(predicted, "predicted"), _as_ids(truth, "truth"), region)
        lengths, boxes = (
            runs[2],
            runs[3][:, :, pair.ndim - n_box_axes :].reshape(runs[2].size, 2 * n_box_axes),
        )
        for ids, table in zip(runs, tables, strict=False):
            table.add(np.column_stack([ids, lengths, boxes])[ids > 0])
        pair_table.add(np.column_stack([runs[1], runs[0], lengths])[(runs[0] > 0) & (runs[1] > 0)])
    predicted_objects, truth_objects = (
        Objects(rows[:, 0], rows[:, 1], rows[:, 2:].reshape(len(rows), 2, n_box_axes))
        for rows in (table.rows() for table in tables)
    )
    truth_ids, predicted_ids, sizes = pair_table.rows().T
    pair_truth = np.searchsorted(truth_objects.ids, truth_ids)
    pair_predicted = np.searchsorted(predicted_objects.ids, predicted_ids)
    return Contents(truth_objects, predicted_objects, pair_truth, pair_predicted, sizes), n_different


def _as_ids(values: npt.NDArray[Any], name: str) -> Int64:
    """Labels as int64, or an error if one is negative or too large for it."""
    ids = values.astype(np.int64, copy=False)
    if ids.min(initial=0) < 0:
        raise SettingsError(f"{name} holds ids below 0 or past {2**63 - 1}; give labels from 0 up.")
    return ids


def _runs(predicted: Int64, truth: Int64, region: Region) -> tuple[Int64, Int64, Int64, Int64]:
    """Runs of equal label pairs along the last axis: both labels, lengths and boxes (n, 2, ndim)."""
    is_start = np.ones(predicted.shape, np.bool_)
    is_start[..., 1:] = (predicted[..., 1:] != predicted[..., :-1]) | (truth[..., 1:] != truth[..., :-1])
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=predicted.size)
    predicted, truth = predicted.reshape(-1)[starts], truth.reshape(-1)[starts]
    is_object = (predicted > 0) | (truth > 0)
    starts, lengths = starts[is_object], lengths[is_object]
    offset = [of_axis.start for of_axis in region]
    first = np.column_stack(np.unravel_index(starts, is_start.shape)) + np.array(offset, np.int64)
    boxes = np.stack([first, first], axis=1)
    boxes[:, 1, -1] += lengths - 1
    return predicted[is_object], truth[is_object], lengths, boxes
