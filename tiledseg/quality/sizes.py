"""Sizes and places of objects, region by region, in memory that grows only with the objects on borders of regions.

An object within one region is counted there at once; of the others the parts travel, and are put together when
the image has been gone through. What is kept of the objects is how many there are of each size, in the whole and in
each square of a coarse grid, so quartiles are good to a hundredth and medians of squares to a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..grid import Index, Region
from ..objects import object_extents

__all__ = ["EXAMPLES", "Found", "Maps", "Parts", "Sizes", "count_sizes", "map_side"]

FINE = 32
"""Kinds of size from one size to twice that."""
OCTAVES = 40
BARS = 8
"""Bars of a histogram from one size to twice that."""
COARSE = 4
MAP_SIDE = 128
LEAST_SIDE = 16
PER_SQUARE = 8
"""Objects that a square of the maps has on average, at least, where there are any: else squares are put together."""
EXAMPLES = 3

Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Found:
    """Objects as rows: pixels, then first pixel and one past the last per axis."""

    rows: Int64

    @property
    def sizes(self) -> Int64:
        """Pixels."""
        return self.rows[:, 0]

    def centres(self) -> Int64:
        """Middle of the box, per axis."""
        ndim = self.rows.shape[1] // 2
        return (self.rows[:, 1 : 1 + ndim] + self.rows[:, 1 + ndim :] - 1) // 2


@dataclass(frozen=True)
class Parts:
    """What one region tells of the objects in it.

    Attributes
    ----------
    n_objects, n_pixels, n_at_border : int
        Of the objects that lie within it; pixels of all, also of the others.
    largest_id : int
    kinds : array of int64, shape (n, 3)
        Square of the map, kind of size, and how many objects are of both.
    smallest, largest : array of int64, shape (up to 3, 1 + 2 * ndim)
        The objects at either end, see `Found`.
    ids, open : array of int64, shape (n,) and (n, 1 + 2 * ndim)
        Objects that may go on in other regions.
    """

    n_objects: int
    n_pixels: int
    n_at_border: int
    largest_id: int
    kinds: Int64
    smallest: Int64
    largest: Int64
    ids: Int64
    open: Int64


def map_side(shape: Index) -> int:
    """Pixels of a square of the maps along y and x."""
    return max(LEAST_SIDE, -(-max(shape[-2:]) // MAP_SIDE))


def count_sizes(labels: Labels, ids: Int64, region: Region, shape: Index) -> Parts:
    """Measure the objects in one region.

    Parameters
    ----------
    labels : array of int32, shape (*spatial)
        Labels 1..n of the region alone.
    ids : array of int64, shape (n,)
        What they are called; one that does not occur is passed over.
    region : tuple of slice
        Where it lies.
    shape : tuple of int
        Pixels of the image.

    Returns
    -------
    parts : Parts
    """
    boxes, sizes = object_extents(labels, ids.size)
    is_there = sizes > 0
    boxes = boxes[is_there] + [part.start for part in region]
    rows = np.column_stack([sizes[is_there], boxes[:, 0], boxes[:, 1]])
    goes_on = np.zeros(len(rows), np.bool_)
    for axis, (part, n) in enumerate(zip(region, shape, strict=True)):
        goes_on |= (boxes[:, 0, axis] == part.start) & (part.start > 0)
        goes_on |= (boxes[:, 1, axis] == part.stop) & (part.stop < n)
    whole, known = Found(rows[~goes_on]), ids[is_there]
    order = np.argsort(whole.sizes, kind="stable")
    return Parts(
        len(whole.rows),
        int(rows[:, 0].sum()),
        _n_at_border(whole, shape),
        int(known.max(initial=0)),
        _kinds(whole, shape),
        whole.rows[order[:EXAMPLES]],
        whole.rows[order[::-1][:EXAMPLES]],
        known[goes_on],
        rows[goes_on],
    )


def _n_at_border(found: Found, shape: Index) -> int:
    """Objects that touch an end of the image; an axis of length 1 has none."""
    ndim = len(shape)
    is_long = np.array(shape) > 1
    touches = (found.rows[:, 1 : 1 + ndim] == 0) | (found.rows[:, 1 + ndim :] == np.array(shape))
    return int((touches & is_long).any(axis=1).sum())


def _kinds(found: Found, shape: Index) -> Int64:
    """How many objects there are of each square and kind of size."""
    side = map_side(shape)
    squares = found.centres()[:, -2:] // side
    kinds = np.minimum(np.log2(np.maximum(found.sizes, 1)) * FINE, OCTAVES * FINE - 1).astype(np.int64)
    square = squares[:, 0] * -(-shape[-1] // side) + squares[:, 1]
    codes, counts = np.unique(square * (OCTAVES * FINE) + kinds, return_counts=True)
    rows: Int64 = np.column_stack([*np.divmod(codes, OCTAVES * FINE), counts])
    return rows


@dataclass(frozen=True)
class Maps:
    """Objects in squares of the image, of all planes and time points together; row by row.

    Attributes
    ----------
    side : int
        Pixels of a square.
    counts : array of int64, shape (y, x)
    medians : array of float64, shape (y, x)
        Pixels of the object in the middle, NaN where there is none.
    area : array of float64, shape (y, x)
        Pixels of each square that lie in the image.
    """

    side: int
    counts: Int64
    medians: Floats
    area: Floats


class Sizes:
    """Objects of an image and their sizes, added up region by region.

    Parameters
    ----------
    shape : tuple of int
        Pixels of one image: of a frame, if there are several.
    """

    def __init__(self, shape: Index) -> None:
        self.shape = shape
        side = map_side(shape)
        self._squares = (-(-shape[-2] // side), -(-shape[-1] // side))
        self._per_square = np.zeros((math.prod(self._squares), OCTAVES * FINE // COARSE), np.int32)
        self._kinds = np.zeros(OCTAVES * FINE, np.int64)
        self._open: dict[Index, list[tuple[Int64, Int64]]] = {}
        width = 1 + 2 * len(shape)
        self._ends: dict[str, list[tuple[Index, Int64]]] = {"smallest": [], "largest": []}
        self._no_rows = np.zeros((0, width), np.int64)
        self.n_objects = self.n_pixels = self.n_at_border = self.largest_id = 0

    def add(self, parts: Parts, frame: Index = ()) -> None:
        """Take in what one region of a frame has."""
        self.n_objects += parts.n_objects
        self.n_pixels += parts.n_pixels
        self.n_at_border += parts.n_at_border
        self.largest_id = max(self.largest_id, parts.largest_id)
        np.add.at(self._kinds, parts.kinds[:, 1], parts.kinds[:, 2])
        np.add.at(self._per_square, (parts.kinds[:, 0], parts.kinds[:, 1] // COARSE), parts.kinds[:, 2])
        self._keep_ends(frame, parts.smallest, parts.largest)
        if parts.ids.size:
            self._open.setdefault(frame, []).append((parts.ids, parts.open))

    def close(self, frame: Index = ()) -> None:
        """Put together the objects of a frame that lie in several regions: all its regions are in."""
        pieces = self._open.pop(frame, [])
        if not pieces:
            return
        ids, rows = (np.concatenate(column) for column in zip(*pieces, strict=True))
        order = np.argsort(ids, kind="stable")
        _, starts = np.unique(ids[order], return_index=True)
        rows, ndim = rows[order], len(self.shape)
        folds = [(np.add, 0, 1), (np.minimum, 1, 1 + ndim), (np.maximum, 1 + ndim, 1 + 2 * ndim)]
        found = Found(np.column_stack([fold.reduceat(rows[:, a:b], starts) for fold, a, b in folds]))
        by_size = np.argsort(found.sizes, kind="stable")
        ends = found.rows[by_size[:EXAMPLES]], found.rows[by_size[::-1][:EXAMPLES]]
        n, border = len(found.rows), _n_at_border(found, self.shape)
        nobody = np.zeros(0, np.int64)
        self.add(Parts(n, 0, border, 0, _kinds(found, self.shape), *ends, nobody, self._no_rows), frame)

    def _keep_ends(self, frame: Index, smallest: Int64, largest: Int64) -> None:
        """Remember the smallest and the largest."""
        for name, rows in (("smallest", smallest), ("largest", largest)):
            ends = self._ends[name]
            ends += [(frame, row) for row in rows]
            order = {"smallest": 1, "largest": -1}[name]
            ends.sort(key=lambda end: (order * int(end[1][0]), end[0], end[1].tolist()))
            del ends[EXAMPLES:]

    def smallest(self) -> Sequence[tuple[Index, Int64]]:
        """Frame and row of the smallest objects."""
        return self._ends["smallest"]

    def largest(self) -> Sequence[tuple[Index, Int64]]:
        """Frame and row of the largest objects."""
        return self._ends["largest"]

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Pixels that a share of the objects does not exceed."""
        up_to = np.concatenate([[0], np.cumsum(self._kinds)])
        at = np.interp(np.array(shares) * up_to[-1], *_strictly_rising(up_to))
        return [float(2 ** (value / FINE)) for value in at]

    def n_between(self, low: float, high: float) -> int:
        """Objects of `low` pixels to less than `high`, by kinds of size."""
        kinds = 2 ** ((np.arange(self._kinds.size) + 0.5) / FINE)
        return int(self._kinds[(kinds >= low) & (kinds < high)].sum())

    def histogram(self, power: float) -> tuple[Int64, Floats]:
        """How many objects there are of each kind of size, and the ends of the kinds: pixels to the given power."""
        used = np.flatnonzero(self._kinds)
        if not used.size:
            return np.zeros(0, np.int64), np.zeros(1)
        step = FINE // BARS
        first, last = used[0] // step * step, -(-(used[-1] + 1) // step) * step
        counts = self._kinds[first:last].reshape(-1, step).sum(axis=1)
        return counts, 2 ** (np.arange(first, last + 1, step) / FINE * power)

    def maps(self) -> Maps:
        """Objects in squares, put together until there are enough in each for a median."""
        side = map_side(self.shape)
        counts = self._per_square.reshape(*self._squares, -1)
        while min(counts.shape[:2]) > 1 or max(counts.shape[:2]) > 2:
            per_square = counts.sum(axis=2)
            if per_square.sum() >= PER_SQUARE * max(1, int(np.count_nonzero(per_square))):
                break
            counts = _halved(counts)
            side *= 2
        rows, columns = (np.diff(np.minimum(np.arange(n // side + 2) * side, n)) for n in self.shape[-2:])
        rows, columns = rows[: counts.shape[0]], columns[: counts.shape[1]]
        area = (rows[:, None] * columns).astype(np.float64)
        return Maps(side, counts.sum(axis=2).astype(np.int64), _medians(counts), area)


def _strictly_rising(up_to: Int64) -> tuple[Int64, Int64]:
    """Points of a cumulative count between which it rises."""
    rises = np.flatnonzero(np.diff(up_to))
    if not rises.size:
        return np.array([0]), np.array([0])
    at = np.unique(np.concatenate([rises, rises + 1]))
    return up_to[at], at


def _halved(counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Two by two squares put together."""
    padded = np.pad(counts, [(0, counts.shape[0] % 2), (0, counts.shape[1] % 2), (0, 0)])
    halved: npt.NDArray[np.int32] = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2, -1).sum(
        axis=(1, 3), dtype=np.int32
    )
    return halved


def _medians(counts: npt.NDArray[np.int32]) -> Floats:
    """Median size in each square, by where in its kind the object in the middle lies."""
    up_to = np.cumsum(counts, axis=2)
    half = up_to[..., -1:] / 2
    kind = np.minimum((up_to < half).sum(axis=2), counts.shape[2] - 1)
    n = np.take_along_axis(counts, kind[..., None], 2)[..., 0]
    before = np.take_along_axis(up_to, kind[..., None], 2)[..., 0] - n
    within = (half[..., 0] - before) / np.maximum(n, 1)
    return np.where(up_to[..., -1] > 0, 2 ** ((kind + within) * COARSE / FINE), np.nan)
