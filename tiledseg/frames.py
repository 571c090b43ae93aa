"""Planes of an image: which axes cells extend along, and pixels of channels there."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .errors import ImageError
from .grid import Index, Region
from .images import Image

__all__ = ["plane_axes", "plane_region", "plane_shape", "read_channels", "read_plane", "refuse_missing"]


def plane_axes(image: Image) -> str:
    """The axes cells extend along; those of length 1 beside y and x are carried along.

    Raises
    ------
    ImageError
        If the image is a volume or a series over time.
    """
    for axis in "tz":
        if axis in image.axes and (n := image.shape[image.axes.index(axis)]) > 1:
            raise ImageError(
                f"{image.name} has axis {axis!r} of length {n}; this version segments single planes: "
                f"give an image whose {axis} has length 1."
            )
    return "yx"


def plane_shape(image: Image, level: int = 0) -> Index:
    """Shape of a level along the axes cells extend along."""
    return tuple(image.levels[level].shape[image.axes.index(axis)] for axis in plane_axes(image))


def plane_region(image: Image, region: Region, channel: int | None) -> Region:
    """A region over all axes of the image from one over its plane; no channel means all."""
    parts = dict(zip(plane_axes(image), region, strict=True))
    channels = slice(0, image.n_channels) if channel is None else slice(channel, channel + 1)
    return tuple(parts.get(axis, channels if axis == "c" else slice(0, 1)) for axis in image.axes)


def read_plane(image: Image, level: int, region: Region, channel: int) -> npt.NDArray[np.generic]:
    """One channel of a region of a level, shape of the region."""
    values = image.read(level, plane_region(image, region, channel))
    return values.reshape(tuple(part.stop - part.start for part in region))


def read_channels(image: Image, region: Region) -> npt.NDArray[np.generic]:
    """Every channel of a region of level 0, channels first; one if the image has no such axis."""
    values = image.read(0, plane_region(image, region, None))
    if "c" in image.axes:
        values = np.moveaxis(values, image.axes.index("c"), 0)
    return values.reshape((image.n_channels, *(part.stop - part.start for part in region)))


def refuse_missing(image: Image, level: int, region: Region, channels: Iterable[int]) -> None:
    """Refuse a region of some channels of which chunks are not stored.

    Raises
    ------
    ImageError
        If there are any; it names the first.
    """
    for channel in channels:
        missing = image.missing_chunks(level, plane_region(image, region, channel))
        if not missing:
            continue
        raise ImageError(
            f"chunk {missing[0]} of {image.name} is missing ({len(missing)} in this region); restore it, or if the "
            "image was written without its empty chunks, add --missing-chunks fill."
        )
