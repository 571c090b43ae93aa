"""Parts of an image that are images themselves: from one of its levels on, or cut to a region."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from ..axes import SPATIAL, spatial_axes
from ..errors import ImageError, SettingsError
from .image import Image, Level, listed_names

__all__ = ["Bounds", "at_level", "at_region", "parse_region"]

Bounds = Mapping[str, tuple[int | None, int | None]]
"""First and one-past-last pixel per axis, None for the axis's own."""

_PART = re.compile(r"(\w+)\s*=\s*(?:([0-9]{0,18})\s*:\s*([0-9]{0,18})|([0-9]{1,18}))")
_TOLERANCE = 1e-3  # pixels of a level: metadata gives scales as rounded numbers


def at_level(image: Image, level: int) -> Image:
    """The image as if one of its levels were level 0; the finer ones are gone.

    Parameters
    ----------
    image : Image
    level : int
        Index into its levels.

    Returns
    -------
    image : Image
        Its spacing and translation are those of the level, so that what is made from it lies where
        the image does. An unknown spacing becomes the number of pixels it was, without a unit.

    Raises
    ------
    ImageError
        If there is no such level.
    """
    if not 0 <= level < len(image.levels):
        known = listed_names([f"{i} ({_lengths(image.axes, one)})" for i, one in enumerate(image.levels)])
        raise ImageError(f"{image.name} has no level {level}; it has {known}; give one of these (--level).")
    first = image.levels[level]
    spacing, translation, units = list(image.spacing), list(image.translation), list(image.units)
    placement = list(image.placement)
    for axis, scale, offset in zip(image.spatial_axes, first.scale, first.offset, strict=True):
        at = image.axes.index(axis)
        step = spacing[at]
        translation[at] += offset * (step or 1.0)
        if step is not None:
            spacing[at] = step * scale
        elif scale != 1:
            spacing[at], units[at] = scale, None
        start, width = placement[at]
        # An offset is that of the centre of pixel 0.
        placement[at] = start + (offset + 0.5 - scale / 2) * width, width * scale
    return replace(
        image,
        levels=tuple(_seen_from(first, one) for one in image.levels[level:]),
        spacing=tuple(spacing),
        translation=tuple(translation),
        units=tuple(units),
        within=_part(placement),
    )


def parse_region(text: str, axes: str) -> dict[str, tuple[int | None, int | None]]:
    """Read a region such as ``"z=0:50,y=100:2100"``.

    Parameters
    ----------
    text : str
        ``AXIS=START:STOP`` of some axes, with commas or spaces between them; either end may be left
        out, and ``AXIS=I`` is one plane. Pixels of level 0, counted from 0, `STOP` excluded.
    axes : str
        Of the image.

    Returns
    -------
    bounds : dict of (int or None, int or None)
        First and one-past-last pixel per axis named, None for an end that was left out.

    Raises
    ------
    SettingsError
        If it cannot be read, or an axis is named twice, unknown, or that of channels.
    """
    bounds: dict[str, tuple[int | None, int | None]] = {}
    for part in re.split(r"\s*,\s*|\s+(?=\w+\s*=)", text.strip()):
        found = _PART.fullmatch(part)
        if found is None:
            raise SettingsError(
                f"region {text!r} cannot be read at {part!r}; write AXIS=START:STOP in pixels from 0, "
                "e.g. --region y=100:2100,x=:500."
            )
        axis, start, stop, single = found.groups()
        _check_axis(axis, axes)
        if axis in bounds:
            raise SettingsError(f"region {text!r} names axis {axis!r} twice; give one range for each (--region).")
        if single is not None:
            bounds[axis] = (int(single), int(single) + 1)
        else:
            bounds[axis] = (int(start) if start else None, int(stop) if stop else None)
    return bounds


def at_region(image: Image, bounds: Bounds) -> Image:
    """The image cut to a region of level 0.

    Parameters
    ----------
    image : Image
    bounds : mapping of (int or None, int or None)
        First and one-past-last pixel of level 0 per axis; axes that are not named stay whole.

    Returns
    -------
    image : Image
        Level 0 has the pixels of the region. Coarser levels have the fewest pixels that cover it,
        with an `offset` that says where they lie in it, which may be outside.

    Raises
    ------
    ImageError
        If the region is empty, or reaches outside the image.
    SettingsError
        If an axis is unknown, or that of channels.
    """
    spans, translation, placement = {}, list(image.translation), list(image.placement)
    for axis, (start, stop) in bounds.items():
        _check_axis(axis, image.axes)
        at = image.axes.index(axis)
        size = image.shape[at]
        low, high = 0 if start is None else start, size if stop is None else stop
        if not 0 <= low < high <= size:
            raise ImageError(
                f"{image.name} has no region {axis}={low}:{high}, its axis {axis!r} has length {size}; "
                f"give {axis}=START:STOP with 0 <= START < STOP <= {size} (--region)."
            )
        if high - low < size:
            spans[axis] = (low, high)
            translation[at] += low * (image.spacing[at] or 1.0)
            placement[at] = placement[at][0] + low * placement[at][1], placement[at][1]
    # The time points of a level that has fewer of them are not known.
    in_time = [image.axes.index(axis) for axis in spans if axis not in SPATIAL]
    kept = [one for one in image.levels if all(one.shape[at] == image.shape[at] for at in in_time)]
    return replace(
        image,
        levels=tuple(_cut(one, image.axes, spans) for one in kept),
        translation=tuple(translation),
        within=_part(placement),
    )


def _lengths(axes: str, level: Level) -> str:
    """Shape of a level for messages, e.g. ``"y 40, x 30"``."""
    return ", ".join(f"{axis} {size}" for axis, size in zip(axes, level.shape, strict=True))


def _seen_from(first: Level, level: Level) -> Level:
    """A level, with its geometry in pixels of a finer one."""
    places = list(zip(level.scale, level.offset, first.scale, first.offset, strict=True))
    return replace(
        level,
        scale=tuple(scale / step for scale, _, step, _ in places),
        offset=tuple((offset - origin) / step for _, offset, step, origin in places),
    )


def _part(placement: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """`Image.within`: empty for all of an image."""
    return () if all(at == (0.0, 1.0) for at in placement) else tuple(placement)


def _check_axis(axis: str, axes: str) -> None:
    """Refuse an axis that a region cannot have."""
    if axis == "c":
        raise SettingsError("a region has no channels; choose those with --channel and leave c out of --region.")
    if axis not in axes or len(axis) != 1:
        known = ", ".join(axes.replace("c", ""))
        raise SettingsError(f"the region names axis {axis!r}, but the image has {known}; correct --region.")


def _cut(level: Level, axes: str, spans: Mapping[str, tuple[int, int]]) -> Level:
    """The part of a level that covers a region of level 0, placed relative to that region."""
    start, shape, offset = list(level.start), list(level.shape), list(level.offset)
    for axis, (low, high) in spans.items():
        at, (first, last) = axes.index(axis), (low, high)
        if axis in SPATIAL:
            i = spatial_axes(axes).index(axis)
            first, last = _covering(level.scale[i], level.offset[i], level.shape[at], low, high)
            offset[i] += first * level.scale[i] - low
        start[at] += first
        shape[at] = last - first
    return replace(level, start=tuple(start), shape=tuple(shape), offset=tuple(offset))


def _covering(scale: float, offset: float, size: int, low: int, high: int) -> tuple[int, int]:
    """The fewest pixels of a level, one at least, that cover pixels of level 0 as far as the level reaches."""
    first = math.floor((low - 0.5 - offset) / scale + 0.5 + _TOLERANCE)
    last = math.ceil((high - 0.5 - offset) / scale + 0.5 - _TOLERANCE)
    first = min(max(first, 0), size - 1)
    return first, max(min(last, size), first + 1)
