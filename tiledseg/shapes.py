"""The mean diameter of shapes that somebody drew round cells: in napari, ImageJ or QuPath."""

from __future__ import annotations

import csv
import json
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SettingsError

__all__ = ["diameter_of_layer", "diameter_of_shapes"]

Vertices = npt.NDArray[np.float64]

BOXES = {"rectangle", "ellipse"}
OUTLINES = {"polygon", "path"}
CORNERS = 4


def diameter_of_shapes(path: str | Path) -> tuple[float, int]:
    """Mean diameter of the shapes in a file.

    Parameters
    ----------
    path : path
        A CSV that napari saved of a shapes layer, an ImageJ ``.roi`` or ``.zip`` of them, or a GeoJSON of QuPath. All
        are in pixels of the full-size image.

    Returns
    -------
    diameter : float
        In pixels: of a box or ellipse the diameter of the circle that is as large as the ellipse in it, of an outline
        that of the circle of its area, of a line its length.
    n_shapes : int

    Raises
    ------
    SettingsError
        If the file cannot be read, holds no shapes, or one of them has no size.
    """
    path = Path(path)
    readers = {".csv": _napari, ".roi": _imagej, ".zip": _imagej, ".geojson": _qupath, ".json": _qupath}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SettingsError(
            f"{path} is no file of shapes; give a .csv of napari, a .roi or .zip of ImageJ, or a .geojson of QuPath."
        )
    if not path.is_file():
        raise SettingsError(f"there is no file {path} with shapes; check the path.")
    try:
        diameters = list(reader(path))
    except (OSError, ValueError, TypeError, LookupError, RecursionError, struct.error, zipfile.BadZipFile) as error:
        raise SettingsError(f"shapes cannot be read from {path} ({error}); save them again.") from error
    return _mean(diameters, str(path))


def diameter_of_layer(layer: Any) -> tuple[float, int]:
    """Mean diameter of a napari Shapes layer, as `diameter_of_shapes`; it is in pixels of the full-size image."""
    where = f"layer {layer.name!r}"
    kinds = layer.shape_type if isinstance(layer.shape_type, list) else [layer.shape_type] * len(layer.data)
    try:
        diameters = [_diameter(kind, np.asarray(shape, float)) for kind, shape in zip(kinds, layer.data, strict=True)]
    except ValueError as error:
        raise SettingsError(f"shapes cannot be read from {where} ({error}).") from error
    return _mean(diameters, where)


def _mean(diameters: list[float], where: str) -> tuple[float, int]:
    if not diameters:
        raise SettingsError(f"{where} holds no shapes; draw circles or boxes round some cells.")
    for number, diameter in enumerate(diameters, 1):
        if not (np.isfinite(diameter) and diameter > 0):
            raise SettingsError(
                f"shape {number} of {len(diameters)} of {where} has no size; remove it, or draw it round a cell."
            )
    return float(np.mean(diameters)), len(diameters)


def _diameter(kind: str, vertices: Vertices) -> float:
    """Diameter of one shape from its vertices; of vertices in more axes, the last two count."""
    vertices = vertices[:, -2:]
    if kind == "line":
        return float(np.hypot(*(vertices[1] - vertices[0])))
    if kind in BOXES:
        if len(vertices) != CORNERS:
            raise ValueError(f"a {kind} with {len(vertices)} corners instead of {CORNERS}")
        sides = np.hypot(*(vertices[1:3] - vertices[0:2]).T)
        return float(np.sqrt(sides[0] * sides[1]))
    if kind not in OUTLINES:
        raise ValueError(f"a shape of the kind {kind!r}; known are {', '.join(sorted(BOXES | OUTLINES | {'line'}))}")
    return 2 * float(np.sqrt(_area(vertices) / np.pi))


def _area(vertices: Vertices) -> float:
    """Area inside a closed outline."""
    first, second = (vertices - vertices.mean(axis=0)).T
    return abs(float(np.dot(first, np.roll(second, 1)) - np.dot(second, np.roll(first, 1)))) / 2


def _is_box(vertices: Vertices) -> bool:
    """Whether four vertices are the corners of a rectangle."""
    if len(vertices) != CORNERS:
        return False
    first, second = vertices[1] - vertices[0], vertices[2] - vertices[1]
    is_closed = np.allclose(vertices[0] + vertices[2], vertices[1] + vertices[3])
    return is_closed and abs(float(first @ second)) <= 1e-6 * float(np.hypot(*first) * np.hypot(*second))


def _napari(path: Path) -> Iterator[float]:
    """Shapes of a CSV: index, shape-type, vertex-index, axis-0, axis-1, ..."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    axes = sorted((name for name in rows[0] if name and name.startswith("axis-")), key=lambda name: int(name[5:]))
    if len(axes) < 2 or not {"index", "shape-type"} <= set(rows[0]):
        raise ValueError("it has no columns index, shape-type, axis-0 and axis-1, as napari saves shapes")
    shapes: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        shapes.setdefault(row["index"], []).append(row)
    for vertices in shapes.values():
        yield _diameter(vertices[0]["shape-type"], np.array([[float(row[axis]) for axis in axes] for row in vertices]))


def _imagej(path: Path) -> Iterator[float]:
    """Regions of interest of ImageJ."""
    try:
        from roifile import ROI_TYPE, roiread
    except ModuleNotFoundError as error:
        raise SettingsError(
            "regions of ImageJ need the package roifile; install it (pip install 'tiledseg[imagej]'), or save the "
            "shapes as a CSV in napari."
        ) from error
    found = roiread(path)
    boxes, outlines = {ROI_TYPE.RECT, ROI_TYPE.OVAL}, {ROI_TYPE.POLYGON, ROI_TYPE.FREEHAND, ROI_TYPE.TRACED}
    for roi in found if isinstance(found, list) else [found]:
        if roi.roitype in boxes:
            sides = np.array([roi.right - roi.left, roi.bottom - roi.top], np.float64)
            yield float(np.sqrt(sides.prod()))
        elif roi.roitype in outlines:
            yield _diameter("polygon", np.asarray(roi.coordinates(), np.float64))
        elif roi.roitype == ROI_TYPE.LINE:
            yield float(np.hypot(roi.x2 - roi.x1, roi.y2 - roi.y1))
        else:
            raise ValueError(f"a region of the kind {roi.roitype.name.lower()}; draw ovals or rectangles")


def _qupath(path: Path) -> Iterator[float]:
    """Annotations of QuPath: a list, a collection, or a single feature."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(document, dict):
        document = document.get("features", [document])
    for feature in document:
        yield from _geometry(feature["geometry"])


def _geometry(geometry: dict[str, Any]) -> Iterator[float]:
    """Diameters of a GeoJSON geometry: the outer outline of each polygon, the length of each line."""
    kind, coordinates = geometry["type"], geometry.get("coordinates", [])
    polygons: Iterable[Any]
    if kind == "LineString" and len(coordinates) == 2:
        yield _diameter("line", np.asarray(coordinates, np.float64))
        return
    if kind == "Polygon":
        polygons = [coordinates]
    elif kind == "MultiPolygon":
        polygons = coordinates
    else:
        raise ValueError(f"a shape of the kind {kind!r}; draw ellipses or rectangles")
    for rings in polygons:
        outline = np.asarray(rings[0], np.float64)
        outline = outline[:-1] if len(outline) > 1 and np.array_equal(outline[0], outline[-1]) else outline
        yield _diameter("rectangle" if _is_box(outline) else "polygon", outline)
