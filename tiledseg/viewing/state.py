"""What neuroglancer is told to show: layers, colours, contrast and the place looked at."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .contrast import Channel
from .pieces import drawn_type
from .scene import Overlay, Picture, Scene

__all__ = ["state_of"]

SCREEN = {"x": 1000, "y": 700, "z": 700}
"""Pixels of a window that is thought of as usual, less its margins."""
METERS = 1e-6
SHADER = """#uicontrol invlerp contrast
#uicontrol vec3 color color
void main() {
  emitRGB(color * contrast());
}
"""
OPACITY = 0.35
OBLIQUE = (-0.23, 0.33, 0.08, 0.91)
"""A view of a volume from the side and above, as a quaternion."""


def state_of(scene: Scene, data: str) -> dict[str, Any]:
    """The state of neuroglancer that shows a scene.

    Parameters
    ----------
    scene : Scene
    data : str
        Address below which its layers lie, as ``DATA/0`` for the first channel; labels follow.

    Returns
    -------
    state : dict
        Ready for JSON.
    """
    layers: list[dict[str, Any]] = []
    picture = scene.picture
    if picture is not None:
        dtype = drawn_type(picture.image.dtype, is_labels=False)
        layers += [_channel_layer(one, dtype, f"{data}/{i}") for i, one in enumerate(picture.channels)]
    for overlay in scene.overlays:
        layers.append(_labels_layer(overlay, f"{data}/{len(layers)}"))
    _name_apart(layers)
    # The whole of what labels there are; an image may go on far beyond, where only a region was segmented.
    seen = scene.overlays[0] if scene.overlays else scene.layers[0]
    place, shape = seen.placement, _shape(seen)
    axes = [axis for axis in "xyzt" if any(axis in layer.placement.axes for layer in scene.layers)]
    steps = {axis: (step, unit) for axis, step, unit in zip(place.axes, place.step, place.units, strict=True)}
    centers = {
        axis: origin / step + ((n - 1) / 2 if axis in "yx" else (n - 1) // 2 if axis == "z" else 0)
        for axis, origin, step, n in zip(place.axes, place.origin, place.step, shape, strict=True)
    }
    finest = min(steps[axis][0] for axis in "xy")
    extent = {axis: n * step / finest for axis, step, n in zip(place.axes, place.step, shape, strict=True)}
    is_volume = extent.get("z", 0.0) > 0 and shape[place.axes.index("z")] > 1
    share = 0.5 if is_volume else 1.0
    zoom = max(extent[axis] / (SCREEN[axis] * share) for axis in "zyx" if axis in extent)
    return {
        "title": scene.title,
        "dimensions": {axis: _dimension(*steps.get(axis, (1.0, None))) for axis in axes},
        # Of z and t a plane that is there, not the place between two.
        "position": [centers.get(axis, 0.0) for axis in axes],
        "crossSectionScale": zoom,
        "projectionOrientation": OBLIQUE,
        "projectionScale": 1.1 * math.hypot(*(extent[axis] for axis in "zyx" if axis in extent)),
        "layers": layers,
        "layout": "4panel" if is_volume else "xy",
        "showAxisLines": False,
        "showDefaultAnnotations": False,
        "crossSectionBackgroundColor": "#000000",
        "projectionBackgroundColor": "#000000",
    }


def _channel_layer(channel: Channel, dtype: np.dtype[Any], source: str) -> dict[str, Any]:
    """One channel, added to the others in its colour."""
    contrast, slider = _contrast(channel.window, dtype)
    return {
        "type": "image",
        "name": channel.title,
        "source": f"{source}/|zarr3:",
        "shader": SHADER,
        "shaderControls": {
            "contrast": {"range": contrast, "window": slider},
            "color": f"#{channel.color}",
        },
        "blend": "additive",
        "opacity": 1,
        "visible": channel.is_shown,
    }


def _contrast(window: tuple[float, float], dtype: np.dtype[Any]) -> tuple[list[float], list[float]]:
    """The pixel values that are black and brightest, and those a slider reaches: of whole numbers such as there are."""
    low, high = window
    reach = [low - (high - low) / 2, high + (high - low) / 2]
    if dtype.kind not in "ui":
        return [low, high], reach
    limits = np.iinfo(dtype)
    ends = [int(np.clip(round(value), limits.min, limits.max)) for value in (low, high, *reach)]
    if ends[1] == ends[0]:
        ends[0], ends[1] = max(ends[0] - 1, limits.min), min(ends[1] + 1, limits.max)
    return [*ends[:2]], [min(ends[2], ends[0]), max(ends[3], ends[1])]


def _labels_layer(overlay: Overlay, source: str) -> dict[str, Any]:
    """Labels, each in a colour of its own."""
    return {
        "type": "segmentation",
        "name": overlay.name,
        "source": f"{source}/|zarr3:",
        "selectedAlpha": OPACITY,
        "notSelectedAlpha": OPACITY / 2,
        "visible": overlay.is_shown,
    }


def _name_apart(layers: list[dict[str, Any]]) -> None:
    """Number what has the same name as another: neuroglancer knows layers by it."""
    taken: set[str] = set()
    for layer in layers:
        name, n = layer["name"] or "layer", 2
        while layer["name"] in taken or not layer["name"]:
            layer["name"] = f"{name} {n}"
            n += 1
        taken.add(layer["name"])


def _shape(layer: Picture | Overlay) -> tuple[int, ...]:
    """Pixels of level 0 along every axis but c."""
    image = layer.image
    return tuple(n for axis, n in zip(image.axes, image.shape, strict=True) if axis != "c")


def _dimension(step: float, unit: str | None) -> list[Any]:
    """The length of a unit of the viewer's coordinates."""
    return [step * METERS, "m"] if unit else [step, ""]
