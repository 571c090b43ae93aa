"""The image as the network sees it: its inputs on the working grid, normalised.

Every value is computed from its global index, so a tile's content depends on where the tile lies
and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .blend import cleared
from .frames import frame_region, label_shape, level_geometry
from .grid import Index, Region, WorkingGrid, interpolate, linear_weights
from .images import Image
from .inputs import Input
from .meters import metered
from .normalisation import Normalisation

__all__ = ["box_mean", "finite_float", "pixels_to_read", "read_tile", "source_level"]

FloatArray = npt.NDArray[np.float32]


def _along_grid(image: Image, level: int, grid: WorkingGrid) -> tuple[Index, tuple[float, ...], tuple[float, ...]]:
    """Shape, scale and offset of a level along the axes of a grid."""
    n = len(grid.scale)
    scale, offset = level_geometry(image, level)
    return label_shape(image, level)[-n:], scale[-n:], offset[-n:]


def source_level(image: Image, grid: WorkingGrid) -> int:
    """The coarsest level that is not coarser than the working grid, and has all frames."""
    best, n_frames = 0, len(label_shape(image)) - len(grid.scale)
    for i in range(len(image.levels)):
        _, scale, _ = _along_grid(image, i, grid)
        has_all = label_shape(image, i)[:n_frames] == label_shape(image)[:n_frames]
        if has_all and all(r * s <= 1 + 1e-3 for r, s in zip(scale, grid.scale, strict=True)):
            best = i
    return best


def pixels_to_read(image: Image, grid: WorkingGrid, sides: Index) -> Index:
    """Sides in pixels of the level that is read for a region of the working grid of these sides, at most."""
    shape, scale, _ = _along_grid(image, source_level(image, grid), grid)
    parts = zip(shape, sides, grid.scale, scale, strict=True)
    return tuple(min(n, math.ceil(side / (s * r)) + 2) for n, side, s, r in parts)


@metered("scale")
def read_tile(
    image: Image,
    shown: Sequence[tuple[Input, Normalisation]],
    grid: WorkingGrid,
    frame: Index,
    region: Region,
) -> FloatArray:
    """What the network is shown on a region of the working grid.

    Parameters
    ----------
    image : Image
        Any image; where it has a pyramid, the level just finer than the grid is read.
    shown : sequence of (Input, Normalisation)
        Each input, and its values that become 0 and 1. Pixels that are not finite count as the first.
    grid : WorkingGrid
        The grid, over the last axes of the image.
    frame : tuple of int
        Which of the frames over the axes before.
    region : tuple of slice
        In working pixels; may reach outside the grid, where the result is 0 (background).

    Returns
    -------
    values : array of float32, shape (inputs, *region)
    """
    result: FloatArray = cleared((len(shown), *(p.stop - p.start for p in region)))
    inside = tuple(slice(max(p.start, 0), min(p.stop, n)) for p, n in zip(region, grid.shape, strict=True))
    if any(p.start >= p.stop for p in inside):
        return result
    source = source_level(image, grid)
    shape, scale, offset = _along_grid(image, source, grid)
    positions, factors, needed = [], [], []
    in_frame = [np.array([i], np.float64) for i in frame]
    pixels = list(in_frame)
    for axis, part in enumerate(inside):
        n = shape[axis]
        # Where the level is still more than twice as fine, means of whole pixels replace the missing
        # level of the pyramid: linear interpolation alone would skip pixels and alias noise.
        factor = max(1, math.floor(1 / (grid.scale[axis] * scale[axis]) + 1e-6))
        n_reduced = -(-n // factor)
        in_level = (grid.to_image(part.start, part.stop, axis) - offset[axis]) / scale[axis]
        coordinates = (in_level - (factor - 1) / 2) / factor
        low, high, _ = linear_weights(coordinates[[0, -1]], n_reduced)
        needed.append(slice(int(low[0]) * factor, min(n, (int(high[-1]) + 1) * factor)))
        positions.append((coordinates, n_reduced, int(low[0])))
        factors.append(factor)
        pixels.append(np.arange(needed[-1].start, needed[-1].stop, dtype=np.float64) * scale[axis] + offset[axis])
    in_image = [*in_frame, *(grid.to_image(p.start, p.stop, axis) for axis, p in enumerate(inside))]
    where = tuple(slice(p.start - q.start, p.stop - q.start) for p, q in zip(inside, region, strict=True))
    for target, (single, normalisation) in zip(result, shown, strict=True):
        raw = single.read(image, source, frame_region(frame, tuple(needed)))
        raw = raw.reshape(raw.shape[len(frame) :])
        background = _in_frame(normalisation.at(pixels)[0], raw.ndim) if raw.dtype.kind == "f" else np.float32(0)
        values = interpolate(box_mean(finite_float(raw, background), tuple(factors)), positions)
        low, difference = (_in_frame(of, raw.ndim) for of in normalisation.at(in_image))
        target[where] = (values - low) / difference
    return result


def _in_frame(values: Any, ndim: int) -> Any:
    """A number as it is, an array without the axes of frames."""
    return values.reshape(values.shape[-ndim:]) if np.ndim(values) else values


def finite_float(values: npt.NDArray[np.generic], background: Any) -> FloatArray:
    """As float32, with what is not finite, or beyond float32, replaced by a number or one for each pixel."""
    with np.errstate(over="ignore"):
        result = values.astype(np.float32)
    if values.dtype.kind == "f":
        np.copyto(result, background, where=~np.isfinite(result))
    return result


def box_mean(values: FloatArray, factors: tuple[int, ...]) -> FloatArray:
    """Means over boxes of `factors` pixels; the last box of an axis repeats its edge to be full."""
    if all(factor == 1 for factor in factors):
        return values
    short = [(0, -n % factor) for n, factor in zip(values.shape, factors, strict=True)]
    if any(after for _, after in short):
        values = np.pad(values, short, mode="edge")
    for axis, factor in enumerate(factors):
        # Sums of slices are several times as fast as a mean over an axis of a few pixels.
        before = (slice(None),) * axis
        total = values[(*before, slice(0, None, factor))].copy()
        for k in range(1, factor):
            total += values[(*before, slice(k, None, factor))]
        values = total / np.float32(factor)
    return values
