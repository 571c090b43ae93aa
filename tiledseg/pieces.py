"""Pieces of a conversion: regions that are read and written by one task each, and the plan of what is written.

A piece is of whole files (shards, or chunks) of what is written, so that no file is written by two tasks, and where it
can be of whole chunks of what is read, so that none is decoded twice: a plane that is compressed in one strip
makes the piece as large as the plane.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .config import ConvertConfig
from .errors import SettingsError
from .grid import Index, Region
from .images import Image, MemorySource
from .omezarr import ImagePlan
from .omezarr.groups import chunk_shape, count_levels
from .remote import Location

__all__ = ["Pieces", "calibrated", "pieces_of_level", "pieces_of_source", "plan_of"]

logger = logging.getLogger(__name__)

CHUNK = 1024
SIDE = 2048
"""Along y and x, up to which pieces grow."""
PIECE_BYTES = 2**24
"""Up to which pieces grow. A task holds a few times as much."""
MOST_BYTES = 2**26
"""Of pieces that are large because of what is read; above that chunks are made smaller."""
LARGE_BYTES = 2**30
"""Of pieces of which it is said that they take memory."""
FEWEST_ROWS = 256


@dataclass(frozen=True)
class Pieces:
    """An array cut into equal boxes.

    Attributes
    ----------
    axes : str
    shape, sides : tuple of int
        Pixels per axis, of the array and of a box; those at the far edges are cut.
    """

    axes: str
    shape: Index
    sides: Index

    @property
    def counts(self) -> Index:
        """Boxes per axis."""
        return tuple(-(-n // side) for n, side in zip(self.shape, self.sides, strict=True))

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __getitem__(self, number: int) -> Region:
        """One box, in raster order."""
        at: list[int] = []
        for count in reversed(self.counts):
            number, i = divmod(number, count)
            at.insert(0, i)
        return tuple(
            slice(i * side, min((i + 1) * side, n)) for i, side, n in zip(at, self.sides, self.shape, strict=True)
        )


def calibrated(image: Image, config: ConvertConfig) -> Image:
    """The image with the pixel size that was given, and no unit where the size is unknown."""
    sizes = config.sizes_um(image.spatial_axes)
    spacing = tuple(sizes.get(axis, known) for axis, known in zip(image.axes, image.spacing, strict=True))
    named = zip(image.axes, image.units, spacing, strict=True)
    units = tuple("micrometer" if a in sizes else unit if step is not None else None for a, unit, step in named)
    return dataclasses.replace(image, spacing=spacing, units=units)


def plan_of(image: Image, root: Location, config: ConvertConfig) -> ImagePlan:
    """What is written.

    Raises
    ------
    SettingsError
        If the shard is no multiple of the chunk.
    """
    chunks = _chunks(image, config)
    return ImagePlan(
        root=root,
        version=config.ome_version,
        axes=image.axes,
        shape=image.shape,
        dtype=image.dtype.str,
        n_levels=count_levels(image.axes, image.shape, config.chunk or CHUNK),
        chunks=chunks,
        spacing=image.spacing,
        translation=image.translation,
        units=image.units,
        channels=image.channels,
        shards=_shards(image, chunks, config),
        thickness=image.plane_thickness(),
        method=config.downsample,
    )


def pieces_of_source(image: Image, plan: ImagePlan) -> Pieces:
    """Pieces of level 0, as they are read from the image and written."""
    sides = _read_once(plan.level_files(0), _source_chunks(image), image.shape)
    n_bytes = image.dtype.itemsize * math.prod(sides)
    if n_bytes > LARGE_BYTES:
        logger.warning(
            "%s can only be read in pieces of %.1f GiB, and each thread holds one or two of them; --workers 1 on a "
            "machine of few cores takes least memory.",
            image.name,
            n_bytes / 2**30,
        )
    return Pieces(plan.axes, plan.shape, _grown(plan.axes, sides, plan.shape, image.dtype.itemsize, PIECE_BYTES))


def pieces_of_level(plan: ImagePlan, level: int) -> Pieces:
    """Pieces of a coarser level; each is made from up to eight times as many pixels."""
    shape, itemsize = plan.level_shape(level), int(plan.dtype[2:])
    sides = _grown(plan.axes, plan.level_files(level), shape, itemsize, PIECE_BYTES // 4)
    return Pieces(plan.axes, shape, sides)


def _source_chunks(image: Image) -> Index:
    """What is read at once; of an array in memory that has no chunks, a pixel."""
    source = image.source
    if isinstance(source, MemorySource) and not hasattr(source.array, "chunks"):
        return (1,) * len(image.shape)
    return image.levels[0].chunks


def _chunks(image: Image, config: ConvertConfig) -> Index:
    """Pixels of a chunk: as was asked for, but fewer where what is read would make pieces large."""
    axes, shape = image.axes, image.shape
    chunks = list(chunk_shape(axes, shape, config.chunk or CHUNK))
    fewest = {"z": 1} if config.chunk else {"z": 1, "y": FEWEST_ROWS}
    if config.chunk:
        for axis in "yx":
            chunks[axes.index(axis)] = min(config.chunk, shape[axes.index(axis)])
    source = _source_chunks(image)

    def n_bytes(chunks: Sequence[int]) -> int:
        return image.dtype.itemsize * math.prod(_read_once(chunks, source, shape))

    for axis, least in fewest.items():
        while axis in axes and chunks[axes.index(axis)] > least:
            fewer = [max(least, n // 2) if a == axis else n for a, n in zip(axes, chunks, strict=True)]
            # What is large for its chunks alone, or is read whole anyway, does not become smaller.
            if n_bytes(chunks) <= MOST_BYTES or n_bytes(fewer) == n_bytes(chunks) or source == (1,) * len(shape):
                break
            chunks = fewer
    return tuple(chunks)


def _shards(image: Image, chunks: Index, config: ConvertConfig) -> Index | None:
    """Pixels of a shard: as many times a chunk along z as along y and x."""
    if config.shard is None:
        return None
    at = image.axes.index("x")
    if config.shard % chunks[at] and config.shard < image.shape[at]:
        raise SettingsError(
            f"shard {config.shard} is no multiple of the chunk {chunks[at]}; give one (--shard, --chunk)."
        )
    times = max(1, config.shard // chunks[at])
    return tuple(chunk * times if axis in "zyx" else chunk for axis, chunk in zip(image.axes, chunks, strict=True))


def _read_once(files: Sequence[int], source: Sequence[int], shape: Sequence[int]) -> Index:
    """Sides of whole files that hold whole chunks of the source, where some of a moderate size do."""
    return tuple(_side(out, chunk, n) for out, chunk, n in zip(files, source, shape, strict=True))


def _side(out: int, chunk: int, n: int) -> int:
    """The least multiple of `out` that is one of `chunk`, or reaches the end; else one so large that few are cut."""
    whole = -(-n // out) * out
    least = min(whole, -(-chunk // out) * out)
    for side in itertools.takewhile(lambda side: side <= max(least, SIDE), itertools.count(least, out)):
        if side % chunk == 0 or side >= whole:
            return side
    return max(least, SIDE // out * out)


def _grown(axes: str, sides: Sequence[int], shape: Sequence[int], itemsize: int, most_bytes: int) -> Index:
    """Sides, doubled along x and then y as long as pieces stay small."""
    grown = list(sides)
    for axis in "xy":
        at = axes.index(axis)
        while grown[at] < min(shape[at], SIDE) and 2 * itemsize * math.prod(grown) <= most_bytes:
            grown[at] *= 2
    return tuple(grown)
