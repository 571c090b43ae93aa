"""Means over small boxes of a picture, and of its squares, in one pass: the kernel behind the survey's statistics."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["box_moments"]

FloatArray = npt.NDArray[np.float32]

_jit = nb.njit(cache=True, nogil=True)


def box_moments(values: FloatArray, middle: np.float32, side: int) -> tuple[FloatArray, FloatArray]:
    """Means over boxes of the distance to a value, and of its square.

    Parameters
    ----------
    values : array of float32, shape (y, x)
    middle : float32
        The value.
    side : int
        Pixels of a box along both axes; the last boxes repeat their edge to be full.

    Returns
    -------
    means, squares : array of float32, shape (boxes y, boxes x)
        Of ``values - middle``, and of its square; to the bit what `working.box_mean` makes of both.
    """
    shape = tuple(-(-n // side) for n in values.shape)
    means, squares = np.empty(shape, np.float32), np.empty(shape, np.float32)
    _box_moments(np.ascontiguousarray(values), np.float32(middle), side, means, squares)
    return means, squares


@_jit
def _box_moments(values: Any, middle: Any, side: int, means: Any, squares: Any) -> None:
    n_rows, n_columns = values.shape
    sums, powers = np.empty(n_columns, np.float32), np.empty(n_columns, np.float32)
    n = np.float32(side)
    for i in range(means.shape[0]):
        for k in range(side):
            row = values[min(i * side + k, n_rows - 1)]
            for j in range(n_columns):
                distance = row[j] - middle
                sums[j] = distance if k == 0 else sums[j] + distance
                powers[j] = distance * distance if k == 0 else powers[j] + distance * distance
        for j in range(n_columns):
            sums[j] /= n
            powers[j] /= n
        for j in range(means.shape[1]):
            total, power = sums[j * side], powers[j * side]
            for k in range(1, side):
                at = min(j * side + k, n_columns - 1)
                total += sums[at]
                power += powers[at]
            means[i, j] = total / n
            squares[i, j] = power / n
