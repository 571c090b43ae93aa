"""Stage 3: from flows, or with a function from pixels, to the cells of every block.

Reads
    ``flows.zarr`` under a block and its halo; with a function the image there.
Writes
    ``<labels>/labels.zarr``: local labels of the padded block, only of objects that reach into the
    core; ``<labels>/objects/<block>``: how many objects the halo cut, whether the block was skipped,
    then per object the first pixel it has in the core. Where planes are stitched, labels are of the parts
    of objects in one plane, and ``<labels>/links/<block>`` says which belong together.
Parallel over
    Blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .blend import add_half, cleared
from .cluster import Executor, peak_memory
from .config import MasksConfig
from .cores import CORES
from .dynamics import finish_masks, gather_pixels
from .frames import frame_region, read_channels, refuse_missing
from .gpu import idle_device
from .grid import (
    Block,
    Index,
    Region,
    WorkingGrid,
    interpolate,
    overlap,
    region_shape,
    region_text,
    samples_needed,
    shift,
)
from .inputs import channels_of
from .job import CELLPROB_FLOOR, Job, has_size_limits
from .links import link_planes
from .meters import meter, metered
from .objects import first_pixels, look_up
from .progress import Progress
from .reach import SMOOTHING_REACH, grown_blocks, smoothing, smoothing_reach
from .segmenters import Segmenter, drop_small
from .tasks import Tasks

__all__ = ["block_around", "label_block", "label_region", "process_block", "read_flows", "run", "tasks_of"]

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.uint32]

CHUNK = {2: 768, 3: 128}
"""Side of a chunk of the stored labels at most, by the number of axes that objects extend along."""


@metered("read")
def read_flows(job: Job, frame: Index, region: Region) -> FloatArray:
    """The blended network output on a region of the working grid, summed over the orientations of its planes.

    Parameters
    ----------
    job : Job
        The run.
    frame : tuple of int
        Which of the frames.
    region : tuple of slice
        In working pixels, inside the grid.

    Returns
    -------
    values : array of float32, shape (ndim + 1, *shape of region)
        Flow per axis, of unit length in a picture, and cell logit.
    """
    moment = job.moment_of(frame)
    values: FloatArray = cleared((len(region) + 1, *region_shape(region)))
    sheets = [sheet for sheet in job.sheets if sheet.moment == moment]
    for sheet in sheets:
        flows, lattice = job.store.open(sheet.name), sheet.lattice
        for chunk in lattice.chunks_meeting(region):
            piece = lattice.piece_region(chunk)
            shared = overlap(region, piece)
            if shared is None:
                continue
            here, there = (shift(shared, tuple(p.start for p in of)) for of in (region, piece))
            found = flows[(*sheet.index_of(frame), *chunk, slice(None), *there)]
            plane, top, left = ([0] + [part.start for part in here])[-3:]
            for target, source in zip((*sheet.planes, -1), found, strict=True):
                into = values[target].reshape(-1, *values.shape[-2:])
                add_half(source.reshape(-1, *source.shape[-2:]), into, plane, top, left)
    values[-1] += np.float32(CELLPROB_FLOOR * len(sheets))
    return values


def process_block(values: FloatArray, masks: MasksConfig, niter: int, device: str = "cpu") -> npt.NDArray[np.int32]:
    """Gather the pixels of one padded block into objects, none dropped yet.

    Parameters
    ----------
    values : array of float32, shape (ndim + 1, *spatial)
        Flow per axis and cell logit, at the size the flows are followed at.
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


def _values_of(job: Job, frame: Index, region: Region) -> tuple[FloatArray, list[npt.NDArray[np.int64]] | None]:
    """Network output for a region of a frame at the size the flows are followed at, and for each
    pixel of the region the one of the output that is nearest, None if they are the same."""
    working, masks = job.working(job.moment_of(frame)), job.settings.masks
    if masks.resample:
        return _resampled(job, working, frame, region), None
    coordinates = [working.from_image(p.start, p.stop, axis) for axis, p in enumerate(region)]
    nearest = [
        np.clip(np.floor(c + 0.5).astype(np.int64), 0, n - 1) for c, n in zip(coordinates, working.shape, strict=True)
    ]
    needed = tuple(slice(int(i[0]), int(i[-1]) + 1) for i in nearest)

    def read(wide: Region) -> FloatArray:
        return read_flows(job, frame, wide)

    values = _smoothed(read, needed, working.shape, smoothing(job))
    places = (working.to_image(p.start, p.stop, axis) for axis, p in enumerate(needed))
    _hide(job, frame, values, [np.floor(at + 0.5).astype(np.int64) for at in places])
    return values, [i - p.start for i, p in zip(nearest, needed, strict=True)]


def _resampled(job: Job, working: WorkingGrid, frame: Index, region: Region) -> FloatArray:
    """Network output on the pixels of a region of level 0."""

    def read(wide: Region) -> FloatArray:
        coordinates = [working.from_image(p.start, p.stop, axis) for axis, p in enumerate(wide)]
        needed = tuple(samples_needed(c, n) for c, n in zip(coordinates, working.shape, strict=True))
        positions = [(c, n, p.start) for c, n, p in zip(coordinates, working.shape, needed, strict=True)]
        return np.ascontiguousarray(interpolate(read_flows(job, frame, needed), positions))

    values = _smoothed(read, region, working.image_shape, smoothing(job))
    for axis, scale in enumerate(working.scale):
        if scale != working.scale[-1]:
            # A step of one pixel of y and x is a smaller part of a thick plane.
            values[axis] *= np.float32(working.scale[-1] / scale)
    _hide(job, frame, values, [np.arange(p.start, p.stop) for p in region])
    return values


def _hide(job: Job, frame: Index, values: FloatArray, places: list[npt.NDArray[np.int64]]) -> None:
    """Make background of what the mask leaves out; `places` are the pixels of level 0 that the values lie on."""
    if job.mask is None:
        return
    inside = [np.clip(at, 0, n - 1) for at, n in zip(places, job.shape[len(frame) :], strict=True)]
    region = tuple(slice(int(at[0]), int(at[-1]) + 1) for at in inside)
    wanted = job.mask.at(frame_region(frame, region)).reshape(region_shape(region))
    values[-1][~wanted[np.ix_(*(at - at[0] for at in inside))]] = -np.inf


def _smoothed(read: Callable[[Region], FloatArray], region: Region, shape: Index, sigma: float) -> FloatArray:
    """A region of the flows, smoothed by what lies around it: the same wherever the region ends."""
    if not sigma:
        return read(region)
    from scipy.ndimage import gaussian_filter

    reach = smoothing_reach(sigma)
    wide = tuple(slice(max(0, p.start - reach), min(n, p.stop + reach)) for p, n in zip(region, shape, strict=True))
    values = read(wide)
    for flow in values[:-1]:
        flow[...] = gaussian_filter(flow, sigma, truncate=SMOOTHING_REACH)
    return np.ascontiguousarray(values[(slice(None), *shift(region, tuple(p.start for p in wide)))])


def _labels_of(job: Job, block: Block) -> tuple[LabelArray, int]:
    """Labels of a block with its halo, and the objects that its halo cuts.

    Whether an object is cut is asked, and counted, before any is dropped: one that is cut off disagrees
    with the flow and would be dropped for that alone. With an automatic halo the block is then seen
    with a larger one; what is still cut is kept whatever its flow, for the stitcher to link.
    """
    masks, is_flat, n = job.settings.masks, len(job.extent.flows) == 2, job.extent.n_flow_frames
    frame = tuple(p.start for p in block.core[:n])
    for grown in grown_blocks(job, block):
        values, nearest = _values_of(job, frame, grown.padded[n:])
        with idle_device(job.device) as device:
            gathered = process_block(values, masks, job.niter(job.moment_of(frame)), device)
        cut = _cut_by_halo(_at_pixels(gathered, nearest), grown, job.shape, n)
        if not cut.size:
            break
    # Planes that are stitched may be parts of something large enough. Without resampling objects are measured on the
    # network's grid.
    min_size = 0 if job.extent.is_stitched else masks.min_size
    if nearest is not None:
        min_size = round(min_size * math.prod(job.working(job.moment_of(frame)).scale))
    # There is no such check in 3D: Cellpose has none.
    threshold = masks.flow_threshold if is_flat else 0.0
    with idle_device(job.device) as device:
        finished = finish_masks(
            gathered, values[:-1], flow_threshold=threshold, min_size=min_size, spared=cut, cores=CORES, device=device
        )
    return _inside(_at_pixels(finished, nearest), grown, block, n), cut.size


def _inside(labels: Any, grown: Block, block: Block, n_frames: int) -> Any:
    """Labels of the grown block as far as the block itself reaches."""
    inner = shift(block.padded[n_frames:], tuple(p.start for p in grown.padded[n_frames:]))
    return labels[inner]


def _labels_by_function(job: Job, segmenter: Segmenter, block: Block) -> tuple[LabelArray, int]:
    """As `_labels_of`, by a function of the pixels."""
    image, n = job.image, job.extent.n_flow_frames
    for grown in grown_blocks(job, block):
        if job.settings.survey.missing_chunks == "refuse":
            refuse_missing(image, 0, grown.padded, channels_of(job.inputs))
        inner = region_shape(grown.padded[n:])
        if segmenter.takes_all_channels:
            pixels = read_channels(image, grown.padded).reshape(-1, *inner)
        else:
            pixels = job.inputs[0].read(image, 0, grown.padded).reshape(inner)
        if not image.is_shippable:
            pixels = pixels.copy()  # the function may write into it, and this may be the caller's own array
        where = f"block {block.index} ({region_text(job.extent.axes, grown.padded)})"
        labels = segmenter.label(pixels, where, job.store)
        if job.mask is not None:
            labels = np.where(job.mask.at(grown.padded).reshape(inner), labels, np.uint32(0))
        if _cut_by_halo(labels, grown, job.shape, n).size == 0:
            break
    if not job.extent.is_stitched:
        labels = drop_small(labels, job.settings.masks.min_size)
    return _inside(labels, grown, block, n), _cut_by_halo(labels, grown, job.shape, n).size


def _at_pixels(labels: Any, nearest: list[npt.NDArray[np.int64]] | None) -> Any:
    """Labels at the pixels of level 0."""
    return labels if nearest is None else labels[np.ix_(*nearest)]


def _cut_by_halo(labels: Any, block: Block, shape: Index, n_frames: int) -> npt.NDArray[Any]:
    """Labels that reach both into the core and to an edge of the padded block inside the image."""
    edges = []
    for axis, (part, n) in enumerate(zip(block.padded[n_frames:], shape[n_frames:], strict=True)):
        if part.start > 0:
            edges.append(labels.take(0, axis=axis).ravel())
        if part.stop < n:
            edges.append(labels.take(-1, axis=axis).ravel())
    n_labels = int(labels.max(initial=0))
    is_at_edge = np.zeros(n_labels + 1, np.bool_)
    for edge in edges:
        is_at_edge[edge] = True
    return np.flatnonzero(is_at_edge & (first_pixels(labels[block.core_in_padded[n_frames:]], n_labels) >= 0))


def _planes_of(block: Block, axis: int) -> Iterator[Block]:
    """The planes of a block and its halo, one after the other."""
    for z in range(block.padded[axis].start, block.padded[axis].stop):
        here = slice(z, z + 1)
        core, padded = ((*of[:axis], here, *of[axis + 1 :]) for of in (block.core, block.padded))
        yield Block(block.index, core, padded)


def _label(job: Job, block: Block) -> tuple[LabelArray, int]:
    """Labels of a block with its halo, shape of its padded part, and how many objects are cut."""
    segmenter = job.segmenter
    labels, n_cut = _labels_of(job, block) if segmenter is None else _labels_by_function(job, segmenter, block)
    return np.ascontiguousarray(labels).reshape(region_shape(block.padded)), n_cut


def _label_planes(job: Job, block: Block) -> tuple[LabelArray, int]:
    """The same of planes that are to be stitched, each with labels of its own."""
    labels, total, n_cut = np.zeros(region_shape(block.padded), np.uint32), 0, 0
    axis = job.extent.n_object_frames
    for plane in _planes_of(block, axis):
        if not any(job.may_hold_cells([plane.padded])):
            continue
        found, n_cut_here = _label(job, plane)
        is_core = block.core[axis].start <= plane.core[axis].start < block.core[axis].stop
        n_cut += n_cut_here if is_core else 0
        numbered = np.where(found > 0, found + np.uint32(total), np.uint32(0))
        labels[shift(plane.padded, tuple(p.start for p in block.padded))] = numbered
        total += int(found.max(initial=0))
    return labels, n_cut


def label_block(number: int, job: Job) -> dict[str, Any]:
    """Task: label one block and keep what reaches into its core."""
    grid, masks = job.blocks, job.settings.masks
    block = grid.at(grid.index_of(number))
    if not any(job.may_hold_cells([block.padded])):
        job.store.save(f"{job.labels}/objects/{number}", np.array([0, 1], np.int64))
        return {"peak": peak_memory()}
    links = np.zeros((0, 2), np.uint32)
    if job.extent.is_stitched:
        labels, n_cut = _label_planes(job, block)
        volume = labels.reshape(labels.shape[job.extent.n_object_frames :])
        links = link_planes(volume, float(masks.stitch_threshold or 0), masks.stitch_gap)
    else:
        labels, n_cut = _label(job, block)
    labels, first, links = _keep_core_objects(labels, block, grid.shape, links)
    where = tuple(slice(0, n) for n in labels.shape)
    with meter("write"):
        job.store.open(f"{job.labels}/labels.zarr")[(number, *where)] = labels
    job.store.save(f"{job.labels}/objects/{number}", np.concatenate([[n_cut, 0], first]))
    if job.extent.is_stitched:
        job.store.save(f"{job.labels}/links/{number}", links)
    if has_size_limits(job):
        sizes = np.bincount(labels[block.core_in_padded].ravel(), minlength=first.size + 1)
        job.store.save(f"{job.labels}/sizes/{number}", sizes[1:])
    return {"peak": peak_memory()}


def block_around(job: Job, region: Region) -> Block:
    """A region of the image as a block, with the halo that blocks have; of one frame."""
    grid, n = job.blocks, job.extent.n_flow_frames
    block = grid.around((0,) * len(region), region, grid.halo)
    return Block(block.index, region, (*region[:n], *block.padded[n:]))


def label_region(_: int, region: Region, job: Job) -> LabelArray:
    """Task: the labels that a run gives a region, but for their numbers; of planes that are stitched, before that.

    Parameters
    ----------
    region : tuple of slice
        Of one frame, along the axes of `Job.shape`.
    job : Job
        After the survey; the flows that `reach.Reach.under` names for `block_around` this region are there.

    Returns
    -------
    labels : array of uint32, shape of `region`
        1..n in raster order of the first pixel here, 0 background.

    Notes
    -----
    Nothing depends on where the region ends but the size of an object that reaches past the halo: that is compared
    with ``max_size`` as far as it is seen.
    """
    block, largest = block_around(job, region), job.settings.masks.max_size
    labels = _label(job, block)[0]
    if largest and not job.extent.is_stitched:
        is_kept = np.bincount(labels.ravel()) <= largest
        labels = np.where(is_kept[labels], labels, np.uint32(0))
    labels = _keep_core_objects(labels, block, job.shape, np.zeros((0, 2), np.uint32))[0]
    return np.ascontiguousarray(labels[block.core_in_padded])


def _keep_core_objects(
    labels: LabelArray, block: Block, shape: Index, links: npt.NDArray[np.uint32]
) -> tuple[LabelArray, npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """Labels 1..n of the objects with pixels in the core, in the order of their first pixel there, and that pixel's
    position in the whole image in raster order.

    What is linked to one of them is kept as well, after them and with position -1. With them the links that are left.
    """
    core = labels[block.core_in_padded]
    first_of = first_pixels(core, int(labels.max()))
    present = np.flatnonzero(first_of >= 0)
    order = present[np.argsort(first_of[present])]
    links = links[(first_of[links] >= 0).any(axis=1)]
    beside = np.setdiff1d(links, present)
    table = np.zeros(first_of.size, np.uint32)
    table[np.concatenate([order, beside])] = np.arange(1, order.size + beside.size + 1, dtype=np.uint32)
    inside = np.unravel_index(first_of[order], core.shape)
    position = np.ravel_multi_index(tuple(i + p.start for i, p in zip(inside, block.core, strict=True)), shape)
    return look_up(table, labels), np.concatenate([position, np.full(beside.size, -1)]).astype(np.int64), table[links]


def tasks_of(job: Job, progress: Progress, begin: Callable[[], None] = lambda: None) -> Tasks:
    """The blocks that are missing; `begin` is called before the first."""
    grid = job.blocks
    side = CHUNK[len(job.extent.objects)]
    chunks = tuple(-(-n // -(-n // side)) for n in grid.padded_shape)  # of one size: a last one would be stored whole
    job.store.create(
        f"{job.labels}/labels.zarr", (grid.n_blocks, *grid.padded_shape), (1, *chunks), "uint32", codec="zstd"
    )
    stage = f"{job.labels}/masks"
    done = job.store.done(stage)

    def start() -> None:
        begin()
        progress.start("masks", grid.n_blocks, len(done), beside=True)

    def took(number: int, record: dict[str, Any]) -> None:
        job.store.mark(stage, [number])
        progress.step(record["peak"], "masks")

    todo = (number for number in range(grid.n_blocks) if number not in done)
    return Tasks(
        "masks", label_block, todo, (job,), where=lambda n: grid.text(job.extent.axes, n), begin=start, took=took
    )


def run(job: Job, executor: Executor, progress: Progress) -> None:
    """Label the blocks that are missing."""
    executor.work(tasks_of(job, progress))
