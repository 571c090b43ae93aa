"""Stage 1: what holds for the whole image.

Reads
    The image: all of one level (level 0, or a coarser one of very large images), then windows.
Writes
    ``survey.zarr``: for each input of the network sampled values and noise statistics per region, then
    the foreground map of all and, if asked for, the maps of the normalisation;
    ``survey.zarr/diameters``: of the objects that the diameter was estimated from, in pixels of level 0;
    ``survey.json``: percentiles (of the parts that are not empty), diameter with its spread.
Parallel over
    Regions of the level, then windows of the image.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Executor, peak_memory
from .config import MasksConfig
from .dynamics import compute_masks
from .errors import ModelError
from .foreground import foreground_map
from .grid import Region, WorkingGrid
from .images import Image
from .inputs import channels_of
from .job import Diameter, Job, Surveyed
from .networks.runner import load_network
from .normalisation import CELL, CELLS_PER_POINT, SAMPLES_PER_CELL, percentiles_of, range_map, sample_cells
from .objects import object_extents
from .planes import plane_axes, plane_shape, refuse_missing
from .progress import Progress
from .working import box_mean, finite_float, read_tile

__all__ = ["SIZES", "measure_window", "process_block", "run"]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
Centre = tuple[float, ...]
Part = tuple[tuple[float, float], ...]

REGION = 2048
POOL = 4
MARGIN = 16
MAX_SAMPLES = 2**22
LARGE_IMAGE = 2**28
COARSEST = 4.0

WINDOWS_PER_AXIS = 6
GUESS_WINDOWS_PER_AXIS = 3
GUESS_DIAMETERS = (0.5, 1.0, 2.0, 4.0)
PASSES = 4
MIN_OBJECTS = 5
SIZES = "survey.zarr/diameters"


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
    centred = box_mean(values - middle, (POOL,) * values.ndim)
    squares = box_mean(np.square(values - middle), (POOL,) * values.ndim)
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


def _survey_level(image: Image) -> int:
    """The finest level of at most 2**28 pixels, but none coarser than 4."""
    for i, level in enumerate(image.levels):
        last = i == len(image.levels) - 1 or max(image.levels[i + 1].scale) > COARSEST * 1.01
        if last or math.prod(level.shape) // image.n_channels <= LARGE_IMAGE:
            return i
    return 0


class _Sampling:
    """Which regions the surveyed level has, and which pixels are sampled."""

    def __init__(self, image: Image) -> None:
        self.level = _survey_level(image)
        self.shape = plane_shape(image, self.level)
        self.step = max(1, math.ceil(math.sqrt(math.prod(self.shape) / MAX_SAMPLES)))
        self.counts = tuple(-(-n // REGION) for n in self.shape)
        self.cells = tuple(-(-n // CELL) for n in self.shape)
        self.samples_per_region = math.ceil(min(REGION, max(self.shape)) / self.step) ** 2

    def region(self, number: int) -> Region:
        index = np.unravel_index(number, self.counts)
        return tuple(
            slice(int(i) * REGION, min((int(i) + 1) * REGION, n)) for i, n in zip(index, self.shape, strict=True)
        )

    def sampled(self, region: Region) -> tuple[slice, ...]:
        """The sampled pixels of a region: every `step`-th of the whole level."""
        first = self.step // 2
        return tuple(slice((first - p.start) % self.step, p.stop - p.start, self.step) for p in region)

    def where(self, samples: FloatArray, cells: npt.NDArray[np.bool_]) -> FloatArray:
        """Of the stored samples, shape (regions, samples), those that lie in the marked cells."""
        kept = []
        for number in range(len(samples)):
            region = self.region(number)
            rows, columns = (
                np.arange(p.start, p.stop)[s] // CELL for p, s in zip(region, self.sampled(region), strict=True)
            )
            is_kept = cells[np.ix_(rows, columns)].ravel()
            kept.append(samples[number, : is_kept.size][is_kept])
        return np.concatenate(kept)


def survey_region(number: int, job: Job) -> dict[str, Any]:
    """Task: sample one region and measure its cells, for each input of the network."""
    sampling = _Sampling(job.image)
    region = sampling.region(number)
    if job.settings.survey.missing_chunks == "refuse":
        refuse_missing(job.image, sampling.level, region, channels_of(job.inputs))
    wide = tuple(
        slice(max(0, p.start - MARGIN), min(n, p.stop + MARGIN)) for p, n in zip(region, sampling.shape, strict=True)
    )
    core = tuple(slice(p.start - q.start, p.stop - q.start) for p, q in zip(region, wide, strict=True))
    cells = tuple(slice(p.start // CELL, -(-p.stop // CELL)) for p in region)
    facts = np.zeros((len(job.inputs), 3), np.float64)
    for i, single in enumerate(job.inputs):
        values = finite_float(single.read(job.image, sampling.level, wide), np.nan)
        samples = values[core][sampling.sampled(region)].ravel()
        if job.settings.survey.normalize == "local":
            job.store.open("survey.zarr/by-cell")[(i, *cells)] = sample_cells(values[core])
        n_nonfinite = int(np.isnan(values[core]).sum())
        if n_nonfinite or np.isnan(values).any():
            values[np.isnan(values)] = 0 if np.isnan(values).all() else np.nanmin(values)
        stored = np.full(sampling.samples_per_region, np.nan, np.float32)
        stored[: samples.size] = samples
        job.store.open("survey.zarr/samples")[i, number] = stored
        job.store.open("survey.zarr/cells")[(i, slice(None), *cells)] = process_block(values, core)
        facts[i] = n_nonfinite, values[core].min(), values[core].max()
    job.store.save(f"survey.zarr/facts-{number}", facts)
    return {"peak": peak_memory()}


def run(job: Job, executor: Executor, progress: Progress) -> Surveyed:
    """Survey the image, or read what an earlier run found."""
    document = job.store.read_json("survey.json")
    sampling = _Sampling(job.image)
    n_regions = math.prod(sampling.counts)
    if document is not None:
        progress.start("survey", n_regions, n_regions)
        return Surveyed.from_json(document)
    n, side = len(job.inputs), REGION // CELL
    n_samples = sampling.samples_per_region
    job.store.create("survey.zarr/samples", (n, n_regions, n_samples), (1, 1, n_samples), "float32")
    job.store.create("survey.zarr/cells", (n, 3, *sampling.cells), (1, 3, side, side), "float32")
    job.store.create("survey.zarr/foreground", sampling.cells, (1024, 1024), "bool")
    if job.settings.survey.normalize == "local":
        per_chunk = (1, side, side, SAMPLES_PER_CELL)
        job.store.create("survey.zarr/by-cell", (n, *sampling.cells, SAMPLES_PER_CELL), per_chunk, "float32")
    done = job.store.done("survey")
    progress.start("survey", n_regions, len(done))
    todo = [number for number in range(n_regions) if number not in done]
    for number, record in executor.stream(survey_region, todo, job):
        job.store.mark("survey", [number])
        progress.step(record["peak"])
    found = _summarise(job, sampling)
    diameter = _find_diameter(job, found, executor, progress)
    found = Surveyed(**{**vars(found), "diameter": diameter})
    job.store.write_json("survey.json", found.to_json())
    return found


def _summarise(job: Job, sampling: _Sampling) -> Surveyed:
    """Percentiles, foreground and map of the normalisation from what the regions left, input by input."""
    settings = job.settings.survey
    n, n_regions = len(job.inputs), math.prod(sampling.counts)
    facts = np.stack([job.store.load(f"survey.zarr/facts-{i}") for i in range(n_regions)])
    level = job.image.levels[sampling.level]
    cell_size = tuple(CELL * level.scale[job.image.spatial_axes.index(axis)] for axis in plane_axes(job.image))
    is_local = settings.normalize == "local"
    if is_local:
        lattice = tuple(-(-count // CELLS_PER_POINT) for count in sampling.cells)
        job.store.create("survey.zarr/normalisation", (n, 2, *lattice), (1, 2, 256, 256), "float32")
    foreground = np.zeros(sampling.cells, np.bool_)
    percentiles = []
    for i, single in enumerate(job.inputs):
        cells = job.store.open("survey.zarr/cells")[i]
        extremes = float(facts[:, i, 1].min()), float(facts[:, i, 2].max())
        name = f"{single.text(job.image)} of {job.image.name}"
        samples = job.store.open("survey.zarr/samples")[i]
        (low, high), holds_something = _range_of(samples, cells, sampling, extremes, name)
        percentiles.append((low, high))
        if extremes[0] < extremes[1]:
            foreground |= foreground_map(cells, high - low)
        if is_local:
            points = range_map(job.store.open("survey.zarr/by-cell"), i, cells[2], holds_something, (low, high))
            job.store.open("survey.zarr/normalisation")[i] = points
    is_constant = bool((facts[:, :, 1].min(axis=0) >= facts[:, :, 2].max(axis=0)).all())
    is_mapped = settings.foreground == "auto" and not is_constant
    if is_mapped:
        job.store.open("survey.zarr/foreground")[:] = foreground
    return Surveyed(
        percentiles=tuple(percentiles),
        is_constant=is_constant,
        n_nonfinite=int(facts[:, :, 0].sum()),
        foreground_cell=cell_size if is_mapped else (),
        foreground_fraction=float(foreground.mean()) if is_mapped else float(not is_constant),
        diameter=Diameter(job.model.diam_mean, "default", (job.model.diam_mean,) * 2),
        normalisation_pitch=tuple(CELLS_PER_POINT * side for side in cell_size) if is_local else (),
    )


def _range_of(
    samples: FloatArray, cells: FloatArray, sampling: _Sampling, extremes: tuple[float, float], name: str
) -> tuple[tuple[float, float], npt.NDArray[np.bool_]]:
    """Which values of an input become 0 and 1, and in which cells of the map something rises above the noise."""
    low, high = percentiles_of(samples)
    # On a slide that is nearly empty both percentiles of all pixels are background, and cells would
    # be many times brighter than the network has ever seen: the empty parts do not count.
    holds_something = foreground_map(cells, high - low, reach=0)
    if holds_something.any():
        low, high = percentiles_of(sampling.where(samples, holds_something))
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


def _find_diameter(job: Job, found: Surveyed, executor: Executor, progress: Progress) -> Diameter:
    """The diameter that is given, or one from the objects in windows over the whole image."""
    given = job.settings.survey.diameter_px(job.image.spacing_um())
    if given is not None:
        return Diameter(given, "given", (given, given))
    job = Job(**{**vars(job), "surveyed": found})
    few = [centre for centre, _ in _windows(job, job.model.diam_mean, GUESS_WINDOWS_PER_AXIS)]
    if found.is_constant or not few:
        return found.diameter
    value = _guess(job, few, executor)
    sizes: npt.NDArray[np.float64] = np.zeros(0)
    for _ in range(PASSES):
        windows = list(_windows(job, value, WINDOWS_PER_AXIS))
        progress.start("diameter", len(windows), 0)
        parts = []
        items = [(centre, value, part) for centre, part in windows]
        for _item, (window_sizes, peak) in executor.stream(measure_window, items, job):
            parts.append(window_sizes)
            progress.step(peak)
        sizes = np.sort(np.concatenate(parts))
        if sizes.size < MIN_OBJECTS:
            break
        before, value = value, float(np.median(sizes))
        if abs(math.log(value / before)) < 0.05:
            break
    if sizes.size < MIN_OBJECTS:
        logger.warning(
            "only %d objects were found in %d windows of %s: the diameter %.1f px is a guess; give --diameter.",
            sizes.size,
            len(windows),
            job.image.name,
            value,
        )
        return Diameter(value, "default", (value, value), int(sizes.size), len(windows))
    job.store.save(SIZES, sizes)
    low, high = (float(v) for v in np.percentile(sizes, [25, 75]))
    # Two decimals: the working grid must not hang on the last bits of a median.
    return Diameter(round(value, 2), "estimated", (low, high), int(sizes.size), len(windows))


def _windows(job: Job, diameter: float, per_axis: int) -> Iterator[tuple[Centre, Part]]:
    """The centre of a window in each part of a regular division of the image, and the part, in pixels of level 0.

    The centre is that of the foreground cell nearest to the middle of the part. Of an image that is hardly larger
    than a window the windows together see all.
    """
    shape = job.shape
    side = job.model.tile * diameter / job.model.diam_mean
    counts = [max(1, min(per_axis, math.ceil(n / side))) for n in shape]
    cell = job.found.foreground_cell
    foreground = job.store.open("survey.zarr/foreground")[:] if cell else None
    for index in itertools.product(*(range(n) for n in counts)):
        edges = tuple((i * n / c, (i + 1) * n / c) for i, c, n in zip(index, counts, shape, strict=True))
        middle = tuple((a + b) / 2 for a, b in edges)
        if foreground is None:
            yield middle, edges
            continue
        part = tuple(
            slice(int(a / s), max(int(a / s) + 1, math.ceil(b / s))) for (a, b), s in zip(edges, cell, strict=True)
        )
        where = np.argwhere(foreground[part])
        if where.size:
            centres = (where + [p.start for p in part] + 0.5) * cell
            nearest = centres[np.square(centres - middle).sum(axis=1).argmin()]
            # A cell cut by the image's edge may have its centre outside.
            yield tuple(float(min(v, n - 0.5)) for v, n in zip(nearest, shape, strict=True)), edges


def _window(job: Job, centre: Centre, diameter: float) -> tuple[WorkingGrid, Region, FloatArray]:
    """One network tile round a centre at the scale of a diameter: its grid, where it lies there, its pixels."""
    grid = WorkingGrid.for_diameter(job.shape, diameter, job.model.diam_mean)
    tile = job.model.tile
    starts = []
    for c, s, n in zip(centre, grid.scale, grid.shape, strict=True):
        starts.append(min(max(0, round(c * s - tile / 2)), max(0, n - tile)))
    region = tuple(slice(start, start + tile) for start in starts)
    return grid, region, read_tile(job.image, job.shown, grid, region)


def _as_input(values: FloatArray, n_channels: int) -> FloatArray:
    """One tile as network input: channels for which there is nothing are empty."""
    tiles = np.zeros((1, n_channels, *values.shape[1:]), np.float32)
    tiles[0, : len(values)] = values
    return tiles


def guess_window(item: tuple[Centre, float], job: Job) -> float:
    """Task: what the style vector says of the diameter when the window is seen at one scale."""
    centre, diameter = item
    grid, _, values = _window(job, centre, diameter)
    _, styles = load_network(job.model, job.device).predict(_as_input(values, job.model.n_channels))
    size = job.model.size
    if size is None:
        raise ModelError(f"model {job.model.name} has no size model to guess a diameter with; give --diameter.")
    return size.diameter(styles[0]) / grid.scale[0]


def _guess(job: Job, centres: list[Centre], executor: Executor) -> float:
    """A first diameter: the one of several scales at which the style vectors confirm it best."""
    if job.model.size is None:
        return job.model.diam_mean
    tried = [job.model.diam_mean * factor for factor in GUESS_DIAMETERS]
    items = [(centre, diameter) for diameter in tried for centre in centres]
    answers: dict[float, list[float]] = {diameter: [] for diameter in tried}
    for (_, diameter), answer in executor.stream(guess_window, items, job):
        answers[diameter].append(answer)
    medians = {diameter: float(np.median(values)) for diameter, values in answers.items()}
    best = min(tried, key=lambda diameter: abs(math.log(medians[diameter] / diameter)))
    return medians[best]


def measure_window(item: tuple[Centre, float, Part], job: Job) -> tuple[npt.NDArray[np.float64], tuple[int, int]]:
    """Task: diameters in level 0 pixels of the objects in one window, and the peak memory.

    Objects count that the window does not cut and that lie in its part of the image, so that none counts twice. What
    the edge of the image itself cuts counts as it is.
    """
    centre, diameter, part = item
    grid, region, values = _window(job, centre, diameter)
    output, _ = load_network(job.model, job.device).predict(_as_input(values, job.model.n_channels))
    inside = tuple(slice(0, min(p.stop, n) - p.start) for p, n in zip(region, grid.shape, strict=True))
    output = output[0][(slice(None), *inside)]
    # The default thresholds, not those of the run: mask settings may change while the diameter stays.
    masks = MasksConfig()
    labels = compute_masks(
        np.ascontiguousarray(output[:-1]),
        np.ascontiguousarray(output[-1]),
        cellprob_threshold=masks.cellprob_threshold,
        flow_threshold=masks.flow_threshold,
    )
    boxes, areas = object_extents(labels, int(labels.max(initial=0)))
    counts = areas > 0
    for axis, (window, n, (start, stop)) in enumerate(zip(region, grid.shape, part, strict=True)):
        low, high = (boxes[:, side, axis] + window.start for side in (0, 1))
        is_cut = ((low == window.start) & (low > 0)) | ((high == window.stop) & (high < n))
        middle = (low + high) / 2 / grid.scale[axis]
        counts &= ~is_cut & (start <= middle) & (middle < stop)
    sizes = 2 * np.sqrt(areas[counts] / np.pi) / grid.scale[0]
    return sizes, peak_memory()
