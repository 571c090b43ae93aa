"""Images with labels to learn from: a folder of files, or an OME-Zarr with labels."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import SurveyConfig
from ..errors import ImageError
from ..frames import label_shape
from ..grid import region_shape
from ..images import Image, open_image
from ..inputs import inputs_of
from ..normalisation import percentiles_of
from ..omezarr import open_labels
from ..pictures import read_png

__all__ = ["Pair", "is_held_out", "read_pairs"]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

IMAGE_SUFFIXES = (".tif", ".tiff", ".png")
LABEL_ENDING = "_masks"
LABEL_FOLDERS = ("labels", "masks")

WINDOW = 512
MAX_WINDOWS = 128
"""Of an OME-Zarr, in pixels of level 0: no more than these are held in memory, some 5 MB each."""


@dataclass(frozen=True)
class Pair:
    """An image, or a window of one, and its labels.

    Attributes
    ----------
    name : str
        Tells it from the others; decides whether it is held out.
    pixels : array of float32, shape (inputs, y, x)
        What the network is shown, as 0 and 1 for percentiles 1 and 99 of the whole image.
    labels : array of int32, shape (y, x)
        Labels 1..n, 0 background.
    diameter : float
        Median diameter of the objects in pixels.
    """

    name: str
    pixels: FloatArray
    labels: npt.NDArray[np.int32]
    diameter: float


def is_held_out(name: str) -> bool:
    """Whether the split's rule keeps an image for validation: one in five, by a hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0


def read_pairs(
    path: Path, survey: SurveyConfig, n_inputs: int, *, labels: str | None = None, axes: str | None = None
) -> Iterator[Pair]:
    """Images with labels; those without objects are left out.

    Parameters
    ----------
    path : Path
        A folder in which ``cell_masks.tif`` holds the labels of ``cell.tif``, or that has a folder ``images`` and a
        folder ``labels`` (or ``masks``) with files of the same names; TIFF or PNG. Or an OME-Zarr with labels: at most
        128 windows of 512 x 512 pixels are taken from it.
    survey : SurveyConfig
        Which channels.
    n_inputs : int
        How many inputs the network makes use of.
    labels : str, optional
        Name of the label image of an OME-Zarr, if it has several.
    axes : str, optional
        Axes of images that do not say them.

    Raises
    ------
    ImageError
        If there are no such images, or labels do not fit their image.
    """
    if (path / "zarr.json").exists() or (path / ".zattrs").exists():
        yield from _windows_of(path, survey, n_inputs, labels, axes)
        return
    files = list(_files_of(path))
    if not files:
        raise ImageError(
            f"{path} holds no images with labels; give a folder in which cell_masks.tif holds the labels of cell.tif, "
            "one with folders images and labels, or an OME-Zarr with labels."
        )
    for image_file, labels_file in files:
        image = _open(image_file, axes)
        inputs = inputs_of(image, survey, n_inputs, "the network")
        found = _labels_in(labels_file)
        shape = _picture_shape(image)
        if found.shape != shape:
            raise ImageError(f"labels {labels_file} have shape {found.shape}, their image {shape}; give those of it.")
        everything = tuple(slice(0, n) for n in label_shape(image))
        pixels = [single.read(image, 0, everything).astype(np.float32).reshape(shape) for single in inputs]
        pair = _pair(image_file.stem, pixels, found, [percentiles_of(plane) for plane in pixels])
        if pair is None:
            logger.info("%s holds no objects and is left out.", labels_file)
        else:
            yield pair


def _files_of(path: Path) -> Iterator[tuple[Path, Path]]:
    """Files of images and of their labels."""
    if not path.is_dir():
        raise ImageError(f"{path} is no folder; give one with images and labels, or an OME-Zarr with labels.")
    label_folder = next((path / name for name in LABEL_FOLDERS if (path / name).is_dir()), None)
    if (path / "images").is_dir() and label_folder is not None:
        known = {file.stem: file for file in sorted(label_folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES}
        images = path / "images"
    else:
        known = {
            file.stem.removesuffix(LABEL_ENDING): file
            for file in sorted(path.iterdir())
            if file.stem.endswith(LABEL_ENDING) and file.suffix.lower() in IMAGE_SUFFIXES
        }
        images = path
    for file in sorted(images.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES and file.stem in known and file != known[file.stem]:
            yield file, known[file.stem]


def _open(file: Path, axes: str | None) -> Image:
    """An image file as an image."""
    if file.suffix.lower() != ".png":
        return open_image(file, axes=axes)
    pixels = read_png(file)
    return open_image(pixels, axes="yxc" if pixels.ndim == 3 else "yx")


def _labels_in(file: Path) -> npt.NDArray[np.int32]:
    """The labels in a file, numbered 1..n."""
    found = read_png(file, is_indexed=True) if file.suffix.lower() == ".png" else np.asarray(open_labels(file)[:])
    if found.ndim > 2 and found.size == math.prod(found.shape[-2:]):
        found = found.reshape(found.shape[-2:])
    if found.ndim != 2 or found.dtype.kind not in "iu":
        raise ImageError(f"{file} holds no labels: it has shape {found.shape} and type {found.dtype}.")
    return _numbered(found)


def _numbered(labels: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Labels without gaps."""
    known, flat = np.unique(labels, return_inverse=True)
    numbers = np.cumsum(known > 0).astype(np.int32)
    return numbers[flat].reshape(labels.shape) * (labels > 0)


def _pair(
    name: str,
    pixels: list[FloatArray],
    labels: npt.NDArray[np.int32],
    ranges: list[tuple[float, float]],
    diameter: float | None = None,
) -> Pair | None:
    """A normalised pair; None if there is nothing to learn."""
    median = _median_diameter([labels])
    if not median:
        return None
    shown = [
        (np.nan_to_num(plane, nan=low) - np.float32(low)) / np.float32(max(high - low, 1e-3))
        for plane, (low, high) in zip(pixels, ranges, strict=True)
    ]
    return Pair(name, np.stack(shown), labels, diameter or median)


def _median_diameter(labels: list[npt.NDArray[np.int32]]) -> float:
    """Of all objects, in pixels; 0 if there are none."""
    areas = np.concatenate([np.bincount(each.ravel())[1:] for each in labels])
    return float(np.median(2 * np.sqrt(areas[areas > 0] / np.pi))) if (areas > 0).any() else 0.0


def _windows_of(
    path: Path, survey: SurveyConfig, n_inputs: int, labels: str | None, axes: str | None
) -> Iterator[Pair]:
    """Windows of one large image, chosen by a rule: those with objects, in the order of a hash of their place."""
    image = open_image(path, axes=axes)
    inputs = inputs_of(image, survey, n_inputs, "the network")
    known = open_labels(path if labels is None else path / "labels" / labels)
    shape = label_shape(image)
    n_more = len(known.shape) - len(shape)
    if tuple(known.shape[-2:]) != shape[-2:] or math.prod(known.shape) != math.prod(shape):
        raise ImageError(f"labels of {path} have shape {tuple(known.shape)}, the image {shape}; give those of it.")
    sides = [1] * (len(shape) - 2) + [WINDOW] * 2
    starts = itertools.product(*(range(0, n, side) for n, side in zip(shape, sides, strict=True)))
    windows = [
        tuple(slice(s, min(s + side, n)) for s, side, n in zip(start, sides, shape, strict=True)) for start in starts
    ]
    windows.sort(key=lambda window: hashlib.sha256(_place(window).encode()).digest())
    found: dict[str, tuple[list[FloatArray], npt.NDArray[np.int32]]] = {}
    for window in windows:
        inner = region_shape(window[-2:])
        here = _numbered(np.asarray(known[(0,) * n_more + window[max(0, -n_more) :]]).reshape(inner))
        if here.any():
            pixels = [single.read(image, 0, window).astype(np.float32).reshape(inner) for single in inputs]
            found[_place(window)] = pixels, here
        if len(found) == MAX_WINDOWS:
            break
    if not found:
        raise ImageError(f"labels of {path} are empty; give an image with labels to learn from.")
    ranges = [_range_of([pixels[i] for pixels, _ in found.values()]) for i in range(len(inputs))]
    diameter = _median_diameter([here for _, here in found.values()])
    for name, (pixels, here) in found.items():
        pair = _pair(name, pixels, here, ranges, diameter)
        if pair is not None:
            yield pair


def _picture_shape(image: Image) -> tuple[int, int]:
    """Pixels along y and x of what is a single picture."""
    *frames, height, width = label_shape(image)
    if math.prod(frames) != 1:
        raise ImageError(
            f"{image.name} holds {math.prod(frames)} pictures; give files of one each, or an OME-Zarr with labels."
        )
    return height, width


def _place(window: tuple[slice, ...]) -> str:
    """A window's name."""
    return "-".join(str(part.start) for part in window)


def _range_of(planes: list[FloatArray]) -> tuple[float, float]:
    """Percentiles 1 and 99 of every 16th pixel of some windows."""
    return percentiles_of(np.concatenate([plane[::4, ::4].ravel() for plane in planes]))
