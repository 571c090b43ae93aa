"""Stage 1: what holds for the whole image.

Reads
    The image: all of one level (level 0, or a coarser one of very large images), then windows.
Writes
    ``survey.zarr``: for each input of the network sampled values and noise statistics per region, then
    the foreground map of all and, if asked for, the maps of the normalisation, with what tells where fields begin;
    ``survey.zarr/diameters-<moment>``: of the objects that the diameter was estimated from, in pixels of level 0;
    ``survey.json``: percentiles (of the parts that are not empty), diameter with its spread.
Parallel over
    Regions of the level, then windows of the image.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Executor, peak_memory
from .diameters import find_diameter
from .fields import FieldPoints, field_starts, steps_along
from .foreground import foreground_map
from .frames import Extent, label_shape, level_geometry, refuse_missing
from .grid import Index, Region, region_shape, region_text, shift
from .images import Image
from .inputs import channels_of
from .job import Diameter, Job, Moment, Surveyed
from .meters import metered
from .normalisation import CELL, PITCH, SAMPLES_PER_CELL, percentiles_of, range_map, sample_cells
from .pool import box_moments
from .progress import Progress
from .working import finite_float

__all__ = ["process_block", "region_to_survey", "run"]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

REGION = 2048
POOL = 4
MARGIN = 16
MAX_SAMPLES = 2**22
LARGE_IMAGE = 2**28
COARSEST = 4.0

CELL_PLANES = 8
"""Planes of a cell of the map of the foreground."""
MAX_PLANES = 64
"""Of a region."""


@metered("statistics")
def process_block(values: FloatArray, core: Region) -> FloatArray:
    """Statistics by which a region's background is told from cells.

    Parameters
    ----------
    values : array of float32, shape (y, x)
        Pixels of a region with a margin.
    core : tuple of slice
        The region without its margin, within `values`; starts at a multiple of 4.

    Returns
    -------
    statistics : array of float32, shape (3, cells y, cells x)
        Per cell of 64 x 64 pixels: the smallest and largest value after smoothing, and the noise.
    """
    from scipy.ndimage import gaussian_filter

    # Variance from squares needs values near 0: a camera's offset would eat the bits of the noise.
    middle = np.float32(values.mean(dtype=np.float64))
    centred, squares = box_moments(values, middle, POOL)
    noise = np.sqrt(np.maximum(squares - centred * centred, 0))
    pooled = centred + middle
    smooth = gaussian_filter(pooled, 1.0, mode="nearest")
    inner = tuple(slice(p.start // POOL, -(-p.stop // POOL)) for p in core)
    return np.stack(
        [
            _per_cell(smooth[inner], np.min),
            _per_cell(smooth[inner], np.max),
            _per_cell(noise[inner], np.median),
        ]
    )


def _per_cell(pooled: FloatArray, statistic: Any) -> FloatArray:
    """A statistic over cells of pooled pixels; the last cells may be cut by the image's edge."""
    size = CELL // POOL
    short = [(0, -n % size) for n in pooled.shape]
    full = np.pad(pooled, short, mode="edge")
    rows, columns = (n // size for n in full.shape)
    cells = full.reshape(rows, size, columns, size).swapaxes(1, 2).reshape(rows, columns, -1)
    result: FloatArray = statistic(cells, axis=-1).astype(np.float32)
    return result


def _survey_level(image: Image, extent: Extent) -> int:
    """The finest level of at most 2**28 pixels that has all frames, but none coarser than 4."""
    frames = label_shape(image)[: extent.n_flow_frames]
    usable = [i for i in range(len(image.levels)) if label_shape(image, i)[: extent.n_flow_frames] == frames]
    usable = [i for i in usable if max(image.levels[i].scale) <= COARSEST * 1.01] or [0]
    return next((i for i in usable if math.prod(label_shape(image, i)) <= LARGE_IMAGE), usable[-1])


class _Sampling:
    """Which regions the surveyed level has, and which pixels are sampled."""

    def __init__(self, image: Image, extent: Extent) -> None:
        self.level = _survey_level(image, extent)
        self.axes, self.shape = extent.axes, label_shape(image, self.level)
        self.cell = tuple({"t": 1, "z": CELL_PLANES}.get(axis, CELL) for axis in self.axes)
        self.sides = tuple({"t": 1, "z": self._depth(image)}.get(axis, self._width(image)) for axis in self.axes)
        self.step = self._steps()
        self.counts = tuple(-(-n // side) for n, side in zip(self.shape, self.sides, strict=True))
        self.cells = tuple(-(-n // cell) for n, cell in zip(self.shape, self.cell, strict=True))
        self.cells_per_region = tuple(
            min(side // cell, n) for side, cell, n in zip(self.sides, self.cell, self.cells, strict=True)
        )
        sampled = zip(self.shape, self.sides, self.step, strict=True)
        self.samples_per_region = math.prod(math.ceil(min(side, n) / step) for n, side, step in sampled)

    def _depth(self, image: Image) -> int:
        """Planes of a region: about as many as a chunk of the image holds, so that none is decoded again and again."""
        if "z" not in self.axes:
            return 1
        chunk = image.levels[self.level].chunks[image.axes.index("z")]
        return min(max(CELL_PLANES, -(-chunk // CELL_PLANES) * CELL_PLANES), MAX_PLANES)

    def _width(self, image: Image) -> int:
        """Pixels of a region along y and x."""
        depth = min(self._depth(image), self.shape[self.axes.index("z")]) if "z" in self.axes else 1
        return max(REGION >> math.floor(math.log2(depth) / 2), CELL)

    def _steps(self) -> Index:
        """Every how many-th pixel is a sample, along each axis."""
        excess = math.prod(self.shape) / MAX_SAMPLES
        n_planes = self.shape[self.axes.index("z")] if "z" in self.axes else 1
        across = max(1, min(n_planes, math.ceil(excess ** (1 / 3))))
        along = max(1, math.ceil(math.sqrt(excess / across)))
        return tuple({"t": 1, "z": across}.get(axis, along) for axis in self.axes)

    @property
    def longest_side(self) -> int:
        """Rows or columns of a region, at most."""
        return max(min(side, n) for side, n in zip(self.sides[-2:], self.shape[-2:], strict=True))

    @property
    def regions_per_moment(self) -> int:
        """Regions of one time point."""
        return math.prod(n for n, axis in zip(self.counts, self.axes, strict=True) if axis != "t")

    def region(self, number: int) -> Region:
        parts = zip(np.unravel_index(number, self.counts), self.sides, self.shape, strict=True)
        return tuple(slice(int(i) * side, min((int(i) + 1) * side, n)) for i, side, n in parts)

    def cells_of(self, region: Region) -> Region:
        """The cells of the map in a region."""
        return tuple(slice(p.start // cell, -(-p.stop // cell)) for p, cell in zip(region, self.cell, strict=True))

    def sampled(self, region: Region) -> Region:
        """The sampled pixels of a region: every `step`-th of the whole level."""
        parts = zip(region, self.step, strict=True)
        return tuple(slice((step // 2 - p.start) % step, p.stop - p.start, step) for p, step in parts)

    def where(self, samples: FloatArray, cells: npt.NDArray[np.bool_], first: int) -> FloatArray:
        """Of the stored samples, shape (regions, samples), those that lie in the marked cells.

        The first of them is that of region `first`; cells are those of the whole map.
        """
        kept = []
        for number in range(len(samples)):
            region = self.region(first + number)
            parts = zip(region, self.sampled(region), self.cell, strict=True)
            index = (np.arange(p.start, p.stop)[s] // cell for p, s, cell in parts)
            is_kept = cells[np.ix_(*index)].ravel()
            kept.append(samples[number, : is_kept.size][is_kept])
        return np.concatenate(kept)


def region_to_survey(image: Image, extent: Extent) -> tuple[int, Index]:
    """The level that is surveyed, and the sides of the largest region of it that is read."""
    sampling = _Sampling(image, extent)
    sides = (side + 2 * MARGIN * (axis in "yx") for side, axis in zip(sampling.sides, sampling.axes, strict=True))
    return sampling.level, tuple(map(min, sides, sampling.shape))


def survey_region(number: int, job: Job) -> dict[str, Any]:
    """Task: sample one region and measure its cells, for each input of the network."""
    sampling = _Sampling(job.image, job.extent)
    region = sampling.region(number)
    if job.settings.survey.missing_chunks == "refuse":
        refuse_missing(job.image, sampling.level, region, channels_of(job.inputs))
    wide = tuple(
        slice(max(0, p.start - MARGIN), min(n, p.stop + MARGIN)) if axis in "yx" else p
        for p, n, axis in zip(region, sampling.shape, sampling.axes, strict=True)
    )
    core = shift(region, tuple(p.start for p in wide))
    cells = sampling.cells_of(region)
    facts = np.zeros((len(job.inputs), 3), np.float64)
    for i, single in enumerate(job.inputs):
        raw = single.read(job.image, sampling.level, wide)
        values = finite_float(raw, np.nan)
        samples = values[core][sampling.sampled(region)].ravel()
        planes = values.reshape(-1, *values.shape[-2:])
        if job.settings.survey.normalize == "local":
            middle = [planes[(k + min(k + CELL_PLANES, len(planes))) // 2] for k in range(0, len(planes), CELL_PLANES)]
            by_cell = np.stack([sample_cells(plane[core[-2:]]) for plane in middle])
            job.store.open("survey.zarr/by-cell")[(i, *cells)] = by_cell.reshape(*region_shape(cells), -1)
        n_nonfinite = int(np.isnan(values[core]).sum()) if raw.dtype.kind == "f" else 0
        if raw.dtype.kind == "f" and np.isnan(values).any():
            values[np.isnan(values)] = 0 if np.isnan(values).all() else np.nanmin(values)
        stored = np.full(sampling.samples_per_region, np.nan, np.float32)
        stored[: samples.size] = samples
        job.store.open("survey.zarr/samples")[i, number] = stored
        statistics = _per_planes([process_block(plane, core[-2:]) for plane in planes])
        job.store.open("survey.zarr/cells")[(i, slice(None), *cells)] = statistics.reshape(3, *region_shape(cells))
        if job.settings.survey.normalize == "local":
            steps = np.zeros((2, sampling.longest_side), np.float64)
            for plane in planes:
                for target, along in zip(steps, steps_along(plane, core[-2:]), strict=True):
                    target[: along.size] += along
            job.store.open("survey.zarr/steps")[i, number] = steps
        facts[i] = n_nonfinite, values[core].min(), values[core].max()
    job.store.save(f"survey.zarr/facts-{number}", facts)
    return {"peak": peak_memory()}


def _per_planes(statistics: list[FloatArray]) -> FloatArray:
    """Statistics of cells in groups of 8 planes from those in each, shape (3, groups, cells y, cells x)."""
    groups = [np.stack(statistics[k : k + CELL_PLANES]) for k in range(0, len(statistics), CELL_PLANES)]
    summed = [[group[:, 0].min(axis=0), group[:, 1].max(axis=0), np.median(group[:, 2], axis=0)] for group in groups]
    return np.stack([np.stack(of) for of in zip(*summed, strict=True)])


def run(job: Job, executor: Executor, progress: Progress) -> Surveyed:
    """Survey the image, or read what an earlier run found."""
    document = job.store.read_json("survey.json")
    sampling = _Sampling(job.image, job.extent)
    n_regions = math.prod(sampling.counts)
    if document is not None:
        progress.start("survey", n_regions, n_regions)
        return Surveyed.from_json(document)
    n, n_samples = len(job.inputs), sampling.samples_per_region
    job.store.create("survey.zarr/samples", (n, n_regions, n_samples), (1, 1, n_samples), "float32")
    job.store.create("survey.zarr/cells", (n, 3, *sampling.cells), (1, 3, *sampling.cells_per_region), "float32")
    chunks = tuple(min(1024, m) if axis in "yx" else 1 for m, axis in zip(sampling.cells, sampling.axes, strict=True))
    job.store.create("survey.zarr/foreground", sampling.cells, chunks, "bool")
    if job.settings.survey.normalize == "local":
        per_chunk = (1, *sampling.cells_per_region, SAMPLES_PER_CELL)
        job.store.create("survey.zarr/by-cell", (n, *sampling.cells, SAMPLES_PER_CELL), per_chunk, "float32")
        n_steps = sampling.longest_side
        job.store.create("survey.zarr/steps", (n, n_regions, 2, n_steps), (1, 1, 2, n_steps), "float64")
    done = job.store.done("survey")
    progress.start("survey", n_regions, len(done))
    todo = [number for number in range(n_regions) if number not in done]

    def where(number: int) -> str:
        return f"region {region_text(sampling.axes, sampling.region(number))} of level {sampling.level}"

    for number, record in executor.stream(survey_region, todo, job, name="survey", where=where):
        job.store.mark("survey", [number])
        progress.step(record["peak"])
    found = _summarise(job, sampling)
    moments = []
    for i, moment in enumerate(found.moments):
        diameter = find_diameter(job, found, i, executor, progress)
        moments.append(dataclasses.replace(moment, diameter=diameter))
    found = dataclasses.replace(found, moments=tuple(moments))
    job.store.write_json("survey.json", found.to_json())
    return found


def _summarise(job: Job, sampling: _Sampling) -> Surveyed:
    """Percentiles, foreground and map of the normalisation from what the regions left."""
    settings, n = job.settings.survey, len(job.inputs)
    is_per_time = settings.per_time and "t" in sampling.axes
    n_moments = sampling.shape[0] if is_per_time else 1
    scale, _ = level_geometry(job.image, sampling.level)
    cell_size = tuple(cell * of for cell, of in zip(sampling.cell, scale, strict=True))
    points: tuple[FieldPoints, ...] = ()
    if settings.normalize == "local":
        points = _points(job, sampling)
        lattice = tuple(along.count for along in points)
        chunks = tuple(min(m, 256) if axis in "yx" else 1 for m, axis in zip(lattice, sampling.axes, strict=True))
        job.store.create("survey.zarr/normalisation", (n, 2, *lattice), (1, 2, *chunks), "float32")
    seen: list[npt.NDArray[np.bool_]] = []
    moments, n_nonfinite = [], 0
    is_wanted = _wanted(job, sampling.cells, cell_size)
    for moment in range(n_moments):
        found, foreground, n_bad = _summarise_moment(job, sampling, moment if is_per_time else None, is_wanted, points)
        moments.append(found)
        seen.append(foreground)
        n_nonfinite += n_bad
    is_constant = all(moment.is_constant for moment in moments)
    foreground = (np.concatenate(seen) if settings.foreground == "auto" else True) & is_wanted
    is_mapped = (settings.foreground == "auto" or job.mask is not None) and not is_constant
    if is_mapped:
        job.store.open("survey.zarr/foreground")[:] = foreground
    return Surveyed(
        moments=tuple(moments),
        n_nonfinite=n_nonfinite,
        foreground_cell=cell_size if is_mapped else (),
        foreground_fraction=float(foreground.mean()) if is_mapped else float(not is_constant),
        normalisation_pitch=tuple(along.pitch * of for along, of in zip(points, scale, strict=False)),
        normalisation_fields=tuple(
            tuple((start * of, first) for start, first in zip(along.starts, along.firsts, strict=True))
            for along, of in zip(points, scale, strict=False)
        ),
    )


def _wanted(job: Job, cells: Index, cell_size: tuple[float, ...]) -> npt.NDArray[np.bool_]:
    """The parts of the map in which the mask says that cells are sought; all without one."""
    is_wanted = np.ones(cells, np.bool_)
    if job.mask is None:
        return is_wanted
    parts = [
        [slice(int(i * size), min(n, math.ceil((i + 1) * size))) for i in range(count)]
        for count, size, n in zip(cells, cell_size, job.shape, strict=True)
    ]
    for row in np.ndindex(cells[:-1]):
        before = tuple(part[i] for part, i in zip(parts, row, strict=False))
        is_wanted[row] = job.mask.touches([(*before, last) for last in parts[-1]])
    return is_wanted


def _points(job: Job, sampling: _Sampling) -> tuple[FieldPoints, ...]:
    """The lattice of the normalisation along each axis.

    Fields are the same in all frames, for all inputs: what moves the stage moves it for all.
    """
    stored = job.store.open("survey.zarr/steps")
    plane = sampling.shape[-2:]
    steps = [np.zeros((len(job.inputs), n)) for n in plane]
    for number in range(math.prod(sampling.counts)):
        of_region = stored[:, number]
        for k, part in enumerate(sampling.region(number)[-2:]):
            steps[k][:, part] += of_region[:, k, : part.stop - part.start]
    frames = [FieldPoints(n, cell) for n, cell in zip(sampling.shape[:-2], sampling.cell[:-2], strict=True)]
    return *frames, *(FieldPoints(n, PITCH, field_starts(of, PITCH)) for n, of in zip(plane, steps, strict=True))


def _summarise_moment(
    job: Job,
    sampling: _Sampling,
    time: int | None,
    is_wanted: npt.NDArray[np.bool_],
    points: tuple[FieldPoints, ...],
) -> tuple[Moment, npt.NDArray[np.bool_], int]:
    """What holds for all time points or one, input by input: percentiles; where something rises above the noise, for
    all inputs together; pixels that are not finite."""
    numbers = range(math.prod(sampling.counts))
    part = slice(None)
    if time is not None:
        numbers = range(time * sampling.regions_per_moment, (time + 1) * sampling.regions_per_moment)
        part = slice(time, time + 1)
    facts = np.stack([job.store.load(f"survey.zarr/facts-{i}") for i in numbers])
    reach = tuple(int(axis != "t") for axis in sampling.axes)
    foreground, percentiles = np.zeros(1, np.bool_), []
    for i, single in enumerate(job.inputs):
        cells = job.store.open("survey.zarr/cells")[i, :, part]
        extremes = float(facts[:, i, 1].min()), float(facts[:, i, 2].max())
        name = f"{single.text(job.image)} of {job.image.name}"
        samples = job.store.open("survey.zarr/samples")[i, numbers.start : numbers.stop]
        is_somewhere = np.zeros(sampling.cells, np.bool_)

        def where(
            is_kept: npt.NDArray[np.bool_],
            samples: FloatArray = samples,
            is_somewhere: npt.NDArray[np.bool_] = is_somewhere,
        ) -> FloatArray:
            is_somewhere[part] = is_kept
            return sampling.where(samples, is_somewhere, numbers.start)

        (low, high), holds_something = _range_of(samples, cells, where, is_wanted[part], extremes, name)
        percentiles.append((low, high))
        if extremes[0] < extremes[1]:
            foreground = foreground | foreground_map(cells, high - low, reach)
        if points:
            _map_range(job, i, part, cells[2], holds_something, (low, high), (points[-2], points[-1]))
    is_constant = bool((facts[:, :, 1].min(axis=0) >= facts[:, :, 2].max(axis=0)).all())
    default = Diameter(job.model.diam_mean, "default", (job.model.diam_mean,) * 2)
    foreground = np.broadcast_to(foreground, (1 if time is not None else sampling.cells[0], *sampling.cells[1:]))
    return Moment(tuple(percentiles), is_constant, default), foreground, int(facts[:, :, 0].sum())


def _map_range(
    job: Job,
    number: int,
    part: slice,
    noise: FloatArray,
    is_counted: npt.NDArray[np.bool_],
    whole: tuple[float, float],
    points: tuple[FieldPoints, FieldPoints],
) -> None:
    """Store the map of the normalisation of an input: of every frame, or group of planes, by itself."""
    samples, maps = job.store.open("survey.zarr/by-cell"), job.store.open("survey.zarr/normalisation")
    for index in np.ndindex(noise.shape[:-2]):
        at = index if part.start is None else (part.start + index[0], *index[1:])

        def rows(start: int, stop: int, at: Index = at) -> FloatArray:
            return np.asarray(samples[(number, *at, slice(start, stop))])

        maps[(number, slice(None), *at)] = range_map(rows, noise[index], is_counted[index], whole, points)


def _range_of(
    samples: FloatArray,
    cells: FloatArray,
    where: Callable[[npt.NDArray[np.bool_]], FloatArray],
    is_wanted: npt.NDArray[np.bool_],
    extremes: tuple[float, float],
    name: str,
) -> tuple[tuple[float, float], npt.NDArray[np.bool_]]:
    """Which values of an input become 0 and 1, and in which cells of the map something rises above the noise."""
    low, high = percentiles_of(samples)
    # On a slide that is nearly empty both percentiles of all pixels are background, and cells would
    # be many times brighter than the network has ever seen: the empty parts do not count.
    holds_something = foreground_map(cells, high - low, (0,) * (cells.ndim - 1)) & is_wanted
    if holds_something.any() and not holds_something.all():
        low, high = percentiles_of(where(holds_something))
    lowest, highest = extremes
    if lowest >= highest:
        return (low, low + 1.0), holds_something
    if low >= high:
        logger.warning(
            "percentiles 1 and 99 of %s are both %g; normalising by its smallest and largest value, %g and %g.",
            name,
            low,
            lowest,
            highest,
        )
        return (lowest, highest), holds_something
    return (low, high), holds_something
