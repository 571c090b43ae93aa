"""Polygons of all objects of a result, region after region: what GeoJSON and GeoParquet are written from.

Memory holds a region with its objects, whatever their number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OutputError
from ..grid import region_shape
from ..objects_at import windows_of
from ..regions import region_sides, regions_of
from .outlines import Rings, trace
from .result import Result

__all__ = ["Corners", "MultiPolygon", "Polygon", "check_flat", "polygons_of"]

LARGEST_BOX = 2**26
"""Pixels of the box of an object that is outlined, which takes 11 bytes for each and those of the labels."""

Corners = npt.NDArray[np.int64]
Polygon = list[Corners]
"""The outer ring, then those of holes; each an array of (x, y) whose last corner is the first again."""
MultiPolygon = list[Polygon]


def check_flat(axes: str, name: str) -> None:
    """Refuse outlines of objects in three dimensions.

    Parameters
    ----------
    axes : str
        Along which objects extend.
    name : str
        Of the labels, for the message.

    Raises
    ------
    OutputError
        If objects extend over planes.
    """
    if axes != "yx":
        raise OutputError(
            f"polygons are outlines in a plane, and the objects of {name!r} extend over planes; leave them out, or "
            "take the table and the labels."
        )


def polygons_of(result: Result) -> Iterator[tuple[Any, list[MultiPolygon]]]:
    """Outlines of all objects along the edges of their pixels.

    Parameters
    ----------
    result : Result

    Yields
    ------
    rows : pyarrow.Table
        Rows of the object table.
    shapes : list of MultiPolygon
        One for each row: its parts, in pixels of the labels, whose upper left corner is (0, 0).

    Raises
    ------
    OutputError
        If objects extend over planes, or the box of one is too large to be looked at.
    """
    table, level = result.table, result.labels.levels[0]
    check_flat(table.object_axes, result.name)
    for region in regions_of(level.shape, region_sides(level.chunks, level.shape)):
        rows = table.starting_in(region)
        boxes, ids = table.boxes_of(rows), rows["label"].to_numpy()
        shapes: list[MultiPolygon] = [[] for _ in range(rows.num_rows)]
        for window in windows_of(region, boxes):
            if math.prod(region_shape(window.region)) > LARGEST_BOX and window.which.size == 1:
                raise OutputError(
                    f"the box of object {ids[window.which[0]]} has more than {LARGEST_BOX:,} pixels, too many to "
                    "outline it; leave polygons out, or drop such objects with --max-size."
                )
            pixels = result.labels.read(0, window.region)
            corner = np.array([part.start for part in window.region])
            frames = boxes[window.which, 0, :-2] - corner[:-2]
            for frame in np.unique(frames, axis=0):
                of_frame = window.which[(frames == frame).all(axis=1)]
                inner = boxes[of_frame][:, :, -2:] - corner[-2:]
                picture = pixels[tuple(frame)]
                rings = trace(picture, ids[of_frame], inner)
                for i, shape in zip(of_frame, _shapes_of(rings, picture, ids[of_frame], inner), strict=True):
                    shapes[i] = [[ring + corner[:-3:-1] for ring in polygon] for polygon in shape]
        if rows.num_rows:
            yield rows, shapes


def _shapes_of(
    rings: Rings, labels: npt.NDArray[Any], ids: npt.NDArray[Any], boxes: npt.NDArray[np.int64]
) -> Iterator[MultiPolygon]:
    """Polygons of each object: outer rings with the holes in them."""
    bounds = np.searchsorted(rings.objects, np.arange(ids.size + 1))
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        closed = [_closed(rings.corners[rings.starts[k] : rings.starts[k + 1]]) for k in range(first, last)]
        is_outer = rings.is_outer[first:last]
        outer, holes = np.flatnonzero(is_outer), np.flatnonzero(~is_outer)
        shape = [[closed[k]] for k in outer]
        parts = np.zeros(last - first, np.int64)
        if holes.size and outer.size > 1:
            (top, left), (bottom, right) = boxes[i]
            own = labels[top:bottom, left:right] == ids[i]
            parts = _parts_at(own, rings.pixels[first:last] - boxes[i, 0])
        part_of = {int(parts[k]): polygon for k, polygon in zip(outer, shape, strict=True)}
        for k in holes:
            part_of[int(parts[k])].append(closed[k])
        yield shape


def _closed(corners: Corners) -> Corners:
    """A ring that ends where it begins."""
    return np.concatenate([corners, corners[:1]])


def _parts_at(own: npt.NDArray[np.bool_], pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Which connected part of an object each of some of its pixels lies in."""
    from scipy.ndimage import label

    parts: npt.NDArray[np.int64] = label(own)[0][tuple(pixels.T)]
    return parts
