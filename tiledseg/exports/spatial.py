"""Labels and table as SpatialData, which ``spatialdata.read_zarr`` opens.

Written straight in its stored form (container 0.2, raster 0.3, table 0.2), region after region: the package wants a
Dask of its own choice, and is not needed here.

References
----------
SpatialData design document, section "Transformations"; OME-Zarr 0.5 with its transformations between named systems.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..omezarr.groups import create_array, shard_shape
from ..regions import regions_of
from ..zarr_stores import new_store
from .annotated import INSTANCE_KEY, REGION_KEY, write_annotated
from .result import Result

__all__ = ["write_spatialdata"]

_CONTAINER, _RASTER, _TABLE = "0.2", "0.3", "0.2"
_NGFF = "0.5-dev-spatialdata"


def write_spatialdata(result: Result, path: Path) -> None:
    """Write labels with their pyramid, and the table that annotates them.

    Parameters
    ----------
    result : Result
    path : Path
        Of the folder, which is not there yet.

    Raises
    ------
    OutputError
        If the labels have a time axis, which SpatialData does not know.

    Notes
    -----
    The coordinate system ``global`` is in pixels; ``micrometer`` is there as well if the pixel size is known. The table
    is called as the labels with ``_table`` at the end, since no two elements may have one name.
    """
    import zarr

    if "t" in result.labels.axes:
        raise OutputError(
            f"labels {result.name!r} have a time axis, which SpatialData does not know; take --anndata, in which it is "
            "a column."
        )
    root = zarr.create_group(new_store(path), zarr_format=3)
    root.attrs["spatialdata_attrs"] = {"version": _CONTAINER, "spatialdata_software_version": "0.7.3"}
    root.create_group("labels").attrs["ome"] = {"version": _NGFF, "labels": [result.name]}
    _write_labels(result, path / "labels" / result.name)
    table = root.create_group("tables").create_group(f"{result.name}_table")
    write_annotated(result, table)
    table.attrs.update(
        {
            "spatialdata-encoding-type": "ngff:regions_table",
            "region": result.name,
            "region_key": REGION_KEY,
            "instance_key": INSTANCE_KEY,
            "version": _TABLE,
        }
    )


def _write_labels(result: Result, folder: Path) -> None:
    """All levels, shard after shard."""
    import zarr

    labels = result.labels
    group = zarr.create_group(new_store(folder), zarr_format=3)
    for number, level in enumerate(labels.levels):
        chunks = tuple(map(min, level.chunks, level.shape))
        shards = shard_shape(chunks, level.shape)
        array = create_array(
            folder / str(number), "0.5", labels.axes, level.shape, chunks, labels.dtype, keep_empty=False, shards=shards
        )
        for region in regions_of(level.shape, shards):
            array[region] = labels.read(number, region)
    group.attrs["ome"] = {"version": _NGFF, "multiscales": [_multiscale(result)]}
    group.attrs["spatialdata_attrs"] = {"version": _RASTER}


def _multiscale(result: Result) -> dict[str, Any]:
    """Where the levels lie, and how pixels become coordinates."""
    labels = result.labels
    axes = [{"name": axis, "type": "space"} for axis in labels.axes]
    datasets = [
        {
            "path": str(number),
            "coordinateTransformations": [
                {"type": "scale", "scale": [n / m for n, m in zip(labels.shape, level.shape, strict=True)]}
            ],
        }
        for number, level in enumerate(labels.levels)
    ]
    systems = [{"type": "identity", **_between(labels.axes, "global")}]
    spacing = labels.spacing_um()
    if spacing is not None and all(map(math.isfinite, spacing)):
        systems.append({"type": "scale", "scale": list(spacing), **_between(labels.axes, "micrometer")})
    return {"name": result.name, "axes": axes, "datasets": datasets, "coordinateTransformations": systems}


def _between(axes: str, system: str) -> dict[str, Any]:
    """From pixels to a coordinate system."""
    listed = [{"name": axis, "type": "space", "unit": "unit"} for axis in axes]
    return {"input": {"name": axes, "axes": listed}, "output": {"name": system, "axes": listed}}
