"""What there is to look at: an image, labels of it, and where in the world each lies."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..addresses import without_credentials
from ..errors import ImageError, SettingsError, TiledsegError
from ..images import Image, open_image
from ..images.units import MICROMETERS
from ..omezarr import label_names
from ..remote import Location, RemotePath, location, read_file
from ..urls import is_remote
from .contrast import Channel, channels_of

__all__ = ["Overlay", "Picture", "Placement", "Scene", "image_around", "is_image", "open_scene", "scene_of"]

logger = logging.getLogger(__name__)

MUCH = 2**26
"""Pixels of the coarsest level of a channel from which on looking at all of it takes long."""


@dataclass(frozen=True)
class Placement:
    """Where a layer lies, along every axis but c."""

    axes: str
    step: tuple[float, ...]
    """Size of a level-0 pixel."""
    origin: tuple[float, ...]
    """Position of the centre of the first."""
    units: tuple[str | None, ...]
    """``"micrometer"``, or None: pixels, and of t whatever the file counts in."""


@dataclass(frozen=True)
class Picture:
    """An image, with how its channels are shown."""

    image: Image
    channels: tuple[Channel, ...]
    placement: Placement


@dataclass(frozen=True)
class Overlay:
    """Labels to lay over the image."""

    name: str
    image: Image
    placement: Placement
    is_shown: bool


@dataclass(frozen=True)
class Scene:
    """All that is looked at together."""

    title: str
    picture: Picture | None
    overlays: tuple[Overlay, ...]

    @property
    def layers(self) -> tuple[Picture | Overlay, ...]:
        """The image, if there is one, then labels; never empty."""
        return (*(() if self.picture is None else (self.picture,)), *self.overlays)

    def describe(self) -> dict[str, Any]:
        """What is shown, ready for JSON."""
        picture = self.picture
        return {
            "image": None if picture is None else picture.image.name,
            "channels": [] if picture is None else [channel.name for channel in picture.channels],
            "labels": [overlay.name for overlay in self.overlays],
        }


def open_scene(out: Any, image: Any = None, name: str | None = None, axes: str | None = None) -> Scene:
    """Open a result and the image it belongs to.

    Parameters
    ----------
    out : path or address
        An OME-Zarr with labels, labels alone, or an image alone.
    image : path, address or array, optional
        The image. Default: `out` if it is one, else what the report of the run names, if that is on a disk here.
    name : str, optional
        Of the labels. Default: all, of which the first are shown.
    axes : str, optional
        Axes of an image that does not say them.

    Returns
    -------
    scene : Scene

    Raises
    ------
    ImageError
        If there is nothing to look at, or no labels of that name.
    """
    root, names = _labels_of(out)
    alone = None
    if not names and image is None:
        alone = open_image(out, axes=axes)
        if alone.writable_group is not None:  # of a container of images, the first
            root = alone.writable_group
            names = label_names(root)
    if name is not None and name not in names:
        known = f"it has {', '.join(names)}" if names else "it has none"
        raise ImageError(f"{without_credentials(str(out))} has no labels {name!r}; {known} (--name).")
    wanted = [name] if name is not None else names
    if wanted:
        labels = [(one, open_image(str(root / "labels" / one), allow_bool=True)) for one in wanted]
        picture = open_image(image, axes=axes) if image is not None else image_around(root, wanted[0], axes)
    elif alone is None:
        labels = [(location(out).name, open_image(out, allow_bool=True))]
        picture = open_image(image, axes=axes)
    else:
        labels, picture = [], alone
        logger.info("%s holds no labels: the image is shown alone.", alone.name)
    return scene_of(root.name, picture, labels)


def scene_of(title: str, image: Image | None, labels: Sequence[tuple[str, Image]]) -> Scene:
    """Lay labels over an image.

    Parameters
    ----------
    title : str
    image : Image, optional
    labels : sequence of (str, Image)
        Name and pixels, which are whole numbers. The first are shown.

    Returns
    -------
    scene : Scene

    Raises
    ------
    ImageError
        If labels are not whole numbers.
    """
    for name, one in labels:
        if one.dtype.kind not in ("b", "u", "i") or "c" in one.axes:
            raise ImageError(
                f"{one.name} cannot be shown as labels {name!r}: it has axes {one.axes!r} and {one.dtype} pixels, and "
                "labels are whole numbers without channels; give the labels first and the image with --image."
            )
    images = [one for one in (image, *(one for _, one in labels)) if one is not None]
    placements = _placed(images)
    picture = None
    if image is not None:
        picture = Picture(image, channels_of(image), placements[0])
        _warn_flat(image)
    rest = placements[len(placements) - len(labels) :]
    overlays = tuple(
        Overlay(name, one, placement, is_shown=i == 0)
        for i, ((name, one), placement) in enumerate(zip(labels, rest, strict=True))
    )
    return Scene(title, picture, overlays)


def _labels_of(out: Any) -> tuple[Location, list[str]]:
    """The group that holds labels, and which; of one label image the group around it."""
    if not isinstance(out, str | Path):
        raise SettingsError(f"a {type(out).__name__} is no result; give the path of one.")
    place = location(out)
    if isinstance(place, Path):
        place = place.absolute()
        if not place.exists():
            raise ImageError(f"{out} does not exist; check the path.")
        if place.is_file():
            return place, []
    around = place.parent
    if around.name == "labels" and place.name in label_names(around.parent):
        return around.parent, [place.name]
    return place, label_names(place)


def image_around(root: Location, name: str, axes: str | None) -> Image | None:
    """The image that holds the labels, else the one the report of their run names; None if neither is there."""
    if is_image(root):
        return open_image(str(root))
    given = _reported(root, name)
    if given is None:
        logger.info("labels alone are shown; --image says which image to lay them over.")
        return None
    candidates = [] if is_remote(given) or isinstance(root, RemotePath) else [Path(given), root.parent / given]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        logger.info("labels alone are shown; to lay them over the image, add --image %s", without_credentials(given))
        return None
    try:
        image = open_image(found, axes=axes)
    except TiledsegError as error:
        logger.warning("labels alone are shown, their image cannot be opened: %s", error)
        return None
    logger.info("the image is %s, as the report of the run says; --image shows another.", found)
    return image


def is_image(root: Location) -> bool:
    """Whether a group is an image of its own."""
    for file in ("zarr.json", ".zattrs"):
        found = read_file(root / file)
        if found is not None:
            content = json.loads(found[0])
            attributes = content.get("attributes", {}).get("ome", {}) if file == "zarr.json" else content
            return "multiscales" in attributes
    return False


def _reported(root: Location, name: str) -> str | None:
    """The image that the report of a run names."""
    found = read_file(root / "tables" / name / "report.json")
    try:
        given = None if found is None else json.loads(found[0])["image"]["name"]
    except (ValueError, LookupError, TypeError) as error:
        logger.warning("the report of labels %r cannot be read (%s)", name, error)
        return None
    return given if isinstance(given, str) else None


def _placed(images: Sequence[Image]) -> list[Placement]:
    """Where each lies; along an axis of which only some have a known size, all are laid out in pixels."""
    placements = []
    is_metric = {axis: all(_size_um(one, axis) for one in images if axis in one.axes) for axis in "zyx"}
    is_mixed = {axis: not is_metric[axis] and any(_size_um(one, axis) for one in images) for axis in "zyx"}
    if any(is_mixed.values()):
        logger.warning(
            "of %s only some have a pixel size: they are laid over each other pixel by pixel.",
            " and ".join(one.name for one in images),
        )
    for one in images:
        axes = one.axes.replace("c", "")
        step, origin = [], []
        for axis in axes:
            at = one.axes.index(axis)
            size, start = one.spacing[at] or 1.0, one.translation[at]
            factor = (
                MICROMETERS[one.units[at] or ""] if is_metric.get(axis) else 1 / size if is_mixed.get(axis) else 1.0
            )
            step.append(size * factor)
            origin.append(start * factor)
        units = tuple("micrometer" if is_metric.get(axis) else None for axis in axes)
        placements.append(Placement(axes, tuple(step), tuple(origin), units))
    return placements


def _size_um(image: Image, axis: str) -> float | None:
    """Size of a pixel along a spatial axis in micrometres, None if unknown."""
    if axis not in image.axes:
        return None
    at = image.axes.index(axis)
    size, unit = image.spacing[at], image.units[at]
    return size * MICROMETERS[unit] if size is not None and unit in MICROMETERS else None


def _warn_flat(image: Image) -> None:
    """Say so if looking at the whole image means reading all of it."""
    coarsest = image.levels[-1].shape
    n_pixels = 1
    for axis, n in zip(image.axes, coarsest, strict=True):
        n_pixels *= n if axis in "yx" else 1
    if n_pixels > MUCH:
        logger.warning(
            "%s has no coarser levels: from afar all of it is read. `tiledseg convert` makes an OME-Zarr with levels.",
            image.name,
        )
