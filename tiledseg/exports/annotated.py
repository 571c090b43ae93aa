"""The object table as AnnData, stored in Zarr: what scanpy, squidpy and SpatialData work on.

Written batch after batch straight in AnnData's stored form, for its own writer wants the whole table in memory; so
nothing else needs to be installed. ``anndata.read_zarr`` opens it.

References
----------
anndata, "On-disk format": encodings anndata 0.1.0, dataframe 0.2.0, array 0.2.0, string-array 0.2.0, categorical 0.2.0,
dict 0.1.0, string 0.2.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..zarr_stores import new_store
from .result import Result

__all__ = ["INSTANCE_KEY", "REGION_KEY", "write_anndata", "write_annotated"]

REGION_KEY, INSTANCE_KEY = "region", "label"
"""Columns of ``obs`` that say which labels an object is of, and which of them it is, as SpatialData wants it."""

_ROWS = 2**16
"""Of a chunk."""


def write_anndata(result: Result, path: Path) -> None:
    """Write the object table as AnnData.

    Parameters
    ----------
    result : Result
    path : Path
        Of the folder, which is not there yet.

    Notes
    -----
    ``obs``: ``region`` (the name of the labels), ``label``, time point and plane, centroids in micrometres; ``X`` and
    ``var``: all that is measured; ``obsm["spatial"]``: centroids x, y (z) in pixels.
    """
    import zarr

    write_annotated(result, zarr.create_group(new_store(path), zarr_format=2))


def write_annotated(result: Result, group: Any) -> None:
    """Write the object table as AnnData.

    Parameters
    ----------
    result : Result
    group : zarr.Group
        An empty one.
    """
    n, names = result.table.n_objects, result.table.schema.names
    spatial = [f"centroid_{axis}" for axis in result.table.object_axes[::-1]]
    about = [name for name in names if name in ("label", "t", "z") or (name.startswith("centroid_") and "um" in name)]
    boxes = [name for name in names if name.startswith("bbox_")]
    measured = [name for name in names if name not in {*spatial, *about, *boxes}]
    _encode(group, "anndata", "0.1.0")
    for name in ("layers", "varm", "obsp", "varp"):
        _encode(group.create_group(name), "dict", "0.1.0")
    uns = _encode(group.create_group("uns"), "dict", "0.1.0")
    attrs = _encode(uns.create_group("spatialdata_attrs"), "dict", "0.1.0")
    for name, text in (("region", result.name), ("region_key", REGION_KEY), ("instance_key", INSTANCE_KEY)):
        _encode(attrs.create_array(name, shape=(), dtype=str), "string", "0.2.0")[...] = text
    var = _frame(group, "var", [])
    _strings(var, "_index", len(measured))[:] = np.array(measured, np.dtypes.StringDType())

    obs = _frame(group, "obs", [REGION_KEY, *about])
    region = _encode(obs.create_group(REGION_KEY), "categorical", "0.2.0")
    region.attrs["ordered"] = False
    _strings(region, "categories", 1)[:] = np.array([result.name], np.dtypes.StringDType())
    _numbers(region, "codes", (n,), np.int8)  # all 0: of the one category
    index = _strings(obs, "_index", n)
    columns = {name: _numbers(obs, name, (n,), _kind(result, name)) for name in about}
    matrix = _numbers(group, "X", (n, len(measured)), np.float32)
    places = _numbers(_encode(group.create_group("obsm"), "dict", "0.1.0"), "spatial", (n, len(spatial)), np.float64)
    start = 0
    for rows in result.table.batches():
        part = slice(start, start + rows.num_rows)
        start = part.stop
        index[part] = rows["label"].to_numpy().astype(str).astype(np.dtypes.StringDType())
        for name, column in columns.items():
            column[part] = rows[name].to_numpy()
        matrix[part] = np.stack([rows[name].to_numpy().astype(np.float32) for name in measured], 1)
        places[part] = np.stack([rows[name].to_numpy() for name in spatial], 1)


def _kind(result: Result, name: str) -> Any:
    return result.table.schema.field(name).type.to_pandas_dtype()


def _frame(group: Any, name: str, columns: list[str]) -> Any:
    """A table of columns, with its index still to be made."""
    frame = _encode(group.create_group(name), "dataframe", "0.2.0")
    frame.attrs.update({"_index": "_index", "column-order": columns})
    return frame


def _strings(group: Any, name: str, n: int) -> Any:
    return _encode(group.create_array(name, shape=(n,), dtype=str, chunks=(max(1, min(n, _ROWS)),)), "string-array")


def _numbers(group: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    chunks = (max(1, min(shape[0], _ROWS)), *shape[1:])
    return _encode(group.create_array(name, shape=shape, dtype=dtype, chunks=chunks), "array")


def _encode(element: Any, kind: str, version: str = "0.2.0") -> Any:
    """Say what an element is."""
    element.attrs.update({"encoding-type": kind, "encoding-version": version})
    return element
