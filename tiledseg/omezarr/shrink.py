"""A level of a pyramid from the one before: means of intensities, or every second pixel of labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["METHODS", "finer_region", "halvings", "shrink"]

METHODS = {
    "mean": "mean of 2 pixels of the level before along each axis that is halved, of integers rounded half to even",
    "nearest": "every second pixel of the level before",
}


def halvings(shape: Sequence[int], finer: Sequence[int]) -> tuple[int, ...]:
    """Pixels of the level before for one of a level, per axis: 2 where it is halved, else 1.

    Parameters
    ----------
    shape, finer : sequence of int
        Pixels per axis of the level, and of the one before.
    """
    return tuple(-(-a // b) for a, b in zip(finer, shape, strict=True))


def finer_region(region: Sequence[slice], shape: Sequence[int], finer: Sequence[int]) -> tuple[slice, ...]:
    """The pixels of the level before that a region is made from.

    Parameters
    ----------
    region : sequence of slice
        Inside the level.
    shape, finer : sequence of int
        Pixels per axis of the level, and of the one before.

    Returns
    -------
    region : tuple of slice
    """
    steps = halvings(shape, finer)
    return tuple(
        slice(part.start * step, min(part.stop * step, n)) for part, step, n in zip(region, steps, finer, strict=True)
    )


def shrink(
    pixels: npt.NDArray[Any], shape: Sequence[int], finer: Sequence[int], method: str = "mean"
) -> npt.NDArray[Any]:
    """A region of a level.

    Parameters
    ----------
    pixels : array
        Of `finer_region`.
    shape, finer : sequence of int
        Pixels per axis of the level, and of the one before.
    method : str
        A key of `METHODS`.

    Returns
    -------
    pixels : array of the same dtype
        At an odd end the last pixel counts twice. Means of integers are exact, whatever their size; those of real
        numbers are computed in float64, and not a number if one of them is not.
    """
    steps = halvings(shape, finer)
    if method == "nearest":
        return np.ascontiguousarray(pixels[tuple(slice(None, None, step) for step in steps)])
    pixels = np.pad(pixels, [(0, -n % step) for n, step in zip(pixels.shape, steps, strict=True)], mode="edge")
    parts = [pixels[tuple(slice(i, None, step) for i, step in zip(at, steps, strict=True))] for at in _offsets(steps)]
    return _integer_mean(parts) if pixels.dtype.kind in "ui" else _real_mean(parts)


def _offsets(steps: Sequence[int]) -> list[tuple[int, ...]]:
    return list(product(*map(range, steps)))


def _integer_mean(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Mean of a power of two of arrays, rounded half to even.

    Strategy: what is whole after the division and what is left are added up apart, so nothing overflows and no wider
    type is needed.
    """
    n = len(parts)
    dtype = parts[0].dtype
    bits, low, half = dtype.type(round(math.log2(n))), dtype.type(n - 1), dtype.type(n // 2)
    whole, left = np.zeros_like(parts[0]), np.zeros_like(parts[0])
    for part in parts:
        whole += part >> bits
        left += part & low
    whole += left >> bits
    left &= low
    is_up = (left > half) | ((left == half) & ((whole & dtype.type(1)) == 1)) if n > 1 else np.zeros(whole.shape, bool)
    whole += is_up.astype(dtype)
    return whole


def _real_mean(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Mean of arrays."""
    total = np.zeros(parts[0].shape, np.float64)
    for part in parts:
        total += part
    return np.asarray(total / len(parts), parts[0].dtype)
