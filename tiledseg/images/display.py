"""How a file wants its channels shown: their colours and the pixel values that are black and bright."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .units import is_number

__all__ = ["Display", "omero_displays"]

_HEX = re.compile(r"#?([0-9A-Fa-f]{6})(?:[0-9A-Fa-f]{2})?")


@dataclass(frozen=True)
class Display:
    """How one channel is shown, as far as the file says."""

    color: str | None = None
    """Six hexadecimal digits, red first; None if unknown."""
    window: tuple[float, float] | None = None
    """Pixel values shown black and brightest; None if unknown."""
    is_shown: bool = True
    """Whether it is shown at first."""


def omero_displays(ome: Mapping[str, Any], n_channels: int) -> tuple[Display, ...]:
    """What the optional omero block of OME-Zarr says.

    Parameters
    ----------
    ome : mapping
        Attributes of an image; written by others and not trusted.
    n_channels : int

    Returns
    -------
    displays : tuple of Display, length `n_channels`
        What cannot be read counts as unknown: it is for looking only.
    """
    omero = ome.get("omero")
    listed = omero.get("channels") if isinstance(omero, dict) else None
    items = listed if isinstance(listed, list) else []
    found = [_display(item) if isinstance(item, dict) else Display() for item in items[:n_channels]]
    return (*found, *(Display(),) * (n_channels - len(found)))


def _display(item: Mapping[str, Any]) -> Display:
    """One channel of the block."""
    color: Any = item.get("color")
    window: Any = item.get("window")
    match = _HEX.fullmatch(color) if isinstance(color, str) else None
    ends: list[Any] = [window.get(key) for key in ("start", "end")] if isinstance(window, dict) else [None, None]
    start, end = ends
    is_window = is_number(start) and is_number(end) and start < end
    return Display(
        color=match[1].upper() if match else None,
        window=(float(start), float(end)) if is_window else None,
        is_shown=item.get("active") is not False,
    )
