"""What is looked at: published labels, the image they lie in or another one, and what their run left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ImageError, SettingsError, TiledsegError
from ..frames import label_axes, label_shape
from ..grid import Index, Region
from ..images import Image, channel_index, open_image
from ..omezarr import label_names
from ..omezarr.groups import open_group
from ..remote import Location, location

__all__ = ["Subject", "open_subject"]


@dataclass(frozen=True)
class Subject:
    """Labels to look at.

    Attributes
    ----------
    labels : Image
        Without a channel.
    name : str
        Of the labels.
    root : Path, RemotePath or None
        The OME-Zarr that holds them as ``labels/NAME``; None of other arrays.
    run : dict
        What the run that made the labels wrote into their attributes; empty of others.
    image : Image or None
        What they were made of.
    channel : int or None
        That pictures show; None for the colours of an image of three channels of 8 bits.
    """

    labels: Image
    name: str
    root: Location | None
    run: dict[str, Any]
    image: Image | None
    channel: int | None

    @property
    def axes(self) -> str:
        """Axes of the labels."""
        return label_axes(self.labels)

    @property
    def shape(self) -> Index:
        """Their pixels."""
        return label_shape(self.labels)

    @property
    def n_frames(self) -> int:
        """How many of the first axes number pictures that share no object: time, and planes that stand alone."""
        alone = self.run.get("stitch_threshold") == 0
        objects = "zyx" if "z" in self.axes and not alone and self.shape[self.axes.index("z")] > 1 else "yx"
        return len(self.axes) - len(objects)

    @property
    def object_axes(self) -> str:
        """Axes that objects extend along: ``"yx"`` or ``"zyx"``."""
        return self.axes[self.n_frames :]

    @property
    def object_shape(self) -> Index:
        """Pixels along those."""
        return self.shape[self.n_frames :]

    @property
    def frames(self) -> Iterator[Index]:
        """All frames, in order."""
        return iter(np.ndindex(*self.shape[: self.n_frames]))

    @property
    def spacing_um(self) -> tuple[float, ...] | None:
        """Micrometres of a pixel along the axes of objects; None if they are not known."""
        found = self.labels.spacing_um()
        return None if found is None else found[-len(self.object_axes) :]

    @property
    def table_folder(self) -> Location | None:
        """Where table and report lie."""
        return None if self.root is None else self.root / "tables" / self.name

    def read(self, frame: Index, region: Region) -> npt.NDArray[Any]:
        """Labels of a region of a frame."""
        where = dict(zip(self.axes, (*(slice(i, i + 1) for i in frame), *region), strict=True))
        pixels = self.labels.read(0, tuple(where.get(axis, slice(0, 1)) for axis in self.labels.axes))
        found = pixels.reshape(tuple(part.stop - part.start for part in region))
        may_be_wrong = found.dtype.kind == "i" or found.dtype.itemsize == 8
        if may_be_wrong and found.astype(np.int64, copy=False).min(initial=0) < 0:
            raise SettingsError(f"{self.labels.name} holds values below 0 or past {2**63 - 1}, so these are no labels.")
        return found


def open_subject(result: Any, name: str | None = None, image: Any = None, channel: str | int | None = None) -> Subject:
    """Find the labels, and what belongs to them.

    Parameters
    ----------
    result : path, address or array
        An OME-Zarr with labels, a label image, or any array of whole numbers.
    name : str, optional
        Of the labels, if there are several.
    image : path, address or array, optional
        What the labels were made of. Default: the OME-Zarr that holds them, if it is an image.
    channel : str or int, optional
        That pictures show. Default: the first, and of three of 8 bits all, as colours.

    Returns
    -------
    subject : Subject

    Raises
    ------
    ImageError
        If there are no such labels, or several to choose from.
    SettingsError
        If they are no labels, or the image is not theirs.
    """
    root: Location | None = None
    if isinstance(result, str | os.PathLike):
        place = location(result)
        names = label_names(place)
        if names:
            root, name = place, _chosen(place, names, name)
            result = str(place / "labels" / name)
        elif name is not None:
            raise ImageError(f"{place} holds no labels; leave out the name {name!r}, or give what holds them.")
        elif place.absolute().parent.name == "labels":
            root, name = place.absolute().parent.parent, place.name
    labels = open_image(result)
    if labels.dtype.kind not in "ui" or labels.n_channels > 1:
        what = f"{labels.n_channels} channels of " if labels.n_channels > 1 else ""
        raise SettingsError(
            f"{labels.name} holds {what}{labels.dtype}, no labels; give the OME-Zarr that segment wrote, or labels."
        )
    shown = _image_of(image, root, labels)
    is_colourful = shown is not None and shown.n_channels == 3 and shown.dtype == np.uint8
    index = None if shown is None or (channel is None and is_colourful) else channel_index(shown, channel)
    return Subject(labels, name or "labels", root, _run_of(root, name), shown, index)


def _chosen(place: Location, names: list[str], name: str | None) -> str:
    """The one name, or the one that was given."""
    known = ", ".join(names)
    if name is None and len(names) > 1:
        raise ImageError(f"{place} holds labels {known}; say which (--name {names[0]}).")
    if name is not None and name not in names:
        raise ImageError(f"{place} holds no labels {name!r} but {known}; give one of these (--name).")
    return name or names[0]


def _run_of(root: Location | None, name: str | None) -> dict[str, Any]:
    """What a run of ours says of itself at its labels."""
    group = None if root is None or name is None else open_group(root / "labels" / name)
    run = None if group is None else group.attrs.get("tiledseg")
    return run if isinstance(run, dict) else {}


def _image_of(image: Any, root: Location | None, labels: Image) -> Image | None:
    """The image that was given, which must fit; or the one around the labels, if it is one and does."""
    if image is not None:
        opened = open_image(image)
        if not _fits(opened, labels):
            raise SettingsError(
                f"{opened.name} has shape {opened.shape} ({opened.axes}) but the labels {labels.shape} "
                f"({labels.axes}); give the image that these labels were made of."
            )
        return opened
    if root is None:
        return None
    try:
        around = open_image(str(root))
    except TiledsegError:
        return None  # a group that holds labels alone
    return around if _fits(around, labels) else None


def _fits(image: Image, labels: Image) -> bool:
    """Whether both have the same pixels."""
    return label_axes(image) == label_axes(labels) and label_shape(image) == label_shape(labels)
