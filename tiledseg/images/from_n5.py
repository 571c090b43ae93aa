"""Opening N5 by tensorstore: a dataset, or a pyramid of datasets ``s0``, ``s1``, ...

N5 counts dimensions from the fastest on, x first. Here they are in the order of arrays, x last, as z5py and zarr have
them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..axes import ALL_AXES, spatial_axes
from ..errors import ImageError
from .assembly import StoredLevel, assemble_image, check_array, given_axes, is_number
from .damage import BAD_FILE
from .image import Image, listed_names
from .units import MICROMETERS, unit_name

__all__ = ["N5Source", "is_n5", "open_n5"]

_ATTRIBUTES = "attributes.json"
_MOST_LOOKED_AT = 10_000
"""Folders in which images are sought."""


@dataclass(frozen=True)
class N5Source:
    """Datasets of N5 in a folder."""

    folder: str
    axes: str
    stamp: int

    def open(self, level: int, path: str) -> Any:  # noqa: ARG002
        """The array of one level."""
        return _open_dataset(str(Path(self.folder) / path), self.stamp)

    def chunk_folder(self, path: str) -> None:
        """None: blocks that are not stored are zeros in N5."""


def is_n5(path: Path) -> bool:
    """Whether a folder is one of N5: it has attributes, or its name ends so."""
    return (path / _ATTRIBUTES).is_file() or path.suffix.lower() == ".n5"


def open_n5(path: Path, axes: str | None) -> Image:
    """Open a dataset, a pyramid of datasets, or the only one of a container.

    Parameters
    ----------
    path : path
        Of the dataset or group.
    axes : str, optional
        Axes with x last, where the attributes do not name them.

    Returns
    -------
    image : Image
        With the pixel sizes of ``pixelResolution`` or ``resolution``, and levels by ``downsamplingFactors``.

    Raises
    ------
    ImageError
        If tensorstore is not installed, there is no dataset, there are several, or it cannot be read.
    """
    folder = path if _is_image(path) else _only_image(path)
    names = [""] if _is_dataset(folder) else _levels(folder)
    try:
        stamp = (folder / names[0] / _ATTRIBUTES).stat().st_mtime_ns
        arrays = [_open_dataset(str((folder / name).absolute()), stamp) for name in names]
        for array in arrays:
            check_array(array.shape, array.dtype, str(path))
        attributes = [_attributes(folder / name) for name in names]
        about = {**_attributes(folder), **attributes[0]}
        disk_axes = given_axes(axes or _named_axes(about, len(arrays[0].shape)), arrays[0].shape, str(path))
        if any(len(array.shape) != len(disk_axes) or array.dtype != arrays[0].dtype for array in arrays):
            raise ImageError(
                f"{folder} has levels that differ in dimensions or dtype; give one of them, as {folder}/s0."
            )
        sizes, units = _sizes(about, disk_axes)
        stored = []
        for name, array, own in zip(names, arrays, attributes, strict=True):
            scale = _factors(own, sizes, disk_axes) if name != names[0] else sizes
            stored.append(StoredLevel(name, array.shape, array.chunks, scale))
    except BAD_FILE as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{folder} is not readable as N5 ({error}); restore its attributes.") from error
    source = N5Source(str(folder.absolute()), disk_axes, stamp)
    return assemble_image(str(path), source, arrays[0].dtype, stored, units)


@lru_cache(maxsize=64)
def _open_dataset(path: str, stamp: int) -> Any:  # noqa: ARG001
    """A dataset, opened once per process; the stamp keys the cache only."""
    try:
        import tensorstore
    except ImportError as error:
        raise ImageError(f'{path} is N5, which needs tensorstore; install it: pip install -e ".[n5]".') from error
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": path}}
    return _N5Array(tensorstore.open(spec, read=True).result().T)


class _N5Array:
    """A tensorstore as an array that is read where it is sliced."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.shape = tuple(int(n) for n in store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)
        self.chunks = tuple(int(n) for n in store.chunk_layout.read_chunk.shape)

    def __getitem__(self, selection: tuple[slice | int, ...]) -> npt.NDArray[Any]:
        """Read a region."""
        return np.asarray(self._store[selection].read().result())


def _attributes(folder: Path) -> Mapping[str, Any]:
    """The attributes of a folder, empty if it has none."""
    path = folder / _ATTRIBUTES
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, OSError, RecursionError) as error:
        raise ImageError(f"{path} is not readable as JSON ({error}); restore it.") from error
    if not isinstance(content, dict):
        raise ImageError(f"{path} holds no JSON object; restore it.")
    return content


def _is_dataset(folder: Path) -> bool:
    return "dimensions" in _attributes(folder)


def _levels(folder: Path) -> list[str]:
    """Names of the datasets of a pyramid, empty if the folder is none."""
    names: list[str] = []
    while _is_dataset(folder / f"s{len(names)}"):
        names.append(f"s{len(names)}")
    return names


def _is_image(folder: Path) -> bool:
    return _is_dataset(folder) or bool(_levels(folder))


def _only_image(path: Path) -> Path:
    """The dataset or pyramid of a container that holds one."""
    found: list[Path] = []
    ahead, n_seen = deque([path]), 0
    while ahead and n_seen < _MOST_LOOKED_AT:
        folder, n_seen = ahead.popleft(), n_seen + 1
        if _is_image(folder):
            found.append(folder)
        else:
            ahead += sorted(child for child in folder.iterdir() if child.is_dir())
    if not found:
        raise ImageError(f"{path} is a folder of N5 without datasets; give the path of one.")
    if len(found) > 1:
        names = listed_names([str(image.relative_to(path)) for image in found])
        raise ImageError(f"{path} holds {len(found)} images ({names}); give one, as in {found[0]}.")
    return found[0]


def _named_axes(about: Mapping[str, Any], ndim: int) -> str | None:
    """Axes in the order of the array, None if the attributes name none."""
    names = about.get("axes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    letters = [name.lower() for name in reversed(names)]
    is_usable = len(letters) == ndim == len(set(letters)) and set(letters) <= set(ALL_AXES)
    return "".join(letters) if is_usable else None


def _sizes(about: Mapping[str, Any], axes: str) -> tuple[list[float], list[str | None]]:
    """Pixel sizes and units by axis, x first in the attributes."""
    own = about.get("pixelResolution")
    given, unit = (own.get("dimensions"), own.get("unit")) if isinstance(own, dict) else (own, None)
    given = about.get("resolution") if given is None else given
    units = about.get("units") if unit is None else [unit] * len(axes)
    sizes = _numbers(given, axes)
    names = list(reversed(units)) if isinstance(units, list) and len(units) == len(axes) else [None] * len(axes)
    known = [unit_name(name) for name in names]
    return sizes, [name if size > 0 and name in MICROMETERS else None for size, name in zip(sizes, known, strict=True)]


def _factors(own: Mapping[str, Any], sizes: list[float], axes: str) -> list[float] | None:
    """Pixel sizes of a level, None if it does not say how much coarser it is."""
    factors = _numbers(own.get("downsamplingFactors"), axes)
    is_known = all(factor > 0 for factor, axis in zip(factors, axes, strict=True) if axis in spatial_axes(axes))
    return [size * (factor or 1.0) for size, factor in zip(sizes, factors, strict=True)] if is_known else None


def _numbers(given: Any, axes: str) -> list[float]:
    """Positive numbers per axis, 0 where there is none; a list may be of the spatial axes alone."""
    values = list(reversed(given)) if isinstance(given, list) else []
    space = spatial_axes(axes)
    letters = axes if len(values) == len(axes) else space if len(values) == len(space) else ""
    known = dict(zip(letters, values, strict=False))
    found: list[Any] = [known.get(axis) for axis in axes]
    return [float(value) if is_number(value) and value > 0 else 0.0 for value in found]
