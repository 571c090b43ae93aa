"""What a run needs, told before it starts; and the refusal of one that cannot fit.

Memory is an upper bound: what a process has with everything loaded, and for every thread that works
in it the largest task there is. Tasks are bounded by the block, by the regions of survey and publish
(2048 px) and by the chunks of the image, which are read whole; nothing but the links between blocks
grows with the image. Disk is what a dense image takes, with a margin.

The factors were measured task by task (``scripts/bench/memory.py``: two cores, CPU, dense synthetic
slides with cells of 8.5 to 34 px) and rounded up by a quarter or more; run it again after changing a
stage.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cluster import Crew, n_cores
from .config import Settings
from .errors import OutputError, SettingsError
from .flows import PIXELS_AT_ONCE, group_shape
from .frames import Extent, anisotropy_of, extent_of, label_axes, label_shape
from .grid import BlockGrid, Index, WorkingGrid
from .images import RECENT_BYTES, Image
from .inputs import Input, channels_of
from .job import N_OUTPUTS, Sheet, block_of, grid_of, halo_of, sheets_of
from .networks.batches import tile_memory
from .networks.models import Model
from .rates import pixels_per_second, tiles_per_second
from .regions import REGION as PUBLISH_REGION
from .regions import region_sides
from .runs import Place
from .segmenters import Segmenter
from .stitch import merge_memory
from .survey import region_to_survey
from .working import pixels_to_read, source_level

__all__ = ["Needs", "Preflight", "size_text"]

MIB = 2**20

PROCESS_BYTES = 850 * MIB
"""A process in which torch, numba's kernels, zarr and a network are loaded; some 720 MiB."""
CUDA_BYTES = 3072 * MIB
"""More of that with a GPU: its libraries, and pinned tiles; a guess, not measured. Its own memory is not counted here:
batches are chosen to fit it, see `networks.batches`."""
TASK_BYTES = 48 * MIB
"""Of any task beside its arrays: buffers of codecs, the heap's slack; up to 30 MiB."""
SURVEY_PIXEL = 28
"""Per pixel of a region of the survey, besides the image's own; 19 to 21."""
SURVEY_VOXEL = 12
"""Per pixel of a region of several planes, of which one is measured at a time."""
FLOWS_BYTES = 64 * MIB
"""Of the tiles of a chunk and what comes of them."""
PASS = 3.0
"""Of what the tensors of a forward pass hold on a CPU, whose kernels take more; with cpsam 2.8."""
LOADING = 2.25
"""Of the size of a transformer's file, to load it: as it is stored, and as it is used; 2.03."""
FLOWS_PIXEL = 16
"""Per pixel of the level that tiles are read from, besides the image's own."""
BLENDED_PIXEL = 32
"""Per pixel of the planes of a volume that are blended together."""
MASKS_PIXEL = {2: 100, 3: 44}
"""Per pixel that flows are followed in, of a block with its halo, by the number of axes; in planes 58 to 66, 90 in
small blocks; in volumes 35 to 40, that of the network's grid included."""
MASKS_WORKING_PIXEL = {2: 32, 3: 20}
"""Per pixel of the network's grid there; 23 in planes."""
SMOOTHED_PIXEL = 24
"""More of it if flows are smoothed."""
STITCHED_PIXEL = 24
"""Per pixel of a block of planes that are stitched."""
FUNCTION_PIXEL = 24
"""Per pixel of a block with its halo for labels; what the function itself takes nobody knows."""
STITCH_PIXEL = 160
"""Per pixel that two blocks share."""
PUBLISH_PIXEL = 60
"""Per pixel of a region that is published; 30 to 45 with one channel of uint16."""
PUBLISH_CHANNEL_PIXEL = 20
"""Per pixel and channel there, besides the image's own."""
SHARD_PIXEL = 14
"""Per pixel of a shard, which is put together from regions and written whole; 12 at most, 5 of real labels."""
SMALLEST_BLOCK = 64
"""That is ever advised."""
LARGE_CHUNK = 64 * MIB

READ_AT_ONCE = 10
"""Chunks that zarr decodes at once."""
CHUNK_COPIES = 2
"""A chunk as stored and as decoded."""

LABELS_SHARE = 0.1
"""Compressed labels of their plain size; 0.02 (scratch) and 0.034 (published) on dense slides."""
OBJECT_BYTES = 250
"""Of records of one object in the scratch; 160 with one channel."""
ROW_BYTES = 120
"""Of one object in the table; 61 to 77."""
SAMPLES_BYTES = 24 * MIB
"""Of the samples that the percentiles of one input are from, at most."""


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes
    ----------
    diameter : float or None
        Pixels of level 0; None if it is not known: then these are the needs whatever it is.
    halo : int
        Pixels around a block.
    n_blocks, n_tiles : int
        Blocks, and tiles of the network.
    n_pixels : int
        That masks are made of: of all blocks with their halos, at the size flows are followed at.
    working_shape : tuple of int
        Of the network's grid; empty if that is not known or there is no network.
    scratch_bytes, output_bytes : int
        On disk, for an image full of cells.
    scratch_bytes_max : int
        If nothing could be compressed.
    n_files : int
        Of the labels and their pyramid; where nothing is there is no file.
    task_bytes : dict of str to int
        Memory of the largest task of each stage.
    process_bytes : int
        Memory of a worker beside its tasks.
    n_workers, n_threads : int
        Processes, and tasks at once in each.
    n_on_gpu : int
        Tasks of a network on a GPU at once in each that has one; these are not counted above.
    does_both : bool
        Whether a process does these and others at once.
    client_bytes : int
        Memory of the process that hands out the work, if it does none itself.
    """

    diameter: float | None
    halo: int
    n_blocks: int
    n_tiles: int
    n_pixels: int
    working_shape: Index
    scratch_bytes: int
    output_bytes: int
    scratch_bytes_max: int
    n_files: int
    task_bytes: dict[str, int]
    process_bytes: int
    n_workers: int
    n_threads: int
    n_on_gpu: int
    does_both: bool
    client_bytes: int

    @property
    def largest_task(self) -> str:
        """The stage whose tasks need most."""
        return max(self.task_bytes, key=lambda stage: self.task_bytes[stage])

    @property
    def worker_bytes(self) -> int:
        """Most memory of one worker."""
        others = self.n_threads * self.task_bytes[self.largest_task]
        on_gpu = self.n_on_gpu * self.task_bytes.get("flows", 0)
        return self.process_bytes + (others + on_gpu if self.does_both else max(others, on_gpu))

    @property
    def memory_bytes(self) -> int:
        """Most memory of all processes together."""
        return self.client_bytes + self.n_workers * self.worker_bytes

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        sums = {"worker_bytes": self.worker_bytes, "memory_bytes": self.memory_bytes}
        return {**dataclasses.asdict(self), **sums, "largest_task": self.largest_task}


@dataclass(frozen=True)
class Preflight:
    """A run that has not begun.

    Parameters
    ----------
    image, inputs, settings, labeller, place
        The run.
    crew : Crew
        Who works.
    device : str
        ``"cpu"`` or ``"cuda"``.
    """

    image: Image
    inputs: tuple[Input, ...]
    settings: Settings
    labeller: Model | Segmenter
    place: Place
    crew: Crew
    device: str = "cpu"

    def needs(self, diameter: float | None) -> Needs:
        """Project what the run needs.

        Parameters
        ----------
        diameter : float or None
            Of the cells in pixels of level 0. None if it is not known: an automatic halo and flows then
            count for nothing, and the run needs at least what is returned.

        Returns
        -------
        needs : Needs
        """
        blocks, working = self._grids(diameter)
        shape = blocks.shape
        n_objects = 0 if diameter is None else math.ceil(math.prod(shape) / self._object_pixels(diameter))
        n_tiles, disk = 0, OBJECT_BYTES * n_objects
        if isinstance(self.labeller, Model):
            disk += len(self.inputs) * (min(SAMPLES_BYTES, 8 * math.prod(shape)) + math.prod(shape) // 200)
            for sheet in self._sheets(working):
                n_tiles += sheet.lattice.n_tiles * math.prod(sheet.frames)
                disk += 2 * math.prod(sheet.array_shape)
        labels = 4 * blocks.n_blocks * math.prod(blocks.padded_shape)
        on_disk = self.place.scratch is not None
        process = PROCESS_BYTES + RECENT_BYTES + (CUDA_BYTES if self.device == "cuda" else 0) + self._loading_bytes()
        return Needs(
            diameter=diameter,
            halo=blocks.halo[-1],
            n_blocks=blocks.n_blocks,
            n_tiles=n_tiles,
            n_pixels=self._pixels_followed(blocks, working),
            working_shape=() if working is None else working.shape,
            scratch_bytes=disk + int(LABELS_SHARE * labels) if on_disk else 0,
            scratch_bytes_max=disk + labels if on_disk else 0,
            n_files=0 if self.place.plan is None else self.place.plan.n_files,
            output_bytes=self._output_bytes(n_objects),
            task_bytes=dict(self._tasks(blocks, working, n_objects)),
            # Without a scratch everything stays in this process.
            process_bytes=process if on_disk else process + disk + labels + 4 * math.prod(shape),
            n_workers=self.crew.n_workers,
            n_threads=self.crew.n_threads,
            n_on_gpu=self.crew.n_on_gpu,
            does_both=self.crew.does_both,
            client_bytes=0 if self.crew.in_process else PROCESS_BYTES,
        )

    def settled(self, diameter: float | None) -> Preflight:
        """The same with a number for the side of the blocks, if that is left to us: at least the halo, and as large as
        fits in memory, but no larger than is of use."""
        if self.settings.masks.block != "auto":
            return self
        usual, halo = block_of(self.settings, self._extent), self.needs(diameter).halo
        sides = [side for side in (usual, usual * 3 // 4, usual // 2, usual * 3 // 8, usual // 4) if side >= halo]
        for side in sides:
            settled = self._with_block(side)
            if settled._fits(diameter):
                return settled
        return self._with_block(max(usual, halo))

    def _with_block(self, side: int) -> Preflight:
        """The same with blocks of this side."""
        masks = dataclasses.replace(self.settings.masks, block=side)
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, masks=masks))

    def _loading_bytes(self) -> int:
        """Memory to load a network that is large beside all else."""
        if isinstance(self.labeller, Segmenter) or self.labeller.architecture == "unet":
            return 0
        return int(LOADING * self.labeller.path.stat().st_size)

    @property
    def _extent(self) -> Extent:
        return extent_of(self.image, self.settings)

    @property
    def _anisotropy(self) -> float:
        return anisotropy_of(self.image, self.settings) or 1.0

    def _object_pixels(self, diameter: float) -> float:
        """Pixels of an object that is counted, in an image full of them: where planes are stitched, of a plane."""
        is_3d = len(self._extent.flows) == 3
        return diameter**3 / self._anisotropy if is_3d else diameter**2

    def _grids(self, diameter: float | None) -> tuple[BlockGrid, WorkingGrid | None]:
        """The blocks, and the network's grid if there is one and it is known."""
        shape, masks, extent = label_shape(self.image), self.settings.masks, self._extent
        halo = 0 if diameter is None and masks.halo == "auto" else halo_of(self.settings, diameter)
        blocks = grid_of(shape, self.settings, extent, halo, self._anisotropy)
        if diameter is None or isinstance(self.labeller, Segmenter):
            return blocks, None
        inner = shape[extent.n_flow_frames :]
        return blocks, WorkingGrid.for_diameter(inner, diameter, self.labeller.diam_mean, self._anisotropy)

    def _sheets(self, working: WorkingGrid | None) -> list[Sheet]:
        """The flows, none if the network's grid is not known; all time points as one."""
        if working is None or isinstance(self.labeller, Segmenter):
            return []
        shape = label_shape(self.image)
        return sheets_of([working], self._extent, shape, self.labeller.tile, self.labeller.stride)

    def _pixels_followed(self, blocks: BlockGrid, working: WorkingGrid | None) -> int:
        """Pixels of all blocks with their halos, at the size flows are followed at."""
        parts = zip(blocks.counts, blocks.halo, blocks.shape, strict=True)
        n_pixels = math.prod(n + 2 * halo * (count - 1) for count, halo, n in parts)
        if working is None or self.settings.masks.resample:
            return n_pixels
        return math.ceil(n_pixels * math.prod(working.scale))

    def seconds(self, diameter: float) -> dict[str, float]:
        """How long network and masks take if cells are everywhere, at the rates of this machine, measured now; nothing
        of a function."""
        if isinstance(self.labeller, Segmenter):
            return {}
        needs, crew = self.needs(diameter), self.crew
        n_at_once = crew.n_on_gpu or crew.n_threads
        tiles = tiles_per_second(self.labeller, self.device, n_at_once) * (crew.n_network or crew.n_workers)
        pixels = pixels_per_second(len(self._extent.flows), crew.n_threads) * crew.n_workers
        return {"flows": needs.n_tiles / tiles, "masks": needs.n_pixels / pixels}

    def _output_bytes(self, n_objects: int) -> int:
        """Labels, pyramid and table on disk."""
        plan = self.place.plan
        if plan is None:
            return 0
        n_pixels = sum(math.prod(plan.level_shape(level)) for level in range(plan.n_levels))
        return ROW_BYTES * n_objects + int(LABELS_SHARE * 4 * n_pixels)

    def _tasks(self, blocks: BlockGrid, working: WorkingGrid | None, n_objects: int) -> Iterator[tuple[str, int]]:
        """The stages, and the most memory a task of each takes."""
        image, extent = self.image, self._extent
        padded = self._largest_padded(blocks)
        if isinstance(self.labeller, Segmenter):
            n_channels = len(channels_of(self.inputs))
            n_pixels = math.prod(padded)
            yield "masks", TASK_BYTES + FUNCTION_PIXEL * n_pixels + _reading(image, 0, padded, n_channels)
        else:
            yield "survey", _survey_bytes(image, extent, self.inputs)
            if working is not None:
                tiles = [_tiles_bytes(image, self.inputs, sheet, working) for sheet in self._sheets(working)]
                passes = int(PASS * tile_memory(self.labeller)) if self.device == "cpu" else 0
                yield "flows", FLOWS_BYTES + passes + max(tiles)
            yield "masks", TASK_BYTES + self._masks_bytes(padded, working)
        yield "stitch", TASK_BYTES + _stitch_bytes(blocks, n_objects, self.crew.n_threads)
        plan, shape = self.place.plan, blocks.shape
        chunks = plan.level_chunks(0) if plan is not None else (1,) * (len(shape) - 2) + (PUBLISH_REGION,) * 2
        region = tuple(map(min, region_sides(chunks, shape), shape))
        per_pixel = PUBLISH_PIXEL + PUBLISH_CHANNEL_PIXEL * image.n_channels
        shards = None if plan is None else plan.level_shards(0)
        sharded = 0 if shards is None else SHARD_PIXEL * math.prod(map(min, shards, shape))
        measured = per_pixel * math.prod(region) + _reading(image, 0, region, image.n_channels)
        yield "publish", TASK_BYTES + measured + sharded

    def _largest_padded(self, blocks: BlockGrid) -> Index:
        """Sides of what a mask task works on at once: with an automatic halo a block is seen with a larger one where
        a cell is cut, here with twice as much."""
        n, times = self._extent.n_flow_frames, 2 if self.settings.masks.halo == "auto" else 1
        sides = zip(blocks.shape, blocks.block, blocks.halo, strict=True)
        grown = tuple(min(side, block + 2 * times * halo) for side, block, halo in sides)
        return (*(1,) * n, *grown[n:])

    def _masks_bytes(self, padded: Index, working: WorkingGrid | None) -> int:
        """Memory from flows to labels."""
        extent, masks = self._extent, self.settings.masks
        n_pixels = math.prod(padded)
        n_working = 0 if working is None else math.ceil(n_pixels * math.prod(working.scale))
        n_followed = n_pixels if masks.resample else n_working
        followed, on_grid = MASKS_PIXEL[len(extent.flows)], MASKS_WORKING_PIXEL[len(extent.flows)]
        needed = followed * n_followed + on_grid * n_working + 8 * n_pixels
        if masks.flow3d_smooth:
            needed += SMOOTHED_PIXEL * n_followed
        if extent.is_stitched:
            needed += STITCHED_PIXEL * math.prod(self._grids(None)[0].padded_shape)
        return needed

    def check(self, diameter: float | None) -> None:
        """Refuse a run that needs more memory or disk than there is.

        Parameters
        ----------
        diameter : float or None
            As for `needs`.

        Raises
        ------
        SettingsError
            If it needs more memory than a worker or this machine has.
        OutputError
            If labels or scratch need more disk than is free. A scratch in which flows or masks have begun is not
            checked: what is missing is not known without counting all that is there.
        """
        needs, crew = self.needs(diameter), self.crew
        if crew.worker_limit is not None and needs.worker_bytes > crew.worker_limit:
            who, limit = "a worker", f"worker limit {size_text(crew.worker_limit)}"
            what = f"needs {size_text(needs.worker_bytes)}"
        elif crew.machine_bytes is not None and needs.memory_bytes > crew.machine_bytes:
            who = "this process" if crew.in_process else f"{crew.n_workers} workers"
            limit = f"this machine has {size_text(crew.machine_bytes)}"
            what = f"need{'s' if crew.in_process else ''} {size_text(needs.memory_bytes)}"
        else:
            self._check_disk(needs)
            return
        stage = needs.largest_task
        block = block_of(self.settings, self._extent)
        where = f", block {block} with halo {needs.halo}" if stage == "masks" else ""
        raise SettingsError(
            f"{who} of {crew.n_threads} threads {what}, {limit} (stage {stage}{where}: "
            f"{size_text(needs.task_bytes[stage])} a thread); {self._advice(diameter)}."
        )

    def _fits(self, diameter: float | None) -> bool:
        """Whether the memory is enough."""
        needs, crew = self.needs(diameter), self.crew
        is_enough = crew.worker_limit is None or needs.worker_bytes <= crew.worker_limit
        return is_enough and (crew.machine_bytes is None or needs.memory_bytes <= crew.machine_bytes)

    def _advice(self, diameter: float | None) -> str:
        """What would make it fit: smaller blocks, fewer workers, smaller chunks of the image, or more memory."""
        options = []
        lowest, present = max(self.needs(diameter).halo, SMALLEST_BLOCK), block_of(self.settings, self._extent)
        for block in (present // 2**k for k in range(1, present.bit_length())):
            if block >= lowest and self._with_block(block)._fits(diameter):
                options.append(f"lower --block to {block}")
                break
        n_made_here = self.crew.n_workers if self.crew.worker_limit is None else 0
        for n_workers in range(n_made_here - 1, 0, -1):
            # Processes made here share the cores: fewer of them have more threads.
            crew = dataclasses.replace(self.crew, n_workers=n_workers, n_threads=max(1, n_cores() // n_workers))
            if dataclasses.replace(self, crew=crew)._fits(diameter):
                options.append(f"give --workers {n_workers}")
                break
        if self.place.scratch is None:
            options.append("give an output (-o), so that what is in between lies on a disk")
        chunks = self.image.levels[0].chunks
        is_read_whole = self.image.is_shippable and self.image.dtype.itemsize * math.prod(chunks) > LARGE_CHUNK
        if not options and is_read_whole:
            options.append(f"store the image in smaller chunks: those of shape {chunks} are read whole")
        return " or ".join(options) or "use a machine or workers with more memory"

    def _check_disk(self, needs: Needs) -> None:
        """Refuse labels or scratch that do not fit."""
        place = self.place
        if place.scratch is None or place.plan is None:
            return
        if (place.scratch / "flows.journal").exists() or any(place.scratch.glob("masks-*/masks.journal")):
            return
        wanted = [("the scratch", "--scratch", _existing(place.scratch), needs.scratch_bytes)]
        if isinstance(place.plan.root, Path):
            wanted.append(("the labels", "-o", _existing(place.plan.root), needs.output_bytes))
        disks: dict[int, list[tuple[str, str, Path, int]]] = {}
        for row in wanted:
            disks.setdefault(row[2].stat().st_dev, []).append(row)
        for rows in disks.values():
            needed, free = sum(row[3] for row in rows), shutil.disk_usage(rows[0][2]).free
            if needed > free:
                raise OutputError(
                    f"{' and '.join(row[0] for row in rows)} may take {size_text(needed)}, {rows[0][2]} has "
                    f"{size_text(free)} free; free some space or choose another disk "
                    f"({', '.join(row[1] for row in rows)})."
                )


def _survey_bytes(image: Image, extent: Extent, inputs: tuple[Input, ...]) -> int:
    """Memory to survey a region, an input at a time."""
    level, sides = region_to_survey(image, extent)
    read = SURVEY_PIXEL * math.prod(sides[-2:]) + (0 if math.prod(sides[:-2]) == 1 else SURVEY_VOXEL * math.prod(sides))
    return TASK_BYTES + read + _reading(image, level, sides, _most_channels(inputs))


def _most_channels(inputs: tuple[Input, ...]) -> int:
    """How many channels are read at once for one input."""
    return max(len(single.channels) for single in inputs)


def _tiles_bytes(image: Image, inputs: tuple[Input, ...], sheet: Sheet, working: WorkingGrid) -> int:
    """Memory for the tiles of a chunk: to read them, together or one by one, from the level just finer than the
    working grid; and of a volume for what comes of them."""
    lattice = sheet.lattice
    together = group_shape(lattice)
    piece, tile = (pixels_to_read(image, working, of) for of in (together, lattice.sides))
    n, level = len(inputs), source_level(image, working)
    read = piece if n * math.prod(piece) <= PIXELS_AT_ONCE else tile
    frames = (1,) * len(sheet.frames)
    needed = n * FLOWS_PIXEL * math.prod(read) + _reading(image, level, (*frames, *read), _most_channels(inputs))
    if lattice.thin is None:
        return needed
    return needed + 2 * N_OUTPUTS * math.prod(lattice.piece_shape) + BLENDED_PIXEL * math.prod(together)


def _stitch_bytes(blocks: BlockGrid, n_objects: int, n_threads: int) -> int:
    """Memory to compare two blocks where both see the image, and to number all objects.

    Numbering is one task, in the one thread of all that works then: it counts by its share.
    """
    n_pixels = math.prod(blocks.padded_shape)
    n_shared = max(
        n_pixels // side * min(side, 2 * h) for side, h in zip(blocks.padded_shape, blocks.halo, strict=True)
    )
    seams = zip(blocks.counts, blocks.halo, blocks.shape, strict=True)
    share_of_twice_seen = min(1.0, sum((count - 1) * 2 * halo / n for count, halo, n in seams))
    n_labels = math.ceil(n_objects * (1 + 2 * share_of_twice_seen) / blocks.n_slabs)
    n_links = math.ceil(n_objects * 2 * share_of_twice_seen)
    merging = merge_memory(n_labels, n_links, blocks.n_blocks)
    return max(STITCH_PIXEL * n_shared if blocks.n_blocks > 1 else 0, math.ceil(merging / n_threads))


def _reading(image: Image, level: int, sides: Index, n_channels: int) -> int:
    """Memory to read a region of these sides: its pixels, and the chunks that are decoded for them at once."""
    pixels = image.dtype.itemsize * n_channels * math.prod(sides)
    if not image.is_shippable:
        return pixels
    stored = image.levels[level]
    wanted = dict(zip(label_axes(image), sides, strict=True)) | {"c": n_channels}
    n_chunks = 1
    for axis, n, chunk in zip(image.axes, stored.shape, stored.chunks, strict=True):
        # A part of an image may begin within a chunk.
        n_chunks *= min(math.ceil((n - 1) / chunk) + 1, math.ceil((wanted[axis] - 1) / chunk) + 1)
    decoded = image.dtype.itemsize * math.prod(stored.chunks)
    return pixels + CHUNK_COPIES * decoded * min(READ_AT_ONCE, n_chunks)


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def size_text(n_bytes: float) -> str:
    """Bytes for people: ``1.5 GiB`` or ``20 MiB``."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{math.ceil(n_bytes / MIB)} MiB"
