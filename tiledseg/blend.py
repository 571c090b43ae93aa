"""Blending a tile of the network: the kernel behind `flows.process_block`."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from .lerp import lerp

__all__ = ["add_tile", "load_kernels"]


@nb.njit(cache=True, nogil=True)
def add_tile(output: Any, rows: Any, columns: Any, floor: Any, blended: Any, plane: int, top: int, left: int) -> None:
    """Add ``(values * rows) * columns`` of a tile to the blend, in float32 and in this order.

    Parameters
    ----------
    output : array of float32, shape (3, b, b)
        Flow along both axes, and the cell logit, of which what rises above the floor counts.
    rows, columns : array of float32, shape (b,)
        Weights along both axes.
    floor : float32
    blended : array of float32, shape (3, planes, h, w)
        Is added to, in C order.
    plane, top, left : int
        Where the tile lies in it.
    """
    last = output.shape[0] - 1
    for c in range(last + 1):
        for i in range(rows.size):
            values, share, into = output[c, i], rows[i], blended[c, plane, top + i, left : left + columns.size]
            if c < last:
                for j in range(columns.size):
                    into[j] += values[j] * share * columns[j]
            else:
                for j in range(columns.size):
                    value = floor if values[j] < floor else values[j]
                    into[j] += (value - floor) * share * columns[j]


def load_kernels() -> None:
    """Compile what tiles are read and blended with, or load it from numba's cache."""
    tile, share, first = np.zeros((3, 1, 1), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int64)
    for axis in (1, 2):
        lerp(tile, axis, first, first, share)
    add_tile(tile, share, share, np.float32(0), tile[:, None], 0, 0, 0)
