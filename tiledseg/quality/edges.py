"""Straight edges: a judge of seams that sees the labels alone and knows nothing of blocks.

Where labels were made block by block and not stitched, or badly, objects end at the borders of blocks: a piece of a
cell has a straight edge there that is about as long as the piece is wide, and many of them lie in one line.

Strategy, in three steps.

1. *Straight edges of single objects.* A line is the space between two rows (columns, planes) of pixels. The faces that
   an object has on a line are counted, and compared with the object's own box: an edge is straight if it has at least
   `STRAIGHT` of the object's extent along the line (in a volume: the square root of its share of the box). The
   top of a round cell of diameter d has sqrt(2 / d) of it, 0.3 for d = 24; a piece that was cut off has all of it. So
   no size of cells is assumed, and labels that were followed by hand or upsampled are only a higher background.
2. *Background.* Lines are divided into segments, and straight edges counted for each. What is expected is what
   the lines up to `AROUND` pixels away have in the same segment, drawn to the mean of the image where that
   is little, and never less than what one in twenty of those lines exceeds: labels on a coarser grid put all edges on
   every k-th line, which is no seam. With a Gamma distribution for the rate, the chance of so many edges or more on a
   line is that of a negative binomial distribution.
3. *Lines.* Segments are put together to ones of twice, four times ... the length, half over each other, up to the
   whole line, for blocks are finite and weak seams need a long line to show. Reported is what has at most a chance of
   `CHANCE` to occur anywhere among all segments looked at (Bonferroni), the least likely first; what lies within
   one that was reported is not reported again.

Limits: cells that truly lie in a row (spots printed on a grid, fields put side by side) are found as well, for they are
straight edges; a block border at which objects were removed, not cut, is not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..grid import Index, Region
from ..objects import object_extents

__all__ = ["Edge", "EdgeCounts", "EdgeJudge", "count_edges", "period_of", "segment_sides"]

STRAIGHT = 0.7
"""Least share of an object's extent that an edge of it has to be straight."""
FEWEST_FACES = {2: 5, 3: 12}
"""Pixels that a straight edge has, by axes of the labels."""
AT_ENDS = 3
"""Lines at either end of the image that are not judged: of objects there only the first pixels may be seen, and
annotations often stop a pixel early."""
FEWEST = 3
"""Straight edges that make a line."""
CHANCE = 0.01
"""That anything at all is reported of labels without seams."""
AROUND, BESIDE = 64, 2
"""Lines on either side that are compared with, and those next to one that are not."""
USUAL = 0.95
"""Share of the lines around that have no more straight edges than are taken for usual."""
PRIOR_LINES = 50.0
"""As many lines with the mean of the image are added to those around."""
PRIOR_EDGES = 0.5
"""And so many edges: where there were none at all, two are no surprise."""
MOST = 0.6
"""Share of the lines that follow a period."""
SIDES = {2: 128, 3: 64}
MOST_SEGMENTS = 10_000_000
AT_ONCE = 4096

Int64 = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Edge:
    """A line, or part of one, on which more objects end than by chance.

    Attributes
    ----------
    axis : int
        Across which it lies.
    position : int
        First pixel after the line along that axis.
    region : tuple of slice
        What of the line it is: along `axis` the two pixels on either side, along the others the segment.
    n_straight : int
        Objects with a straight edge there.
    n_expected : float
        As many as expected, of what is around.
    n_crossing : int
        Objects that extend over the line.
    chance : float
        Of so many edges anywhere in the labels, 1 at most.
    """

    axis: int
    position: int
    region: Region
    n_straight: int
    n_expected: float
    n_crossing: int
    chance: float

    @property
    def share(self) -> float:
        """Of the objects at the line, those that end there."""
        return self.n_straight / (self.n_straight + self.n_crossing)


@dataclass(frozen=True)
class EdgeCounts:
    """What one region adds to the counts across one axis; lines and segments are those of the whole image.

    Attributes
    ----------
    edges : array of int64, shape (n, ndim + 1)
        Line, segment along every other axis, and straight edges there.
    crossing : array of int64, shape (n_objects, ndim + 1)
        First line that an object extends over, one past the last, and its segment along every other axis.
    """

    edges: Int64
    crossing: Int64


def segment_sides(shape: Index) -> Index:
    """Pixels of a segment along each axis: as many for all, and more where an image would have too many segments."""
    side = SIDES[len(shape)]

    def n_segments(side: int) -> int:
        return max(n * math.prod(-(-m // side) for j, m in enumerate(shape) if j != i) for i, n in enumerate(shape))

    while n_segments(side) > MOST_SEGMENTS:
        side *= 2
    return (side,) * len(shape)


def count_edges(labels: Labels, n_labels: int, core: Region, origin: Index, sides: Index) -> list[EdgeCounts]:
    """Count straight edges in one region.

    Parameters
    ----------
    labels : array of int32, shape (*spatial)
        Labels 1..n_labels of the region with a margin that shows the objects at its border whole.
    n_labels : int
    core : tuple of slice
        The region, within `labels`. What begins in it is counted.
    origin : tuple of int
        Position of `labels` in the image.
    sides : tuple of int
        From `segment_sides`.

    Returns
    -------
    counts : list of EdgeCounts
        Per axis.
    """
    boxes, _ = object_extents(labels, n_labels)
    return [_across(labels, boxes, core, origin, sides, axis) for axis in range(labels.ndim)]


def _across(labels: Labels, boxes: Int64, core: Region, origin: Index, sides: Index, axis: int) -> EdgeCounts:
    """Straight edges, and objects that extend over lines, across one axis."""
    others = [i for i in range(labels.ndim) if i != axis]
    # There is no margin at the ends of the image, and only there.
    first = core[axis].start or 1 + AT_ENDS
    last = core[axis].stop - (AT_ENDS if core[axis].stop == labels.shape[axis] else 0)
    if first >= last:
        nothing = np.zeros((0, labels.ndim + 1), np.int64)
        return EdgeCounts(nothing, _crossing(boxes, core, origin, sides, axis))
    along = np.moveaxis(labels, axis, 0)
    below, above = along[first - 1 : last - 1], along[first:last]
    differs = below != above
    extents = boxes[:, 1, others] - boxes[:, 0, others]
    low, high = (_straight(side, differs, extents) for side in (below, above))
    # A cell that is cut has an edge on either side of the line and counts once.
    partners = below[tuple(high[:, :-1].T)]
    is_new = ~np.isin(high[:, 0] * (len(boxes) + 1) + partners, low[:, 0] * (len(boxes) + 1) + low[:, -1])
    places = np.concatenate([low, high[is_new]])[:, :-1]
    places += [first, *(0 for _ in others)]
    is_inside = np.ones(len(places), np.bool_)
    for column, i in enumerate(others, 1):
        is_inside &= (places[:, column] >= core[i].start) & (places[:, column] < core[i].stop)
    places = places[is_inside] + [origin[axis], *(origin[i] for i in others)]
    places[:, 1:] //= [sides[i] for i in others]
    edges, counts = np.unique(places, axis=0, return_counts=True)
    return EdgeCounts(np.column_stack([edges, counts]), _crossing(boxes, core, origin, sides, axis))


def _straight(side: Labels, differs: npt.NDArray[np.bool_], extents: Int64) -> Int64:
    """Straight edges of the objects on one side of each line: line, first pixel along the other axes, and label."""
    is_face = differs & (side > 0)
    at = np.flatnonzero(is_face)
    n_line, n_labels = math.prod(side.shape[1:]), len(extents)
    keys, firsts, counts = np.unique(
        (at // n_line) * (n_labels + 1) + side[is_face], return_index=True, return_counts=True
    )
    owners = keys % (n_labels + 1)
    share = (counts / extents[owners - 1].prod(axis=1)) ** (1 / extents.shape[1])
    is_straight = (share >= STRAIGHT) & (counts >= FEWEST_FACES[side.ndim])
    places = np.unravel_index(at[firsts[is_straight]], side.shape)
    return np.column_stack([*places, owners[is_straight]])


def _crossing(boxes: Int64, core: Region, origin: Index, sides: Index, axis: int) -> Int64:
    """The lines that each object with its centre in the region extends over."""
    boxes = boxes[boxes[:, 1, 0] > boxes[:, 0, 0]]
    centres = (boxes[:, 0] + boxes[:, 1] - 1) // 2
    is_here = np.ones(len(boxes), np.bool_)
    for i, part in enumerate(core):
        is_here &= (centres[:, i] >= part.start) & (centres[:, i] < part.stop)
    boxes, centres = boxes[is_here] + origin, centres[is_here] + origin
    others = [i for i in range(len(core)) if i != axis]
    segments = centres[:, others] // [sides[i] for i in others]
    rows: Int64 = np.column_stack([boxes[:, 0, axis] + 1, boxes[:, 1, axis], segments])
    return rows


class EdgeJudge:
    """Counts of one image, region by region, and what is found in them.

    Parameters
    ----------
    shape : tuple of int
        Pixels of the image: two or three axes.
    n_images : int
        Images that are judged together: the more, the less likely an edge must be to be reported.

    Notes
    -----
    Memory: 8 bytes for each line and segment of it, 80 MB an axis at most.
    """

    def __init__(self, shape: Index, n_images: int = 1) -> None:
        self.shape, self.sides = shape, segment_sides(shape)
        self._n_images = n_images
        counts = [-(-n // side) for n, side in zip(shape, self.sides, strict=True)]
        self._others = [[i for i in range(len(shape)) if i != axis] for axis in range(len(shape))]
        sizes = [(n + 1, *(counts[i] for i in others)) for n, others in zip(shape, self._others, strict=True)]
        self._edges = [np.zeros(size, np.int32) for size in sizes]
        self._crossing = [np.zeros(size, np.int32) for size in sizes]

    def add(self, counts: Sequence[EdgeCounts]) -> None:
        """Take in what one region has, see `count_edges`."""
        for of_axis, edges, crossing in zip(counts, self._edges, self._crossing, strict=True):
            np.add.at(edges, tuple(of_axis.edges[:, :-1].T), of_axis.edges[:, -1])
            start, stop, *segments = of_axis.crossing.T
            is_any = start < stop
            for at, n in ((start, 1), (stop, -1)):
                np.add.at(crossing, tuple(column[is_any] for column in (at, *segments)), n)

    def found(self) -> list[Edge]:
        """What is no chance, the least likely first."""
        scales = [list(_scales(edges.shape[1:])) for edges in self._edges]
        n_looked_at = self._n_images * sum(
            edges.shape[0] * math.prod(len(starts) for starts in self._starts(edges, scale))
            for edges, of_axis in zip(self._edges, scales, strict=True)
            for scale in of_axis
        )
        edges = [
            edge
            for axis in range(len(self.shape))
            for scale in scales[axis]
            for edge in self._of_scale(axis, scale, n_looked_at)
        ]
        return _without_repeats(sorted(edges, key=lambda e: (e.chance, -e.n_straight, e.axis, e.position)))

    @staticmethod
    def _starts(edges: npt.NDArray[Any], scale: Index) -> list[list[int]]:
        """First segments of those put together, along every other axis."""
        return [_halfway(n, k) for n, k in zip(edges.shape[1:], scale, strict=True)]

    def _of_scale(self, axis: int, scale: Index, n_looked_at: int) -> Iterator[Edge]:
        """What is no chance among segments of one length."""
        starts = self._starts(self._edges[axis], scale)
        sums = _put_together(self._edges[axis][:-1], scale, starts)
        crossing = _put_together(np.cumsum(self._crossing[axis][:-1], axis=0), scale, starts)
        n_lines, mean = sums.shape[0] - 1, float(sums[1:].mean()) if len(sums) > 1 else 0.0
        up_to = np.concatenate([np.zeros((1, *sums.shape[1:]), np.int64), np.cumsum(sums, axis=0)])
        where = np.argwhere(sums >= FEWEST)
        for first in range(0, len(where), AT_ONCE):
            places = where[first : first + AT_ONCE]
            expected, chances = _chances(sums, up_to, places, mean, n_lines)
            for place, rate, chance in zip(places, expected, chances * n_looked_at, strict=True):
                if chance <= CHANCE:
                    at, segments = int(place[0]), place[1:]
                    region = self._region(axis, at, scale, [of[i] for of, i in zip(starts, segments, strict=True)])
                    n, m = int(sums[tuple(place)]), int(crossing[tuple(place)])
                    yield Edge(axis, at, region, n, float(rate), m, float(chance))

    def _region(self, axis: int, at: int, scale: Index, starts: Sequence[int]) -> Region:
        """Pixels on either side of a line along some segments."""
        parts = {axis: slice(at - 1, at + 1)}
        for i, start, k in zip(self._others[axis], starts, scale, strict=True):
            parts[i] = slice(start * self.sides[i], min((start + k) * self.sides[i], self.shape[i]))
        return tuple(parts[i] for i in range(len(self.shape)))


def _scales(counts: Index) -> Iterator[Index]:
    """How many segments are put together along each axis: 1, 2, 4, ... and all."""
    for power in itertools.count():
        scale = tuple(min(2**power, n) for n in counts)
        yield scale
        if scale == counts:
            return


def _halfway(n: int, k: int) -> list[int]:
    """Starts of pieces of k out of n, half over each other, the last one at the end."""
    starts = list(range(0, n - k + 1, max(1, k // 2)))
    return starts if starts[-1] == n - k else [*starts, n - k]


def _put_together(counts: npt.NDArray[Any], scale: Index, starts: list[list[int]]) -> Int64:
    """Sums over pieces of some segments along each axis but the first."""
    sums: Int64 = counts.astype(np.int64)
    for axis, (k, firsts) in enumerate(zip(scale, starts, strict=True), 1):
        if k > 1:
            ends = np.cumsum(sums, axis=axis)
            ends = np.concatenate([np.zeros_like(ends.take([0], axis)), ends], axis=axis)
            low = np.array(firsts)
            sums = ends.take(low + k, axis) - ends.take(low, axis)
    return sums


def _chances(
    sums: Int64, up_to: Int64, places: Int64, mean: float, n_lines: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Edges expected at some places, and the chance of as many as there are, or more."""
    from scipy.special import betainc

    at, segments = places[:, 0], tuple(places[:, 1:].T)

    def between(low: Int64, high: Int64) -> tuple[Int64, Int64]:
        low, high = np.clip(low, 1, n_lines + 1), np.clip(high, 1, n_lines + 1)
        return up_to[(high, *segments)] - up_to[(low, *segments)], high - low

    around, n_around = between(at - AROUND, at + AROUND + 1)
    beside, n_beside = between(at - BESIDE, at + BESIDE + 1)
    exposure = n_around - n_beside + PRIOR_LINES
    rate = (around - beside + PRIOR_LINES * mean + PRIOR_EDGES) / exposure
    # At an end of the image as many lines, on the other side.
    lines = np.clip(at - AROUND, 1, max(1, n_lines - 2 * AROUND))[:, None] + np.arange(min(2 * AROUND + 1, n_lines))
    others = np.where(np.abs(lines - at[:, None]) > BESIDE, sums[(lines, *(s[:, None] for s in segments))], 0)
    rate = np.maximum(rate, np.quantile(others, USUAL, axis=1))
    n = sums[(at, *segments)]
    return rate, betainc(n, rate * exposure, 1 / (1 + exposure))


def _without_repeats(edges: list[Edge]) -> list[Edge]:
    """Edges, least likely first, that share no part of a line, or of the lines beside it, with one before."""
    kept: list[Edge] = []
    taken: dict[tuple[int, int], list[Region]] = {}
    for edge in edges:
        beside = range(edge.position - BESIDE, edge.position + BESIDE + 1)
        near = [region for line in beside for region in taken.get((edge.axis, line), ())]
        if not any(_overlap(edge, region) for region in near):
            kept.append(edge)
            taken.setdefault((edge.axis, edge.position), []).append(edge.region)
    return kept


def _overlap(edge: Edge, region: Region) -> bool:
    """Whether an edge lies along some of the same pixels as another across the same axis."""
    parts = [(p, q) for i, (p, q) in enumerate(zip(edge.region, region, strict=True)) if i != edge.axis]
    return all(p.start < q.stop and q.start < p.stop for p, q in parts)


def period_of(positions: Sequence[int]) -> int | None:
    """The distance from one line to the next, if most of at least three are multiples of it, as borders of blocks are.

    Parameters
    ----------
    positions : sequence of int
        Of lines across one axis.

    Returns
    -------
    period : int or None
        The largest distance between two that follow each other of which most positions are multiples, and of whose
        multiples at least every second one is there.
    """
    lines = np.unique(np.array(positions, np.int64))
    if lines.size < 3:
        return None
    for step in sorted({*np.diff(lines).tolist()}, reverse=True):
        n_fit = np.count_nonzero(lines % step == 0)
        if step > BESIDE and n_fit >= MOST * lines.size and n_fit >= lines[-1] // step / 2:
            return int(step)
    return None
