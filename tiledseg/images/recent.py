"""Chunks of an image that were read in part a moment ago: what lies beside that part is likely to be wanted next.

Regions that a run reads one after the other cut storage chunks anew each time, and to read a part of a chunk is to
fetch and decode all of it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
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
Selection = tuple[slice | int, ...]


class RecentChunks:
    """Chunks of some arrays, which must not change; for all threads of a process. Another process begins anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, Cell], npt.NDArray[Any]] = OrderedDict()

    def __reduce__(self) -> tuple[type[RecentChunks], tuple[()]]:
        return RecentChunks, ()

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
        found = self._find(name, cut)
        pixels = np.empty([high - low for low, high in bounds], array.dtype)
        missing = [cell for cell in product(*spans) if cell not in found]
        if missing:
            # At once, so that they come and are decoded side by side: those that are missing lie side by side too.
            first, last = np.min(missing, axis=0), np.max(missing, axis=0)
            box = [(a * side, min((b + 1) * side, n)) for a, b, side, n in zip(first, last, chunks, shape, strict=True)]
            read = np.asarray(array[tuple(slice(int(low), int(high)) for low, high in box)])
            for cell in missing:
                corner = [(i - a) * side for i, a, side in zip(cell, first, chunks, strict=True)]
                found[cell] = read[tuple(slice(at, at + side) for at, side in zip(corner, chunks, strict=True))]
            self._keep(name, {cell: found[cell].copy() for cell in missing if cell in cut})
        for cell, chunk in found.items():
            origin = [i * side for i, side in zip(cell, chunks, strict=True)]
            shared = [
                (max(low, at), min(high, at + side))
                for (low, high), at, side in zip(bounds, origin, chunk.shape, strict=True)
            ]
            here = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(shared, bounds, strict=True))
            pixels[here] = chunk[tuple(slice(a - at, b - at) for (a, b), at in zip(shared, origin, strict=True))]
        return pixels[tuple(0 if isinstance(part, int) else slice(None) for part in selection)]

    def _find(self, name: str, cells: set[Cell]) -> dict[Cell, npt.NDArray[Any]]:
        """Those that are kept; they are the latest now."""
        found = {}
        with self._lock:
            for cell in cells:
                chunk = self._kept.get((name, cell))
                if chunk is not None:
                    found[cell] = chunk
                    self._kept.move_to_end((name, cell))
        return found

    def _keep(self, name: str, chunks: dict[Cell, npt.NDArray[Any]]) -> None:
        """Keep these, and let go of those that nobody read for the longest time."""
        with self._lock:
            self._kept.update({(name, cell): chunk for cell, chunk in chunks.items()})
            n_bytes = sum(chunk.nbytes for chunk in self._kept.values())
            while n_bytes > RECENT_BYTES:
                n_bytes -= self._kept.popitem(last=False)[1].nbytes
