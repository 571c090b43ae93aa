"""Stage 5: the labels, their pyramid, their metadata and the object table.

Reads
    ``<labels>/labels.zarr`` and ``<labels>/ids``; the image, for intensities.
Writes
    The published label image level by level; per region the measurements of the parts of objects
    in it, and of the shapes of objects that begin in it if they are asked for; then the table. Metadata come last:
    labels are listed only when they are complete. What else is asked for is made from these.
Parallel over
    Regions of whole storage chunks, or whole shards, so that no file is ever written by two tasks; of as many levels
    at once as that holds for, since what is read of a level to make the next costs more than to write it. Table and
    other files are one task each, whose memory does not grow with the number of objects.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Executor, peak_memory
from .exports import BESIDE_TABLE, WRITERS, Result
from .features import LARGEST_BOX, feature_names, shape_features
from .frames import read_channels
from .grid import Region, overlap, region_shape, region_text, shift
from .images import open_image
from .job import Job
from .meters import meter, metered
from .objects import look_up, measure_objects
from .objects_at import ObjectTable, windows_of
from .omezarr import finer_region, finish_labels, halvings, level_array, read_level, shrink
from .progress import Progress
from .regions import level_of, parts_of, regions_of
from .remote import Location, location
from .store import disk_errors
from .table import local_draft, put_in_place, table_file, table_of, write_table

__all__ = ["exports_of", "process_block", "run"]

logger = logging.getLogger(__name__)


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
        The image. Pixels that are not finite are left out.
    ids : array of uint32, shape (n,)
        Global id of each label, ascending.
    origin : tuple of int
        Position of the region in the image.

    Returns
    -------
    measured : array of float64, shape (n present, 2 + 3 * ndim + 5 * channels)
        Per object with pixels here: id, pixels, sum of coordinates per axis, box start per axis, box
        stop per axis, then per channel the sum of values, the number of finite ones, the sum of squared deviations
        from their mean, the least and the largest. Whole numbers below 2**53 are exact, so sums over integer images
        do not depend on how objects were cut.
    """
    measured = measure_objects(labels, intensities, ids)
    measured = measured[measured[:, 1] > 0]
    n = labels.ndim
    shift_by = np.array(origin, np.float64)
    measured[:, 2 : 2 + n] += measured[:, 1:2] * shift_by
    measured[:, 2 + n : 2 + 3 * n] += np.tile(shift_by, 2)
    return measured


def paint_region(position: int, job: Job, levels: range) -> dict[str, Any]:
    """Task: write one region of the first levels and measure the objects in it; of a shard part after part."""
    array, regions, sides = level_of(job, 0)
    region = regions[position]
    corner = tuple(p.start for p in region)
    painted = np.empty(region_shape(region), np.uint32)
    measured = []
    for part in parts_of(region, sides):
        local, ids = _region_labels(job, part)
        intensities = read_channels(job.image, part) if ids.size else np.zeros((job.image.n_channels, *local.shape))
        painted[shift(part, corner)] = look_up(np.concatenate([np.zeros(1, np.uint32), ids]), local)
        measured.append(process_block(local, intensities, ids, tuple(p.start for p in part)))
    _write_levels(job, levels, array, region, painted)
    rows = np.concatenate(measured)
    job.store.save(f"{job.labels}/measured/{position}", rows[np.argsort(rows[:, 0], kind="stable")])
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
        inside = shift(shared, tuple(p.start for p in region))
        labels[inside] = look_up(np.concatenate([np.zeros(1, np.int32), numbers]), local)
    return labels, known


def shrink_region(position: int, job: Job, levels: range) -> dict[str, Any]:
    """Task: write one region of some levels of the pyramid: every second pixel of the level before."""
    if job.plan is None:
        raise RuntimeError("labels in memory have no pyramid")
    array, regions, sides = level_of(job, levels[0])
    region, finer = regions[position], job.plan.level_shape(levels[0] - 1)
    corner = tuple(p.start for p in region)
    shown = np.empty(region_shape(region), np.uint32)
    for part in parts_of(region, sides):
        with meter("read"):
            pixels = read_level(job.plan, levels[0] - 1, finer_region(part, array.shape, finer))
        shown[shift(part, corner)] = shrink(pixels, array.shape, finer, "nearest")
    _write_levels(job, levels, array, region, shown)
    return {"peak": peak_memory()}


def _write_levels(job: Job, levels: range, array: Any, region: Region, pixels: npt.NDArray[np.uint32]) -> None:
    """Write a region of the array of the first of some levels, and what it is in the others: files of its own, see
    `_levels_together`."""
    with meter("write"):
        array[region] = pixels
    for level in levels[1:]:
        finer, array = array.shape, level_of(job, level)[0]
        steps = halvings(array.shape, finer)
        region = tuple(slice(p.start // step, -(-p.stop // step)) for p, step in zip(region, steps, strict=True))
        pixels = shrink(pixels, array.shape, finer, "nearest")
        with meter("write"):
            array[region] = pixels


def _levels_together(job: Job) -> Iterator[range]:
    """Levels whose regions the same tasks write, the finest first: those in which its regions are whole files."""
    if job.plan is None:
        yield range(1)
        return
    arrays = [level_array(job.plan, level) for level in range(job.plan.n_levels)]
    first = 0
    while first < len(arrays):
        shape, sides = arrays[first].shape, arrays[first].shards or level_of(job, first)[2]
        stop, factors = first + 1, (1,) * len(shape)
        while stop < len(arrays):
            coarser, steps = arrays[stop], halvings(arrays[stop].shape, arrays[stop - 1].shape)
            factors = tuple(a * b for a, b in zip(factors, steps, strict=True))
            in_file = tuple(a * b for a, b in zip(factors, coarser.shards or coarser.chunks, strict=True))
            if any(side < n and side % own for side, n, own in zip(sides, shape, in_file, strict=True)):
                break
            stop += 1
        yield range(first, stop)
        first = stop


def describe_region(position: int, job: Job) -> dict[str, Any]:
    """Task: measure the shapes of the objects whose box begins in a region, each from its whole box."""
    region, axes = _feature_regions(job)[position], job.extent.axes
    table = ObjectTable(table_of(job) if job.plan is None else table_file(job), axes)
    rows = table.starting_in(region, ())
    boxes, ids = table.boxes_of(rows), rows["label"].to_numpy()
    spacing, n_frames = job.image.spacing_um(), job.extent.n_object_frames
    found = np.full((ids.size, 1 + len(feature_names(job.extent, spacing))), np.nan)
    found[:, 0] = ids
    n_too_large = 0
    for window in windows_of(region, boxes):
        if math.prod(region_shape(window.region)) > LARGEST_BOX and window.which.size == 1:
            n_too_large += 1
            continue
        labels = _published(job, window.region)
        corner = tuple(p.start for p in window.region)
        with meter("measure"):
            for i in window.which:
                box = shift(tuple(slice(a, b) for a, b in boxes[i].T.tolist()), corner)
                own = labels[box] == ids[i]
                found[i, 1:] = shape_features(own.reshape(own.shape[n_frames:]), spacing)
    job.store.save(f"{job.labels}/features/{position}", found)
    return {"peak": peak_memory(), "n_too_large": n_too_large}


def _feature_regions(job: Job) -> list[Region]:
    """The units of work of the shapes: parts of level 0, also where several of them are a shard."""
    array, _, sides = level_of(job, 0)
    return regions_of(array.shape, sides)


def _published(job: Job, region: Region) -> npt.NDArray[np.uint32]:
    """Published labels of level 0."""
    if job.plan is not None:
        return read_level(job.plan, 0, region)
    labels: npt.NDArray[np.uint32] = job.store.open(f"{job.labels}/published")[region]
    return labels


def write_exports(_: int, job: Job) -> dict[str, Any]:
    """Task: write what else is asked for, from what is published."""
    if job.plan is None:
        raise RuntimeError("labels in memory are not exported")
    table, plan = ObjectTable(table_file(job), job.extent.axes), job.plan
    result = Result(open_image(str(plan.path)), table, plan.name, plan.placement)
    for kind, place in exports_of(job):
        with disk_errors(place):
            draft = local_draft(place, job.store)
            WRITERS[kind](result, draft)
            put_in_place(draft, place)
    return {"peak": peak_memory()}


def exports_of(job: Job) -> list[tuple[str, Location]]:
    """What else is to be written.

    Parameters
    ----------
    job : Job

    Returns
    -------
    wanted : list of (str, Path or RemotePath)
        Kinds, and places: beside the table, or where it was asked for.
    """
    wanted: list[tuple[str, Location]] = []
    if job.table is None:
        return wanted
    settings, folder = job.settings.publish, job.table.parent
    if settings.csv:
        wanted.append(("csv", folder / "table.csv"))
    kind = settings.polygons_kind
    if kind is not None and settings.polygons is not None:
        beside = folder / BESIDE_TABLE[kind]
        wanted.append((kind, beside if settings.polygons == kind else location(settings.polygons)))
    return wanted


def _where(regions: list[Region], job: Job, level: int, position: int) -> str:
    """A region of a level, for messages."""
    return f"region {region_text(job.extent.axes, regions[position])} of level {level}"


def run(job: Job, executor: Executor, progress: Progress) -> None:
    """Write what is missing of the labels, the pyramid, the table, what else is asked for, and the metadata."""
    pieces: list[_Pieces] = []
    for levels in _levels_together(job):
        first, task = levels[0], shrink_region if levels[0] else paint_region
        pieces.append(_Pieces(f"publish-levels-{first}", task, (levels,), level_of(job, first)[1], first))
    shapes = _Pieces("publish-shapes", describe_region, (), _feature_regions(job), 0)
    has_features = job.settings.publish.features
    every = [*pieces, shapes] if has_features else pieces
    done = {of.stage: job.store.done(f"{job.labels}/{of.stage}") for of in every}
    progress.start("publish", sum(len(of.regions) for of in every), sum(map(len, done.values())))
    for of in pieces:
        _do(of, done[of.stage], job, executor, progress)
    if has_features and len(done[shapes.stage]) < len(shapes.regions):
        if job.plan is not None:
            _alone(executor, write_table, job, "of all objects")  # tells where objects are
        if n_too_large := _do(shapes, done[shapes.stage], job, executor, progress):
            logger.warning("%d objects are too large to measure their shape: NaN in the table.", n_too_large)
    if job.plan is None:
        return
    _alone(executor, functools.partial(write_table, has_features=has_features), job, "of all objects")
    finish_labels(job.plan)
    if exports_of(job):
        _alone(executor, write_exports, job, "of all objects")


@dataclass(frozen=True)
class _Pieces:
    """Tasks of one kind, by their regions."""

    stage: str
    task: Callable[..., dict[str, Any]]
    args: tuple[range, ...]
    regions: list[Region]
    level: int


def _do(pieces: _Pieces, done: set[int], job: Job, executor: Executor, progress: Progress) -> int:
    """Do what is missing of them, and note it; how many objects were too large for that."""
    todo = [position for position in range(len(pieces.regions)) if position not in done]
    where = functools.partial(_where, pieces.regions, job, pieces.level)
    n_too_large = 0
    for position, record in executor.stream(pieces.task, todo, job, *pieces.args, name="publish", where=where):
        job.store.mark(f"{job.labels}/{pieces.stage}", [position])
        progress.step(record["peak"])
        n_too_large += record.get("n_too_large", 0)
    return n_too_large


def _alone(executor: Executor, task: Callable[..., Any], job: Job, what: str) -> None:
    """Do a task that is one for all objects."""
    list(executor.stream(task, [0], job, name="table", where=lambda _: what))
