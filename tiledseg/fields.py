"""Fields of an image: where lines straight across it, at which the exposure jumps, divide it, as in a mosaic.

At such a line every row steps at the same place. Differences of neighbouring columns, summed over the image, are there
several times those of the columns around; cells and gradients, which lie anywhere, do nothing of the kind. The lines
hold from one edge of the image to the other. Each field has points of a lattice of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .meters import metered

__all__ = ["FieldPoints", "field_starts", "on_lattice", "steps_along"]

FloatArray = npt.NDArray[np.float32]
Steps = npt.NDArray[np.float64]

JUMP = 3.0
"""How many times the differences around those at a line are. In mosaics it is 4 to 20; cells make it 2 at most."""
AROUND = 33  # pixels whose median is what the differences around are


@metered("statistics")
def steps_along(values: FloatArray, core: tuple[slice, ...]) -> list[Steps]:
    """How much the pixels of a region differ from those before them, summed over each row, and each column.

    Parameters
    ----------
    values : array of float32, shape (y, x)
        Pixels of a region with a margin, where the image has one.
    core : tuple of slice
        The region without its margin, within `values`.

    Returns
    -------
    steps : list of array of float64, of the lengths of `core`
        Per axis; 0 for the first pixel of the image.
    """
    found = []
    for axis, part in enumerate(core):
        along = list(core)
        along[axis] = slice(max(0, part.start - 1), part.stop)
        total = np.abs(np.diff(values[tuple(along)], axis=axis)).sum(axis=1 - axis, dtype=np.float64)
        found.append(np.pad(total, (part.stop - part.start - total.size, 0)))
    return found


def field_starts(steps: Steps, least: int) -> tuple[int, ...]:
    """Where fields begin along one axis.

    Parameters
    ----------
    steps : array of float64, shape (inputs, length)
        Those of `steps_along`, summed over the image. A jump in any input counts.
    least : int
        Pixels of the smallest field.

    Returns
    -------
    starts : tuple of int
        First pixels, ascending; the first is 0.
    """
    from scipy.ndimage import median_filter

    strength = np.zeros(steps.shape[1])
    for single in steps:
        # Where hardly anything differs, as in empty parts without noise, the image's mean is the measure.
        around = np.maximum(median_filter(single, AROUND, mode="nearest"), single.mean())
        strength = np.maximum(strength, np.divide(single, around, out=np.zeros_like(single), where=around > 0))
    is_free = np.zeros(strength.shape, np.bool_)
    is_free[least : max(least, strength.size - least + 1)] = True
    candidates = np.flatnonzero((strength >= JUMP) & is_free)
    starts = [0]
    for at in candidates[np.argsort(-strength[candidates], kind="stable")]:
        if is_free[at]:
            starts.append(int(at))
            is_free[max(0, at - least + 1) : at + least] = False
    return tuple(sorted(starts))


@dataclass(frozen=True)
class FieldPoints:
    """The points of a lattice along one axis: `pitch` apart, in every field from its first pixel on.

    Parameters
    ----------
    length : int
        Of the axis, in pixels.
    pitch : int
        Pixels that belong to a point, which lies amid them; the last of a field may have fewer.
    starts : tuple of int
        First pixels of the fields.
    """

    length: int
    pitch: int
    starts: tuple[int, ...] = (0,)

    @property
    def edges(self) -> npt.NDArray[np.int64]:
        """The first pixel of each point, and the length."""
        stops = (*self.starts[1:], self.length)
        parts = [np.arange(start, stop, self.pitch) for start, stop in zip(self.starts, stops, strict=True)]
        return np.concatenate([*parts, [self.length]])

    @property
    def firsts(self) -> tuple[int, ...]:
        """The number of the first point of each field."""
        return tuple(int(i) for i in np.searchsorted(self.edges, self.starts))

    @property
    def count(self) -> int:
        """How many there are."""
        return self.edges.size - 1


def on_lattice(
    at: npt.NDArray[np.float64], pitch: float, count: int, fields: tuple[tuple[float, int], ...]
) -> npt.NDArray[np.float64]:
    """Where coordinates lie among the points of a lattice: between two of the same field, or at its first or last.

    Parameters
    ----------
    at : array of float64
        Ascending coordinates of pixels.
    pitch : float
        Pixels between points.
    count : int
        Number of points.
    fields : tuple of (float, int)
        Of each field the edge at which it begins, and the number of its first point.

    Returns
    -------
    positions : array of float64
        Ascending; point i is at i.
    """
    starts, firsts = (np.array(of) for of in zip(*fields, strict=True))
    lasts = np.append(firsts[1:], count) - 1
    field = np.searchsorted(starts[1:], at + 0.5, side="right")
    positions: npt.NDArray[np.float64] = np.clip(
        firsts[field] + ((at + 0.5 - starts[field]) / pitch - 0.5), firsts[field], lasts[field]
    )
    return positions
