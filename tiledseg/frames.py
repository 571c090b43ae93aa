"""Frames: which axes of an image cells extend along, and which only number pictures; and pixels of channels there.

A region has one slice for every axis but the channel, in the order t, z, y, x: first the axes that number frames,
each with a slice of one, then those that cells extend along.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .config import Settings
from .errors import ImageError, SettingsError
from .grid import Index, Region
from .images import Image

__all__ = [
    "Extent",
    "anisotropy_of",
    "extent_of",
    "frame_region",
    "image_region",
    "label_axes",
    "label_shape",
    "level_geometry",
    "n_planes",
    "read_channel",
    "read_channels",
    "refuse_missing",
]


@dataclass(frozen=True)
class Extent:
    """How far cells, and flows, extend.

    Attributes
    ----------
    axes : str
        Of regions and labels: those of the image without c.
    objects : str
        Along which an object extends: ``"yx"``, or ``"zyx"``.
    flows : str
        Along which flows are followed: ``"yx"``, or ``"zyx"``.
    """

    axes: str
    objects: str
    flows: str

    @property
    def is_stitched(self) -> bool:
        """Whether objects are put together from planes."""
        return self.objects != self.flows

    @property
    def n_object_frames(self) -> int:
        """How many of the first axes number pictures that share no object."""
        return len(self.axes) - len(self.objects)

    @property
    def n_flow_frames(self) -> int:
        """How many of the first axes number pictures that share no flow."""
        return len(self.axes) - len(self.flows)


def label_axes(image: Image) -> str:
    """The axes of an image without the channel."""
    return image.axes.replace("c", "")


def label_shape(image: Image, level: int = 0) -> Index:
    """Pixels of a level along those axes."""
    return tuple(image.levels[level].shape[image.axes.index(axis)] for axis in label_axes(image))


def n_planes(image: Image) -> int:
    """Planes of a volume, 1 of a picture."""
    return image.shape[image.axes.index("z")] if "z" in image.axes else 1


def extent_of(image: Image, settings: Settings) -> Extent:
    """Along which axes cells are sought. A volume of a single plane is a picture, whatever is asked of it.

    Raises
    ------
    ImageError
        If the image is a volume and nothing says how its planes belong together.
    SettingsError
        If two ways are asked for.
    """
    axes, threshold = label_axes(image), settings.masks.stitch_threshold
    if settings.flows.do_3d and threshold is not None:
        raise SettingsError("do_3d finds cells in 3D and stitch_threshold plane by plane; give one of them.")
    if n_planes(image) == 1:
        return Extent(axes, "yx", "yx")
    if settings.flows.do_3d:
        return Extent(axes, "zyx", "zyx")
    if threshold is None:
        raise ImageError(
            f"{image.name} has {n_planes(image)} planes; say how cells are sought in them: --do-3d, or plane by plane "
            "and joined where they overlap with --stitch-threshold 0.25 (0 joins none)."
        )
    return Extent(axes, "zyx" if threshold > 0 else "yx", "yx")


def anisotropy_of(image: Image, settings: Settings) -> float | None:
    """Thickness of a plane in pixels of y and x: as given, or as the pixel sizes say; None if they do not."""
    if settings.flows.anisotropy != "auto":
        return float(settings.flows.anisotropy)
    return image.plane_thickness()


def frame_region(frame: Index, region: Region) -> Region:
    """A region of one frame as one of the image."""
    return (*(slice(i, i + 1) for i in frame), *region)


def image_region(image: Image, region: Region, channel: int | None) -> Region:
    """A region over all axes of the image; no channel means all."""
    parts = dict(zip(label_axes(image), region, strict=True))
    channels = slice(0, image.n_channels) if channel is None else slice(channel, channel + 1)
    return tuple(parts.get(axis, channels) for axis in image.axes)


def level_geometry(image: Image, level: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and offset of a level along every axis of a region, in pixels of level 0."""
    stored = image.levels[level]
    scale, offset = (dict(zip(image.spatial_axes, of, strict=True)) for of in (stored.scale, stored.offset))
    axes = label_axes(image)
    return tuple(scale.get(axis, 1.0) for axis in axes), tuple(offset.get(axis, 0.0) for axis in axes)


def read_channel(image: Image, level: int, region: Region, channel: int) -> npt.NDArray[np.generic]:
    """One channel of a region of a level, shape of the region."""
    values = image.read(level, image_region(image, region, channel))
    return values.reshape(tuple(part.stop - part.start for part in region))


def read_channels(image: Image, region: Region) -> npt.NDArray[np.generic]:
    """Every channel of a region of level 0, channels first; one if the image has no such axis."""
    values = image.read(0, image_region(image, region, None))
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
        missing = image.missing_chunks(level, image_region(image, region, channel))
        if not missing:
            continue
        raise ImageError(
            f"chunk {missing[0]} of {image.name} is missing ({len(missing)} in this region); restore it, or if the "
            "image was written without its empty chunks, add --missing-chunks fill."
        )
