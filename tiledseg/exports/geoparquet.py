"""Outlines as GeoParquet: the object table with a column of geometries, which GeoPandas and DuckDB open.

Both are in pixels of the labels.

References
----------
GeoParquet 1.0.0; OGC Simple Feature Access, part 1, section "Well-known Binary Representation".
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from .polygons import MultiPolygon, Polygon, polygons_of
from .result import Result

__all__ = ["write_geoparquet"]

_LITTLE_ENDIAN, _POLYGON, _MULTIPOLYGON = 1, 3, 6
_KIND = struct.Struct("<BII")
_COUNT = struct.Struct("<I")


def write_geoparquet(result: Result, path: Path) -> None:
    """Write the outlines of all objects with their rows of the table, a row group per region.

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
    import pyarrow
    import pyarrow.parquet

    about = {
        "version": "1.0.0",
        "primary_column": "geometry",
        "columns": {
            "geometry": {
                "encoding": "WKB",
                "geometry_types": ["Polygon", "MultiPolygon"],
                "crs": None,
                "orientation": "counterclockwise",
            }
        },
    }
    schema = result.table.schema.append(pyarrow.field("geometry", pyarrow.binary(), nullable=False))
    schema = schema.with_metadata({"geo": json.dumps(about)})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for rows, shapes in polygons_of(result):
            geometry = pyarrow.array([_well_known(shape) for shape in shapes], pyarrow.binary())
            columns = [*rows.columns, geometry]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def _well_known(shape: MultiPolygon) -> bytes:
    """A geometry in well-known binary."""
    if len(shape) == 1:
        return _polygon(shape[0])
    return _KIND.pack(_LITTLE_ENDIAN, _MULTIPOLYGON, len(shape)) + b"".join(map(_polygon, shape))


def _polygon(rings: Polygon) -> bytes:
    parts = [_KIND.pack(_LITTLE_ENDIAN, _POLYGON, len(rings))]
    for ring in rings:
        parts += (_COUNT.pack(len(ring)), ring.astype(np.dtype("<f8")).tobytes())
    return b"".join(parts)
