"""Stage 5: the labels, their pyramid, their metadata and the object table.

Reads
    ``<labels>/labels.zarr`` and ``<labels>/ids``; the image, for intensities.
Writes
    The published label image level by level; per region the measurements of the parts of objects
    in it; then the table. Metadata come last: labels are listed only when they are complete.
Parallel over
    Regions of whole storage chunks, so that no chunk is ever written by two tasks; the table is one
    task that goes through the ids in batches: its time grows with the number of objects, its memory
    only with the number of regions.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Executor, peak_memory
from .disk import settle
from .frames import read_channels
from .grid import Index, Region, overlap, region_shape, region_text, shift
from .job import Job
from .meters import meter, metered
from .objects import measure_objects
from .omezarr import finish_labels, level_array, read_level
from .progress import Progress
from .remote import Location
from .store import DiskStore, Store
from .zarr_stores import new_store

__all__ = ["process_block", "region_sides", "run", "table_of"]

REGION = 2048
TABLE_BATCH = 2**18
"""Ids that are measured at a time for the table: a row group of it, some 200 MiB while in work."""

Measured = npt.NDArray[np.float64]


@metered("measure")
def process_block(
    labels: npt.NDArray[np.int32], intensities: npt.NDArray[Any], ids: npt.NDArray[np.uint32], origin: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    """Measure the parts of objects in one region; sums, so that parts can be added up.

    Parameters
    ----------
    labels : array of int32, shape (*spatial)
        Labels 1..n of this region, 0 background.
    intensities : array, shape (channels, *spatial)
        The image. Pixels that are not finite are left out of means.
    ids : array of uint32, shape (n,)
        Global id of each label, ascending.
    origin : tuple of int
        Position of the region in the image.

    Returns
    -------
    measured : array of float64, shape (n present, 2 + 3 * ndim + 2 * channels)
        Per object with pixels here: id, pixels, sum of coordinates per axis, box start per axis, box
        stop per axis, then per channel the sum of values and the number of finite ones. Whole numbers
        below 2**53 are exact, so sums over integer images do not depend on how objects were cut.
    """
    measured = measure_objects(labels, intensities, ids)
    measured = measured[measured[:, 1] > 0]
    n = labels.ndim
    shift_by = np.array(origin, np.float64)
    measured[:, 2 : 2 + n] += measured[:, 1:2] * shift_by
    measured[:, 2 + n : 2 + 3 * n] += np.tile(shift_by, 2)
    return measured


def region_sides(chunks: Index, shape: Index) -> Index:
    """Sides of the regions: whole chunks, more of them from the last axis on while there are at most 2**22 pixels."""
    sides = list(chunks)
    for axis in reversed(range(len(sides))):
        while sides[axis] < shape[axis] and sides[axis] < REGION and 2 * math.prod(sides) <= REGION**2:
            sides[axis] *= 2
    return tuple(sides)


def _regions(shape: Index, chunks: Index) -> list[Region]:
    """Regions of whole chunks."""
    sides = region_sides(chunks, shape)
    starts = itertools.product(*(range(0, n, side) for n, side in zip(shape, sides, strict=True)))
    return [
        tuple(slice(a, min(a + side, n)) for a, side, n in zip(start, sides, shape, strict=True)) for start in starts
    ]


def _level(job: Job, level: int) -> tuple[Any, list[Region]]:
    """The array of a level and its regions."""
    if job.plan is None:
        labels = job.store.open(f"{job.labels}/published")
        shape = labels.shape
        return labels, _regions(shape, (*(1,) * (len(shape) - 2), *(min(n, REGION) for n in shape[-2:])))
    array = level_array(job.plan, level)
    return array, _regions(array.shape, array.chunks)


def paint_region(position: int, job: Job) -> dict[str, Any]:
    """Task: write one region of level 0 and measure the objects in it."""
    array, regions = _level(job, 0)
    region = regions[position]
    local, ids = _region_labels(job, region)
    intensities = read_channels(job.image, region) if ids.size else np.zeros((job.image.n_channels, *local.shape))
    painted = np.concatenate([np.zeros(1, np.uint32), ids])[local]
    with meter("write"):
        array[region] = painted
    origin = tuple(p.start for p in region)
    job.store.save(f"{job.labels}/measured/{position}", process_block(local, intensities, ids, origin))
    return {"peak": peak_memory()}


@metered("read")
def _region_labels(job: Job, region: Region) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32]]:
    """Labels 1..n of a region of level 0, of which not all need occur, and their global ids, ascending."""
    source, grid = job.store.open(f"{job.labels}/labels.zarr"), job.blocks
    touching = [(grid.at(index), grid.number(index)) for index in grid.touching(region)]
    ids_of = [job.store.load(f"{job.labels}/ids/{number}") for _, number in touching]
    known = np.unique(np.concatenate(ids_of))
    known = known[known > 0]
    labels = np.zeros(region_shape(region), np.int32)
    for (block, number), ids in zip(touching, ids_of, strict=True):
        shared = overlap(region, block.core)
        if shared is None or not ids.size:
            continue
        local = source[(number, *shift(shared, tuple(p.start for p in block.padded)))]
        numbers = np.where(ids > 0, np.searchsorted(known, ids) + 1, 0).astype(np.int32)
        labels[shift(shared, tuple(p.start for p in region))] = np.concatenate([np.zeros(1, np.int32), numbers])[local]
    return labels, known


def shrink_region(position: int, job: Job, level: int) -> dict[str, Any]:
    """Task: write one region of a pyramid level: every second pixel of the level below."""
    if job.plan is None:
        raise RuntimeError("labels in memory have no pyramid")
    array, regions = _level(job, level)
    region, finer = regions[position], job.plan.level_shape(level - 1)
    steps = [-(-a // b) for a, b in zip(finer, array.shape, strict=True)]
    wide = tuple(slice(p.start * s, min(p.stop * s, m)) for p, s, m in zip(region, steps, finer, strict=True))
    with meter("read"):
        shown = read_level(job.plan, level - 1, wide)[tuple(slice(None, None, s) for s in steps)]
    with meter("write"):
        array[region] = shown
    return {"peak": peak_memory()}


@metered("table")
def write_table(_: int, job: Job) -> dict[str, Any]:
    """Task: add up the parts of objects and write the table, a row group per batch of ids."""
    import pyarrow.parquet

    if job.table is not None:
        _describe_table(job)
        draft = _draft_of(job.table, job.store)
        with pyarrow.parquet.ParquetWriter(draft, _rows_of(job, _no_parts(job)).schema) as writer:
            for parts in _parts_by_id(job):
                writer.write_table(_rows_of(job, parts))
        if isinstance(job.table, Path):
            settle(draft, job.table)
        else:
            job.table.upload(draft)
            draft.unlink()
    return {"peak": peak_memory()}


def _draft_of(table: Location, store: Store) -> Path:
    """Where the table is written before it is put in its place: of a remote one in the scratch."""
    if isinstance(table, Path):
        table.parent.mkdir(parents=True, exist_ok=True)
        return table.with_suffix(".partial")
    if not isinstance(store, DiskStore):
        raise RuntimeError("a remote table needs a scratch on a disk")
    return store.path / "table.partial"


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


def table_of(job: Job) -> Any:
    """The object table, one row per label in order, from what the regions left.

    Returns
    -------
    table : pyarrow.Table
        ``label``; ``t``, and ``z`` where planes stand alone, if the image has them; ``centroid_y``,
        ``centroid_x`` in pixels, in volumes also of z; the same with ``_um`` if the pixel size is known;
        ``bbox_y_start`` ... ``bbox_x_stop`` (half open); ``area`` in pixels and ``area_um2``, or ``volume``
        in voxels and ``volume_um3``; ``mean_<channel>`` per channel.
    """
    import pyarrow

    return pyarrow.concat_tables([_rows_of(job, parts) for parts in (_no_parts(job), *_parts_by_id(job))])


def _no_parts(job: Job) -> Measured:
    """What the regions of an image without objects leave."""
    return np.zeros((0, 2 + 3 * len(job.shape) + 2 * job.image.n_channels))


def _parts_by_id(job: Job) -> Iterator[Measured]:
    """What the regions measured, batch after batch of ids; within a batch region by region.

    Strategy: ids are in raster order of first pixels, and what a region measured is sorted by id. So
    a batch meets few regions, and of those only its own rows are read.
    """
    folder = f"{job.labels}/measured"
    spans = np.zeros((len(_level(job, 0)[1]), 2), np.int64)
    for i, span in enumerate(spans):
        parts = job.store.view(f"{folder}/{i}")
        if len(parts):
            span[:] = parts[[0, -1], 0]
    for start in range(1, int(spans.max(initial=0)) + 1, TABLE_BATCH):
        stop = start + TABLE_BATCH
        rows = [_no_parts(job)]
        for region in np.flatnonzero((spans[:, 0] < stop) & (spans[:, 1] >= start)):
            parts = job.store.view(f"{folder}/{region}")
            low, high = (bisect.bisect_left(parts, edge, key=lambda row: row[0]) for edge in (start, stop))
            rows.append(np.array(parts[low:high]))
        yield np.concatenate(rows)


def _rows_of(job: Job, parts: Measured) -> Any:
    """The rows of the table for all objects of which there are parts, in order of their ids."""
    import pyarrow

    n, n_frames, axes = len(job.shape), job.extent.n_object_frames, job.extent.axes
    parts = parts[np.argsort(parts[:, 0], kind="stable")]
    _, starts = np.unique(parts[:, 0], return_index=True)
    summed = np.add.reduceat(parts, starts) if starts.size else parts
    low, high = slice(2 + n, 2 + 2 * n), slice(2 + 2 * n, 2 + 3 * n)
    size = summed[:, 1]
    columns: dict[str, npt.NDArray[Any]] = {"label": parts[starts, 0].astype(np.uint32)}
    box_low = (np.minimum.reduceat(parts[:, low], starts) if starts.size else parts[:, low]).astype(np.int64)
    box_high = (np.maximum.reduceat(parts[:, high], starts) if starts.size else parts[:, high]).astype(np.int64)
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
        total, count = summed[:, 2 + 3 * n + 2 * i], summed[:, 3 + 3 * n + 2 * i]
        # Rounded to float32: the last bits of a sum of floats depend on how objects were cut.
        columns[f"mean_{channel}"] = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    return pyarrow.table(columns)


def _where(job: Job, level: int, position: int) -> str:
    """A region of a level, for messages."""
    return f"region {region_text(job.extent.axes, _level(job, level)[1][position])} of level {level}"


def run(job: Job, executor: Executor, progress: Progress) -> None:
    """Write what is missing of the labels, the pyramid, the table and the metadata."""
    n_levels = 1 if job.plan is None else job.plan.n_levels
    counts = [len(_level(job, level)[1]) for level in range(n_levels)]
    stages = [f"{job.labels}/publish-{level}" for level in range(n_levels)]
    done = [job.store.done(stage) for stage in stages]
    progress.start("publish", sum(counts), sum(map(len, done)))
    for level, (stage, count) in enumerate(zip(stages, counts, strict=True)):
        todo = [position for position in range(count) if position not in done[level]]
        task, args = (paint_region, ()) if level == 0 else (shrink_region, (level,))
        where = functools.partial(_where, job, level)
        for position, record in executor.stream(task, todo, job, *args, name="publish", where=where):
            job.store.mark(stage, [position])
            progress.step(record["peak"])
    if job.plan is not None:
        list(executor.stream(write_table, [0], job, name="table", where=lambda _: "of all objects"))
        finish_labels(job.plan)
