"""Opening whole slides: what OpenSlide reads (SVS, NDPI, MRXS, ...), as red, green and blue."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..axes import check_axes
from ..errors import ImageError
from .assembly import StoredLevel, assemble_image
from .damage import BAD_FILE
from .image import Image

__all__ = ["SlideSource", "is_slide", "open_slide"]

_log = logging.getLogger(__name__)

# A TIFF that calls itself .tif is read as one, also where OpenSlide would know it: its name says what reads a file.
_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide", ".czi"}
_AXES = "yxc"
_COLOURS = ("red", "green", "blue")
_TILE = 256
_WHITE = "FFFFFF"


@dataclass(frozen=True)
class SlideSource:
    """A whole slide."""

    path: str
    stamp: int
    axes: str = _AXES

    def open(self, level: int, path: str) -> Any:  # noqa: ARG002
        """The array of one level."""
        return _SlideLevel(_open_slide(self.path, self.stamp), level)

    def chunk_folder(self, path: str) -> None:
        """None: the tiles lie inside the file."""


def is_slide(path: Path) -> bool:
    """Whether a file is one for OpenSlide, by the end of its name."""
    return path.suffix.lower() in _SUFFIXES


def open_slide(path: Path, axes: str | None) -> Image:
    """Open a slide with its levels.

    Parameters
    ----------
    path : path
    axes : str, optional
        May only be those that a slide has.

    Returns
    -------
    image : Image
        Axes ``cyx``, uint8, channels red, green and blue. Alpha is left out: where nothing was scanned lies the
        background that the slide names, or white.

    Raises
    ------
    ImageError
        If OpenSlide is not installed or does not read the file.

    Notes
    -----
    Level 0 is what is stored. Levels whose size is no whole fraction of it are resampled by OpenSlide by parts of a
    pixel.
    """
    if axes is not None and check_axes(axes, len(_AXES), str(path)) != _AXES:
        raise ImageError(f"{path} is a slide, whose axes are {_AXES!r}, not {axes!r}; leave out axes.")
    stamp = path.stat().st_mtime_ns
    slide = _open_slide(str(path.absolute()), stamp)
    properties = slide.properties
    stored = []
    for level, (width, height) in enumerate(slide.level_dimensions):
        tile = [_whole(properties, f"openslide.level[{level}].tile-{side}") for side in ("height", "width")]
        stored.append(StoredLevel("", (height, width, len(_COLOURS)), (*tile, len(_COLOURS))))
    sizes = [_positive(properties, f"openslide.mpp-{axis}") for axis in "yx"]
    stored[0] = replace(stored[0], scale=(*sizes, 0.0))
    source = SlideSource(str(path.absolute()), stamp)
    image = assemble_image(str(path), source, np.dtype(np.uint8), stored, ("micrometer", "micrometer", None))
    _log.info("%s: alpha is left out; where nothing was scanned the slide is #%s.", path, _background(properties))
    return replace(image, channels=_COLOURS)


@lru_cache(maxsize=8)
def _open_slide(path: str, stamp: int) -> Any:  # noqa: ARG001
    """A slide, opened once per process; the stamp keys the cache only."""
    try:
        import openslide
    except ImportError as error:
        raise ImageError(
            f'{path} is a whole slide, which needs OpenSlide; install it: pip install -e ".[slides]".'
        ) from error
    try:
        return openslide.OpenSlide(path)
    except (openslide.OpenSlideError, *BAD_FILE) as error:
        said = str(error) or "it knows no such format"
        raise ImageError(
            f"{path} is no slide that OpenSlide reads ({said}); save it as OME-TIFF with Bio-Formats or its vendor's "
            "program."
        ) from error


class _SlideLevel:
    """One level as an array of shape (y, x, 3)."""

    def __init__(self, slide: Any, level: int) -> None:
        self._slide, self._level = slide, level
        self._background = np.frombuffer(bytes.fromhex(_background(slide.properties)), np.uint8)

    def __getitem__(self, selection: tuple[slice, ...]) -> npt.NDArray[np.uint8]:
        """Read a region given as one slice per axis."""
        import openslide

        y, x, c = selection
        size = (x.stop - x.start, y.stop - y.start)
        if 0 in size:
            return np.zeros((size[1], size[0], c.stop - c.start), np.uint8)
        # The position is one of level 0, whatever the level.
        step = self._slide.level_downsamples[self._level]
        corner = (round(x.start * step), round(y.start * step))
        try:
            pixels = np.asarray(self._slide.read_region(corner, self._level, size))
        except openslide.OpenSlideError as error:
            raise ValueError(str(error)) from error
        colours: npt.NDArray[np.uint8] = pixels[..., c].copy()
        is_bare = pixels[..., len(_COLOURS)] == 0
        if is_bare.any():
            colours[is_bare] = self._background[c]
        return colours


def _background(properties: Mapping[str, str]) -> str:
    """Colour of what was not scanned, six hexadecimal digits."""
    found = properties.get("openslide.background-color", _WHITE)
    return found if re.fullmatch(r"[0-9a-fA-F]{6}", found) else _WHITE


def _positive(properties: Mapping[str, str], key: str) -> float:
    """A size as a number, 0 if the slide gives none that can be used."""
    try:
        value = float(properties.get(key, "nan"))
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and value > 0 else 0.0


def _whole(properties: Mapping[str, str], key: str) -> int:
    """Pixels of a tile."""
    return max(1, round(_positive(properties, key))) if _positive(properties, key) < 2**16 else _TILE
