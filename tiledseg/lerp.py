"""Linear interpolation along one axis of an array: the kernels behind `grid.interpolate`."""

from __future__ import annotations

import math
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["lerp"]

FloatArray = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_jit = nb.njit(cache=True, nogil=True)


def lerp(values: FloatArray, axis: int, low: Indices, weight: FloatArray) -> FloatArray:
    """``below + (above - below) * weight`` along an axis, in float32 and in this order.

    Parameters
    ----------
    values : array of float32, shape (*before, n, *after)
        Samples.
    axis : int
        Which axis.
    low : array of int64, shape (m,)
        Indices of the samples below each coordinate. The next one is above it, the same where there is but one.
    weight : array of float32, shape (m,)
        Share of the one above.

    Returns
    -------
    sampled : array of float32, shape (*before, m, *after)
    """
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    result = np.empty((*before, low.size, *after), np.float32)
    if values.shape[axis] == 1:
        values = np.repeat(values, 2, axis)
    contiguous = np.ascontiguousarray(values)
    rows, n = math.prod(before), values.shape[axis]
    if axis == values.ndim - 1:
        _lerp_last(contiguous.reshape(rows, n), low, weight, result.reshape(rows, low.size))
    else:
        length = math.prod(after)
        shape = (rows, low.size, length)
        _lerp_rows(contiguous.reshape(rows, n, length), low, weight, result.reshape(shape))
    return result


@_jit
def _lerp_rows(values: Any, low: Any, weight: Any, result: Any) -> None:
    for i in range(values.shape[0]):
        for k in range(low.size):
            below, above, share, out = values[i, low[k]], values[i, low[k] + 1], weight[k], result[i, k]
            for j in range(out.size):
                out[j] = below[j] + (above[j] - below[j]) * share


@_jit
def _lerp_last(values: Any, low: Any, weight: Any, result: Any) -> None:
    one = np.uint64(1)
    for i in range(values.shape[0]):
        row, out = values[i], result[i]
        for k in range(low.size):
            # Unsigned: numba would look at each index whether it counts from the end.
            at = np.uint64(low[k])
            below, above = row[at], row[at + one]
            out[k] = below + (above - below) * weight[k]
