"""Whole chunks of the scratch as zarr stores them, made by the thread that has the values.

zarr hands a chunk to another thread for each of its codecs and to one more for the file, and among threads that keep
Python's lock busy, as those do that feed a GPU, each handing over is a wait.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["chunk_key", "compressors", "encoded", "is_encoded_so"]

LEVEL = 1


def compressors(dtype: npt.DTypeLike) -> list[Any]:
    """What zarr is told of how `encoded` encodes values of a type."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    blosc = BloscCodec(cname="lz4", clevel=LEVEL, shuffle="shuffle", typesize=np.dtype(dtype).itemsize)
    return [blosc, Crc32cCodec()]  # Blosc itself misses half of all flipped bits


def is_encoded_so(array: Any) -> bool:
    """Whether the chunks of a zarr array are what `encoded` makes of its values."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    return [type(codec) for codec in array.compressors] == [BloscCodec, Crc32cCodec]


def chunk_key(region: tuple[slice, ...], chunks: tuple[int, ...]) -> str | None:
    """The key of the chunk that a region is, with dots in it; None if it is not one whole chunk."""
    if any((part.start % n, part.stop - part.start) != (0, n) for part, n in zip(region, chunks, strict=True)):
        return None
    return ".".join(["c", *(str(part.start // n) for part, n in zip(region, chunks, strict=True))])


def encoded(values: npt.NDArray[Any]) -> tuple[bytes, bytes]:
    """The content of the file of a chunk, in two parts."""
    import google_crc32c
    from numcodecs import Blosc

    data = Blosc(cname="lz4", clevel=LEVEL, shuffle=Blosc.SHUFFLE).encode(np.ascontiguousarray(values))
    return data, int(google_crc32c.value(data)).to_bytes(4, "little")
