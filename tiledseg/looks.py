"""What there is to show of an image or a result: channels in colours, and labels to outline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .canvas import MIXED, RGB
from .errors import ImageError, SettingsError
from .frames import label_axes, label_shape
from .images import Image, channel_index, open_image
from .inputs import channels_of
from .omezarr import label_names
from .pipeline import Segmentation
from .remote import location
from .viewing.scene import image_around, is_image

__all__ = ["CONTRAST", "Bounds", "Look", "look_at"]

CONTRAST = (1.0, 99.7)

Bounds = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Look:
    """What is shown.

    Attributes
    ----------
    image : Image
    labels : Image or None
        Outlined: of the image's shape without c, with levels of their own.
    channels : tuple of int
    colours : tuple of (int, int, int) or None
        Of each channel; None is grey for one, and a colour each for several.
    bounds : dict of (int, int)
        Pixels of level 0, per axis but c.
    projected : str
        Axes of more than one pixel along which the largest value is shown.
    contrast : (float, float)
        Percentiles of the pixels shown that are black and white; not for colours as they are.
    """

    image: Image
    labels: Image | None
    channels: tuple[int, ...]
    colours: tuple[tuple[int, int, int], ...] | None
    bounds: Bounds
    projected: str = ""
    contrast: tuple[float, float] = CONTRAST

    @property
    def is_as_stored(self) -> bool:
        """Whether pixels are colours already."""
        return self.colours is RGB and self.image.dtype == np.uint8


def look_at(source: Any, *, channels: Any = None, labels: Any = None, axes: str | None = None) -> Look:
    """What there is to show of a result or an image, whole.

    Parameters
    ----------
    source, channels, labels, axes
        As for `quicklook.show`; labels False are none.
    """
    if isinstance(source, Segmentation):
        image, taken = source.image, channels_of(source.job.inputs)
        found = source.open_labels() if labels is None else labels
    else:
        image, its_labels = _image_and_labels(source, axes)
        taken = _usual(image)
        found = its_labels if labels is None else labels
    chosen, colours = _in_colours(image, channels, taken)
    opened = None if found is False or found is None else _opened(found, image)
    bounds = dict(zip(label_axes(image), ((0, n) for n in label_shape(image)), strict=True))
    return Look(image, opened, chosen, colours, bounds)


def _image_and_labels(source: Any, axes: str | None) -> tuple[Image, Any]:
    """An image and its labels if there is no choice; of a result in a container of its own, the image it is of."""
    root = location(source) if isinstance(source, str | os.PathLike) else None
    names = [] if root is None else label_names(root)
    if root is None or not names or is_image(root):
        image = open_image(source, axes=axes)
        return image, _only_labels(image)
    around = image_around(root, names[0], axes)
    if around is None:
        raise ImageError(
            f"{source} holds labels alone, and their image is not found; give the image, and these labels."
        )
    return around, str(root / "labels" / names[0]) if len(names) == 1 else None


def _usual(image: Image) -> tuple[int, ...]:
    """Channels that are shown unless others are named."""
    return tuple(range(image.n_channels)) if image.n_channels <= len(RGB) else (0,)


def _in_colours(image: Image, wanted: Any, usual: tuple[int, ...]) -> tuple[tuple[int, ...], Any]:
    """Channels by their numbers, and their colours."""
    if wanted == "rgb" and "rgb" not in image.channels:
        if image.n_channels < len(RGB):
            raise SettingsError(f"{image.name} has {image.n_channels} channels, too few for red, green and blue.")
        return (0, 1, 2), RGB
    if wanted is None:
        is_rgb = image.n_channels == len(usual) == len(RGB) and image.dtype == np.uint8
        return usual, RGB if is_rgb else None
    several = wanted if isinstance(wanted, Sequence) and not isinstance(wanted, str) else (wanted,)
    if not 0 < len(several) <= len(MIXED):
        raise SettingsError(f"{len(several)} channels cannot be told apart by colours; give 1 to {len(MIXED)}.")
    return tuple(channel_index(image, channel) for channel in several), None


def _only_labels(image: Image) -> Any:
    """The name of the labels in an OME-Zarr if there are some, and no choice."""
    names = [] if image.writable_group is None else label_names(image.writable_group)
    return names[0] if len(names) == 1 else None


def _opened(labels: Any, image: Image) -> Image:
    """Labels as an image of the same shape."""
    group = image.writable_group
    if isinstance(labels, str) and group is not None and labels in label_names(group):
        labels = str(group / "labels" / labels)
    if not isinstance(labels, Image):
        if isinstance(labels, str | os.PathLike) and "://" not in str(labels) and not Path(labels).exists():
            known = [] if group is None else label_names(group)
            raise ImageError(
                f"there are no labels {str(labels)!r}, neither as a file nor in {image.name}"
                + (f", which has {', '.join(known)}." if known else ".")
            )
        is_array = not isinstance(labels, str | os.PathLike)
        labels = open_image(labels, axes=label_axes(image) if is_array else None)
    if "c" in labels.axes or label_shape(labels) != label_shape(image) or labels.dtype.kind not in "ui":
        raise ImageError(
            f"{labels.name} of shape {labels.shape} ({labels.dtype}) are no labels of {image.name}, which has "
            f"{label_shape(image)} without its channels; give whole numbers of that shape."
        )
    found: Image = labels
    return found
