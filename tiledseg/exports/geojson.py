"""Outlines as GeoJSON (RFC 7946), as QuPath reads it: a feature per object, one line each, written as they come.

QuPath wants pixels of the full-size image, also where a part or a coarser level of it was segmented, plane and time
point in the geometry, and what is measured under ``measurements``.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from .polygons import Corners, MultiPolygon, polygons_of
from .result import Result

__all__ = ["write_geojson"]

logger = logging.getLogger(__name__)


def write_geojson(result: Result, path: Path) -> None:
    """Write the outlines of all objects.

    Parameters
    ----------
    result : Result
    path : Path
        Of the file; what is there is replaced.

    Raises
    ------
    OutputError
        As :func:`polygons.polygons_of`.
    """
    if result.placement is None:
        logger.warning(
            "labels %r do not say which part of the image they cover, as those of earlier versions do not: outlines "
            "are written as if it were all of it.",
            result.name,
        )
    axes = result.labels.axes
    is_first, placement = True, dict(zip(axes, result.placement or ((0.0, 1.0),) * len(axes), strict=True))
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for rows, shapes in polygons_of(result):
            for row, shape in zip(rows.to_pylist(), shapes, strict=True):
                file.write("\n" if is_first else ",\n")
                file.write(json.dumps(_feature(row, shape, placement), separators=(",", ":"), allow_nan=False))
                is_first = False
        file.write("\n]}\n")


def _feature(row: dict[str, Any], shape: MultiPolygon, placement: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """An object as QuPath knows it: a detection, named by its label."""
    coordinates: list[Any] = [[_in_image(ring, placement) for ring in polygon] for polygon in shape]
    geometry: dict[str, Any] = {"type": "MultiPolygon", "coordinates": coordinates}
    if len(coordinates) == 1:
        geometry = {"type": "Polygon", "coordinates": coordinates[0]}
    if "t" in row or "z" in row:
        geometry["plane"] = {"c": -1, **{axis: _plane(row, axis, placement) for axis in "zt"}}
    measured = {
        name: value
        for name, value in row.items()
        if name not in ("t", "z")
        and not name.startswith("bbox_")
        and isinstance(value, int | float)
        and math.isfinite(value)
    }
    properties = {"objectType": "detection", "name": str(row["label"]), "measurements": measured}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def _plane(row: dict[str, Any], axis: str, placement: dict[str, tuple[float, float]]) -> int:
    """Index of an object's plane or time point in the full-size image; 0 if there is no such axis."""
    if axis not in row:
        return 0
    start, width = placement[axis]
    index: int = math.floor(start + width * (row[axis] + 0.5))
    return index


def _in_image(ring: Corners, placement: dict[str, tuple[float, float]]) -> list[list[float]]:
    """Corners (x, y) in pixels of the full-size image; whole numbers where its pixels are those of the labels."""
    start, width = np.array([placement["x"], placement["y"]]).T
    corners = start + width * ring
    whole = corners.astype(np.int64)
    corners_as_list: list[list[float]] = (whole if (whole == corners).all() else corners).tolist()
    return corners_as_list
