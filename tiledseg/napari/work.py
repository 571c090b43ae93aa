"""What runs in the background: from a target and settings to labels that napari can show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SettingsError
from ..progress import Listener
from .layers import fitted
from .target import Target, levels_of

__all__ = ["Labels", "estimated", "segmented"]


@dataclass(frozen=True)
class Labels:
    """What was found.

    Attributes
    ----------
    levels : list of arrays
        Finest first; one if they are in memory.
    axes : str
        Of the labels, in the order of the layer.
    text : str
        What was found, in words.
    """

    levels: list[Any]
    axes: str
    text: str


def segmented(
    listener: Listener,
    target: Target,
    bounds: Mapping[str, tuple[int, int]],
    settings: Mapping[str, Any],
    output: str | None,
    restart: bool,
) -> Labels:
    """Find the cells of a layer.

    Parameters
    ----------
    listener : callable
        Told the progress; what it raises ends the run.
    target : Target
    bounds : mapping of (int, int)
        What of it, see `choices.region_of`.
    settings : mapping
        See `choices.Choices.settings`.
    output : str or None
        An OME-Zarr for the labels; None keeps them in memory.
    restart : bool
        Discard what an earlier run left there.
    """
    from ..pipeline import segment

    region = ",".join(f"{axis}={start}:{stop}" for axis, (start, stop) in bounds.items()) or None
    source = target.source(in_memory=output is None)
    found = segment(**source, output=output, restart=restart, progress=listener, region=region, **settings)
    levels = [found.labels.compute()] if found.path is None else levels_of(found.path)

    text = f"{found.report.n_objects} cells"
    if found.report.diameter is not None:
        text += f", diameter {found.report.diameter.value:.1f} px ({found.report.diameter.source})"
    if found.path is not None:
        text += f", in {found.path}"
    placed = [fitted(level, target.layer_axes, target.n_layer_channels) for level in levels]
    return Labels([level for level, _ in placed], placed[0][1], text)


def estimated(listener: Listener, target: Target, settings: Mapping[str, Any]) -> float:
    """The diameter of the cells of a layer, pixels.

    Raises
    ------
    SettingsError
        If nothing is found to estimate it from.
    """
    from ..pipeline import estimate_diameter

    found = estimate_diameter(**target.source(in_memory=False), progress=listener, **settings)
    if found.source != "estimated":
        raise SettingsError("no cells were found to estimate a diameter from; give one, or draw shapes round some.")
    return round(found.value, 2)
