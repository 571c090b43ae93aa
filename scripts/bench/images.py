"""Images to measure on: synthetic slides of any size, written piece by piece, and the real mosaic."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tiledseg.errors import SettingsError
from tiledseg.slides import synthetic_slide, synthetic_slide_block

DIAMETER = 24
"""Of the nuclei of a synthetic slide, pixels."""
MOSAIC_DIAMETER = 27
"""Median of the mosaic's nuclei, pixels."""


@dataclass(frozen=True)
class Example:
    """An image in memory with its truth."""

    name: str
    image: npt.NDArray[np.uint16]
    truth: npt.NDArray[np.uint32]
    diameter: int


@dataclass(frozen=True)
class LazySlide:
    """A synthetic slide that is drawn where it is read; all `write_image` needs of an array."""

    shape: tuple[int, int]
    diameter: float = DIAMETER

    @property
    def dtype(self) -> np.dtype[np.uint16]:
        """Of a synthetic slide."""
        return np.dtype(np.uint16)

    def __getitem__(self, region: tuple[slice, slice]) -> npt.NDArray[np.uint16]:
        return synthetic_slide_block(self.shape, region, diameter=self.diameter)[0]


@dataclass(frozen=True)
class RepeatedSlide:
    """One synthetic slide laid side by side, so that any part of any size holds the same."""

    piece: npt.NDArray[np.uint16]
    shape: tuple[int, int]

    @property
    def dtype(self) -> np.dtype[np.uint16]:
        """Of the piece."""
        return self.piece.dtype

    def __getitem__(self, region: tuple[slice, slice]) -> npt.NDArray[np.uint16]:
        parts = [np.arange(part.start, part.stop) % n for part, n in zip(region, self.piece.shape, strict=True)]
        return self.piece[np.ix_(*parts)]


def synthetic(side: int) -> Example:
    """The demo's slide of touching nuclei."""
    image, truth = synthetic_slide((side, side), diameter=DIAMETER)
    return Example(f"synthetic {side}", image, truth, DIAMETER)


def mosaic(side: int | None = None) -> Example:
    """The real mosaic, whole or a square from its middle.

    Raises
    ------
    SettingsError
        If TILEDSEG_DATA does not say where it is.
    """
    import tifffile

    folder = Path(os.environ.get("TILEDSEG_DATA", "")) / "mosaic_fluo"
    if not (folder / "image.tif").is_file():
        raise SettingsError("mosaic_fluo is not there; set TILEDSEG_DATA to the folder of the data sets.")
    image, truth = (tifffile.imread(folder / name) for name in ("image.tif", "labels.tif"))
    if side is None:
        return Example("mosaic_fluo", image, truth, MOSAIC_DIAMETER)
    middle = tuple(slice((n - side) // 2, (n - side) // 2 + side) for n in image.shape)
    return Example(f"mosaic_fluo {side}", image[middle], truth[middle], MOSAIC_DIAMETER)


def mosaic_corners(side: int) -> list[Example]:
    """Squares from the four corners of the real mosaic.

    Raises
    ------
    SettingsError
        As `mosaic`.
    """
    whole = mosaic()
    found = []
    for name, y, x in (("top left", 0, 0), ("top right", 0, 1), ("bottom left", 1, 0), ("bottom right", 1, 1)):
        corner = tuple(
            slice(at * (n - side), at * (n - side) + side) for at, n in zip((y, x), whole.image.shape, strict=True)
        )
        found.append(Example(f"{whole.name} {name}", whole.image[corner], whole.truth[corner], whole.diameter))
    return found
