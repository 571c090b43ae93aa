"""What is made from a finished result for other programs: labels and table are read, nothing else is needed.

| what | for | module |
|---|---|---|
| GeoJSON | QuPath | `geojson` |
| GeoParquet | GeoPandas, DuckDB | `geoparquet` |
| CSV | spreadsheets | `text` |
| AnnData in Zarr | scanpy, squidpy | `annotated` |
| SpatialData | spatialdata | `spatial` |

All are written region after region, or batch after batch: memory does not grow with the number of objects.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ..disk import settle
from ..errors import OutputError
from ..store import disk_errors
from .annotated import write_anndata
from .geojson import write_geojson
from .geoparquet import write_geoparquet
from .polygons import check_flat
from .result import Result, open_result
from .spatial import write_spatialdata
from .text import write_csv

__all__ = ["BESIDE_TABLE", "WRITERS", "Result", "check_flat", "export", "open_result"]

WRITERS: dict[str, Callable[[Result, Path], None]] = {
    "geojson": write_geojson,
    "geoparquet": write_geoparquet,
    "csv": write_csv,
    "anndata": write_anndata,
    "spatialdata": write_spatialdata,
}
FOLDERS = ("anndata", "spatialdata")
"""What is no file; one that is there is not replaced."""
BESIDE_TABLE = {"geojson": "polygons.geojson", "geoparquet": "polygons.parquet"}
"""Names of files beside the table."""


def export(path: str | Path, targets: Mapping[str, str | Path], name: str | None = None) -> list[Path]:
    """Write a finished result in other forms.

    Parameters
    ----------
    path : path or address
        The OME-Zarr that `segment` put its labels in, or the labels themselves.
    targets : mapping of str to path
        Where to write, by kind: ``"geojson"``, ``"geoparquet"``, ``"csv"``, ``"anndata"``, ``"spatialdata"``. Each is
        there completely or not at all.
    name : str, optional
        Of the labels, if there are several.

    Returns
    -------
    paths : list of Path
        What was written.

    Raises
    ------
    ImageError
        If there is no such result.
    OutputError
        If it cannot be written there, or not in that form.
    """
    places = {kind: Path(place) for kind, place in targets.items()}
    for kind, place in places.items():
        if place.is_dir() or (kind in FOLDERS and place.exists()):
            raise OutputError(f"{place} is there already; give another place (--{kind}), or remove it first.")
    with open_result(path, name) as result:
        for kind, place in places.items():
            with disk_errors(place):
                place.absolute().parent.mkdir(parents=True, exist_ok=True)
                _write(kind, result, place.absolute())
    return list(places.values())


def _write(kind: str, result: Result, place: Path) -> None:
    """Write as a draft, and give it its name when it is complete."""
    draft = place.with_name(f"{place.name}.partial")
    if draft.is_dir():
        shutil.rmtree(draft)
    WRITERS[kind](result, draft)
    if kind in FOLDERS:
        draft.rename(place)
    else:
        settle(draft, place)
