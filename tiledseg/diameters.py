"""The diameter of a run: given, or measured on the objects in windows over the whole image.

The style vectors of a few windows give a first guess, the objects in these the next, those in many windows the last.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Executor, peak_memory
from .config import MasksConfig
from .dynamics import compute_masks
from .errors import ModelError
from .grid import Region, WorkingGrid
from .job import Diameter, Job, Surveyed
from .networks.runner import load_network
from .objects import object_extents
from .progress import Progress
from .working import read_tile

__all__ = ["find_diameter", "sizes_name"]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
Centre = tuple[float, ...]
Part = tuple[tuple[float, float], ...]

WINDOWS_PER_AXIS = (1, 6, 6, 4, 3)
FEW_WINDOWS_PER_AXIS = (1, 3, 3, 2, 2)
"""By the number of axes that are longer than one pixel."""
GUESS_DIAMETERS = (0.5, 1.0, 2.0, 4.0)
PASSES = 4
CLOSE, SAME = 0.15, 0.05
"""Sizes that are not farther apart, see `_apart`: well enough for many windows to be looked at; well enough to stop."""
MIN_OBJECTS = 5


def sizes_name(moment: int) -> str:
    """Where the scratch keeps the diameters of the objects that an estimate rests on, in pixels of level 0."""
    return f"survey.zarr/diameters-{moment}"


def find_diameter(job: Job, found: Surveyed, moment: int, executor: Executor, progress: Progress) -> Diameter:
    """The diameter that is given, or one from the objects in windows over the whole image, or one time point."""
    given = job.settings.survey.diameter_px(job.image.spacing_um())
    if given is not None:
        return Diameter(given, "given", (given, given))
    job = dataclasses.replace(job, surveyed=found)
    few = [centre for centre, _ in _windows(job, job.model.diam_mean, FEW_WINDOWS_PER_AXIS, moment)]
    if found.moments[moment].is_constant or not few:
        return found.moments[moment].diameter
    value = _guess(job, few, executor)
    n_windows, sizes = 0, np.zeros(0)
    # A few windows find the scale at which many are looked at.
    for per_axis, near in ((FEW_WINDOWS_PER_AXIS, CLOSE), (WINDOWS_PER_AXIS, SAME)):
        if n_windows < len(list(_windows(job, value, per_axis, moment))):
            value, sizes, n_windows = _settle(job, value, per_axis, near, moment, executor, progress)
    if sizes.size < MIN_OBJECTS:
        logger.warning(
            "only %d objects were found in %d windows of %s%s: the diameter %.1f px is a guess; give --diameter.",
            sizes.size,
            n_windows,
            job.image.name,
            f" at time {moment}" if len(found.moments) > 1 else "",
            value,
        )
        return Diameter(value, "default", (value, value), int(sizes.size), n_windows)
    job.store.save(sizes_name(moment), sizes)
    low, high = (float(v) for v in np.percentile(sizes, [25, 75]))
    # Two decimals: the working grid must not hang on the last bits of a median.
    return Diameter(round(value, 2), "estimated", (low, high), int(sizes.size), n_windows)


def _settle(
    job: Job, value: float, per_axis: Sequence[int], near: float, moment: int, executor: Executor, progress: Progress
) -> tuple[float, npt.NDArray[np.float64], int]:
    """Measure windows at a diameter, and again at the one found, until it stays.

    Returns the diameter, those of all objects, ascending, and the number of windows.
    """
    for _ in range(PASSES):
        windows = list(_windows(job, value, per_axis, moment))
        progress.start("diameter", len(windows), 0)
        items = [(centre, value, part) for centre, part in windows]
        parts = []
        for _item, (window_sizes, peak) in executor.stream(measure_window, items, job, **_in_windows(job)):
            parts.append(window_sizes)
            progress.step(peak)
        sizes = np.sort(np.concatenate(parts))
        if sizes.size < MIN_OBJECTS:
            break
        before, value = value, float(np.median(sizes))
        if _apart(value, before) < near:
            break
    return value, sizes, len(windows)


def _windows(job: Job, diameter: float, per_axis: Sequence[int], moment: int) -> Iterator[tuple[Centre, Part]]:
    """The centre of a window in each part of a regular division of the image, and the part, in pixels of level 0.

    A window is one tile of one plane. Its centre is that of the foreground cell nearest to the middle of the part. Of
    a picture that is hardly larger than a window the windows together see all.
    """
    side = job.model.tile * diameter / job.model.diam_mean
    at_most = per_axis[sum(n > 1 for n in job.shape)]
    whole = [(0, n) for n in job.shape]
    if len(job.found.moments) > 1:
        whole[0] = (moment, moment + 1)
    lengths = [stop - start for start, stop in whole]
    in_plane = [max(1, min(at_most, math.ceil(n / side))) for n in lengths[-2:]]
    # Where a plane holds few windows, more planes are looked at.
    n_across = sum(n > 1 for n in lengths[:-2])
    share = math.ceil((per_axis[2] ** 2 / math.prod(in_plane)) ** (1 / max(1, n_across)))
    counts = [*(min(n, max(at_most, share)) for n in lengths[:-2]), *in_plane]
    cell = job.found.foreground_cell
    foreground = job.store.open("survey.zarr/foreground")[:] if cell else None
    for index in itertools.product(*(range(n) for n in counts)):
        edges = tuple(
            (start + i * (stop - start) / c, start + (i + 1) * (stop - start) / c)
            for i, c, (start, stop) in zip(index, counts, whole, strict=True)
        )
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
            yield tuple(float(min(v, n - 0.5)) for v, n in zip(nearest, job.shape, strict=True)), edges


def _window(job: Job, centre: Centre, diameter: float) -> tuple[WorkingGrid, Region, FloatArray]:
    """One network tile round a centre at the scale of a diameter: its grid, where it lies there, its pixels."""
    grid = WorkingGrid.for_diameter(job.shape[-2:], diameter, job.model.diam_mean)
    frame, tile = tuple(int(c) for c in centre[:-2]), job.model.tile
    starts = []
    for c, s, n in zip(centre[-2:], grid.scale, grid.shape, strict=True):
        starts.append(min(max(0, round(c * s - tile / 2)), max(0, n - tile)))
    region = tuple(slice(start, start + tile) for start in starts)
    return grid, region, read_tile(job.image, job.shown(job.moment_of(frame)), grid, frame, region)


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


def _in_windows(job: Job) -> dict[str, Any]:
    """How windows are worked on, for `cluster.Executor.stream`."""

    def where(item: tuple[Any, ...]) -> str:
        return f"window at {', '.join(f'{axis} {at:.0f}' for axis, at in zip(job.extent.axes, item[0], strict=True))}"

    return {"name": "diameter", "kind": "network", "claims": job.device != "cpu", "where": where}


def _guess(job: Job, centres: list[Centre], executor: Executor) -> float:
    """A first diameter: the one of several scales at which the style vectors confirm it best.

    Scales are tried from the network's own on, each time the one nearest to the last answer, until that was tried.
    """
    if job.model.size is None:
        return job.model.diam_mean
    scales = [job.model.diam_mean * factor for factor in GUESS_DIAMETERS]
    answers: dict[float, float] = {}
    scale = job.model.diam_mean
    while scale not in answers:
        items = [(centre, scale) for centre in centres]
        found = [answer for _, answer in executor.stream(guess_window, items, job, **_in_windows(job))]
        answers[scale] = float(np.median(found))
        scale = min(scales, key=functools.partial(_apart, answers[scale]))
    return answers[min(answers, key=lambda tried: _apart(answers[tried], tried))]


def _apart(one: float, other: float) -> float:
    """How far two sizes are from each other, as the logarithm of their ratio."""
    return abs(math.log(one / other))


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
    for axis, (window, n, (start, stop)) in enumerate(zip(region, grid.shape, part[-2:], strict=True)):
        low, high = (boxes[:, side, axis] + window.start for side in (0, 1))
        is_cut = ((low == window.start) & (low > 0)) | ((high == window.stop) & (high < n))
        middle = (low + high) / 2 / grid.scale[axis]
        counts &= ~is_cut & (start <= middle) & (middle < stop)
    sizes = 2 * np.sqrt(areas[counts] / np.pi) / grid.scale[0]
    return sizes, peak_memory()
