"""A picture of any region of an image at any level, with the outlines of its labels.

Few pixels are read: those of the level that is just fine enough for the picture. Where there is no such level, and
reading a finer one would take long, the middle of the image is shown instead of all (`overview_of`) or it is said what
to ask for (`show`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from .canvas import Picture, enlarged, in_colours, stretched, with_scale_bar
from .errors import ImageError, SettingsError
from .frames import label_axes, label_shape
from .images import Image, parse_region
from .looks import CONTRAST, Bounds, Look, look_at
from .pictures import draw_outlines

__all__ = ["Ground", "chosen_bounds", "ground_of", "overview_of", "show"]

MAX_SIDE = 1000
MOST_PIXELS = 2**26
"""Of a plane that is read for a picture."""
MOST_PROJECTED = 2**29
"""Of all planes."""
LARGE_CHUNK = 2**29
"""Bytes of a chunk that is not decoded for a picture."""
MIDDLE = 1024
"""Side of what is shown of an image that has no level for a picture of all."""
ENLARGED_TO = 480
MOST_TIMES = 8


def show(
    source: Any,
    region: str | None = None,
    *,
    level: int | None = None,
    channels: Any = None,
    labels: Any = None,
    outlines: bool = True,
    z: int | str | None = None,
    t: int | str | None = None,
    contrast: tuple[float, float] = CONTRAST,
    max_side: int = MAX_SIDE,
    axes: str | None = None,
) -> Picture:
    """A picture of a region of an image or a result, with outlines.

    Parameters
    ----------
    source : Segmentation, Image, path, address or array
        What to show. Of a result that is the image as far as it was segmented, and its labels.
    region : str, optional
        As for `segment`: ``"y=100:2100,x=:500"``, in pixels of the full-size image (of a result, of what was
        segmented). Default: all.
    level : int, optional
        Of the pyramid. Default: the one that is just fine enough.
    channels : str, int or sequence of these, optional
        By name or index; several are laid over each other in colours, at most six. ``"rgb"`` takes the first three as
        red, green and blue. Default: of a result what the network was shown; else all if they are three at most
        (three of uint8 as colours), or the first.
    labels : str, path, array or Image, optional
        What to outline, of the image's shape: also the name of labels in an OME-Zarr. Default: those of the result, or
        the only ones in the OME-Zarr.
    outlines : bool
        Draw them.
    z, t : int or "max", optional
        The plane and the time point, or the largest value over those of the region (and the largest label). Must be
        given if there are several.
    contrast : (float, float)
        Percentiles of the pixels shown, per channel, that are black and white.
    max_side : int
        Longest side of the picture in pixels; what is larger is shown by every k-th pixel.
    axes : str, optional
        Axes of an array that does not say them.

    Returns
    -------
    Picture
        Shows itself in Jupyter; ``.save("picture.png")``. With a scale bar where the pixel size is known.

    Raises
    ------
    TiledsegError
        If there is no such region, level, channel or labels, or too much would have to be read.
    """
    if not 0 <= contrast[0] < contrast[1] <= 100:
        raise SettingsError(f"contrast {contrast} must be two percentiles, the first below the second: (1, 99.7).")
    if max_side < 16:
        raise SettingsError(f"max_side is {max_side}; give 16 pixels or more.")
    look = look_at(source, channels=channels, labels=labels if outlines else False, axes=axes)
    bounds, projected = chosen_bounds(look.image, region, {"z": z, "t": t})
    look = replace(look, bounds=bounds, projected=projected, contrast=contrast)
    return _picture(look, level, max_side)


def overview_of(look: Look, max_side: int = 600) -> Picture:
    """A picture of all of an image, or of its middle where there is no level for one; of volumes and series of the
    middle plane and time point. Its longest side is about as long as asked for.

    Raises
    ------
    ImageError
        If its chunks are too large, or it cannot be read.
    """
    longest = max(look.bounds[axis][1] for axis in "yx")
    # In whole steps a picture may be half as long as it might: a bit more than asked for is better.
    max_side = max(max_side, math.ceil(longest / max(1, round(longest / max_side))))
    middle = {axis: (n // 2, n // 2 + 1) for axis, (_, n) in look.bounds.items() if axis not in "yx"}
    look = replace(look, bounds={**look.bounds, **middle})
    level = _level_for(look.image, _step(look.bounds, max_side))
    if _pixels_read(look.image, level, look.bounds) > MOST_PIXELS:
        cut = {axis: _middle(look.bounds[axis][1]) for axis in "yx"}
        look = replace(look, bounds={**look.bounds, **cut})
    return _picture(look, None, max_side)


def chosen_bounds(image: Image, region: str | None, planes: dict[str, int | str | None]) -> tuple[Bounds, str]:
    """Pixels per axis that are shown, and the axes along which the largest value is."""
    asked = {} if region is None else parse_region(region, image.axes)
    bounds, projected = {}, ""
    for axis, n in zip(label_axes(image), label_shape(image), strict=True):
        low, high = asked.get(axis, (None, None))
        low, high = low or 0, n if high is None else high
        if not 0 <= low < high <= n:
            raise ImageError(f"{image.name} has no region {axis}={low}:{high}, its axis {axis!r} has length {n}.")
        plane = planes.pop(axis, None)
        if isinstance(plane, Integral) and not isinstance(plane, bool):
            if not low <= plane < high:
                raise ImageError(f"{image.name} has no {axis}={plane} there; give {low} to {high - 1}.")
            low, high = int(plane), int(plane) + 1
        elif plane == "max":
            projected += axis if high - low > 1 else ""
        elif plane is not None:
            raise SettingsError(f"{axis} is {plane!r}; give a number, or 'max' for the largest value over all.")
        elif axis not in "yx" and high - low > 1:
            raise SettingsError(
                f"{image.name} has {high - low} positions along {axis}; say which to show, e.g. "
                f"{axis}={(low + high) // 2}, or {axis}='max' for the largest value over all."
            )
        bounds[axis] = (low, high)
    for axis, plane in planes.items():
        if plane is not None:
            raise SettingsError(f"{image.name} has axes {image.axes!r} and no {axis}; leave {axis} out.")
    return bounds, projected


def _step(bounds: Bounds, max_side: int) -> float:
    """Pixels of level 0 that a pixel of the picture stands for, at least."""
    return max(1.0, max(bounds[axis][1] - bounds[axis][0] for axis in "yx") / max_side)


def _level_for(image: Image, step: float) -> int:
    """The coarsest level that is fine enough for pixels of this size."""
    usable = [i for i, level in enumerate(image.levels) if max(level.scale[-2:]) <= step * 1.01]
    return max(usable, key=lambda i: image.levels[i].scale[-1], default=0)


def _pixels_read(image: Image, level: int, bounds: Bounds) -> int:
    """Of one plane of a level."""
    scale = image.levels[level].scale[-2:]
    return math.prod(math.ceil((bounds[axis][1] - bounds[axis][0]) / s) for axis, s in zip("yx", scale, strict=True))


def _middle(n: int) -> tuple[int, int]:
    low = max(0, (n - MIDDLE) // 2)
    return low, min(n, low + MIDDLE)


@dataclass(frozen=True)
class Ground:
    """A picture without outlines, and where its pixels are.

    Attributes
    ----------
    pixels : array of uint8, shape (y, x, 3)
    grid : dict of array of float64
        Positions of its pixels along y and x, in pixels of level 0, before it was enlarged.
    times : int
        By how much.
    step : float
        Pixels of level 0 from one position to the next.
    caption : str
    """

    pixels: npt.NDArray[np.uint8]
    grid: dict[str, npt.NDArray[np.float64]]
    times: int
    step: float
    caption: str

    def labels(self, look: Look, labels: Image) -> npt.NDArray[Any]:
        """Labels at its pixels."""
        level = _level_for(labels, self.step)
        _check_affordable(look, labels, level)
        shown = _sampled(look, labels, level, self.grid, None)
        return np.asarray(enlarged(shown, self.times))

    def finished(self, pixels: npt.NDArray[np.uint8], image: Image) -> Picture:
        """A picture from this ground with what was drawn on it, and a scale bar."""
        spacing = image.spacing_um()
        if spacing is not None:
            pixels = with_scale_bar(pixels, spacing[-1] * self.step / self.times)
        return Picture(pixels, self.caption)


def ground_of(look: Look, level: int | None, max_side: int) -> Ground:
    """Read what is shown.

    Parameters
    ----------
    look : Look
    level : int or None
        None takes the coarsest that is fine enough.
    max_side : int
        Of the picture in pixels.
    """
    image, step = look.image, _step(look.bounds, max_side)
    if level is None:
        level = _level_for(image, step)
    elif not 0 <= level < len(image.levels):
        raise ImageError(f"{image.name} has levels 0 to {len(image.levels) - 1} and no level {level}.")
    scale = image.levels[level].scale[-1]
    # Whole steps, so that pixels are as they are stored.
    step = scale * max(1, math.ceil(step / scale * 0.999))
    _check_affordable(look, image, level)
    grid = {axis: _positions(look.bounds[axis], step) for axis in "yx"}
    planes = [_sampled(look, image, level, grid, channel) for channel in look.channels]
    if look.is_as_stored:
        pixels = np.ascontiguousarray(np.stack(planes, axis=-1))
    else:
        pixels = in_colours([stretched(plane, look.contrast) for plane in planes], look.colours)
    times = min(MOST_TIMES, max(1, min(ENLARGED_TO, max_side) // max(pixels.shape[:2])))
    return Ground(enlarged(pixels, times), grid, times, step, _caption(look, level))


def _picture(look: Look, level: int | None, max_side: int) -> Picture:
    """Read, and draw."""
    ground = ground_of(look, level, max_side)
    if look.labels is not None:
        draw_outlines(ground.pixels, ground.labels(look, look.labels))
    return ground.finished(ground.pixels, look.image)


def _check_affordable(look: Look, image: Image, level: int) -> None:
    """Refuse to read what takes long, of the image or of its labels."""
    stored = image.levels[level]
    n_pixels = _pixels_read(image, level, look.bounds)
    n_planes = math.prod(look.bounds[axis][1] - look.bounds[axis][0] for axis in look.projected)
    side = math.isqrt(MOST_PIXELS)
    if n_pixels > MOST_PIXELS or n_pixels * n_planes > MOST_PROJECTED:
        raise ImageError(
            f"{n_pixels * n_planes:,} pixels of level {level} of {image.name} are too many for a quick look; give a "
            f"region of at most {side:,} x {side:,}"
            + (f" and {MOST_PROJECTED:,} in all" if look.projected else "")
            + (", or a coarser level." if level + 1 < len(image.levels) else ".")
        )
    if image.is_shippable and image.dtype.itemsize * math.prod(stored.chunks) > LARGE_CHUNK:
        raise ImageError(
            f"the chunks of level {level} of {image.name} have {stored.chunks} pixels, which is too much for a quick "
            "look; store the image in smaller ones."
        )


def _positions(bounds: tuple[int, int], step: float) -> npt.NDArray[np.float64]:
    """Centres of the picture's pixels along an axis, in pixels of level 0."""
    low, high = bounds
    n = max(1, math.ceil((high - low) / step - 1e-6))
    return np.asarray(low + (np.arange(n) + 0.5) * step - 0.5, np.float64)


def _sampled(
    look: Look, image: Image, level: int, grid: dict[str, npt.NDArray[np.float64]], channel: int | None
) -> npt.NDArray[Any]:
    """The pixels of a level that are nearest to some positions, the largest over what is projected."""
    stored = image.levels[level]
    geometry = dict(zip(image.spatial_axes, zip(stored.scale, stored.offset, strict=True), strict=True))
    index = {"t": np.zeros(1, np.int64), "z": np.zeros(1, np.int64)}
    for axis, n in zip(image.axes, stored.shape, strict=True):
        if axis == "c":
            continue
        at = grid.get(axis, np.arange(*look.bounds[axis]))
        scale, offset = geometry.get(axis, (1.0, 0.0))
        index[axis] = np.clip(np.floor((at - offset) / scale + 0.5).astype(np.int64), 0, n - 1)
    parts = {axis: slice(int(at[0]), int(at[-1]) + 1) for axis, at in index.items()}
    if channel is not None:
        parts["c"] = slice(channel, channel + 1)
    inside = np.ix_(*(index[axis] - parts[axis].start for axis in "yx"))
    largest: list[npt.NDArray[Any]] = []
    for t, planes in itertools.product(np.unique(index["t"]), _together(image, level, np.unique(index["z"]), parts)):
        parts |= {"t": slice(t, t + 1), "z": slice(planes[0], planes[-1] + 1)}
        pixels = image.read(level, tuple(parts[axis] for axis in image.axes))
        pixels = pixels.reshape(-1, *pixels.shape[-2:])[planes - planes[0]]
        shown = pixels.max(axis=0)[inside]
        largest = [np.maximum(shown, before) for before in largest] or [shown]
    return largest[0]


def _together(
    image: Image, level: int, planes: npt.NDArray[np.int64], parts: dict[str, slice]
) -> list[npt.NDArray[np.int64]]:
    """Planes of a level in groups that are read at once: those of a chunk, unless that is much."""
    stored = image.levels[level]
    depth = stored.chunks[image.axes.index("z")] if "z" in image.axes else 1
    n_pixels = math.prod(parts[axis].stop - parts[axis].start for axis in "yx")
    depth = max(1, min(depth, MOST_PIXELS // n_pixels))
    return np.split(planes, np.flatnonzero(np.diff(planes // depth)) + 1)


def _caption(look: Look, level: int) -> str:
    """What is shown, in words."""
    image = look.image
    shown = ", ".join(
        f"{axis} {'largest of ' if axis in look.projected else ''}" + (f"{low}" if high - low == 1 else f"{low}:{high}")
        for axis, (low, high) in look.bounds.items()
    )
    names = ", ".join(image.channels[i] for i in look.channels)
    channels = f", channel {names}" if image.n_channels > 1 else ""
    return f"{image.name}, {shown}, level {level}{channels}"
