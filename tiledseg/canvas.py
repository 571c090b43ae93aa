"""Pictures for screens: channels in colours, a scale bar, and a file as small as it may be.

A `Picture` shows itself in Jupyter. What is drawn on it is outlines (`pictures`), in as many pixels as are shown.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import OutputError, SettingsError

__all__ = ["RGB", "Picture", "data_uri", "enlarged", "in_colours", "stretched", "with_scale_bar"]

Bytes = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

RGB: tuple[Colour, ...] = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
WHITE: Colour = (255, 255, 255)
MIXED: tuple[Colour, ...] = ((255, 0, 255), (0, 255, 0), (0, 130, 255), (255, 200, 0), (0, 255, 255), WHITE)
"""Of several channels; the first two are told apart with all kinds of colour vision."""

SMALL_FILE = 50_000
"""Bytes up to which a PNG is not too large: beyond, a JPEG is shown if it is smaller."""
QUALITY = 75
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}

BAR_SHARE = 0.25
"""Of the picture's width that a scale bar takes at most."""
UNITS = ((1000.0, "mm"), (1.0, "um"), (0.001, "nm"))
"""In micrometres; the font that Pillow brings along has no µ."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that shows itself in Jupyter.

    Attributes
    ----------
    pixels : array of uint8, shape (y, x, 3)
        Red, green and blue.
    caption : str
        What it shows.
    """

    pixels: Bytes
    caption: str

    def __repr__(self) -> str:
        height, width = self.pixels.shape[:2]
        return f"<Picture {width} x {height}: {self.caption}>"

    @functools.cached_property
    def png(self) -> bytes:
        """As a PNG: exact."""
        return self._encoded("PNG", optimize=True)

    @functools.cached_property
    def jpeg(self) -> bytes:
        """As a JPEG: a fraction of the size where there is noise, and colours at full sharpness."""
        return self._encoded("JPEG", quality=QUALITY, subsampling=0)

    @property
    def is_small_as_png(self) -> bool:
        """Whether it is shown as PNG; else as JPEG."""
        return len(self.png) <= max(SMALL_FILE, len(self.jpeg))

    def save(self, path: str | Path) -> None:
        """Write a file, PNG or JPEG by its name.

        Raises
        ------
        SettingsError
            If the name ends otherwise.
        OutputError
            If it cannot be written.
        """
        kind = SUFFIXES.get(Path(path).suffix.lower())
        if kind is None:
            raise SettingsError(f"{path} names no kind of picture; end it in .png or .jpg.")
        try:
            Path(path).write_bytes(self.png if kind == "PNG" else self.jpeg)
        except OSError as error:
            raise OutputError(
                f"cannot write picture {path}: {error.strerror or error}; give a file in a folder that exists "
                "and that you may write to."
            ) from error

    def _encoded(self, kind: str, **options: Any) -> bytes:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, format=kind, **options)
        return file.getvalue()

    def _repr_png_(self) -> bytes | None:
        return self.png if self.is_small_as_png else None

    def _repr_jpeg_(self) -> bytes | None:
        return None if self.is_small_as_png else self.jpeg


def data_uri(picture: Picture | bytes) -> str:
    """A picture, or a PNG, as an address that holds it: pages with it load nothing from elsewhere."""
    if isinstance(picture, bytes):
        kind, content = "png", picture
    else:
        kind = "png" if picture.is_small_as_png else "jpeg"
        content = picture.png if picture.is_small_as_png else picture.jpeg
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def stretched(plane: npt.NDArray[Any], contrast: tuple[float, float]) -> npt.NDArray[np.float32]:
    """Pixels with one percentile at 0 and another at 1.

    Parameters
    ----------
    plane : array, shape (y, x)
        What is not finite becomes 0.
    contrast : (float, float)
        Percentiles, the first below the second.

    Returns
    -------
    values : array of float32, shape (y, x)
        In [0, 1].
    """
    values = plane.astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, contrast) if finite.size else (0.0, 1.0)
    if high <= low:
        high = low + 1  # a constant image is shown black
    shown: npt.NDArray[np.float32] = np.clip((np.nan_to_num(values, nan=low) - low) / (high - low), 0, 1)
    return shown.astype(np.float32)


def in_colours(planes: Sequence[npt.NDArray[np.float32]], colours: Sequence[Colour] | None = None) -> Bytes:
    """Channels laid over each other, each in a colour.

    Parameters
    ----------
    planes : sequence of array of float32, shape (y, x)
        In [0, 1].
    colours : sequence of (int, int, int), optional
        Of each. Default: a single one is grey.

    Returns
    -------
    pixels : array of uint8, shape (y, x, 3)
    """
    if colours is None:
        colours = (WHITE,) if len(planes) == 1 else MIXED
    total = np.zeros((*planes[0].shape, 3), np.float32)
    for plane, colour in zip(planes, colours, strict=False):
        total += plane[:, :, None] * np.asarray(colour, np.float32)
    pixels: Bytes = np.rint(np.minimum(total, 255)).astype(np.uint8)
    return pixels


def enlarged(pixels: Any, times: int) -> Any:
    """A picture or labels with every pixel as a square of so many."""
    return pixels if times == 1 else np.ascontiguousarray(pixels.repeat(times, axis=0).repeat(times, axis=1))


def with_scale_bar(pixels: Bytes, pixel_um: float) -> Bytes:
    """A picture with a bar of a round length in its lower left corner.

    Parameters
    ----------
    pixels : array of uint8, shape (y, x, 3)
    pixel_um : float
        Width of a pixel of the picture in micrometres.

    Returns
    -------
    pixels : array of uint8, shape (y, x, 3)
        As it was where it is too small for a bar.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = pixels.shape[:2]
    if width < 120 or height < 60 or not math.isfinite(pixel_um) or pixel_um <= 0:
        return pixels
    length_um = _round_length(BAR_SHARE * width * pixel_um)
    unit, name = next((u for u in UNITS if length_um >= u[0] * 0.999), UNITS[-1])
    picture = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    text, left, base = f"{length_um / unit:g} {name}", 12, height - 14
    right = left + round(length_um / pixel_um)
    # On a dark ground of its own it is read on any picture.
    box = draw.textbbox((0, 0), text, font=font)
    draw.rectangle((left - 6, base - 14 - (box[3] - box[1]), max(right, left + box[2]) + 6, base + 8), fill=(0, 0, 0))
    draw.rectangle((left, base, right, base + 3), fill=WHITE)
    draw.text((left, base - 4), text, fill=WHITE, font=font, anchor="ls")
    return np.asarray(picture)


def _round_length(most: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is no longer."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (5, 2, 1) if step * power <= most * (1 + 1e-9))
