"""Which objects of successive planes belong together: what makes a volume of pictures.

Arrays in, arrays out. The rule is that of Cellpose's ``stitch3D``: of every object the best partner in the next plane
counts, and of several that have the same best partner the one that overlaps it most. It looks at the planes of two
objects and what touches them there, so blocks that see these whole agree.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from .seams import is_best, overlap_ious

__all__ = ["link_planes"]

Labels = npt.NDArray[np.uint32]
Pairs = npt.NDArray[np.uint32]


def link_planes(labels: Labels, min_iou: float, gap: int = 0) -> Pairs:
    """Link the objects of each plane to those of the next.

    Parameters
    ----------
    labels : array of uint32, shape (z, y, x)
        Each label in one plane only, 0 background.
    min_iou : float
        Intersection over union needed, in (0, 1].
    gap : int
        1 to link also over a plane, objects that have no partner in it; 0 not to.

    Returns
    -------
    pairs : array of uint32, shape (n_pairs, 2)
        Labels that are the same cell in two planes, the lower plane first.
    """
    found = [np.zeros((0, 2), np.uint32)]
    for below, above in itertools.pairwise(labels):
        found.append(_best(*overlap_ious(below, above), min_iou))
    if gap:
        # Decided after all planes: only what has no partner in the plane between may look beyond it.
        has_next, has_previous = (
            _marked(labels, np.concatenate([pairs[:, side] for pairs in found])) for side in (0, 1)
        )
        for below, above in zip(labels[:-2], labels[2:], strict=True):
            pairs, ious = overlap_ious(below, above)
            is_open = ~has_next[pairs[:, 0]] & ~has_previous[pairs[:, 1]]
            found.append(_best(pairs[is_open], ious[is_open], min_iou))
    return np.concatenate(found)


def _marked(labels: Labels, which: Labels) -> npt.NDArray[np.bool_]:
    """For every label whether it is among some."""
    is_marked = np.zeros(int(labels.max(initial=0)) + 1, np.bool_)
    is_marked[which] = True
    return is_marked


def _best(pairs: Pairs, ious: npt.NDArray[np.float64], min_iou: float) -> Pairs:
    """Of overlapping objects those that are each other's choice."""
    is_enough = ious >= min_iou
    pairs, ious = pairs[is_enough], ious[is_enough]
    for chooser in (0, 1):
        is_chosen = is_best(pairs[:, chooser], pairs[:, 1 - chooser], ious)
        pairs, ious = pairs[is_chosen], ious[is_chosen]
    return pairs
