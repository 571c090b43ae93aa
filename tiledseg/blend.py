"""Blending tiles of the network: the kernels behind `flows.process_block`, and of putting its pieces together."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from .lerp import lerp

__all__ = ["add_half", "add_tile", "load_kernels"]


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


def add_half(piece: npt.NDArray[np.float16], values: npt.NDArray[np.float32], plane: int, top: int, left: int) -> None:
    """``values[plane :, top :, left :] += piece``, at a quarter of the time that numpy takes to widen float16.

    Parameters
    ----------
    piece : array of float16, shape (n, y, x)
    values : array of float32, shape (planes, h, w)
        Is added to.
    plane, top, left : int
        Where the piece lies in it.
    """
    _add_half(np.ascontiguousarray(piece).view(np.uint16), values, plane, top, left)


@nb.njit(cache=True, nogil=True)
def _add_half(piece: Any, values: Any, plane: int, top: int, left: int) -> None:
    """The bits of a float16, moved to where a float32 has them, are its value over 2**112, also below the least normal
    number. What is not finite would become 65536 and more."""
    n = piece.shape[2]
    bits = np.empty(n, np.uint32)
    moved, scale, beyond = bits.view(np.float32), np.float32(2.0**112), np.float32(2.0**16)
    for z in range(piece.shape[0]):
        for i in range(piece.shape[1]):
            row, into = piece[z, i], values[plane + z, top + i, left : left + n]
            for k in range(n):
                half = np.uint32(row[k])
                magnitude, sign = half & np.uint32(0x7FFF), half & np.uint32(0x8000)
                bits[k] = (magnitude << np.uint32(13)) | (sign << np.uint32(16))
            for k in range(n):
                value = moved[k] * scale
                if abs(value) >= beyond:
                    value = value * np.float32(np.inf) if abs(value) == beyond else np.float32(np.nan)
                into[k] += value


def load_kernels() -> None:
    """Compile what tiles are read and blended with, or load it from numba's cache."""
    tile, share, first = np.zeros((3, 1, 1), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int64)
    for axis in (1, 2):
        lerp(tile, axis, first, share)
    add_tile(tile, share, share, np.float32(0), tile[:, None], 0, 0, 0)
    add_half(tile.astype(np.float16), tile, 0, 0, 0)
