"""Stage 3: from flows, or with a function from pixels, to the cells of every block.

Reads
    ``flows.zarr`` under a block and its halo; with a function the image there.
Writes
    ``<labels>/labels.zarr``: local labels of the padded block, only of objects that reach into the
    core; ``<labels>/objects/<block>``: how many objects the halo cut, whether the block was skipped,
    then per object the first pixel it has in the core.
Parallel over
    Blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Executor, peak_memory
from .config import MasksConfig
from .cores import CORES
from .dynamics import finish_masks, gather_pixels
from .gpu import idle_device
from .grid import Block, Region, interpolate, samples_needed
from .inputs import channels_of
from .job import CELLPROB_FLOOR, Job
from .planes import plane_axes, read_channels, refuse_missing
from .progress import Progress
from .segmenters import Segmenter, drop_small

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


def process_block(values: FloatArray, masks: MasksConfig, niter: int, device: str = "cpu") -> npt.NDArray[np.int32]:
    """Gather the pixels of one padded block into objects, none dropped yet.

    Parameters
    ----------
    values : array of float32, shape (ndim + 1, *spatial)
        Unit flow per axis and cell logit, at the size the flows are followed at.
    masks : MasksConfig
        Thresholds.
    niter : int
        Steps at most, in pixels of `values`.
    device : str
        Where to follow them.

    Returns
    -------
    gathered : array of int32, shape (*spatial)
        One label per object in no particular order, 0 background.
    """
    threshold = masks.cellprob_threshold
    return gather_pixels(values[:-1], values[-1], cellprob_threshold=threshold, niter=niter, cores=CORES, device=device)


def _values_of(job: Job, region: Region) -> tuple[FloatArray, list[npt.NDArray[np.int64]] | None]:
    """Network output for a region of level 0 at the size the flows are followed at, and for each
    pixel of the region the one of the output that is nearest, None if they are the same."""
    working = job.working
    coordinates = [working.from_image(p.start, p.stop, axis) for axis, p in enumerate(region)]
    if job.settings.masks.resample:
        needed = tuple(samples_needed(c, n) for c, n in zip(coordinates, working.shape, strict=True))
        positions = [(c, n, p.start) for c, n, p in zip(coordinates, working.shape, needed, strict=True)]
        return np.ascontiguousarray(interpolate(read_flows(job, needed), positions)), None
    nearest = [
        np.clip(np.floor(c + 0.5).astype(np.int64), 0, n - 1) for c, n in zip(coordinates, working.shape, strict=True)
    ]
    needed = tuple(slice(int(i[0]), int(i[-1]) + 1) for i in nearest)
    return read_flows(job, needed), [i - p.start for i, p in zip(nearest, needed, strict=True)]


def _labels_of(job: Job, block: Block) -> tuple[LabelArray, Block, int]:
    """Labels of a block with its halo, the block with the halo it took, and the objects that cut.

    Whether an object is cut is asked, and counted, before any is dropped: one that is cut off disagrees
    with the flow and would be dropped for that alone. With an automatic halo the block is then seen
    with a larger one; what is still cut is kept whatever its flow, for the stitcher to link.
    """
    grid, masks = job.blocks, job.settings.masks
    for grown in _growing(job, block):
        values, nearest = _values_of(job, grown.padded)
        with idle_device(job.device) as device:
            gathered = process_block(values, masks, job.niter, device)
        cut = _cut_by_halo(_at_pixels(gathered, nearest), grown, grid.shape)
        if not cut.size:
            break
    # Without resampling objects are measured on the network's grid.
    min_size = masks.min_size if nearest is None else round(masks.min_size * float(np.prod(job.working.scale)))
    threshold = masks.flow_threshold
    with idle_device(job.device) as device:
        finished = finish_masks(
            gathered, values[:-1], flow_threshold=threshold, min_size=min_size, spared=cut, cores=CORES, device=device
        )
    return _at_pixels(finished, nearest), grown, cut.size


def _growing(job: Job, block: Block) -> Iterator[Block]:
    """The block with its halo, then with larger ones if the halo is automatic."""
    grid = job.blocks
    for growth in HALO_GROWTHS if job.settings.masks.halo == "auto" else HALO_GROWTHS[:1]:
        yield grid.at(block.index, tuple(h * growth for h in grid.halo))


def _labels_by_function(job: Job, segmenter: Segmenter, block: Block) -> tuple[LabelArray, Block, int]:
    """As `_labels_of`, by a function of the pixels."""
    image, shape = job.image, job.shape
    for grown in _growing(job, block):
        if job.settings.survey.missing_chunks == "refuse":
            refuse_missing(image, 0, grown.padded, channels_of(job.inputs))
        if segmenter.takes_all_channels:
            pixels = read_channels(image, grown.padded)
        else:
            pixels = job.inputs[0].read(image, 0, grown.padded)
        if not image.is_shippable:
            pixels = pixels.copy()  # the function may write into it, and this may be the caller's own array
        region = ", ".join(f"{a} {p.start}:{p.stop}" for a, p in zip(plane_axes(image), grown.padded, strict=True))
        labels = segmenter.label(pixels, f"block {block.index} ({region})", job.store)
        if _cut_by_halo(labels, grown, shape).size == 0:
            break
    labels = drop_small(labels, job.settings.masks.min_size)
    return labels, grown, _cut_by_halo(labels, grown, shape).size


def _at_pixels(labels: Any, nearest: list[npt.NDArray[np.int64]] | None) -> Any:
    """Labels at the pixels of level 0."""
    return labels if nearest is None else labels[np.ix_(*nearest)]


def _cut_by_halo(labels: Any, block: Block, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Labels that reach both into the core and to an edge of the padded block inside the image."""
    edges = []
    for axis, part in enumerate(block.padded):
        if part.start > 0:
            edges.append(labels.take(0, axis=axis).ravel())
        if part.stop < shape[axis]:
            edges.append(labels.take(-1, axis=axis).ravel())
    is_at_edge = np.zeros(int(labels.max(initial=0)) + 1, np.bool_)
    for edge in edges:
        is_at_edge[edge] = True
    is_at_edge[0] = False
    core = labels[block.core_in_padded]
    return np.unique(core[is_at_edge[core]])


def label_block(number: int, job: Job) -> dict[str, Any]:
    """Task: label one block and keep what reaches into its core."""
    grid = job.blocks
    block = grid.at(grid.index_of(number))
    if not any(job.may_hold_cells([block.padded])):
        job.store.save(f"{job.labels}/objects/{number}", np.array([0, 1], np.int64))
        return {"peak": peak_memory()}
    segmenter = job.segmenter
    labels, grown, n_cut = _labels_of(job, block) if segmenter is None else _labels_by_function(job, segmenter, block)
    inner = tuple(slice(p.start - q.start, p.stop - q.start) for p, q in zip(block.padded, grown.padded, strict=True))
    labels, first = _keep_core_objects(np.ascontiguousarray(labels[inner]), block, grid.shape)
    where = tuple(slice(0, n) for n in labels.shape)
    job.store.open(f"{job.labels}/labels.zarr")[(number, *where)] = labels
    job.store.save(f"{job.labels}/objects/{number}", np.concatenate([[n_cut, 0], first]))
    if job.settings.masks.max_size:
        sizes = np.bincount(labels[block.core_in_padded].ravel(), minlength=first.size + 1)
        job.store.save(f"{job.labels}/sizes/{number}", sizes[1:])
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
