"""Colours and contrast of an image's channels: as the file says, else from some of its pixels."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..images import Image
from ..images.display import Display

__all__ = ["Channel", "channels_of"]

SAMPLES = 16
"""Places that pixels are taken from."""
SIDE = 256
"""Pixels of a sample along y and x."""
LOW_PERCENTILE, HIGH_PERCENTILE = 1.0, 99.8
COLORS = ("FF00FF", "00FF00", "00FFFF", "FFFF00", "FF4040", "4060FF", "FFFFFF")
"""Of channels without colours of their own; the first two are told apart by all kinds of colour vision."""
RGB = ("FF0000", "00FF00", "0000FF")


@dataclass(frozen=True)
class Channel:
    """How one channel of an image is shown."""

    index: int
    name: str
    color: str
    """Six hexadecimal digits, red first."""
    window: tuple[float, float]
    """Pixel values shown black and brightest."""
    is_shown: bool

    @property
    def title(self) -> str:
        """Its name, as that of a layer."""
        return f"channel {self.name}" if self.name.isdigit() else self.name


def channels_of(image: Image) -> tuple[Channel, ...]:
    """Colours and contrast of every channel.

    Parameters
    ----------
    image : Image

    Returns
    -------
    channels : tuple of Channel
        Windows of the file, but those as wide as a type of more than 8 bits, which say nothing; else percentiles of
        the coarsest level. Three channels of 8 bits without colours are red, green and blue of full range.
    """
    displays = image.displays or (Display(),) * image.n_channels
    is_rgb = image.n_channels == 3 and image.dtype == np.uint8 and not any(one.color or one.window for one in displays)
    colors = RGB if is_rgb else ("FFFFFF",) if image.n_channels == 1 else COLORS
    channels = []
    for index, (name, display) in enumerate(zip(image.channels, displays, strict=True)):
        window = (0.0, 255.0) if is_rgb else display.window
        if window is None or _is_whole_range(image.dtype, window):
            window = _sampled(image, index)
        # One channel alone is grey, unless it was given another colour than writers give the first.
        color = display.color if display.color and image.n_channels > 1 else None
        channels.append(Channel(index, name, color or colors[index % len(colors)], window, display.is_shown))
    return tuple(channels)


def _is_whole_range(dtype: np.dtype[Any], window: tuple[float, float]) -> bool:
    """Whether a window is that of the type, which cameras rarely fill."""
    return dtype.kind in "ui" and dtype.itemsize > 1 and window[1] - window[0] >= np.iinfo(dtype).max


def _sampled(image: Image, channel: int) -> tuple[float, float]:
    """Two percentiles of the coarsest level, at places spread over it."""
    level = len(image.levels) - 1
    shape = image.levels[level].shape
    free = [at for at, axis in enumerate(image.axes) if axis != "c"]
    n_each = max(1, math.ceil(SAMPLES ** (1 / len(free))))
    found = []
    for places in itertools.product(*(range(min(n_each, shape[at])) for at in free)):
        region = [slice(channel, channel + 1)] * len(shape)
        for at, place in zip(free, places, strict=True):
            side = SIDE if image.axes[at] in "yx" else 1
            start = int((place + 0.5) * shape[at] / min(n_each, shape[at])) - side // 2
            start = min(max(start, 0), max(0, shape[at] - side))
            region[at] = slice(start, min(start + side, shape[at]))
        values = image.read(level, tuple(region)).astype(np.float64)
        found.append(values[np.isfinite(values)])
    values = np.concatenate(found)
    if not values.size:
        return (0.0, 1.0)
    low, high = (float(value) for value in np.percentile(values, [LOW_PERCENTILE, HIGH_PERCENTILE]))
    return (low, high) if high > low else (low, low + 1.0)
