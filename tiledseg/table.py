"""The object table: put together from what regions measured, in batches of ids, and read again by place.

Its time grows with the number of objects, its memory only with the number of regions.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import peak_memory
from .disk import settle
from .features import feature_names
from .job import Job
from .meters import metered
from .objects import N_INTENSITIES
from .regions import level_of, regions_of
from .remote import Location
from .store import DiskStore, Store
from .zarr_stores import new_store

__all__ = ["local_draft", "put_in_place", "table_file", "table_of", "write_table"]

TABLE_BATCH = 2**18
"""Ids that are measured at a time for the table: a row group of it, some 200 MiB while in work."""

Measured = npt.NDArray[np.float64]


@metered("table")
def write_table(_: int, job: Job, has_features: bool = False) -> dict[str, Any]:
    """Task: add up the parts of objects and write the table, a row group per batch of ids."""
    import pyarrow.parquet

    if job.table is not None:
        _describe_table(job)
        draft = local_draft(job.table, job.store)
        with pyarrow.parquet.ParquetWriter(draft, _rows_of(job, *_nothing(job, has_features)).schema) as writer:
            for batch in _batches(job, has_features):
                writer.write_table(_rows_of(job, *batch))
        put_in_place(draft, job.table, table_file(job))
    return {"peak": peak_memory()}


def table_file(job: Job) -> Path:
    """The table on a disk: itself, or of a remote one the copy in the scratch."""
    if isinstance(job.table, Path):
        return job.table
    if not isinstance(job.store, DiskStore):
        raise RuntimeError("a remote table needs a scratch on a disk")
    return job.store.path / "table.parquet"


def local_draft(place: Location, store: Store) -> Path:
    """Where a file of the output is written before it is put in its place: of a remote one in the scratch."""
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        return place.with_name(f"{place.name}.partial")
    if not isinstance(store, DiskStore):
        raise RuntimeError("a remote file needs a scratch on a disk")
    return store.path / f"{place.name}.partial"


def put_in_place(draft: Path, place: Location, copy: Path | None = None) -> None:
    """Give a draft its name, or upload it; of what is uploaded a copy may be kept."""
    if isinstance(place, Path):
        settle(draft, place)
        return
    place.upload(draft)
    if copy is None:
        draft.unlink()
    else:
        draft.replace(copy)


def _describe_table(job: Job) -> None:
    """Make the table's groups, with the attributes by which ngio and Fractal know a feature table."""
    import zarr

    if job.plan is None:
        return
    zarr_format: Any = job.plan.zarr_format
    tables = zarr.open_group(new_store(job.plan.root / "tables"), mode="a", zarr_format=zarr_format)
    listed: Any = tables.attrs.get("tables", [])
    tables.attrs["tables"] = sorted({*listed, job.plan.name})
    tables.require_group(job.plan.name).attrs.update(
        {
            "type": "feature_table",
            "table_version": "1",
            "backend": "parquet",
            "index_key": "label",
            "index_type": "int",
            "region": {"path": f"../labels/{job.plan.name}"},
        }
    )


def table_of(job: Job, has_features: bool = False) -> Any:
    """The object table, one row per label in order, from what the regions left.

    Parameters
    ----------
    job : Job
    has_features : bool
        Whether shapes were measured as well, see `features`.

    Returns
    -------
    table : pyarrow.Table
        ``label``; ``t``, and ``z`` where planes stand alone, if the image has them; ``centroid_y``,
        ``centroid_x`` in pixels, in volumes also of z; the same with ``_um`` if the pixel size is known;
        ``bbox_y_start`` ... ``bbox_x_stop`` (half open); ``area`` in pixels and ``area_um2``, or ``volume``
        in voxels and ``volume_um3``; ``mean_<channel>``, ``std_<channel>`` (divided by n), ``min_<channel>`` and
        ``max_<channel>`` per channel; then what `features` measures.
    """
    import pyarrow

    batches = (_nothing(job, has_features), *_batches(job, has_features))
    return pyarrow.concat_tables([_rows_of(job, *batch) for batch in batches])


def _nothing(job: Job, has_features: bool) -> tuple[Measured, Measured | None]:
    """What the regions of an image without objects leave."""
    n = len(job.shape)
    width = 2 + 3 * n + N_INTENSITIES * job.image.n_channels
    names = feature_names(job.extent, job.image.spacing_um())
    return np.zeros((0, width)), np.zeros((0, 1 + len(names))) if has_features else None


def _batches(job: Job, has_features: bool) -> Iterator[tuple[Measured, Measured | None]]:
    """What the regions measured, batch after batch of ids."""
    parts, features = _nothing(job, has_features)
    array, regions, sides = level_of(job, 0)
    by_id = _rows_by_id(job.store, f"{job.labels}/measured", len(regions), parts)
    if features is None:
        for batch in by_id:
            yield batch, None
        return
    n_parts = len(regions_of(array.shape, sides))
    of_shapes = _rows_by_id(job.store, f"{job.labels}/features", n_parts, features)
    yield from zip(by_id, of_shapes, strict=True)


def _rows_by_id(store: Store, folder: str, n_regions: int, nothing: Measured) -> Iterator[Measured]:
    """Rows that begin with an id, batch after batch of ids; within a batch region by region.

    Strategy: ids are in raster order of first pixels, and what a region measured is sorted by id. So
    a batch meets few regions, and of those only its own rows are read.
    """
    spans = np.zeros((n_regions, 2), np.int64)
    for i, span in enumerate(spans):
        rows = store.view(f"{folder}/{i}")
        if len(rows):
            span[:] = rows[[0, -1], 0]
    for start in range(1, int(spans.max(initial=0)) + 1, TABLE_BATCH):
        stop = start + TABLE_BATCH
        batch = [nothing]
        for region in np.flatnonzero((spans[:, 0] < stop) & (spans[:, 1] >= start)):
            rows = store.view(f"{folder}/{region}")
            low, high = (bisect.bisect_left(rows, edge, key=lambda row: row[0]) for edge in (start, stop))
            batch.append(np.array(rows[low:high]))
        yield np.concatenate(batch)


def _rows_of(job: Job, parts: Measured, features: Measured | None) -> Any:
    """The rows of the table for all objects of which there are parts, in order of their ids."""
    import pyarrow

    n, n_frames, axes = len(job.shape), job.extent.n_object_frames, job.extent.axes
    parts = parts[np.argsort(parts[:, 0], kind="stable")]
    _, starts = np.unique(parts[:, 0], return_index=True)
    summed = _reduced(np.add, parts, starts)
    size = summed[:, 1]
    columns: dict[str, npt.NDArray[Any]] = {"label": parts[starts, 0].astype(np.uint32)}
    box_low = _reduced(np.minimum, parts[:, 2 + n : 2 + 2 * n], starts).astype(np.int64)
    box_high = _reduced(np.maximum, parts[:, 2 + 2 * n : 2 + 3 * n], starts).astype(np.int64)
    for i, axis in enumerate(axes[:n_frames]):
        columns[axis] = box_low[:, i]
    centroids = summed[:, 2 : 2 + n] / np.maximum(size, 1)[:, None]
    inner = list(enumerate(axes))[n_frames:]
    for i, axis in inner:
        columns[f"centroid_{axis}"] = centroids[:, i]
    spacing = dict(zip(job.image.spatial_axes, job.image.spacing_um() or (), strict=False))
    if spacing:
        for i, axis in inner:
            columns[f"centroid_{axis}_um"] = centroids[:, i] * spacing[axis]
    for i, axis in inner:
        columns[f"bbox_{axis}_start"] = box_low[:, i]
        columns[f"bbox_{axis}_stop"] = box_high[:, i]
    name, power = ("area", "um2") if len(inner) == 2 else ("volume", "um3")
    columns[name] = size.astype(np.int64)
    if spacing:
        columns[f"{name}_{power}"] = size * math.prod(spacing[axis] for _, axis in inner)
    for i, channel in enumerate(job.image.channels):
        of_channel = slice(2 + 3 * n + N_INTENSITIES * i, 2 + 3 * n + N_INTENSITIES * (i + 1))
        columns |= _intensities(channel, parts[:, of_channel], starts, job.image.dtype)
    if features is not None:
        rows = features[np.argsort(features[:, 0], kind="stable")]
        columns |= dict(zip(feature_names(job.extent, job.image.spacing_um()), rows[:, 1:].T, strict=True))
    return pyarrow.table({name: _column(values) for name, values in columns.items()})


def _column(values: npt.NDArray[Any]) -> Any:
    """Numbers as pyarrow keeps them. Given as an array, pyarrow would import pandas first to see what it is."""
    import pyarrow

    kind, numbers = pyarrow.from_numpy_dtype(values.dtype), pyarrow.py_buffer(np.ascontiguousarray(values))
    return pyarrow.Array.from_buffers(kind, len(values), [None, numbers])


def _reduced(how: Any, parts: Measured, starts: npt.NDArray[np.int64]) -> Measured:
    """The parts of each object as one row."""
    reduced: Measured = how.reduceat(parts, starts) if starts.size else parts
    return reduced


def _intensities(
    channel: str, parts: Measured, starts: npt.NDArray[np.int64], dtype: np.dtype[Any]
) -> dict[str, npt.NDArray[Any]]:
    """Columns of a channel; not a number where no pixel of an object is finite.

    Variances are added up as Chan, Golub and LeVeque do (1979, Updating formulae and a pairwise algorithm).
    """
    totals, counts, squares, low, high = parts.T
    total, count = _reduced(np.add, totals, starts), _reduced(np.add, counts, starts)
    with np.errstate(invalid="ignore"):
        mean = total / np.where(count, count, np.nan)
    object_of = np.repeat(np.arange(starts.size), np.diff(np.append(starts, len(parts))))
    apart = np.where(counts > 0, totals / np.maximum(counts, 1) - mean[object_of], 0)
    variance = _reduced(np.add, squares + counts * apart**2, starts) / np.where(count, count, np.nan)
    lowest, highest = _reduced(np.minimum, low, starts), _reduced(np.maximum, high, starts)
    # Rounded to float32: the last bits of a sum of floats depend on how objects were cut.
    kind = dtype if dtype.kind in "ui" else np.dtype(np.float32)
    if kind.kind == "f":
        lowest, highest = np.where(count, lowest, np.nan), np.where(count, highest, np.nan)
    return {
        f"mean_{channel}": mean.astype(np.float32),
        f"std_{channel}": np.sqrt(variance).astype(np.float32),
        f"min_{channel}": lowest.astype(kind),
        f"max_{channel}": highest.astype(kind),
    }
