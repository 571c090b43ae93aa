"""Outlines of labels along the edges of their pixels: arrays in, arrays out.

Pixel (y, x) covers the square from corner (y, x) to corner (y + 1, x + 1). Pixels of an object belong together where
they share an edge: parts that only touch at a corner are separate. Every ring is simple, it passes no corner twice;
rings may touch at corners. Drawing the rings again gives back exactly the pixels::

        (y, x) ──────► (y, x + 1)       the object lies to the right of every edge, seen along it: outer rings run
          ▲   pixel        │            clockwise on the screen (y down), with a positive area in (x, y), holes the
          │   (y, x)       ▼            other way round
        (y+1, x) ◄──── (y+1, x+1)

Strategy: every ring has an edge along the upper side of a pixel, so rings are found by a scan for such edges that no
ring has passed yet. Where two pixels of an object touch at a corner only, a ring may pass that corner twice; the part
in between is then cut off as a ring of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["Rings", "trace"]

_jit = nb.njit(cache=True, nogil=True)

_N_FACTS = 5
_FIRST_CORNERS = 4096
_FIRST_RINGS = 256


@dataclass(frozen=True)
class Rings:
    """Outlines of some objects.

    Attributes
    ----------
    corners : array of int64, shape (n_corners, 2)
        Position (x, y) of the corners of all rings, ring after ring; the first is not repeated at the end.
    starts : array of int64, shape (n_rings + 1,)
        Where each ring begins among the corners, and where the last one ends.
    objects : array of int64, shape (n_rings,)
        Which of the objects a ring belongs to, ascending.
    is_outer : array of bool, shape (n_rings,)
        False for holes.
    pixels : array of int64, shape (n_rings, 2)
        Index (y, x) of a pixel of the object along the ring.
    """

    corners: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    objects: npt.NDArray[np.int64]
    is_outer: npt.NDArray[np.bool_]
    pixels: npt.NDArray[np.int64]


def trace(labels: npt.NDArray[np.integer[Any]], ids: npt.NDArray[Any], boxes: npt.NDArray[np.int64]) -> Rings:
    """Outline some objects of a picture.

    Parameters
    ----------
    labels : array of integers, shape (y, x)
    ids : array of integers, shape (n,)
        Labels of the objects.
    boxes : array of int64, shape (n, 2, 2)
        First and one-past-last index per axis of a box that holds each of them.

    Returns
    -------
    rings : Rings
        In pixels of `labels`.
    """
    corners, facts = _trace(labels, ids.astype(np.int64), boxes)
    starts = np.append(facts[:, 1], len(corners))
    return Rings(corners, starts, facts[:, 0], facts[:, 4] > 0, facts[:, 2:4])


@_jit
def _trace(labels: Any, ids: Any, boxes: Any) -> Any:
    """Corners of all rings; and per ring the object, its first corner, a pixel, and twice the area."""
    corners = np.empty((_FIRST_CORNERS, 2), np.int64)
    facts = np.empty((_FIRST_RINGS, _N_FACTS), np.int64)
    counts = np.zeros(2, np.int64)
    for i in range(ids.size):
        box = boxes[i]
        height, width = box[1, 0] - box[0, 0], box[1, 1] - box[0, 1]
        own = np.zeros((height + 2, width + 2), np.bool_)  # with a margin, so that no neighbour is outside
        for y in range(height):
            for x in range(width):
                own[y + 1, x + 1] = labels[box[0, 0] + y, box[0, 1] + x] == ids[i]
        is_passed = np.zeros((height, width), np.bool_)
        place = np.full((height + 1, width + 1), -1, np.int32)
        for y in range(height):
            for x in range(width):
                if own[y + 1, x + 1] and not own[y, x + 1] and not is_passed[y, x]:
                    path = _walk(own, is_passed, y, x)
                    corners, facts = _cut(path, place, i, box[0], corners, facts, counts)
    return corners[: counts[0]], facts[: counts[1]]


@_jit
def _walk(own: Any, is_passed: Any, y: int, x: int) -> Any:
    """Corners passed on the way along an outline that begins with the upper side of a pixel."""
    path = np.empty((16, 2), np.int64)
    path[0, 0], path[0, 1] = y, x
    n = 1
    at_y, at_x, heading = y, x, 0
    while True:
        if heading == 0:
            is_passed[at_y, at_x] = True
            at_x += 1
        elif heading == 1:
            at_y += 1
        elif heading == 2:
            at_x -= 1
        else:
            at_y -= 1
        # The two pixels ahead, right and left of the way; `own` has a margin of 1.
        right = own[at_y + (heading < 2), at_x + (heading == 0 or heading == 3)]
        left = own[at_y + (heading == 1 or heading == 2), at_x + (heading < 2)]
        turned = heading
        if not right:
            turned = (heading + 1) % 4
        elif left:
            turned = (heading + 3) % 4
        if at_y == y and at_x == x and turned == 0:
            return path[:n]
        if turned != heading:
            if n == len(path):
                path = np.concatenate((path, np.empty_like(path)))
            path[n, 0], path[n, 1] = at_y, at_x
            n += 1
        heading = turned


@_jit
def _cut(path: Any, place: Any, i: int, origin: Any, corners: Any, facts: Any, counts: Any) -> Any:
    """Store a path as rings, none of which passes a corner twice."""
    kept = np.empty_like(path)
    n = 0
    for k in range(len(path)):
        y, x = path[k]
        first = place[y, x]
        if first >= 0:
            corners, facts = _store(kept[first:n], i, origin, corners, facts, counts)
            for passed in kept[first + 1 : n]:
                place[passed[0], passed[1]] = -1
            n = first + 1
        else:
            place[y, x] = n
            kept[n] = path[k]
            n += 1
    for passed in kept[:n]:
        place[passed[0], passed[1]] = -1
    return _store(kept[:n], i, origin, corners, facts, counts)


@_jit
def _store(ring: Any, i: int, origin: Any, corners: Any, facts: Any, counts: Any) -> Any:
    """Append a ring to all rings."""
    n_corners, n_rings = counts
    while n_corners + len(ring) > len(corners):
        corners = np.concatenate((corners, np.empty_like(corners)))
    if n_rings == len(facts):
        facts = np.concatenate((facts, np.empty_like(facts)))
    for k in range(len(ring)):
        corners[n_corners + k, 0] = ring[k, 1] + origin[1]
        corners[n_corners + k, 1] = ring[k, 0] + origin[0]
    doubled_area = 0
    for k in range(len(ring)):
        after = ring[k + 1 if k + 1 < len(ring) else 0]
        doubled_area += ring[k, 1] * after[0] - after[1] * ring[k, 0]
    # The pixel to the right of the first edge.
    down, along = ring[1, 0] - ring[0, 0], ring[1, 1] - ring[0, 1]
    facts[n_rings, 0], facts[n_rings, 1] = i, n_corners
    facts[n_rings, 2] = origin[0] + ring[0, 0] - (1 if along < 0 or down < 0 else 0)
    facts[n_rings, 3] = origin[1] + ring[0, 1] - (1 if along < 0 or down > 0 else 0)
    facts[n_rings, 4] = doubled_area
    counts[0], counts[1] = n_corners + len(ring), n_rings + 1
    return corners, facts
