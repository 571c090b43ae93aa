"""Stage 3: from flows to the cells of every block.

Reads
    ``flows.zarr`` under a block and its halo.
Writes
    ``<labels>/labels.zarr``: local labels of the padded block, only of objects that reach into the
    core; ``<labels>/objects/<block>``: how many objects the halo cut, whether the block was skipped,
    then per object the first pixel it has in the core.
Parallel over
    Blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Executor, peak_memory
from .config import MasksConfig
from .dynamics import compute_masks
from .grid import Block, Region, interpolate, samples_needed
from .job import CELLPROB_FLOOR, Job
from .progress import Progress

__all__ = ["label_block", "process_block", "read_flows", "run"]

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.uint32]

HALO_GROWTHS = (1, 2, 4)


def read_flows(job: Job, region: Region) -> FloatArray:
    """The blended network output on a region of the working grid.

    Parameters
    ----------
    job : Job
        The run.
    region : tuple of slice
        In working pixels, inside the grid.

    Returns
    -------
    values : array of float32, shape (ndim + 1, *shape of region)
        Unit flow per axis and cell logit.
    """
    flows, lattice = job.store.open("flows.zarr"), job.lattice
    values = np.zeros((len(region) + 1, *(p.stop - p.start for p in region)), np.float32)
    for chunk in lattice.chunks_meeting(region):
        piece = lattice.piece_region(chunk)
        shared = [(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(region, piece, strict=True)]
        here = tuple(slice(a - p.start, b - p.start) for (a, b), p in zip(shared, region, strict=True))
        there = tuple(slice(a - q.start, b - q.start) for (a, b), q in zip(shared, piece, strict=True))
        values[(slice(None), *here)] += flows[(*chunk, slice(None), *there)]
    values[-1] += np.float32(CELLPROB_FLOOR)
    return values


def process_block(values: FloatArray, masks: MasksConfig, niter: int, min_size: int) -> LabelArray:
    """Labels of one padded block.

    Parameters
    ----------
    values : array of float32, shape (ndim + 1, *spatial)
        Unit flow per axis and cell logit, at the size the flows are followed at.
    masks : MasksConfig
        Thresholds.
    niter, min_size : int
        In pixels of `values`.

    Returns
    -------
    labels : array of uint32, shape (*spatial)
        1..n in raster order of first pixel, 0 background.
    """
    return compute_masks(
        values[:-1],
        values[-1],
        cellprob_threshold=masks.cellprob_threshold,
        flow_threshold=masks.flow_threshold,
        niter=niter,
        min_size=min_size,
    ).astype(np.uint32, copy=False)


def _labels_of(job: Job, region: Region) -> LabelArray:
    """Labels of a region of level 0, as if it were the whole image."""
    masks, working = job.settings.masks, job.working
    coordinates = [working.from_image(p.start, p.stop, axis) for axis, p in enumerate(region)]
    if masks.resample:
        needed = tuple(samples_needed(c, n) for c, n in zip(coordinates, working.shape, strict=True))
        positions = [(c, n, p.start) for c, n, p in zip(coordinates, working.shape, needed, strict=True)]
        values = np.ascontiguousarray(interpolate(read_flows(job, needed), positions))
        return process_block(values, masks, job.niter, masks.min_size)
    nearest = [
        np.clip(np.floor(c + 0.5).astype(np.int64), 0, n - 1) for c, n in zip(coordinates, working.shape, strict=True)
    ]
    needed = tuple(slice(int(i[0]), int(i[-1]) + 1) for i in nearest)
    volume = float(np.prod(working.scale))
    labels = process_block(read_flows(job, needed), masks, job.niter, round(masks.min_size * volume))
    return labels[np.ix_(*(i - p.start for i, p in zip(nearest, needed, strict=True)))]


def _cut_by_halo(labels: LabelArray, block: Block, shape: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """Labels that reach both into the core and to an edge of the padded block inside the image."""
    edges = []
    for axis, part in enumerate(block.padded):
        if part.start > 0:
            edges.append(labels.take(0, axis=axis).ravel())
        if part.stop < shape[axis]:
            edges.append(labels.take(-1, axis=axis).ravel())
    if not edges:
        return np.zeros(0, np.uint32)
    return np.intersect1d(np.concatenate(edges), labels[block.core_in_padded])


def label_block(number: int, job: Job) -> dict[str, Any]:
    """Task: label one block; with an automatic halo, look further round where a cell is cut by it."""
    grid = job.blocks
    block = grid.at(grid.index_of(number))
    if not job.may_hold_cells(block.padded):
        job.store.save(f"{job.labels}/objects/{number}", np.array([0, 1], np.int64))
        return {"peak": peak_memory()}
    growths = HALO_GROWTHS if job.settings.masks.halo == "auto" else (1,)
    for growth in growths:
        grown = grid.at(block.index, tuple(h * growth for h in grid.halo))
        labels = _labels_of(job, grown.padded)
        cut = _cut_by_halo(labels, grown, grid.shape)
        n_cut = int(np.count_nonzero(cut))
        if n_cut == 0:
            break
    inner = tuple(slice(p.start - q.start, p.stop - q.start) for p, q in zip(block.padded, grown.padded, strict=True))
    labels, first = _keep_core_objects(np.ascontiguousarray(labels[inner]), block, grid.shape)
    where = tuple(slice(0, n) for n in labels.shape)
    job.store.open(f"{job.labels}/labels.zarr")[(number, *where)] = labels
    job.store.save(f"{job.labels}/objects/{number}", np.concatenate([[n_cut, 0], first]))
    return {"peak": peak_memory()}


def _keep_core_objects(
    labels: LabelArray, block: Block, shape: tuple[int, ...]
) -> tuple[LabelArray, npt.NDArray[np.int64]]:
    """Labels 1..n of the objects with pixels in the core, in the order of their first pixel there,
    and that pixel's position in the whole image in raster order."""
    core = labels[block.core_in_padded]
    pixels = np.flatnonzero(core)
    first_of = np.full(int(labels.max()) + 1, -1, np.int64)
    # Of equal indices the last assignment stays: backwards, that is the first pixel.
    first_of[core.ravel()[pixels[::-1]]] = pixels[::-1]
    present = np.flatnonzero(first_of >= 0)
    order = present[np.argsort(first_of[present])]
    table = np.zeros(first_of.size, np.uint32)
    table[order] = np.arange(1, order.size + 1, dtype=np.uint32)
    inside = np.unravel_index(first_of[order], core.shape)
    position = tuple(i + p.start for i, p in zip(inside, block.core, strict=True))
    return table[labels], np.ravel_multi_index(position, shape).astype(np.int64)


def run(job: Job, executor: Executor, progress: Progress) -> None:
    """Label the blocks that are missing."""
    grid = job.blocks
    chunks = tuple(min(512, n) for n in grid.padded_shape)
    job.store.create(
        f"{job.labels}/labels.zarr", (grid.n_blocks, *grid.padded_shape), (1, *chunks), "uint32", codec="zstd"
    )
    stage = f"{job.labels}/masks"
    done = job.store.done(stage)
    progress.start("masks", grid.n_blocks, len(done))
    todo = (number for number in range(grid.n_blocks) if number not in done)
    for number, record in executor.stream(label_block, todo, job):
        job.store.mark(stage, [number])
        progress.step(record["peak"])
