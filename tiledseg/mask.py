"""A foreground mask: an array of any resolution over the whole image, non-zero where cells are to be sought.

Along an axis on which the mask has ``m`` pixels and the whole image ``n``, image pixel ``p`` looks up
mask pixel ``floor((p + 0.5) * m / n)``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ImageError
from .grid import Region, enclosing, region_shape, shift
from .images import Image, UnnamedAxesError, open_image

__all__ = ["Mask", "open_mask"]

MOST_PIXELS = 2**24
"""Of the mask, read at once."""
FEW_PIXELS = 2**18
"""Of the mask, hardly dearer to read than one: they may lie in one chunk."""
MOST_IDLE = 4
"""How many times the pixels wanted may be read to read them at once."""

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Mask:
    """A mask and how it lies over an image; it travels to other processes if its pixels do.

    Attributes
    ----------
    pixels : Image
        Of the mask; its level 0 counts.
    axes : str
        Those of the image without c: one slice of a region each.
    position : tuple of int
        Pixels of the whole image before the image's own, per axis of `axes`.
    full_shape : tuple of int
        Pixels of the whole image, over which the mask lies, per axis of `axes`.
    """

    pixels: Image
    axes: str
    position: tuple[int, ...]
    full_shape: tuple[int, ...]

    def at(self, region: Region) -> BoolArray:
        """What the mask says about each pixel of a region.

        Parameters
        ----------
        region : tuple of slice
            One per axis of `axes`, in pixels of level 0 of the image.

        Returns
        -------
        is_wanted : array of bool, shape of `region`
            Pixels of the mask that are NaN count as 0.

        Raises
        ------
        ImageError
            If the mask cannot be read there.
        """
        shape = region_shape(region)
        if 0 in shape:
            return np.zeros(shape, np.bool_)
        wanted = {axis: self._looked_up(axis, part) for axis, part in zip(self.axes, region, strict=True)}
        box = self._box({axis: slice(int(at[0]), int(at[-1]) + 1) for axis, at in wanted.items()})
        if math.prod(region_shape(box)) > MOST_PIXELS:
            # Of a mask finer than the image only some pixels are looked up, but all between them are read.
            longest = max(self.axes, key=lambda axis: wanted[axis][-1] - wanted[axis][0])
            along = self.axes.index(longest)
            return np.concatenate([self.at(half) for half in _halves(region, along)], axis=along)
        found = self._read(box)
        for along, (axis, part) in enumerate(zip(self.axes, self._in_region_order(box), strict=True)):
            found = found.take(wanted[axis] - part.start, axis=along)
        return found

    def touches(self, regions: Sequence[Region]) -> list[bool]:
        """Whether there is anything of the mask under each of some regions.

        Parameters
        ----------
        regions : sequence of tuple of slice
            One slice per axis of `axes`, in pixels of level 0 of the image. Those that lie near each other
            are best given together.

        Returns
        -------
        is_touched : list of bool
            Whether a mask pixel that is not 0 is looked up by a pixel of the region or has its centre in it.

        Raises
        ------
        ImageError
            If the mask cannot be read there.
        """
        is_empty = [0 in region_shape(region) for region in regions]
        boxes = [self._under(region) for region, empty in zip(regions, is_empty, strict=True) if not empty]
        found = iter(self._any_in(boxes))
        return [not empty and next(found) for empty in is_empty]

    def _any_in(self, boxes: Sequence[Region]) -> list[bool]:
        """Whether the mask is non-zero anywhere in each of some boxes of its pixels."""
        if not boxes:
            return []
        whole = enclosing(boxes)
        n_pixels, n_wanted = math.prod(region_shape(whole)), sum(math.prod(region_shape(box)) for box in boxes)
        if n_pixels <= min(MOST_PIXELS, max(FEW_PIXELS, MOST_IDLE * n_wanted)):
            found = _is_nonzero(self.pixels.read(0, whole))
            origin = tuple(part.start for part in whole)
            return [bool(found[shift(box, origin)].any()) for box in boxes]
        if len(boxes) > 1:
            half = len(boxes) // 2
            return self._any_in(boxes[:half]) + self._any_in(boxes[half:])
        sides = region_shape(whole)
        return [any(self._any_in([part])[0] for part in _halves(whole, sides.index(max(sides))))]

    def _read(self, box: Region) -> BoolArray:
        """Whether pixels of the mask are non-zero, with the axes of a region."""
        return _is_nonzero(self.pixels.read(0, box)).reshape(region_shape(self._in_region_order(box)))

    def _geometry(self, axis: str) -> tuple[int, int, int]:
        """Along an axis: position in the whole image, its length, and that of the mask."""
        at, pixels = self.axes.index(axis), self.pixels
        size = pixels.shape[pixels.axes.index(axis)] if axis in pixels.axes else 1
        return self.position[at], self.full_shape[at], size

    def _looked_up(self, axis: str, part: slice) -> npt.NDArray[np.int64]:
        """The pixels of the mask that pixels of the image look up, along an axis."""
        position, n, m = self._geometry(axis)
        return (2 * np.arange(part.start + position, part.stop + position, dtype=np.int64) + 1) * m // (2 * n)

    def _under(self, region: Region) -> Region:
        """The pixels of the mask that are looked up in a region or have their centre in it."""
        parts = {}
        for axis, part in zip(self.axes, region, strict=True):
            position, n, m = self._geometry(axis)
            start, stop = part.start + position, part.stop + position
            looked_up = (2 * start + 1) * m // (2 * n), (2 * stop - 1) * m // (2 * n) + 1
            centred = -((n - 2 * start * m) // (2 * n)), -((n - 2 * stop * m) // (2 * n))
            parts[axis] = slice(min(looked_up[0], centred[0]), max(looked_up[1], centred[1]))
        return self._box(parts)

    def _box(self, parts: dict[str, slice]) -> Region:
        """A region of the mask, from its slices by axis."""
        return tuple(parts.get(axis, slice(0, 1)) for axis in self.pixels.axes)

    def _in_region_order(self, box: Region) -> Region:
        """A region of the mask with the axes of a region of the image."""
        parts = dict(zip(self.pixels.axes, box, strict=True))
        return tuple(parts.get(axis, slice(0, 1)) for axis in self.axes)


def open_mask(source: Any, image: Image, *, axes: str | None = None) -> Mask:
    """Open a mask without reading its pixels.

    Parameters
    ----------
    source : str, path, zarr.Array, dask array or numpy array
        Whatever :func:`open_image` takes, and bool arrays. It lies over the whole image, also where
        `image` is a part of one, and may lack axes or have a length of 1 along them: it holds for all
        planes or time points then.
    image : Image
    axes : str, optional
        Axes of the stored mask, in its order, where it does not say; None takes those of the image
        without c, if it has as many.

    Returns
    -------
    mask : Mask

    Raises
    ------
    ImageError
        If it cannot be read or does not fit the image.

    Notes
    -----
    Only lengths are compared. A mask of another image of like proportions is not noticed, and neither is
    a shift or a scale in the metadata of the mask.
    """
    where = [at for at, axis in enumerate(image.axes) if axis != "c"]
    mask = Mask(
        pixels=_open_pixels(source, image, axes),
        axes="".join(image.axes[at] for at in where),
        position=tuple(image.position[at] for at in where),
        full_shape=tuple(image.full_shape[at] for at in where),
    )
    _check_axes(mask, image)
    _check_lengths(mask, image)
    return mask


def _open_pixels(source: Any, image: Image, axes: str | None) -> Image:
    """Open the array of a mask; dimensions without names are those of the image, if there are as many."""
    try:
        return open_image(source, axes=axes, allow_bool=True)
    except UnnamedAxesError as error:
        wanted = image.axes.replace("c", "")
        try:
            return open_image(source, axes=wanted, allow_bool=True)
        except ImageError:
            name = source if isinstance(source, str | os.PathLike) else type(source).__name__
            raise ImageError(
                f"the mask ({name}) does not name its dimensions, and has not one for each of {wanted!r} of "
                f"{image.name}; store it as OME-Zarr, or with these axes, or with 'yx' only."
            ) from error


def _check_axes(mask: Mask, image: Image) -> None:
    """Refuse a mask with channels, or with axes that the image does not have."""
    pixels = mask.pixels
    for axis, size in zip(pixels.axes, pixels.shape, strict=True):
        if size == 1 or axis in mask.axes:
            continue
        if axis == "c":
            raise ImageError(f"the mask ({pixels.name}) has {size} channels; give a mask of one.")
        raise ImageError(
            f"the mask ({pixels.name}) has axis {axis!r} of length {size}, which {image.name} does not have; "
            f"give a mask of axes {mask.axes!r}."
        )


def _check_lengths(mask: Mask, image: Image) -> None:
    """Refuse a mask whose lengths are not those of the image at one resolution."""
    (n_y, m_y), (n_x, m_x) = (mask._geometry(axis)[1:] for axis in "yx")
    # A mask that was made smaller by a factor has lengths rounded up or down by less than a pixel.
    if abs(m_y / n_y - m_x / n_x) * min(n_y, n_x) > 1 + 1e-9:
        raise ImageError(
            f"the mask ({mask.pixels.name}) has {m_y} x {m_x} pixels along y and x, and {image.name} has "
            f"{n_y} x {n_x}, which is not the same shape at any resolution; it is probably a mask of another image, "
            "give that of this one."
        )
    if "t" in mask.axes:
        n_t, m_t = mask._geometry("t")[1:]
        if m_t not in (1, n_t):
            raise ImageError(
                f"the mask ({mask.pixels.name}) has {m_t} time points and {image.name} has {n_t}; give a mask with "
                "as many, or with one for all."
            )


def _is_nonzero(values: npt.NDArray[Any]) -> BoolArray:
    """Whether values are non-zero numbers."""
    found: BoolArray = values != 0
    return found & ~np.isnan(values) if values.dtype.kind == "f" else found


def _halves(region: Region, along: int) -> tuple[Region, Region]:
    """A region cut in two along an axis."""
    part = region[along]
    middle = (part.start + part.stop) // 2
    before, after = region[:along], region[along + 1 :]
    return (*before, slice(part.start, middle), *after), (*before, slice(middle, part.stop), *after)
