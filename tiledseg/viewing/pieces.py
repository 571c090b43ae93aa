"""One channel of an image, or labels, as the files of an OME-Zarr that nobody stored.

A viewer asks for pieces of a picture by name, and they are read from whatever the image is: OME-Zarr of any version,
sharded or not, TIFF, a remote store that wants credentials, an array in memory. So the viewer needs no more than one
format, no file is opened that a request names, and nothing outside the image can be asked for.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ImageError
from ..images import Image
from ..omezarr.groups import multiscales
from .scene import Placement

__all__ = ["Pieces", "Stored", "drawn_type"]

LARGEST = 2**21
"""Pixels of a piece; larger ones are cut."""
LONGEST = 2048
"""Pixels of a side of a piece: strips of a TIFF are wide."""
SMALLEST = 2**16
"""Pixels of a piece; smaller ones are put together: each costs a request."""
KEPT_BYTES = 2**28
"""Of stored pieces of which only a part was asked for, by image."""
MOST_BYTES = 2**29
"""Of a stored piece that is read for a part of it."""
_CHUNK = re.compile(r"(\d{1,3})/c((?:/\d{1,9}){1,5})")
_DRAWN = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "float32"}

Box = tuple[tuple[int, int], ...]
"""First and one-past-last pixel per axis."""


class Stored:
    """Reads parts of an image's levels; keeps what was read beside them where pieces are stored as larger ones.

    Parameters
    ----------
    image : Image

    Raises
    ------
    ImageError
        If a stored piece is too large to be read for every part of it.
    """

    def __init__(self, image: Image) -> None:
        self.image = image
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, Box], npt.NDArray[Any]] = OrderedDict()
        # A numpy array gives any part at no cost.
        self._is_direct = [
            isinstance(image.source.open(level.number, level.path), np.ndarray) for level in image.levels
        ]
        for number in range(len(image.levels)):
            n_bytes = math.prod(self._stored_shape(number)) * image.dtype.itemsize
            if not self._is_direct[number] and n_bytes > MOST_BYTES:
                raise ImageError(
                    f"{image.name} is stored in pieces of {n_bytes / 2**30:.1f} GiB, each read whole for any part of "
                    "it; make an OME-Zarr of it first (tiledseg convert)."
                )

    def read(self, level: int, box: Box) -> npt.NDArray[Any]:
        """Pixels of a box of a level.

        Parameters
        ----------
        level : int
        box : tuple of (int, int)
            Per axis of the image, inside the level.

        Returns
        -------
        pixels : array, shape of the box
        """
        around = self._around(level, box)
        n_wanted, n_stored = (math.prod(stop - start for start, stop in one) for one in (box, around))
        if self._is_direct[level] or n_stored == n_wanted or n_stored * self.image.dtype.itemsize > MOST_BYTES:
            return self.image.read(level, _slices(box))
        with self._lock:
            pixels = self._kept.pop((level, around), None)
            if pixels is None:
                pixels = self.image.read(level, _slices(around))
            self._kept[level, around] = pixels
            while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return pixels[tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(box, around, strict=True))]

    def _stored_shape(self, level: int) -> tuple[int, ...]:
        stored = self.image.levels[level]
        return tuple(map(min, stored.chunks, stored.shape))

    def _around(self, level: int, box: Box) -> Box:
        """All that is read to read a box: the stored pieces it touches."""
        stored = self.image.levels[level]
        found = []
        for (start, stop), before, chunk, size in zip(box, stored.start, stored.chunks, stored.shape, strict=True):
            first = (start + before) // chunk * chunk - before
            last = -(-(stop + before) // chunk) * chunk - before
            found.append((max(first, 0), min(last, size)))
        return tuple(found)


class Pieces:
    """The files of an OME-Zarr 0.5 with the pixels of one channel, or of labels.

    Parameters
    ----------
    stored : Stored
    placement : Placement
    channel : int or None
        None for labels, and images without channels.
    is_labels : bool

    Attributes
    ----------
    dtype : dtype
        Of the pixels handed out.
    shapes, chunks : list of tuple of int
        Pixels of every level, and of its pieces, along every axis but c.
    """

    def __init__(self, stored: Stored, placement: Placement, channel: int | None, *, is_labels: bool) -> None:
        self._stored, self._placement, self._channel = stored, placement, channel
        self._image = image = stored.image
        self._free = [at for at, axis in enumerate(image.axes) if axis != "c"]
        self.dtype = drawn_type(image.dtype, is_labels=is_labels)
        self.shapes = [self._of(level.shape) for level in image.levels]
        self.chunks = [
            _sides(placement.axes, self._of(level.chunks), shape)
            for level, shape in zip(image.levels, self.shapes, strict=True)
        ]

    def file(self, path: str) -> bytes | None:
        """The content of a file, None if there is none of that name.

        Parameters
        ----------
        path : str
            ``zarr.json``, ``LEVEL/zarr.json`` or ``LEVEL/c/I/J``; it only ever names numbers.

        Returns
        -------
        content : bytes or None
        """
        if path == "zarr.json":
            return json.dumps(self._group()).encode()
        level, _, rest = path.partition("/")
        if rest == "zarr.json" and level.isascii() and level.isdigit() and int(level) < len(self.shapes):
            return json.dumps(self._array(int(level))).encode()
        found = _CHUNK.fullmatch(path)
        if found is None or int(found[1]) >= len(self.shapes):
            return None
        return self._chunk(int(found[1]), [int(part) for part in found[2][1:].split("/")])

    def read(self, level: int, box: Box) -> npt.NDArray[Any]:
        """Pixels of a box of a level.

        Parameters
        ----------
        level : int
        box : tuple of (int, int)
            First and one-past-last pixel along every axis but c, inside the level.

        Returns
        -------
        pixels : array of `dtype`, shape of the box
        """
        full = list(box)
        if "c" in self._image.axes:
            channel = self._channel or 0
            full.insert(self._image.axes.index("c"), (channel, channel + 1))
        pixels = self._stored.read(level, tuple(full))
        with np.errstate(over="ignore", invalid="ignore"):  # of float64, numbers too large to draw
            return pixels.reshape([stop - start for start, stop in box]).astype(self.dtype)

    def _of(self, values: Sequence[int]) -> tuple[int, ...]:
        """Of one value per axis those of all but c."""
        return tuple(values[at] for at in self._free)

    def _group(self) -> dict[str, Any]:
        """Metadata of the group: where every level lies."""
        place, image = self._placement, self._image
        scales, shifts = [], []
        for level in image.levels:
            scale = dict(zip(image.spatial_axes, level.scale, strict=True))
            offset = dict(zip(image.spatial_axes, level.offset, strict=True))
            geometry = list(zip(place.axes, place.step, place.origin, strict=True))
            scales.append([step * scale.get(axis, 1.0) for axis, step, _ in geometry])
            shifts.append([origin + step * offset.get(axis, 0.0) for axis, step, origin in geometry])
        entry = multiscales("layer", place.axes, place.units, scales, shifts)
        return {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"ome": {"version": "0.5", "multiscales": [entry]}},
        }

    def _array(self, level: int) -> dict[str, Any]:
        """Metadata of one level."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shapes[level]),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunks[level])}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
            ],
            "dimension_names": list(self._placement.axes),
            "attributes": {},
        }

    def _chunk(self, level: int, index: list[int]) -> bytes | None:
        """A piece, whole also where the picture ends within it; None if it lies outside."""
        from numcodecs import Zstd

        shape, chunks = self.shapes[level], self.chunks[level]
        if len(index) != len(shape) or any(i * side >= n for i, side, n in zip(index, chunks, shape, strict=True)):
            return None
        box = tuple((i * side, min((i + 1) * side, n)) for i, side, n in zip(index, chunks, shape, strict=True))
        pixels = self.read(level, box)
        whole = np.zeros(chunks, self.dtype.newbyteorder("<"))
        whole[tuple(slice(0, n) for n in pixels.shape)] = pixels
        return bytes(Zstd(level=1).encode(whole))


def drawn_type(dtype: np.dtype[Any], *, is_labels: bool) -> np.dtype[Any]:
    """The type that pixels are sent in.

    Parameters
    ----------
    dtype : dtype
        Of the image.
    is_labels : bool

    Returns
    -------
    dtype : dtype
        One that viewers draw: of labels uint32 or uint64, of images whole numbers of up to 32 bits or float32.
    """
    if is_labels:
        return np.dtype(np.uint32 if dtype.itemsize <= 4 else np.uint64)
    return np.dtype(dtype.name if dtype.name in _DRAWN else np.float32)


def _sides(axes: str, chunks: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Pixels of a piece per axis: those of a stored one, halved or doubled until they are neither few nor many."""
    sides = [1 if axis == "t" else side for axis, side in zip(axes, chunks, strict=True)]
    space = [at for at, axis in enumerate(axes) if axis != "t"]
    while math.prod(sides) > LARGEST or max(sides) > LONGEST:
        longest = max(space, key=lambda at: sides[at])
        sides[longest] = -(-sides[longest] // 2)
    while math.prod(sides) < SMALLEST and any(sides[at] < shape[at] for at in space):
        shortest = min((at for at in space if sides[at] < shape[at]), key=lambda at: sides[at])
        sides[shortest] = min(2 * sides[shortest], shape[shortest])
    return tuple(sides)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
