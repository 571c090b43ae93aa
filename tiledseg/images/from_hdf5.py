"""Opening HDF5: one dataset of a file, named by a path inside it where there are several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..axes import ALL_AXES
from ..errors import ImageError
from .assembly import StoredLevel, assemble_image, check_array, given_axes, is_number
from .damage import BAD_FILE
from .image import Image, listed_names
from .units import MICROMETERS, unit_name

__all__ = ["Hdf5Source", "open_hdf5", "split_hdf5"]

_SUFFIXES = {".h5", ".hdf5", ".hdf", ".he5"}
_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Hdf5Source:
    """A dataset of an HDF5 file."""

    path: str
    dataset: str
    axes: str
    stamp: int

    def open(self, level: int, path: str) -> Any:  # noqa: ARG002
        """The dataset."""
        return _open_dataset(self.path, self.dataset, self.stamp)

    def chunk_folder(self, path: str) -> None:
        """None: the chunks lie inside the file."""


def split_hdf5(path: Path) -> tuple[Path, str] | None:
    """The file and the path inside it, None if this is no HDF5.

    Parameters
    ----------
    path : path
        A file, or one with the path of a dataset behind it: ``images.h5/raw``.

    Returns
    -------
    file : path
    inner : str
        Empty if nothing is behind the file.
    """
    if path.is_file():
        with path.open("rb") as file:
            is_hdf5 = file.read(len(_SIGNATURE)) == _SIGNATURE
        return (path, "") if is_hdf5 or path.suffix.lower() in _SUFFIXES else None
    for parent in path.parents:
        if parent.suffix.lower() in _SUFFIXES and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def open_hdf5(path: Path, inner: str, axes: str | None) -> Image:
    """Open a dataset.

    Parameters
    ----------
    path : path
        The file.
    inner : str
        Path of the dataset in it; empty takes the only one.
    axes : str, optional
        Axes of the dataset, in its order. By default those that its dimension labels or ilastik's ``axistags`` name.

    Returns
    -------
    image : Image
        With the pixel size of an attribute ``element_size_um``.

    Raises
    ------
    ImageError
        If h5py is not installed, there is no such dataset, there are several to choose from, or it refers to other
        files.
    """
    where = f"{path}/{inner}" if inner else str(path)
    stamp = path.stat().st_mtime_ns
    try:
        name = inner or _only_dataset(path, stamp)
        dataset = _open_dataset(str(path.absolute()), name, stamp)
        dtype = np.dtype(dataset.dtype)
        check_array(dataset.shape, dtype, where)
        letters = _named_axes(dataset)
        axes = given_axes(axes or letters, dataset.shape, where)
        scale, units = _sizes(dataset, axes)
        chunks = dataset.chunks or _rows(dataset.shape)
    except BAD_FILE as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{where} is not readable as HDF5 ({error}); restore the file.") from error
    source = Hdf5Source(str(path.absolute()), name, axes, stamp)
    return assemble_image(where, source, dtype, [StoredLevel("", dataset.shape, chunks, scale)], units)


@lru_cache(maxsize=16)
def _open_file(path: str, stamp: int) -> Any:  # noqa: ARG001
    """A file, opened once per process; the stamp keys the cache only."""
    return _h5py(path).File(path, "r", locking="best-effort")


def _h5py(path: str) -> Any:
    """The library, where it is installed."""
    try:
        import h5py
    except ImportError as error:
        raise ImageError(f'{path} is HDF5, which needs h5py; install it: pip install -e ".[hdf5]".') from error
    return h5py


def _open_dataset(path: str, name: str, stamp: int) -> Any:
    """A dataset all of whose pixels lie in its file."""
    h5py = _h5py(path)
    node, walked = _open_file(path, stamp), ""
    for part in name.strip("/").split("/"):
        walked = f"{walked}/{part}"
        is_group = isinstance(node, h5py.Group)
        link = node.get(part, getlink=True) if is_group and part in node.keys() else None  # noqa: SIM118
        if link is None:
            raise ImageError(
                f"{path} holds no {walked}; it holds {listed_names(_datasets(path, stamp)) or 'no image'}."
            )
        if not isinstance(link, h5py.HardLink):
            raise ImageError(f"{walked} of {path} is a link; give the path of the dataset itself, in its own file.")
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        known = [found for found in _datasets(path, stamp) if found.startswith(f"{walked}/")]
        raise ImageError(f"{walked} of {path} is a group; give one of its datasets ({listed_names(known) or 'none'}).")
    if node.external or (node.is_virtual and any(part.file_name != "." for part in node.virtual_sources())):
        raise ImageError(f"{walked} of {path} takes its pixels from other files; give those.")
    return node


def _datasets(path: str, stamp: int) -> list[str]:
    """Paths of all arrays that may be images."""
    h5py = _h5py(path)
    found: list[str] = []

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and len(node.shape or ()) >= 2 and node.dtype.kind in "buif":
            found.append(f"/{name}")

    _open_file(path, stamp).visititems(visit)
    return found


def _only_dataset(path: Path, stamp: int) -> str:
    """The dataset of a file that holds one."""
    found = _datasets(str(path.absolute()), stamp)
    if not found:
        raise ImageError(f"{path} holds no array of two dimensions or more; give another file.")
    if len(found) > 1:
        raise ImageError(f"{path} holds {len(found)} images ({listed_names(found)}); give one, as in {path}{found[0]}.")
    return found[0]


def _named_axes(dataset: Any) -> str | None:
    """Axes in the order on disk, None if they are not named."""
    names = [dimension.label.lower() for dimension in dataset.dims]
    if not all(names):
        try:
            tags = json.loads(dataset.attrs["axistags"])["axes"]
            names = [str(tag["key"]).lower() for tag in tags]
        except (KeyError, ValueError, TypeError):
            return None
    is_usable = len(names) == dataset.ndim == len(set(names)) and set(names) <= set(ALL_AXES)
    return "".join(names) if is_usable else None


def _sizes(dataset: Any, axes: str) -> tuple[list[float], list[str | None]]:
    """Pixel sizes and units by axis of what Fiji, ilastik and PlantSeg write: ``element_size_um``, z first."""
    given = np.ravel(dataset.attrs.get("element_size_um", ()))
    sizes = (
        [float(size) if is_number(float(size)) and size > 0 else 0.0 for size in given]
        if given.dtype.kind in "iuf"
        else []
    )
    known = dict(zip("xyz", reversed(sizes), strict=False))
    unit = unit_name("um")
    return [known.get(axis, 0.0) for axis in axes], [
        unit if axis in known and unit in MICROMETERS else None for axis in axes
    ]


def _rows(shape: Sequence[int]) -> tuple[int, ...]:
    """What is read at once of a dataset in one piece: nothing more than is asked for."""
    return (*(1,) * (len(shape) - 2), *(min(n, 1024) for n in shape[-2:]))
