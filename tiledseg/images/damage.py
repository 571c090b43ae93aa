"""Damaged files: what reading them raises, and which stored chunks of a Zarr array are to blame."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import TiledsegError
from ..waiting import stored_size

__all__ = ["BAD_FILE", "TornError", "WholeFiles", "failing_chunks", "stored_keys", "torn_chunks"]

# What json, zarr, numcodecs, tifffile and imagecodecs were seen to raise on damaged files.
# fmt: off
BAD_FILE = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, NotImplementedError,
    OSError, EOFError, RuntimeError, MemoryError, struct.error, zlib.error, lzma.LZMAError,
)
# fmt: on


class TornError(ValueError):
    """Chunks whose file is cut short were to be read."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__("the stored file is cut short")
        self.keys = keys


class WholeFiles:
    """A stored Zarr array that refuses chunks whose file is cut short, see `torn_chunks`.

    Parameters
    ----------
    array : zarr.Array
    folder : object
        Of its chunks.
    """

    def __init__(self, array: Any, folder: object) -> None:
        self._array, self._folder = array, folder
        self.chunks, self.shape, self.dtype = array.chunks, array.shape, array.dtype

    def __getitem__(self, selection: tuple[slice | int, ...]) -> Any:
        if torn := torn_chunks(self._array, self._folder, selection):
            raise TornError(torn)
        return self._array[selection]


def stored_keys(array: Any, selection: Sequence[slice | int]) -> list[str]:
    """Storage keys of the chunks, or shards, that a selection touches.

    Parameters
    ----------
    array : zarr.Array
    selection : sequence of slice or int
        One per dimension, with bounds inside the array.

    Returns
    -------
    keys : list of str
    """
    cells = _cells(selection, array.shards or array.chunks)
    return [array.metadata.encode_chunk_key(cell) for cell in cells]


def torn_chunks(array: Any, folder: object, selection: Sequence[slice | int]) -> list[str]:
    """Chunks whose file is shorter than it must be, which zarr reads as zeros or garbage without a word.

    Parameters
    ----------
    array : zarr.Array
    folder : object
        A path, of the array on a local disk; anything else finds nothing.
    selection : sequence of slice or int
        One per dimension, with bounds inside the array.

    Returns
    -------
    keys : list of str
        Storage keys.

    Raises
    ------
    TimeoutError
        If the folder is gone, also after `waiting.PATIENCE_S`.

    Notes
    -----
    Found by the length of the file, without decoding: files of no bytes, and Blosc buffers of another
    length than their header says.
    """
    if not isinstance(folder, Path):
        return []
    codec = type(array.compressors[-1]).__name__ if array.compressors and not array.shards else ""
    torn = []
    for key in stored_keys(array, selection):
        path = folder / key
        try:
            size = stored_size(path, folder)
            if size == 0 or (size and codec.startswith("Blosc") and _blosc_bytes(path) != size):
                torn.append(key)
        except TimeoutError:
            raise
        except OSError:
            torn.append(key)
    return torn


def failing_chunks(array: Any, selection: Sequence[slice | int]) -> list[str]:
    """Storage keys of the chunks that cannot be decoded, found by reading them one by one.

    Parameters
    ----------
    array : zarr.Array
    selection : sequence of slice or int
        One per dimension, with bounds inside the array.

    Returns
    -------
    keys : list of str
    """
    outer = array.shards or array.chunks
    failing: dict[str, None] = {}
    for cell in _cells(selection, array.chunks):
        box = tuple(slice(i * step, (i + 1) * step) for i, step in zip(cell, array.chunks, strict=True))
        try:
            array[box]
        except BAD_FILE as error:
            if isinstance(error, TiledsegError):  # a store that is away damages nothing
                raise
            at = tuple(i * inner // whole for i, inner, whole in zip(cell, array.chunks, outer, strict=True))
            failing[array.metadata.encode_chunk_key(at)] = None
    return list(failing)


def _blosc_bytes(path: Path) -> int:
    """Length a Blosc buffer says it has."""
    with path.open("rb") as file:
        header = file.read(16)
    return int.from_bytes(header[12:16], "little") if len(header) == 16 else -1


def _cells(selection: Sequence[slice | int], chunks: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Indices of the chunks a selection touches."""
    spans = [(part, part + 1) if isinstance(part, int) else (part.start, part.stop) for part in selection]
    return product(
        *(
            range(low // step, -(-high // step) if high > low else low // step)
            for (low, high), step in zip(spans, chunks, strict=True)
        )
    )
