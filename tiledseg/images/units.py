"""Units of length: the names OME-Zarr uses, and their size; and which values of metadata are numbers."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["MICROMETERS", "is_number", "unit_name"]

# fmt: off
_UNIT_NAMES = {
    "pm": "picometer", "Å": "angstrom", "\u212b": "angstrom", "nm": "nanometer", "nanometre": "nanometer",
    "um": "micrometer", "µm": "micrometer", "μm": "micrometer", "\\u00B5m": "micrometer",
    "micron": "micrometer", "microns": "micrometer", "micrometre": "micrometer",
    "mm": "millimeter", "millimetre": "millimeter", "cm": "centimeter", "m": "meter",
}
MICROMETERS = {
    "picometer": 1e-6, "angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0,
    "millimeter": 1e3, "centimeter": 1e4, "decimeter": 1e5, "meter": 1e6,
}
# fmt: on


def unit_name(unit: Any) -> str | None:
    """The name OME-Zarr uses for a unit.

    Parameters
    ----------
    unit : str
        As a file gives it; anything else is no unit.

    Returns
    -------
    name : str or None
        For example ``"micrometer"``; the text itself if it is not a known one, None for pixels.
    """
    if not isinstance(unit, str) or unit.lower() in ("", "pixel", "pixels", "reference frame"):
        return None
    return _UNIT_NAMES.get(unit, unit)


def is_number(value: Any) -> bool:
    """Whether a value of metadata is a finite number.

    Parameters
    ----------
    value : object
        As JSON or a TIFF tag gives it; a bool is no number.

    Returns
    -------
    is_number : bool
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
