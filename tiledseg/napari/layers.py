"""Where things lie in napari: the axes of a layer, what of it is visible, and where labels of a part of it go.

Works on the layers and viewer that napari gives, and imports nothing of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..axes import ALL_AXES, canonical_order, check_axes
from ..errors import ImageError, SettingsError

__all__ = ["add_labels", "axes_named", "finest", "fitted", "layer_axes", "placement", "shown", "visible"]

Spans = dict[str, tuple[int, int]]
"""First and one-past-last pixel per axis."""

OPACITY = 0.5
OURS = "tiledseg"
"""Key in the metadata of layers that this plugin made, and may replace."""


def finest(layer: Any) -> Any:
    """The array of an image layer, of several levels the first."""
    return layer.data[0] if layer.multiscale else layer.data


def axes_named(layer: Any) -> str | None:
    """The axes of an image layer as it names them, one letter for each that it has besides colours; None if it does
    not."""
    names = [str(name).lower() for name in layer.axis_labels]
    is_known = all(len(name) == 1 and name in ALL_AXES for name in names)
    return "".join(names) if is_known and {"y", "x"} <= set(names) and len(set(names)) == len(names) else None


def layer_axes(layer: Any, given: str, stored: str | None) -> str:
    """The axes of an image layer, one letter for each that it has besides colours.

    Parameters
    ----------
    layer : napari.layers.Image
    given : str
        As the user says; empty if they say nothing.
    stored : str or None
        As the file says that the layer shows.

    Raises
    ------
    ImageError
        If nobody says, or what is given does not fit.
    """
    where = f"layer {layer.name!r}"
    if given:
        axes = check_axes(given.lower(), layer.ndim, where)
    else:
        axes = axes_named(layer) or stored or ("yx" if layer.ndim == 2 else "")
    if not axes:
        raise ImageError(f"{where} has {layer.ndim} axes without names; name them in the field Axes, e.g. zyx or cyx.")
    if layer.rgb and "c" in axes:
        raise ImageError(f"{where} has colours and axes {axes!r}; leave the c out.")
    return axes


def visible(viewer: Any, layer: Any, axes: str) -> Spans:
    """What of a layer the canvas shows.

    Parameters
    ----------
    viewer : napari.Viewer
    layer : napari.layers.Image
    axes : str
        Of the layer.

    Returns
    -------
    spans : dict of (int, int)
        Per axis that lies on the canvas the layer's pixels in it.

    Raises
    ------
    SettingsError
        If nothing of it is visible, or the view is in 3D.
    """
    if viewer.dims.ndisplay != 2:
        raise SettingsError(
            "in the view in 3D there is no visible region; switch napari to 2D, or run on the whole image."
        )
    displayed, absent = list(viewer.dims.displayed), viewer.dims.ndim - layer.ndim
    height_width = np.asarray(viewer.canvas.viewbox_size(viewer.layers), float)
    middle, half = np.asarray(viewer.scene.camera.center[-2:], float), height_width / viewer.scene.camera.zoom / 2
    corners = []
    for signs in itertools.product((-1, 1), repeat=2):
        point = np.asarray(viewer.dims.point, float)
        point[displayed] = middle + np.asarray(signs) * half
        corners.append(layer.world_to_data(point[-layer.ndim :]))
    # The middle of pixel i is at i.
    low = np.floor(np.min(corners, axis=0) + 0.5).astype(int)
    high = np.floor(np.max(corners, axis=0) + 0.5).astype(int) + 1
    on_canvas = [axis - absent for axis in displayed if axis >= absent]
    shape = finest(layer).shape
    spans = {axes[at]: (max(0, int(low[at])), min(shape[at], int(high[at]))) for at in on_canvas}
    if any(start >= stop for start, stop in spans.values()):
        raise SettingsError(
            f"layer {layer.name!r} lies outside of what is visible; move the view over it, or run on the whole image."
        )
    return spans


def shown(viewer: Any, layer: Any, axes: str) -> dict[str, int]:
    """Which of a layer's pixels the sliders show, per axis that does not lie on the canvas; may be outside of it."""
    absent = viewer.dims.ndim - layer.ndim
    at = layer.world_to_data(np.asarray(viewer.dims.point, float)[absent:])
    hidden = [axis - absent for axis in viewer.dims.not_displayed if axis >= absent]
    return {axes[axis]: int(np.floor(at[axis] + 0.5)) for axis in hidden}


def placement(layer: Any, axes: str, kept: str, starts: Mapping[str, int]) -> dict[str, Any]:
    """Where labels of a part of an image layer lie.

    Parameters
    ----------
    layer : napari.layers.Image
    axes : str
        Of the layer.
    kept : str
        Those that the labels have, in the same order.
    starts : mapping of int
        First pixel of the part per axis; 0 where none is given.

    Returns
    -------
    placement : dict
        ``scale`` and ``translate``, or ``affine`` of a layer that is turned or sheared; ``units`` and ``axis_labels``.
    """
    at = [axes.index(axis) for axis in kept]
    start = np.array([starts.get(axis, 0) for axis in axes], float)
    origin = np.asarray(layer.data_to_world(start), float)
    steps = np.stack([layer.data_to_world(start + one) for one in np.eye(len(axes))], axis=1) - origin[:, None]
    linear, origin = steps[np.ix_(at, at)], origin[at]
    placed: dict[str, Any] = {"units": [layer.units[i] for i in at], "axis_labels": list(kept)}
    scale = np.diag(linear)
    if np.allclose(linear, np.diag(scale)):
        return {**placed, "scale": scale, "translate": origin, "affine": np.eye(len(at) + 1)}
    affine = np.eye(len(at) + 1)
    affine[:-1, :-1], affine[:-1, -1] = linear, origin
    return {**placed, "scale": np.ones(len(at)), "translate": np.zeros(len(at)), "affine": affine}


def fitted(labels: Any, axes: str, n_channels: int) -> tuple[Any, str]:
    """Labels in the order of a layer's axes.

    Parameters
    ----------
    labels : array, shape (*of the axes t, z, y, x that there are)
    axes : str
        Of the layer.
    n_channels : int
        Of the layer, if it has axis c.

    Returns
    -------
    labels : array
        Without copying.
    axes : str
        Its axes. A channel is among them only if it lies between others, since napari matches axes from the last:
        labels are then the same in all channels, and cannot be painted on.
    """
    ours = axes.replace("c", "")
    labels = labels.transpose([canonical_order(ours).index(axis) for axis in ours])
    at = axes.find("c")
    if at <= 0:
        return labels, ours
    if isinstance(labels, np.ndarray):
        spread = np.broadcast_to
    else:
        import dask.array

        spread = dask.array.broadcast_to
    labels = labels[(slice(None),) * at + (None,)]
    return spread(labels, (*labels.shape[:at], n_channels, *labels.shape[at + 1 :])), axes


def add_labels(viewer: Any, name: str, levels: Sequence[npt.NDArray[Any] | Any], placed: Mapping[str, Any]) -> Any:
    """Add labels to a viewer, in the place of those that were added under that name before.

    Parameters
    ----------
    viewer : napari.Viewer
    name : str
    levels : sequence of arrays
        Finest first.
    placed : mapping
        As from `placement`.

    Returns
    -------
    layer : napari.layers.Labels
    """
    before = next((one for one in viewer.layers if one.name == name and OURS in one.metadata), None)
    if before is not None:
        if not before.multiscale and len(levels) == 1 and before.ndim == levels[0].ndim:
            before.data = levels[0]
            for key, value in placed.items():
                setattr(before, key, value)
            return before
        viewer.layers.remove(before)
    # Of labels napari takes a list of one level for an array with one more axis.
    data = list(levels) if len(levels) > 1 else levels[0]
    is_multiscale = len(levels) > 1
    return viewer.add_labels(
        data, name=name, opacity=OPACITY, multiscale=is_multiscale, metadata={OURS: True}, **placed
    )
