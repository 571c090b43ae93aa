"""Which pixel values become 0 and 1 for the network: one pair for the image, or a smooth map of them.

Where light or stain varies over a slide, one pair of percentiles for all of it leaves cells in dim parts unseen,
and a pair per tile draws the tiles into the result. Here percentiles are taken at the points of a lattice that is
fixed in the image, smoothed over its neighbours, and interpolated: a pixel's values depend on where it lies, and on
nothing else.

A map is made of samples: every 8th pixel of the surveyed level along each axis, kept by cells of the foreground map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .grid import Positions, interpolate, samples_needed

__all__ = [
    "CELL",
    "CELLS_PER_POINT",
    "SAMPLES_PER_CELL",
    "LocalRange",
    "Normalisation",
    "WholeRange",
    "percentiles_of",
    "range_map",
    "sample_cells",
]

FloatArray = npt.NDArray[np.float32]

PERCENTILES = (1.0, 99.0)

CELL = 64
SAMPLE_STEP = 8
SAMPLES_PER_CELL = (CELL // SAMPLE_STEP) ** 2
CELLS_PER_POINT = 4
"""Lattice points are 4 cells of 64 pixels apart. At that distance some tens of cells lie round a point, enough for
percentiles, and no more than the light of a microscope's field changes over; smaller ones follow single cells."""

SMOOTHING = 1.0
PRIOR_SAMPLES = 1.0
NOISE_IN_RANGE = 10.0
LEAST_SHARE = 0.02


class Normalisation(Protocol):
    """What the values 0 and 1 of the network are in pixel values, anywhere in the image."""

    def at(self, coordinates: list[Positions]) -> tuple[Any, Any]:
        """The value that becomes 0, and the difference to the one that becomes 1.

        Parameters
        ----------
        coordinates : list of array of float64
            Per axis, ascending coordinates in pixels of level 0.

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
    points : array of float32, shape (2, *lattice), in memory or on disk
        Low and difference at the lattice points; only what is needed is read.
    pitch : tuple of float
        Distance of lattice points in pixels of level 0; the first lies half of it inside the image.
    """

    points: Any
    pitch: tuple[float, ...]

    def at(self, coordinates: list[Positions]) -> tuple[Any, Any]:
        """Low and difference for every pixel."""
        sizes = self.points.shape[1:]
        on_lattice = [(at + 0.5) / p - 0.5 for at, p in zip(coordinates, self.pitch, strict=True)]
        parts = tuple(samples_needed(at, n) for at, n in zip(on_lattice, sizes, strict=True))
        positions = [(at, n, part.start) for at, n, part in zip(on_lattice, sizes, parts, strict=True)]
        low, difference = interpolate(np.asarray(self.points[(slice(None), *parts)]), positions)
        return low, difference


def percentiles_of(samples: FloatArray) -> tuple[float, float]:
    """Percentiles 1 and 99 of the finite values, 0 and 0 if there are none."""
    samples = samples[np.isfinite(samples)]
    if not samples.size:
        return 0.0, 0.0
    low, high = np.percentile(samples, PERCENTILES)
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
    samples: Any, noise: FloatArray, is_counted: npt.NDArray[np.bool_], whole: tuple[float, float]
) -> FloatArray:
    """Low and difference at the points of the lattice.

    Each point has the percentiles of the samples in its own 4 x 4 cells, as far as they are counted. They are
    smoothed with a Gaussian of one lattice distance, weighted by the number of samples, and lean on those of the whole
    image where hardly any sample is near.

    Parameters
    ----------
    samples : array of float32, shape (cells y, cells x, n), in memory or on disk
        From `sample_cells`; read by rows of lattice points.
    noise : array of float32, shape (cells y, cells x)
        Standard deviation of the noise in each cell.
    is_counted : array of bool, shape (cells y, cells x)
        Cells that are not empty.
    whole : (float, float)
        Percentiles of the whole image.

    Returns
    -------
    points : array of float32, shape (2, *lattice)

    Notes
    -----
    Holds some 40 bytes for every lattice point (6 MB for a slide of 100 000 x 100 000 pixels) and one row of them
    with its samples (7 MB there).
    """
    from scipy.ndimage import gaussian_filter

    found = np.concatenate(
        [
            _row_of_points(samples[rows], noise[rows], is_counted[rows])
            for start in range(0, is_counted.shape[0], CELLS_PER_POINT)
            for rows in [slice(start, start + CELLS_PER_POINT)]
        ],
        axis=1,
    )
    weight, weighted = found[0], found[1:] * found[0]
    low, high = whole
    spread = SMOOTHING, SMOOTHING
    total = gaussian_filter(weight, spread, mode="constant") + PRIOR_SAMPLES
    prior = (low, high, 0.0)
    smooth_low, smooth_high, smooth_noise = (
        (gaussian_filter(values, spread, mode="constant") + PRIOR_SAMPLES * value) / total
        for values, value in zip(weighted, prior, strict=True)
    )
    least = np.maximum(NOISE_IN_RANGE * smooth_noise, LEAST_SHARE * (high - low))
    return np.stack([smooth_low, np.maximum(smooth_high - smooth_low, least)]).astype(np.float32)


def _row_of_points(
    samples: FloatArray, noise: FloatArray, is_counted: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Number of samples, percentiles and noise of one row of lattice points, shape (4, 1, points)."""
    n_points = -(-samples.shape[1] // CELLS_PER_POINT)
    missing = n_points * CELLS_PER_POINT - samples.shape[1]
    values = np.where(is_counted[..., None], samples, np.float32(np.nan))
    values = np.pad(values, ((0, 0), (0, missing), (0, 0)), constant_values=np.nan)
    levels = np.pad(np.where(is_counted, noise, np.float32(np.nan)), ((0, 0), (0, missing)), constant_values=np.nan)
    low, high = _percentiles_of_rows(_by_point(values, n_points), PERCENTILES)
    (middle,) = _percentiles_of_rows(_by_point(levels, n_points), (50.0,))
    counts = np.isfinite(_by_point(values, n_points)).sum(axis=1)
    return np.stack([counts.astype(np.float64), low, high, middle])[:, None]


def _by_point(values: FloatArray, n_points: int) -> FloatArray:
    """Values by cell, shape (cells y, cells x, ...), as one row for each lattice point."""
    of_point = values.reshape(values.shape[0], n_points, CELLS_PER_POINT, -1).swapaxes(0, 1)
    return of_point.reshape(n_points, -1)


def _percentiles_of_rows(rows: FloatArray, percentiles: tuple[float, ...]) -> list[npt.NDArray[np.float64]]:
    """Percentiles of each row without its NaN, by linear interpolation; 0 for rows that have nothing else."""
    ordered = np.sort(rows, axis=1).astype(np.float64)  # NaN goes last
    last = np.isfinite(ordered).sum(axis=1) - 1
    ordered[last < 0] = 0
    found = []
    for percentile in percentiles:
        at = np.maximum(last, 0) * (percentile / 100)
        below = at.astype(np.int64)
        above = np.minimum(below + 1, np.maximum(last, 0))
        first, second = (np.take_along_axis(ordered, index[:, None], axis=1)[:, 0] for index in (below, above))
        found.append(first + (second - first) * (at - below))
    return found
