"""Geometry: blocks with core and halo, the working grid, and the lattice of network tiles.

Everything is computed from global indices, so that a part of the image and the whole give the
same numbers.

A block is what one task of the mask stage works on. Its core is what it writes; cores partition
the image. Its halo is what it reads around that::

        +-----------------------------+   padded: core and halo, clipped at the image
        |  halo                       |
        |     +-----------------+     |
        |     |  core           |     |
        |     |                 |     |
        |     +-----------------+     |
        |                             |
        +-----------------------------+

The working grid is the image scaled so that cells have the diameter the network was trained for.
Network tiles lie at fixed positions of it, the lattice. Neighbouring tiles overlap and are
blended; a flows chunk is a fixed number of tiles along each axis. Of a volume the network sees planes along
two axes: tiles are one pixel thick across them, and a chunk is thin::

    tile 0   |---------------|
    tile 1            |---------------|            stride < tile
    tile 2                     |---------------|
    chunk 0  |------------------------|            the piece of chunk 0 (two tiles)
    chunk 1                    |---------------|   the piece of chunk 1 overlaps it

Where two pieces overlap their values are summed: each tile is weighted by its share of the taper
of all tiles there, which the lattice alone decides.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .errors import SettingsError
from .lerp import lerp

__all__ = [
    "Block",
    "BlockGrid",
    "Lattice",
    "WorkingGrid",
    "enclosing",
    "interpolate",
    "linear_weights",
    "overlap",
    "region_shape",
    "region_text",
    "shift",
]

Index = tuple[int, ...]
Region = tuple[slice, ...]
Positions = npt.NDArray[np.float64]
Entry = TypeVar("Entry")

MAX_WORKING_RATIO = 64.0


def region_shape(region: Region) -> tuple[int, ...]:
    """Shape of a region given as slices with start and stop."""
    return tuple(part.stop - part.start for part in region)


def region_text(axes: str, region: Region) -> str:
    """A region for people: ``y 0:512, x 512:700``."""
    return ", ".join(f"{axis} {part.start}:{part.stop}" for axis, part in zip(axes, region, strict=True))


def shift(region: Region, by: Index) -> Region:
    """The same region seen from an origin at `by`."""
    return tuple(slice(p.start - o, p.stop - o) for p, o in zip(region, by, strict=True))


def overlap(a: Region, b: Region) -> Region | None:
    """Intersection of two regions, None if it is empty."""
    parts = tuple(slice(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(a, b, strict=True))
    return parts if all(p.start < p.stop for p in parts) else None


def enclosing(regions: Sequence[Region]) -> Region:
    """The smallest region that holds all of some regions."""
    return tuple(slice(min(p.start for p in axis), max(p.stop for p in axis)) for axis in zip(*regions, strict=True))


@dataclass(frozen=True)
class Block:
    """One unit of work: `core` is written, `padded` (core and halo) is read."""

    index: Index
    core: Region
    padded: Region

    @property
    def core_in_padded(self) -> Region:
        """The core seen from the origin of the padded block."""
        return shift(self.core, tuple(p.start for p in self.padded))


@dataclass(frozen=True)
class BlockGrid:
    """Partition of an image into blocks.

    Parameters
    ----------
    shape : tuple of int
        Spatial shape of the image in pixels.
    block : tuple of int
        Size of a core; the last one along an axis may be smaller.
    halo : tuple of int
        Pixels read around a core.
    """

    shape: Index
    block: Index
    halo: Index

    @property
    def counts(self) -> Index:
        """Blocks along each axis."""
        return tuple(-(-s // b) for s, b in zip(self.shape, self.block, strict=True))

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return math.prod(self.counts)

    @property
    def padded_shape(self) -> Index:
        """Shape that holds every padded block."""
        sizes = zip(self.shape, self.block, self.halo, strict=True)
        return tuple(min(s, b + 2 * h) for s, b, h in sizes)

    @property
    def n_slabs(self) -> int:
        """Slabs: blocks that follow each other and share their index along all axes of single pixels and the next."""
        frames = next((axis for axis, side in enumerate(self.block) if side > 1), len(self.block) - 1)
        return math.prod(self.counts[: frames + 1])

    def at(self, index: Index, halo: Index | None = None) -> Block:
        """The block of this index, with another halo if one is given."""
        parts = zip(index, self.block, self.shape, strict=True)
        return self.around(index, tuple(slice(i * b, min((i + 1) * b, s)) for i, b, s in parts), halo or self.halo)

    def around(self, index: Index, core: Region, halo: Index) -> Block:
        """The block with this core, which may be any region of the image."""
        parts = zip(core, halo, self.shape, strict=True)
        return Block(index, core, tuple(slice(max(0, c.start - h), min(s, c.stop + h)) for c, h, s in parts))

    def number(self, index: Index) -> int:
        """Position of a block in raster order."""
        return int(np.ravel_multi_index(index, self.counts))

    def index_of(self, number: int) -> Index:
        """Index of the block at this position in raster order."""
        return tuple(int(i) for i in np.unravel_index(number, self.counts))

    def text(self, axes: str, number: int) -> str:
        """The block at this position for people: its index, and its core."""
        block = self.at(self.index_of(number))
        return f"block {block.index} at {region_text(axes, block.core)}"

    def touching(self, region: Region) -> Iterator[Index]:
        """Blocks whose core meets a region, in raster order."""
        yield from itertools.product(
            *(range(p.start // b, -(-p.stop // b)) for p, b in zip(region, self.block, strict=True))
        )

    def later_neighbours(self, index: Index) -> Iterator[Index]:
        """Neighbours over faces, edges and corners that come later in raster order."""
        for step in itertools.product((-1, 0, 1), repeat=len(index)):
            other = tuple(i + d for i, d in zip(index, step, strict=True))
            if step > (0,) * len(step) and all(0 <= i < n for i, n in zip(other, self.counts, strict=True)):
                yield other


@dataclass(frozen=True)
class WorkingGrid:
    """The image scaled so that cells have the network's diameter.

    Working pixel ``i`` lies at image coordinate ``(i + 0.5) / scale - 0.5``.

    Parameters
    ----------
    image_shape : tuple of int
        Spatial shape of level 0 in pixels.
    scale : tuple of float
        Working pixels per image pixel, along each axis.
    """

    image_shape: Index
    scale: tuple[float, ...]

    @classmethod
    def for_diameter(
        cls, image_shape: Index, diameter: float, diam_mean: float, anisotropy: float = 1.0
    ) -> WorkingGrid:
        """The grid on which cells of `diameter` image pixels have `diam_mean` working pixels; of a volume with planes
        `anisotropy` pixels thick."""
        scale = diam_mean / diameter
        if not 1 / MAX_WORKING_RATIO <= scale <= MAX_WORKING_RATIO:
            low, high = diam_mean / MAX_WORKING_RATIO, diam_mean * MAX_WORKING_RATIO
            raise SettingsError(
                f"diameter {diameter:g} px would scale the image by {scale:.3g} before the network sees it; "
                f"give a diameter from {low:.2g} to {high:.0f} px."
            )
        return cls(image_shape, (*(scale * anisotropy,) * (len(image_shape) - 2), scale, scale))

    @property
    def shape(self) -> Index:
        """Shape of the working grid."""
        return tuple(max(1, round(n * s)) for n, s in zip(self.image_shape, self.scale, strict=True))

    def to_image(self, start: int, stop: int, axis: int) -> Positions:
        """Image coordinates of working pixels start..stop along an axis."""
        return (np.arange(start, stop, dtype=np.float64) + 0.5) / self.scale[axis] - 0.5

    def from_image(self, start: int, stop: int, axis: int) -> Positions:
        """Working coordinates of image pixels start..stop along an axis."""
        return (np.arange(start, stop, dtype=np.float64) + 0.5) * self.scale[axis] - 0.5

    def region_in_image(self, region: Region) -> Region:
        """The part of the image that a region of the working grid covers, clipped."""
        parts = zip(region, self.scale, self.image_shape, strict=True)
        return tuple(
            slice(min(n - 1, max(0, math.floor(p.start / s))), min(n, max(1, math.ceil(p.stop / s))))
            for p, s, n in parts
        )


def linear_weights(
    positions: Positions, size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Indices and weight for linear interpolation, clamped to 0..size-1.

    Returns
    -------
    low, high : array of int64
        Indices of the two samples.
    weight : array of float32
        Weight of `high`.
    """
    clamped = np.clip(positions, 0, size - 1)
    low = np.minimum(clamped.astype(np.int64), max(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    return low, high, (clamped - low).astype(np.float32)


def interpolate(
    values: npt.NDArray[np.float32], positions: list[tuple[Positions, int, int]]
) -> npt.NDArray[np.float32]:
    """Linear interpolation along the last axes of an array, one axis after the other.

    Parameters
    ----------
    values : array of float32, shape (..., *spatial)
        Samples of a part of a global grid.
    positions : list of (array of float64, int, int)
        Per spatial axis: global coordinates to sample, size of the global grid, global index of the
        first sample in `values`.

    Returns
    -------
    sampled : array of float32, shape (..., *lengths of positions)
        Every value depends on its global coordinate and the samples there, not on the part given.
    """
    first = values.ndim - len(positions)
    for i, (coordinates, size, origin) in enumerate(positions):
        low, _, weight = linear_weights(coordinates, size)
        values = lerp(values, first + i, low - origin, weight)
    return values


def samples_needed(coordinates: Positions, size: int) -> slice:
    """The samples of a global grid that interpolation at these ascending coordinates reads."""
    low, high, _ = linear_weights(coordinates[[0, -1]], size)
    return slice(int(low[0]), int(high[-1]) + 1)


@functools.lru_cache(maxsize=64)
def _shares(side: int, stride: int, has_before: bool, has_after: bool) -> npt.NDArray[np.float32]:
    """Share of a tile in the blend along an axis, with or without neighbours there.

    The taper is Cellpose's: a sigmoid that falls to one half 20 pixels from the tile's edge.
    """
    distance = np.abs(np.arange(side) - (side - 1) / 2)
    taper = 1 / (1 + np.exp((distance - (side / 2 - 20)) / 7.5))
    total, shared = taper.copy(), side - stride
    if has_before:
        total[:shared] += taper[stride:]
    if has_after:
        total[stride:] += taper[:shared]
    shares: npt.NDArray[np.float32] = (taper / total).astype(np.float32)
    shares.flags.writeable = False
    return shares


@dataclass(frozen=True)
class Lattice:
    """Fixed positions of the network's tiles on the working grid.

    Parameters
    ----------
    shape : tuple of int
        Shape of the working grid along the axes that are tiled.
    tile : int
        Side of a tile in working pixels.
    stride : int
        Distance between tiles; a multiple of the network's total pooling, so that all tiles see
        the same phase, and at least half a tile, so that at most two overlap along an axis.
    thin : int, optional
        Of a volume the axis across the planes that the network sees: a tile is one pixel thick along it.
    margin : int
        How far the first tile starts before the grid, and the last ends at least after it. A grid that is smaller
        than a tile lies in its middle, as in Cellpose.
    tiles_per_chunk : int
        Tiles of a flows chunk along each axis of the planes.
    planes_per_chunk : int
        Planes of a flows chunk.
    """

    shape: Index
    tile: int
    stride: int
    thin: int | None = None
    margin: int = 8
    tiles_per_chunk: int = 4
    planes_per_chunk: int = 16

    def _per_axis(self, of_tiles: int, of_planes: int) -> Index:
        """A number for every axis: one along the planes, another across them."""
        return tuple(of_planes if axis == self.thin else of_tiles for axis in range(len(self.shape)))

    @property
    def sides(self) -> Index:
        """Working pixels of a tile along each axis."""
        return self._per_axis(self.tile, 1)

    @property
    def strides(self) -> Index:
        """Distance of tiles along each axis."""
        return self._per_axis(self.stride, 1)

    @property
    def margins(self) -> Index:
        """How far the first tile starts before the grid along each axis."""
        sides = zip(self.shape, self._per_axis(self.margin, 0), self.sides, strict=True)
        return tuple(margin + max(0, side - n - 2 * margin) // 2 for n, margin, side in sides)

    @property
    def counts(self) -> Index:
        """Tiles along each axis."""
        parts = zip(self.shape, self.sides, self.strides, self._per_axis(self.margin, 0), strict=True)
        return tuple(max(0, -(-(n + 2 * margin - side) // stride)) + 1 for n, side, stride, margin in parts)

    @property
    def chunk_tiles(self) -> Index:
        """Tiles of a chunk along each axis: fewer where the whole lattice has fewer."""
        return tuple(map(min, self._per_axis(self.tiles_per_chunk, self.planes_per_chunk), self.counts))

    @property
    def chunk_counts(self) -> Index:
        """Chunks along each axis."""
        return tuple(-(-n // m) for n, m in zip(self.counts, self.chunk_tiles, strict=True))

    @property
    def n_tiles(self) -> int:
        """Number of tiles."""
        return math.prod(self.counts)

    @property
    def piece_shape(self) -> Index:
        """Shape of what one chunk stores."""
        parts = zip(self.chunk_tiles, self.strides, self.sides, strict=True)
        return tuple((m - 1) * stride + side for m, stride, side in parts)

    def along_plane(self, per_axis: Sequence[Entry]) -> tuple[Entry, ...]:
        """Of what there is for every axis, without the axis across the planes."""
        return tuple(entry for axis, entry in enumerate(per_axis) if axis != self.thin)

    def tile_region(self, index: Index) -> Region:
        """A tile in working pixels; may reach outside the grid."""
        parts = zip(index, self.strides, self.margins, self.sides, strict=True)
        return tuple(slice(i * stride - margin, i * stride - margin + side) for i, stride, margin, side in parts)

    def piece_region(self, chunk: Index) -> Region:
        """What the piece of a chunk covers in working pixels; may reach outside the grid."""
        first = self.tile_region(tuple(c * m for c, m in zip(chunk, self.chunk_tiles, strict=True)))
        return tuple(slice(p.start, p.start + n) for p, n in zip(first, self.piece_shape, strict=True))

    def tiles_of(self, chunk: Index) -> list[Index]:
        """Tiles of a chunk in raster order."""
        parts = zip(chunk, self.chunk_tiles, self.counts, strict=True)
        return list(itertools.product(*(range(c * m, min((c + 1) * m, n)) for c, m, n in parts)))

    def chunks(self) -> Iterator[Index]:
        """All chunks in raster order."""
        yield from itertools.product(*(range(n) for n in self.chunk_counts))

    def chunks_meeting(self, region: Region) -> list[Index]:
        """Chunks whose piece meets a region of the working grid, in raster order."""
        ranges = []
        sizes = zip(self.chunk_tiles, self.strides, self.margins, self.chunk_counts, self.piece_shape, strict=True)
        for part, (m, stride, margin, n, size) in zip(region, sizes, strict=True):
            step = m * stride
            first = (part.start + margin - size) // step + 1
            last = (part.stop - 1 + margin) // step
            ranges.append(range(max(0, first), min(n - 1, last) + 1))
        return list(itertools.product(*ranges))

    def weights(self, index: Index) -> list[npt.NDArray[np.float32]]:
        """Per axis, the share of this tile in the blend of all tiles over its pixels; not to be changed."""
        shares = []
        for axis, (i, count) in enumerate(zip(index, self.counts, strict=True)):
            if axis == self.thin:
                shares.append(np.ones(1, np.float32))
            else:
                shares.append(_shares(self.tile, self.stride, i > 0, i < count - 1))
        return shares
