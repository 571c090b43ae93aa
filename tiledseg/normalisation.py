"""Which pixel values become 0 and 1 for the network: one pair for the image, or a smooth map of them.

Where light or stain varies over a slide, one pair of percentiles for all of it leaves cells in dim parts unseen,
and a pair per tile draws the tiles into the result. Here percentiles are taken at the points of a lattice that is
fixed in the image, smoothed over its neighbours, and interpolated: a pixel's values depend on where it lies, and on
nothing else. Where the exposure itself jumps along a line straight across the image, as between the fields of a mosaic,
so does the map: each field has points of its own, and nothing is smoothed or interpolated over its edges.

A map is made of samples: every 8th pixel of the surveyed level along each axis, kept by cells of the foreground map,
and for the percentiles only those cells count in which something rises above the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .fields import FieldPoints, on_lattice
from .grid import Positions, interpolate, samples_needed

__all__ = [
    "CELL",
    "PITCH",
    "SAMPLES_PER_CELL",
    "Inverted",
    "LocalRange",
    "Normalisation",
    "WholeRange",
    "percentiles_of",
    "range_map",
    "sample_cells",
]

FloatArray = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

PERCENTILES = (1.0, 99.0)

CELL = 64
SAMPLE_STEP = 8
SAMPLES_PER_CELL = (CELL // SAMPLE_STEP) ** 2

PITCH = 128
"""Pixels between lattice points. With the smoothing, the values of a point come from some 400 pixels
around it: dozens of nuclei of 20 to 40 pixels, and no more than light and stain change over. Points twice as far
apart follow steep changes less well; points for each cell would follow single nuclei."""

SMOOTHING = 1.0  # sigma in lattice distances
PRIOR_SAMPLES = 1.0  # how many samples the percentiles of the whole image count for
NOISE_IN_RANGE = 10.0  # least difference in standard deviations of the noise nearby
LEAST_SHARE = 0.2  # least difference, as a share of the whole image's
BAND = 16  # rows of points worked on at once, a row of regions where there is one field


class Normalisation(Protocol):
    """What the values 0 and 1 of the network are in pixel values, anywhere in the image."""

    def at(self, coordinates: list[Positions]) -> tuple[Any, Any]:
        """The value that becomes 0, and the difference to the one that becomes 1.

        Parameters
        ----------
        coordinates : list of array of float64
            Per axis of a region, ascending coordinates in pixels of level 0.

        Returns
        -------
        low, difference : float32, or arrays of float32 of shape (*lengths of coordinates)
        """


@dataclass(frozen=True)
class WholeRange:
    """The same values everywhere.

    Parameters
    ----------
    low, high : float
        Pixel values that become 0 and 1.
    """

    low: float
    high: float

    def at(self, coordinates: list[Positions]) -> tuple[Any, Any]:  # noqa: ARG002
        """Low and difference, both a number."""
        return np.float32(self.low), np.float32(self.high - self.low)


@dataclass(frozen=True)
class LocalRange:
    """Values from a lattice over the image.

    Parameters
    ----------
    maps : array of float32, shape (inputs, 2, *lattice), in memory or on disk
        Low and difference at the lattice points; only what is needed is read.
    number : int
        Of the input.
    pitch : tuple of float
        Distance of lattice points in pixels of level 0 along each axis of a region; the first of a field lies half of
        it inside. Along time it is 1: every time point has its own.
    fields : tuple of tuple of (float, int)
        Along each axis, where fields begin, in pixels of level 0, and their first lattice points.
    """

    maps: Any
    number: int
    pitch: tuple[float, ...]
    fields: tuple[tuple[tuple[float, int], ...], ...]

    def at(self, coordinates: list[Positions]) -> tuple[Any, Any]:
        """Low and difference for every pixel."""
        sizes = self.maps.shape[2:]
        axes = zip(coordinates, self.pitch, sizes, self.fields, strict=True)
        found = [on_lattice(at, pitch, n, fields) for at, pitch, n, fields in axes]
        parts = tuple(samples_needed(at, n) for at, n in zip(found, sizes, strict=True))
        positions = [(at, n, part.start) for at, n, part in zip(found, sizes, parts, strict=True)]
        low, difference = interpolate(np.asarray(self.maps[(self.number, slice(None), *parts)]), positions)
        return low, difference


@dataclass(frozen=True)
class Inverted:
    """The negative: what became 1 becomes 0.

    Parameters
    ----------
    positive : Normalisation
        Of the picture as it is.
    """

    positive: Normalisation

    def at(self, coordinates: list[Positions]) -> tuple[Any, Any]:
        """The high value, and the difference down to the low one."""
        low, difference = self.positive.at(coordinates)
        return low + difference, -difference


def percentiles_of(samples: FloatArray) -> tuple[float, float]:
    """Percentiles 1 and 99 of the finite values, 0 and 0 if there are none."""
    # Sorted first, which processors have instructions for: what percentiles do by themselves takes longer.
    ordered = np.sort(samples, axis=None)
    infinite = np.float32(np.inf)
    finite = ordered[np.searchsorted(ordered, -infinite, side="right") : np.searchsorted(ordered, infinite)]
    if not finite.size:
        return 0.0, 0.0
    low, high = np.percentile(finite, PERCENTILES, overwrite_input=True)
    return float(low), float(high)


def sample_cells(values: FloatArray) -> FloatArray:
    """Samples of a region, by cell.

    Parameters
    ----------
    values : array of float32, shape (y, x)
        Pixels of a region that starts at a multiple of 64; NaN does not count.

    Returns
    -------
    samples : array of float32, shape (cells y, cells x, 64)
        NaN where a cell reaches outside the region.
    """
    n = CELL // SAMPLE_STEP
    taken = values[SAMPLE_STEP // 2 :: SAMPLE_STEP, SAMPLE_STEP // 2 :: SAMPLE_STEP]
    rows, columns = (-(-size // CELL) for size in values.shape)
    full = np.full((rows * n, columns * n), np.nan, np.float32)
    full[: taken.shape[0], : taken.shape[1]] = taken
    return full.reshape(rows, n, columns, n).swapaxes(1, 2).reshape(rows, columns, n * n)


def range_map(
    samples: Callable[[int, int], FloatArray],
    noise: FloatArray,
    is_counted: npt.NDArray[np.bool_],
    whole: tuple[float, float],
    points: tuple[FieldPoints, FieldPoints],
) -> FloatArray:
    """Low and difference at the points of the lattice.

    Each point has the percentiles of the samples in its own 128 x 128 pixels, as far as they are counted. They are
    smoothed within their field with a Gaussian of one lattice distance, weighted by the number of samples, and lean on
    those of the whole image where hardly any sample is near. So that noise and faint haze do not become cells, the
    difference is nowhere smaller than 10 times the noise nearby, or a fifth of that of the whole image.

    Parameters
    ----------
    samples : function from (int, int) to array of float32, shape (rows, cells x, n)
        Those of `sample_cells` from one row of cells to another; asked for in bands of 16 rows of points.
    noise : array of float32, shape (cells y, cells x)
        Standard deviation of the noise in each cell.
    is_counted : array of bool, shape (cells y, cells x)
        Cells that are not empty.
    whole : (float, float)
        Percentiles of the whole image.
    points : (FieldPoints, FieldPoints)
        The lattice along y and x.

    Returns
    -------
    values : array of float32, shape (2, *lattice)

    Notes
    -----
    Holds some 100 bytes for every lattice point (60 MB for a slide of 100 000 x 100 000 pixels) and one band with
    its samples (50 MB there).
    """
    bands = range(0, points[0].count, BAND)
    found = np.concatenate([_rows_of_points(samples, noise, is_counted, points, first) for first in bands], axis=1)
    weight, weighted = found[0], found[1:] * found[0]
    low, high = whole
    total = _smooth(weight, points) + PRIOR_SAMPLES
    prior = (low, high, 0.0)
    smooth_low, smooth_high, smooth_noise = (
        (_smooth(values, points) + PRIOR_SAMPLES * value) / total for values, value in zip(weighted, prior, strict=True)
    )
    least = np.maximum(NOISE_IN_RANGE * smooth_noise, LEAST_SHARE * (high - low))
    return np.stack([smooth_low, np.maximum(smooth_high - smooth_low, least)]).astype(np.float32)


def _smooth(values: npt.NDArray[np.float64], points: tuple[FieldPoints, FieldPoints]) -> npt.NDArray[np.float64]:
    """Values of the lattice smoothed with those of the same field; there is nothing beyond."""
    from scipy.ndimage import gaussian_filter1d

    for axis, along in enumerate(points):
        parts = np.split(values, along.firsts[1:], axis=axis)
        values = np.concatenate([gaussian_filter1d(part, SMOOTHING, axis, mode="constant") for part in parts], axis)
    return values


def _rows_of_points(
    samples: Callable[[int, int], FloatArray],
    noise: FloatArray,
    is_counted: npt.NDArray[np.bool_],
    points: tuple[FieldPoints, FieldPoints],
    first: int,
) -> npt.NDArray[np.float64]:
    """Number of samples, percentiles and noise of the rows of lattice points of a band, shape (4, rows, points)."""
    edges = points[0].edges[first : first + BAND + 1], points[1].edges
    start, stop = int(edges[0][0]) // CELL, -(-int(edges[0][-1]) // CELL)
    counted, n = is_counted[start:stop], CELL // SAMPLE_STEP
    by_cell = np.where(counted[..., None], samples(start, stop), np.float32(np.nan))
    raster = by_cell.reshape(*counted.shape, n, n).swapaxes(1, 2).reshape(len(counted) * n, -1)
    noises = np.where(counted, noise[start:stop], np.float32(np.nan))
    edges = edges[0] - start * CELL, edges[1]
    # Samples lie at 4, 12, ... of the pixels; a cell counts for every point that it reaches into.
    after = [(along + SAMPLE_STEP // 2 - 1) // SAMPLE_STEP for along in edges]
    values = _by_point(raster, [(at[:-1], at[1:]) for at in after])
    (low, high), counts = _percentiles_of_rows(values, PERCENTILES)
    cells = _by_point(noises, [(along[:-1] // CELL, -(-along[1:] // CELL)) for along in edges])
    (middle,), _ = _percentiles_of_rows(cells, (50.0,))
    return np.stack([counts.astype(np.float64), low, high, middle])


def _by_point(values: FloatArray, parts: list[tuple[Integers, Integers]]) -> FloatArray:
    """Values of a raster by point, shape (points y, points x, n), NaN where a point has fewer than another.

    `parts` are the first index of each point along each axis, and the one after its last.
    """
    padded = np.pad(values, [(0, 1)] * 2, constant_values=np.nan)
    rows, columns = (
        np.where(index < stop[:, None], index, -1)
        for first, stop in parts
        for index in [first[:, None] + np.arange(max(1, (stop - first).max()))]
    )
    return padded[rows[:, None, :, None], columns[None, :, None, :]].reshape(len(rows), len(columns), -1)


def _percentiles_of_rows(
    values: FloatArray, percentiles: tuple[float, ...]
) -> tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.int64]]:
    """Percentiles along the last axis without NaN, by linear interpolation, and how many values are left.

    0 where there is no value.
    """
    ordered = np.sort(values, axis=-1)  # NaN goes last
    counts = np.isfinite(ordered).sum(axis=-1)
    ordered[counts == 0] = 0
    last = np.maximum(counts - 1, 0)
    found = []
    for percentile in percentiles:
        at = last * (percentile / 100)
        below = at.astype(np.int64)
        first, second = (
            np.take_along_axis(ordered, index[..., None], axis=-1)[..., 0].astype(np.float64)
            for index in (below, np.minimum(below + 1, last))
        )
        found.append(first + (second - first) * (at - below))
    return found, counts
