"""Regions of the published labels: the units of work of publishing, and of all that is made from the result.

A region consists of whole chunks, or of one whole shard, so that no file is ever written by two tasks.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from .grid import Index, Region
from .job import Job
from .omezarr import level_array

__all__ = ["REGION", "level_of", "parts_of", "region_sides", "regions_of"]

REGION = 2048


def region_sides(chunks: Index, shape: Index) -> Index:
    """Sides of the regions: whole chunks, more of them from the last axis on while there are at most 2**22 pixels.

    Parameters
    ----------
    chunks, shape : tuple of int
        Pixels of a chunk and of the array per axis.
    """
    sides = list(chunks)
    for axis in reversed(range(len(sides))):
        while sides[axis] < shape[axis] and sides[axis] < REGION and 2 * math.prod(sides) <= REGION**2:
            sides[axis] *= 2
    return tuple(sides)


def regions_of(shape: Index, sides: Index) -> list[Region]:
    """All regions of these sides, in C order; the last ones along an axis may be smaller."""
    return parts_of(tuple(slice(0, n) for n in shape), sides)


def parts_of(region: Region, sides: Index) -> list[Region]:
    """A region in parts of these sides, in C order; the last ones along an axis may be smaller."""
    starts = itertools.product(*(range(p.start, p.stop, side) for p, side in zip(region, sides, strict=True)))
    return [
        tuple(slice(a, min(a + side, p.stop)) for a, side, p in zip(start, sides, region, strict=True))
        for start in starts
    ]


def level_of(job: Job, level: int) -> tuple[Any, list[Region], Index]:
    """A level of the published labels.

    Parameters
    ----------
    job : Job
    level : int
        0 is full size.

    Returns
    -------
    array : zarr or numpy array
    regions : list of tuple of slice
        Each written by one task.
    sides : tuple of int
        Of the parts that a task works on at a time; a shard has several.
    """
    if job.plan is None:
        labels = job.store.open(f"{job.labels}/published")
        shape = labels.shape
        sides = region_sides((*(1,) * (len(shape) - 2), *(min(n, REGION) for n in shape[-2:])), shape)
        return labels, regions_of(shape, sides), sides
    array = level_array(job.plan, level)
    sides = region_sides(array.chunks, array.shape)
    return array, regions_of(array.shape, array.shards or sides), sides
