"""Axes: which letters an image has, in which order, and which of them are space.

Axes strings are lower case and in the order OME-Zarr prescribes, a subset of ``"tczyx"`` that
holds at least ``"yx"``. Nothing here looks at a length to guess an axis.
"""

from __future__ import annotations

from .errors import ImageError

__all__ = ["ALL_AXES", "SPATIAL", "canonical_order", "check_axes", "spatial_axes"]

ALL_AXES = "tczyx"
SPATIAL = "zyx"


def check_axes(axes: str, ndim: int, where: str) -> str:
    """Validate an axes string.

    Parameters
    ----------
    axes : str
        Axes of an array, any order, lower case.
    ndim : int
        Dimensions of that array.
    where : str
        Name of the array, for the error text.

    Returns
    -------
    axes : str
        The same string.

    Raises
    ------
    ImageError
        If a letter is unknown or repeated, the number of letters is not `ndim`, or y or x is missing.
    """
    if len(axes) != ndim:
        raise ImageError(f"{where} has {ndim} dimensions but axes {axes!r}; give one letter per dimension.")
    unknown = sorted(set(axes) - set(ALL_AXES))
    if unknown or len(set(axes)) != len(axes):
        raise ImageError(f"{where} has axes {axes!r}; each must be one of t, c, z, y, x and occur once.")
    if not {"y", "x"} <= set(axes):
        raise ImageError(f"{where} has axes {axes!r}; an image needs y and x.")
    return axes


def canonical_order(axes: str) -> str:
    """The same letters in the order t, c, z, y, x."""
    return "".join(letter for letter in ALL_AXES if letter in axes)


def spatial_axes(axes: str) -> str:
    """The letters that are space, in order: ``"yx"`` or ``"zyx"``."""
    return "".join(letter for letter in axes if letter in SPATIAL)
