"""One pass over the labels: sizes and straight edges of every region, on whatever workers there are.

Reads
    The labels, region by region; for straight edges with a margin, so that objects are seen whole.
Writes
    Nothing.
Parallel over
    Regions of whole chunks. What a task hands back grows with the objects in its region, what is kept here with the
    objects on borders of regions (some 100 bytes each) and the lines of the image, see `EdgeJudge`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cluster import Executor
from ..frames import label_axes
from ..grid import Index, Region, region_text, shift
from ..meters import metered
from .edges import Edge, EdgeCounts, EdgeJudge, count_edges, segment_sides
from .sizes import Parts, Sizes, count_sizes
from .subject import Subject

__all__ = ["Labelled", "look_at", "process_block", "region_sides"]

PIXELS = {2: 2**22, 3: 2**23}
"""Of a region, by axes of objects; with its margin up to twice as many. A task takes some 40 bytes each."""
MARGIN = {2: 64, 3: 16}
"""Pixels: objects that are larger may be taken for smaller ones with straight edges, if they lie on a border."""

Listener = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Labelled:
    """What the pass found.

    Attributes
    ----------
    sizes : Sizes
        Of all frames.
    edges : tuple of (tuple of int, Edge)
        Frame and straight edge, the least likely first.
    """

    sizes: Sizes
    edges: tuple[tuple[Index, Edge], ...]


def region_sides(chunks: Index, shape: Index) -> Index:
    """Sides of the regions: whole chunks, more of them along the shortest side first while there is room."""
    sides = [min(c, n) for c, n in zip(chunks, shape, strict=True)]
    most = PIXELS[len(shape)]
    while math.prod(sides) > most:
        longest = sides.index(max(sides))
        sides[longest] = -(-sides[longest] // 2)
    while True:
        can_grow = [i for i, n in enumerate(shape) if sides[i] < n and 2 * math.prod(sides) <= most]
        if not can_grow:
            return tuple(sides)
        shortest = min(can_grow, key=lambda i: sides[i])
        sides[shortest] *= 2


@metered("look")
def process_block(
    labels: npt.NDArray[Any], core: Region, origin: Index, shape: Index
) -> tuple[Parts, list[EdgeCounts]]:
    """Sizes and straight edges of one region.

    Parameters
    ----------
    labels : array of integers, shape (*spatial)
        With a margin, clipped at the image.
    core : tuple of slice
        The region, within `labels`.
    origin : tuple of int
        Position of `labels` in the image.
    shape : tuple of int
        Pixels of the image.

    Returns
    -------
    parts : Parts
    counts : list of EdgeCounts
        Per axis.
    """
    local, ids = _numbered(labels)
    counts = count_edges(local, ids.size, core, origin, segment_sides(shape))
    region = tuple(slice(p.start + o, p.stop + o) for p, o in zip(core, origin, strict=True))
    return count_sizes(np.ascontiguousarray(local[core]), ids, region, shape), counts


def _numbered(labels: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Labels 1..n in place of ids, and the ids: by runs of equal pixels, of which there are few."""
    flat = np.ascontiguousarray(labels).reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ids, numbers = np.unique(flat[starts], return_inverse=True)
    has_background = ids.size > 0 and ids[0] == 0
    numbers = numbers.astype(np.int32) + np.int32(0 if has_background else 1)
    local: Any = np.repeat(numbers, np.diff(starts, append=flat.size))
    return local.reshape(labels.shape), ids[1 if has_background else 0 :].astype(np.int64)


def look_at_region(item: tuple[Index, Index], subject: Subject) -> tuple[Parts, list[EdgeCounts]]:
    """Task: one region of one frame."""
    frame, start = item
    shape = subject.object_shape
    core = _region(subject, start)
    margin = MARGIN[len(shape)]
    padded = tuple(slice(max(0, p.start - margin), min(n, p.stop + margin)) for p, n in zip(core, shape, strict=True))
    origin = tuple(p.start for p in padded)
    return process_block(subject.read(frame, padded), shift(core, origin), origin, shape)


def _sides(subject: Subject) -> Index:
    """Of the regions of the labels."""
    labels = subject.labels
    chunks = [labels.levels[0].chunks[labels.axes.index(axis)] for axis in subject.object_axes]
    return region_sides(tuple(chunks), subject.object_shape)


def _region(subject: Subject, start: Index) -> Region:
    """The region that starts somewhere."""
    parts = zip(start, _sides(subject), subject.object_shape, strict=True)
    return tuple(slice(a, min(a + side, n)) for a, side, n in parts)


def _starts(subject: Subject) -> list[range]:
    """Where regions start, along each axis of objects."""
    return [range(0, n, side) for n, side in zip(subject.object_shape, _sides(subject), strict=True)]


def n_regions(subject: Subject) -> int:
    """Regions of all frames."""
    return math.prod(len(of_axis) for of_axis in _starts(subject)) * math.prod(subject.shape[: subject.n_frames])


def look_at(subject: Subject, executor: Executor, progress: Listener | None = None) -> Labelled:
    """Go through the labels once.

    Parameters
    ----------
    subject : Subject
    executor : Executor
        Who works.
    progress : callable, optional
        Called with ``"look"``, regions done and all regions.

    Returns
    -------
    labelled : Labelled
    """
    shape, total = subject.object_shape, n_regions(subject)
    n_frames = math.prod(subject.shape[: subject.n_frames])
    per_frame = total // n_frames
    sizes, judges = Sizes(shape), dict[Index, EdgeJudge]()
    left, found = dict[Index, int](), list[tuple[Index, Edge]]()

    def items() -> Iterator[tuple[Index, Index]]:
        for frame in subject.frames:
            yield from ((frame, start) for start in itertools.product(*_starts(subject)))

    def where(item: tuple[Index, Index]) -> str:
        frame = tuple(slice(i, i + 1) for i in item[0])
        return f"region {region_text(label_axes(subject.labels), (*frame, *_region(subject, item[1])))}"

    alone = dataclasses.replace(subject, image=None)  # which may be an array of this process
    stream = executor.stream(look_at_region, items(), alone, name="look", where=where)
    for done, ((frame, _), (parts, counts)) in enumerate(stream, 1):
        if frame not in judges:
            judges[frame], left[frame] = EdgeJudge(shape, n_frames), per_frame
        sizes.add(parts, frame)
        judges[frame].add(counts)
        left[frame] -= 1
        if not left[frame]:
            sizes.close(frame)
            found += [(frame, edge) for edge in judges.pop(frame).found()]
        if progress is not None:
            progress("look", done, total)
    found.sort(key=lambda one: one[1].chance)
    return Labelled(sizes, tuple(found))
