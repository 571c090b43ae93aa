"""What is chosen in the form, as settings of `tiledseg.segment`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SettingsError
from ..runs import LARGE_ARRAY
from ..shapes import diameter_of_layer
from .target import Target

__all__ = ["GREY", "IN_3D", "STITCHED", "THIS_PLANE", "VOLUMES", "Choices", "diameter_of_shapes_layer", "region_of"]

GREY = "grey"
"""As a channel: the mean of all."""

IN_3D, STITCHED, THIS_PLANE = "3D", "planes, joined", "this plane only"
VOLUMES = (IN_3D, STITCHED, THIS_PLANE)
"""How cells are sought in a volume."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The form.

    Attributes
    ----------
    model : str
    channel : int, str or None
        Index, `GREY`, or None for what the model takes by itself.
    nuclear_channel : int or None
    diameter : float
        Pixels of the full-size image; 0 to estimate it.
    volume : str
        One of `VOLUMES`; counts for volumes.
    stitch_threshold : float
        Counts where planes are joined.
    resample : bool
    flow_threshold : float
        The model match threshold; does not count in 3D.
    cellprob_threshold : float
    min_size : int
    """

    model: str
    channel: int | str | None
    nuclear_channel: int | None
    diameter: float
    volume: str
    stitch_threshold: float
    resample: bool
    flow_threshold: float
    cellprob_threshold: float
    min_size: int

    def for_estimate(self) -> dict[str, Any]:
        """Settings that the diameter depends on."""
        return {
            "model": self.model,
            **({} if self.channel is None else {"channel": self.channel}),
            **({} if self.nuclear_channel is None else {"nuclear_channel": self.nuclear_channel}),
        }

    def settings(self, target: Target) -> dict[str, Any]:
        """All settings for a layer but the region."""
        chosen = {
            **self.for_estimate(),
            "diameter": self.diameter or "auto",
            "resample": self.resample,
            "cellprob_threshold": self.cellprob_threshold,
            "min_size": self.min_size,
        }
        if target.is_volume and self.volume == IN_3D:
            return {**chosen, "do_3d": True, "anisotropy": target.anisotropy}
        if target.is_volume and self.volume == STITCHED:
            chosen["stitch_threshold"] = self.stitch_threshold
        return {**chosen, "flow_threshold": self.flow_threshold}


def region_of(
    target: Target, volume: str, shown: Mapping[str, int], visible: Mapping[str, tuple[int, int]] | None
) -> dict[str, tuple[int, int]]:
    """What of an image is segmented.

    Parameters
    ----------
    target : Target
    volume : str
        One of `VOLUMES`.
    shown : mapping of int
        What sliders show, see `layers.shown`: the time point if only what is visible is segmented, and the plane if
        cells are sought in one only.
    visible : mapping of (int, int) or None
        What lies on the canvas, see `layers.visible`; None for the whole image.

    Returns
    -------
    bounds : dict of (int, int)
        First and one-past-last pixel per axis; axes that are not named are whole.

    Raises
    ------
    SettingsError
        If what is visible is too large for memory, or a slider is beyond the image.
    """
    bounds = {axis: span for axis, span in (visible or {}).items() if axis != "c"}
    sizes = dict(zip(target.axes, target.array.shape, strict=True))
    single = ("t" if visible is not None else "") + ("z" if target.is_volume and volume == THIS_PLANE else "")
    for axis in [axis for axis in single if axis in shown]:
        if not 0 <= shown[axis] < sizes[axis]:
            raise SettingsError(
                f"napari shows {axis}={shown[axis]}, and the image has {sizes[axis]} along {axis}; move the slider."
            )
        bounds[axis] = (shown[axis], shown[axis] + 1)
    extents = {**{axis: (0, n) for axis, n in sizes.items()}, **bounds}
    n_pixels = math.prod(stop - start for start, stop in extents.values())
    if visible is not None and n_pixels > LARGE_ARRAY:
        raise SettingsError(
            f"what is visible has {n_pixels / 1e6:.0f} million pixels, too many to keep its labels in memory; zoom in, "
            "or run on the whole image."
        )
    return bounds


def diameter_of_shapes_layer(shapes: Any, image: Any) -> float:
    """The mean diameter of drawn shapes in pixels of an image layer, whose pixels may have another size.

    Parameters
    ----------
    shapes : napari.layers.Shapes
    image : napari.layers.Image

    Raises
    ------
    SettingsError
        If there are no shapes, or one has no size.
    """
    found, _ = diameter_of_layer(shapes)
    return round(found * abs(float(shapes.scale[-1] / image.scale[-1])), 2)
