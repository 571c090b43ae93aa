"""What of a layer is segmented: its file, if it shows one that can be opened, else its array."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..config import Settings
from ..errors import TiledsegError
from ..frames import anisotropy_of
from ..images import Image, UnnamedAxesError, open_image
from .layers import finest, layer_axes

__all__ = ["Target", "levels_of", "open_target"]


@dataclass(frozen=True)
class Target:
    """An image layer, opened.

    Attributes
    ----------
    layer_axes : str
        One letter for each axis of the layer, without that of colours.
    axes : str
        Of `array`.
    array : numpy or dask array
        The pixels, read when needed if they are on disk.
    path : str or None
        The file, None if the layer is not known to show one.
    path_axes : str or None
        Axes of the file in its own order, if it does not say them.
    channels : tuple of str
        Names of the channels; one if there is no such axis.
    channel : int or None
        The one that the layer shows, if its file has more.
    anisotropy : float
        Thickness of a plane in pixels of y and x: as the file says, else as the layer is drawn; 1 without planes.
    """

    layer_axes: str
    axes: str
    array: Any
    path: str | None
    path_axes: str | None
    channels: tuple[str, ...]
    channel: int | None
    anisotropy: float

    @property
    def is_volume(self) -> bool:
        """Whether there is more than one plane."""
        return "z" in self.axes and self.array.shape[self.axes.index("z")] > 1

    @property
    def n_layer_channels(self) -> int:
        """Length of the layer's axis c."""
        return len(self.channels) if "c" in self.layer_axes else 1

    def source(self, in_memory: bool) -> dict[str, Any]:
        """What `segment` is given as ``image`` and ``axes``."""
        if in_memory or self.path is None:
            return {"image": self.array, "axes": self.axes}
        return {"image": self.path, "axes": self.path_axes}

    @property
    def place_for_labels(self) -> str:
        """An OME-Zarr beside the file; empty if there is none."""
        if self.path is None:
            return ""
        path = Path(self.path)
        return str(path.with_name(f"{path.name.split('.')[0]}-cells.ome.zarr"))


def open_target(layer: Any, given_axes: str = "") -> Target:
    """Open an image layer; reads no pixels.

    Parameters
    ----------
    layer : napari.layers.Image
    given_axes : str
        Its axes, if it does not name them.

    Returns
    -------
    target : Target

    Raises
    ------
    ImageError
        If the axes are not known.
    """
    array = finest(layer)
    file = _file(layer.source.path, tuple(array.shape[: layer.ndim]), given_axes.lower())
    axes = layer_axes(layer, given_axes, file.layer_axes if file else None)
    steps = dict(zip(axes, map(abs, layer.scale), strict=True))
    thickness = float(steps.get("z", steps["x"]) / steps["x"])
    if file is not None and file.layer_axes.replace("c", "") == axes.replace("c", ""):
        image = file.image
        named = [i for i, name in enumerate(image.channels) if name == layer.name]
        own = None if "c" in axes or layer.rgb or image.n_channels == 1 else (named or [0])[0]
        thickness = anisotropy_of(image, Settings()) or thickness
        array, path = _lazy(image, 0), str(layer.source.path)
        return Target(axes, image.axes, array, path, file.told, image.channels, own, thickness)
    with_colours = axes + "c" if layer.rgb else axes
    n_channels = array.shape[with_colours.index("c")] if "c" in with_colours else 1
    channels = tuple(map(str, range(n_channels)))
    return Target(axes, with_colours, _array(array), None, None, channels, None, thickness)


def levels_of(path: Any) -> list[Any]:
    """The levels of a label image on disk as dask arrays, which read what is looked at."""
    image = open_image(path)
    return [_lazy(image, level) for level in range(len(image.levels))]


class _File(NamedTuple):
    """What a layer shows: an image, the layer's axes in it, and the axes that it had to be told."""

    image: Image
    layer_axes: str
    told: str | None


def _file(path: Any, shape: tuple[int, ...], given: str) -> _File | None:
    """The image in the file that a layer came from; None if there is none, or the layer shows something else.

    Which axes the layer has is known from the file; that it has their lengths only confirms that it is this image.
    """
    if not path or not os.path.exists(path):
        return None
    told = None
    try:
        try:
            image = open_image(path)
        except UnnamedAxesError:
            if not given:
                return None
            image, told = open_image(path, axes=given), given
    except TiledsegError:
        # A file of another kind, which napari reads by itself: its array is all there is.
        return None
    for axes in (image.axes, image.axes.replace("c", "")):
        if shape == tuple(image.shape[image.axes.index(axis)] for axis in axes):
            return _File(image, axes, told)
    return None


def _lazy(image: Image, level: int) -> Any:
    """A level of an image as a dask array."""
    import dask.array

    return dask.array.from_array(
        _Pixels(image, level), chunks=image.levels[level].chunks, name=False, asarray=False, meta=np.empty(0)
    )


def _array(array: Any) -> Any:
    """What a layer holds, as something that `segment` takes for an array in memory."""
    if isinstance(array, np.ndarray) or hasattr(array, "__dask_graph__"):
        return array
    import dask.array

    return dask.array.from_array(array, chunks=getattr(array, "chunks", "auto"), name=False)


class _Pixels:
    """A level of an image as something that dask can slice."""

    def __init__(self, image: Image, level: int) -> None:
        self._image, self._level = image, level
        self.shape, self.dtype = image.levels[level].shape, image.dtype
        self.ndim = len(self.shape)

    def __getitem__(self, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Pixels of slices without steps."""
        bounds = [part.indices(n) for part, n in zip(region, self.shape, strict=True)]
        if any(start >= stop for start, stop, _ in bounds):
            return np.zeros([max(0, stop - start) for start, stop, _ in bounds], self.dtype)
        return self._image.read(self._level, tuple(slice(start, stop) for start, stop, _ in bounds))
