"""Chunks of an image that were read in part a moment ago: what lies beside that part is likely to be wanted next.

Regions that a run reads one after the other cut storage chunks anew each time, and to read a part of a chunk is to
fetch and decode all of it. What one thread is about to read others wait for.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["RECENT_BYTES", "RecentChunks"]

RECENT_BYTES = 2**25
"""That are kept, the latest, decoded."""
LEAST = 4
"""Chunks that must fit; of larger ones none is kept."""

Cell = tuple[int, ...]
Key = tuple[str, Cell]
Chunk = npt.NDArray[Any]
Selection = tuple[slice | int, ...]


class RecentChunks:
    """Chunks of some arrays, which must not change; for all threads of a process.

    Another process that it is sent to begins anew, once: what is sent there again is the same.

    Parameters
    ----------
    key : str, optional
        What tells it from others.
    """

    def __init__(self, key: str | None = None) -> None:
        self._key = key or uuid.uuid4().hex
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, Chunk] = OrderedDict()
        self._coming: dict[Key, Future[Chunk | None]] = {}

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _received, (self._key,)

    @property
    def n_bytes(self) -> int:
        """That are kept now."""
        with self._lock:
            return sum(chunk.nbytes for chunk in self._kept.values())

    def read(self, array: Any, name: str, selection: Selection) -> npt.NDArray[Any]:
        """``array[selection]``.

        Parameters
        ----------
        array : zarr.Array
        name : str
            Of this array among others.
        selection : tuple of slice or int
            One per dimension, step 1, with bounds inside the array.

        Returns
        -------
        pixels : array
        """
        bounds = [(part, part + 1) if isinstance(part, int) else (part.start, part.stop) for part in selection]
        chunks, shape = array.chunks, array.shape
        spans = [range(low // side, -(-high // side)) for (low, high), side in zip(bounds, chunks, strict=True)]
        cut = {
            cell
            for cell in product(*spans)
            if any(
                low > i * side or high < min((i + 1) * side, n)
                for i, (low, high), side, n in zip(cell, bounds, chunks, shape, strict=True)
            )
        }
        if not cut or LEAST * math.prod(chunks) * array.dtype.itemsize > RECENT_BYTES:
            return np.asarray(array[selection])
        pixels = np.empty([high - low for low, high in bounds], array.dtype)
        found, mine, others = self._find(name, cut)
        missing = [cell for cell in product(*spans) if cell not in found and cell not in others]
        try:
            found |= self._read(array, missing)
        finally:
            self._keep(name, {cell: found[cell].copy() if cell in found else None for cell in mine})
        for cell, coming in others.items():
            # None if who was to read it could not.
            found |= self._read(array, [cell]) if (chunk := coming.result()) is None else {cell: chunk}
        for cell, chunk in found.items():
            origin = [i * side for i, side in zip(cell, chunks, strict=True)]
            shared = [
                (max(low, at), min(high, at + side))
                for (low, high), at, side in zip(bounds, origin, chunk.shape, strict=True)
            ]
            here = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(shared, bounds, strict=True))
            pixels[here] = chunk[tuple(slice(a - at, b - at) for (a, b), at in zip(shared, origin, strict=True))]
        return pixels[tuple(0 if isinstance(part, int) else slice(None) for part in selection)]

    def _read(self, array: Any, cells: Iterable[Cell]) -> dict[Cell, Chunk]:
        """Some chunks that lie side by side, at once, so that they come and are decoded together."""
        cells = list(cells)
        if not cells:
            return {}
        first, last = np.min(cells, axis=0), np.max(cells, axis=0)
        sides, shape = array.chunks, array.shape
        box = [(a * side, min((b + 1) * side, n)) for a, b, side, n in zip(first, last, sides, shape, strict=True)]
        read = np.asarray(array[tuple(slice(int(low), int(high)) for low, high in box)])
        found = {}
        for cell in cells:
            corner = [(i - a) * side for i, a, side in zip(cell, first, sides, strict=True)]
            found[cell] = read[tuple(slice(at, at + side) for at, side in zip(corner, sides, strict=True))]
        return found

    def _find(self, name: str, cells: set[Cell]) -> tuple[dict[Cell, Chunk], set[Cell], dict[Cell, Future[Any]]]:
        """Those that are kept, which are the latest now; those that the caller has to read; those that others read."""
        found, mine, others = {}, set(), {}
        with self._lock:
            for cell in cells:
                key = (name, cell)
                if key in self._kept:
                    found[cell] = self._kept[key]
                    self._kept.move_to_end(key)
                elif key in self._coming:
                    others[cell] = self._coming[key]
                else:
                    self._coming[key] = Future()
                    mine.add(cell)
        return found, mine, others

    def _keep(self, name: str, chunks: dict[Cell, Chunk | None]) -> None:
        """Hand these to those who wait, None if there is none; keep them, without what nobody read for the longest."""
        with self._lock:
            for cell, chunk in chunks.items():
                self._coming.pop((name, cell)).set_result(chunk)
                if chunk is not None:
                    self._kept[name, cell] = chunk
            n_bytes = sum(chunk.nbytes for chunk in self._kept.values())
            while n_bytes > RECENT_BYTES:
                n_bytes -= self._kept.popitem(last=False)[1].nbytes


_receiving = threading.Lock()
_latest: dict[str, RecentChunks] = {}


def _received(key: str) -> RecentChunks:
    """What was sent to this process before under a key, of which the latest is kept."""
    with _receiving:
        if key not in _latest:
            _latest.clear()
            _latest[key] = RecentChunks(key)
        return _latest[key]
