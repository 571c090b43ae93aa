"""From what is stored, in the order of axes on disk, to an :class:`Image`: what all readers share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..axes import canonical_order, check_axes, spatial_axes
from ..errors import ImageError
from .image import Image, Level, Source
from .units import is_number

__all__ = [
    "StoredLevel",
    "UnnamedAxesError",
    "assemble_image",
    "channel_names",
    "check_array",
    "given_axes",
    "is_number",
]

_log = logging.getLogger(__name__)


class UnnamedAxesError(ImageError):
    """An array does not say what its dimensions are."""


@dataclass(frozen=True)
class StoredLevel:
    """One stored level; everything in the order on disk."""

    path: str
    shape: Sequence[int]
    chunks: Sequence[int]
    scale: Sequence[float] | None = None  # size of a pixel, 0 unknown
    shift: Sequence[float] | None = None  # position of pixel 0


def assemble_image(
    name: str,
    source: Source,
    dtype: np.dtype[Any],
    stored: Sequence[StoredLevel],
    units: Sequence[str | None] | None = None,
) -> Image:
    """An image in canonical order from what is stored.

    Parameters
    ----------
    name : str
        For messages.
    source : Source
        Its axes are the order of `stored` and `units`.
    dtype : dtype
    stored : sequence of StoredLevel
        Finest first; the first has a scale if the spacing is known.
    units : sequence of str or None, optional
        Of scale and shift, per axis.

    Returns
    -------
    image : Image
        Its channels are named by their index.
    """
    disk = source.axes
    axes = canonical_order(disk)
    order = [disk.index(letter) for letter in axes]
    space = [at for at in order if disk[at] in spatial_axes(axes)]
    first = stored[0]
    sizes, shifts = first.scale or [0.0] * len(disk), first.shift or [0.0] * len(disk)
    levels = []
    for number, one in enumerate(stored):
        scales, offsets = zip(*(_level_geometry(name, disk[at], at, first, one) for at in space), strict=True)
        shape = tuple(int(one.shape[at]) for at in order)
        chunks = tuple(max(1, min(int(one.chunks[at]), int(one.shape[at]))) for at in order)
        levels.append(Level(one.path, shape, chunks, scales, offsets, number, (0,) * len(shape), shape))
    return Image(
        name=name,
        axes=axes,
        dtype=np.dtype(dtype).newbyteorder("="),
        levels=tuple(levels),
        spacing=tuple(sizes[at] if sizes[at] > 0 else None for at in order),
        translation=tuple(shifts[at] for at in order),
        units=tuple(units[at] if units else None for at in order),
        channels=channel_names([], levels[0].shape[axes.index("c")] if "c" in axes else 1),
        source=source,
    )


def _level_geometry(name: str, axis: str, at: int, first: StoredLevel, one: StoredLevel) -> tuple[float, float]:
    """Scale and offset of a level on one axis, in level-0 pixels."""
    full, size = first.shape[at], one.shape[at]
    by_shape = full / size
    if abs(full / max(1, round(by_shape)) - size) <= 1:
        by_shape = float(max(1, round(by_shape)))  # 101 pixels to 50 or 51 is a factor of 2
    if first.scale is None or one.scale is None or first.scale[at] <= 0 or one.scale[at] <= 0:
        return by_shape, (by_shape - 1) / 2
    scale = one.scale[at] / first.scale[at]
    if abs(scale * size / full - 1) > 0.25 and abs(full / scale - size) > 1:
        text = "%s/%s: scale %g on %s contradicts lengths %d and %d; using %g"
        _log.warning(text, name, one.path, scale, axis, full, size, by_shape)
        return by_shape, (by_shape - 1) / 2
    if first.shift is None or one.shift is None:
        return scale, (scale - 1) / 2
    return scale, (one.shift[at] - first.shift[at]) / first.scale[at]


def given_axes(axes: str | None, shape: Sequence[int], where: str) -> str:
    """Axes as given, or yx of a plane; never guessed from lengths.

    Parameters
    ----------
    axes : str, optional
    shape : sequence of int
        Pixels per dimension.
    where : str
        Name of the array, for the error text.

    Returns
    -------
    axes : str
        One letter per dimension.

    Raises
    ------
    UnnamedAxesError
        If there are more than two dimensions without axes.
    ImageError
        If the axes do not fit.
    """
    if axes is None and len(shape) == 2:
        return "yx"
    if axes is None:
        what = f"{len(shape)} dimensions of lengths {tuple(shape)} and does not name them"
        raise UnnamedAxesError(f"{where} has {what}; give axes, e.g. axes='zyx' (--axes zyx).")
    return check_axes(axes, len(shape), where)


def check_array(shape: Sequence[int], dtype: np.dtype[Any], where: str) -> None:
    """Refuse what is neither an image nor a mask.

    Parameters
    ----------
    shape : sequence of int
        Pixels per dimension.
    dtype : dtype
    where : str
        Name of the array, for the error text.

    Raises
    ------
    ImageError
        If there are no pixels, or they are not bool, integers or real numbers of at most 8 bytes.
    """
    if 0 in shape:
        raise ImageError(f"{where} is empty: its shape is {tuple(shape)}.")
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise ImageError(f"{where} has dtype {dtype}; only integers and real numbers can be segmented.")


def channel_names(names: Sequence[Any], n_channels: int) -> tuple[str, ...]:
    """One name per channel, its index where there is none.

    Parameters
    ----------
    names : sequence
        As a file gives them: too few or too many, and of any type.
    n_channels : int

    Returns
    -------
    names : tuple of str, length `n_channels`
    """
    named = [name if isinstance(name, str) and name else str(i) for i, name in enumerate(names)][:n_channels]
    return (*named, *(str(i) for i in range(len(named), n_channels)))
