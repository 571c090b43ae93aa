"""A scene as layers of napari: read lazily, every level, each in its place. The only home of napari."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SettingsError
from .pieces import Pieces, Stored
from .scene import Overlay, Picture, Placement, Scene

__all__ = ["add_overlay", "add_picture", "add_scene", "show"]

OPACITY = 0.5
PIXEL = "pixel"


def show(scene: Scene) -> None:
    """Open napari with a scene, until its window is closed.

    Parameters
    ----------
    scene : Scene

    Raises
    ------
    SettingsError
        If napari is not installed.
    """
    try:
        import napari
    except ModuleNotFoundError as error:
        raise SettingsError(
            'napari is not installed; install it: pip install -e ".[napari]", or look in the browser, without --napari.'
        ) from error
    viewer = napari.Viewer(title=scene.title)
    add_scene(viewer, scene)
    napari.run()


def add_scene(viewer: Any, scene: Scene) -> list[Any]:
    """Add an image and its labels to a viewer, and look at all of it.

    Parameters
    ----------
    viewer : napari.Viewer or napari.components.ViewerModel
    scene : Scene

    Returns
    -------
    layers : list of napari layers
        The channels of the image, then labels.
    """
    layers = [] if scene.picture is None else add_picture(viewer, scene.picture)
    layers += [add_overlay(viewer, overlay) for overlay in scene.overlays]
    viewer.dims.axis_labels = max((one.placement.axes for one in scene.layers), key=len)
    viewer.canvas.overlays.scale_bar.visible = True
    viewer.reset_view()
    return layers


def add_picture(viewer: Any, picture: Picture) -> list[Any]:
    """Add a layer per channel, in its colour and contrast.

    Parameters
    ----------
    viewer : napari.Viewer or napari.components.ViewerModel
    picture : Picture

    Returns
    -------
    layers : list of napari.layers.Image
    """
    from napari.utils import Colormap

    stored, layers = Stored(picture.image), []
    for channel in picture.channels:
        pieces = Pieces(stored, picture.placement, channel.index, is_labels=False)
        bright = [int(channel.color[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        layers.append(
            viewer.add_image(
                **_pixels(pieces),
                name=channel.title,
                colormap=Colormap([[0, 0, 0], bright], name=f"#{channel.color}"),
                contrast_limits=channel.window,
                blending="additive",
                visible=channel.is_shown,
                **_place(picture.placement),
            )
        )
    return layers


def add_overlay(viewer: Any, overlay: Overlay) -> Any:
    """Add labels.

    Parameters
    ----------
    viewer : napari.Viewer or napari.components.ViewerModel
    overlay : Overlay

    Returns
    -------
    layer : napari.layers.Labels
    """
    pieces = Pieces(Stored(overlay.image), overlay.placement, None, is_labels=True)
    return viewer.add_labels(
        **_pixels(pieces),
        name=overlay.name,
        opacity=OPACITY,
        visible=overlay.is_shown,
        **_place(overlay.placement),
    )


def _place(placement: Placement) -> dict[str, Any]:
    """Where a layer lies."""
    return {
        "scale": placement.step,
        "translate": placement.origin,
        "units": [unit or PIXEL for unit in placement.units],
        "axis_labels": list(placement.axes),
    }


def _pixels(pieces: Pieces) -> dict[str, Any]:
    """Dask arrays of all levels, which read what is looked at."""
    import dask.array

    levels = [
        dask.array.from_array(_Level(pieces, level), chunks=chunks, name=False, asarray=False)
        for level, chunks in enumerate(pieces.chunks)
    ]
    # Of labels napari takes a list of one level for an array with one more axis.
    return {"data": levels if len(levels) > 1 else levels[0], "multiscale": len(levels) > 1}


class _Level:
    """One level of a layer, as something that Dask can slice."""

    def __init__(self, pieces: Pieces, level: int) -> None:
        self._pieces, self._level = pieces, level
        self.shape, self.dtype = pieces.shapes[level], pieces.dtype
        self.ndim = len(self.shape)

    def __getitem__(self, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Pixels of slices without steps."""
        bounds = [part.indices(n) for part, n in zip(region, self.shape, strict=True)]
        box = tuple((start, stop) for start, stop, _ in bounds)
        if any(start >= stop for start, stop in box):
            return np.zeros([max(0, stop - start) for start, stop in box], self.dtype)
        return self._pieces.read(self._level, box)
