"""Opening inputs: OME-Zarr, Zarr, N5, TIFF, slides, HDF5 and arrays in memory behind one :class:`Image`.

An image is opened from its metadata alone. Pixels are read region by region, in the canonical order
of axes, from any process: only a path travels. Metadata is written by others and is not trusted.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError
from ..remote import location
from .assembly import StoredLevel, UnnamedAxesError, assemble_image, check_array, given_axes
from .image import Image, Level, MemorySource, Source
from .recent import RECENT_BYTES
from .view import at_level, at_region, parse_region

__all__ = [
    "RECENT_BYTES",
    "Image",
    "Level",
    "MemorySource",
    "Source",
    "UnnamedAxesError",
    "at_level",
    "at_region",
    "channel_index",
    "open_image",
    "parse_region",
]


def open_image(source: Any, *, axes: str | None = None, allow_bool: bool = False) -> Image:
    """Open an image without reading its pixels.

    Parameters
    ----------
    source : str, path, Image, zarr.Array, dask array or numpy array
        An OME-Zarr 0.4 or 0.5 image, a Zarr array, a path inside a Zarr container, the address of a Zarr
        (``s3://BUCKET/KEY``, ``http(s)://HOST/PATH``), a TIFF or OME-TIFF, many TIFFs as a pattern
        (``planes/img_{z}.tif``, see `from_folder`), a whole slide, a dataset of HDF5 (``images.h5/raw``) or N5, or an
        array. A dask array is computed region by region, in threads of this process. An image that is open already is
        given back.
    axes : str, optional
        Axes of the stored array, in its order, where the file does not say.
    allow_bool : bool
        Whether the pixels may be bool, as those of masks.

    Returns
    -------
    image : Image

    Raises
    ------
    ImageError
        If there is nothing there, or it is not an image that can be read.
    RemoteError
        If a remote store cannot be reached, or refuses.
    """
    image = _opened(source, axes)
    if image.dtype.kind == "b" and not allow_bool:
        where = image.name if image.is_shippable else f"the {image.name}"
        raise ImageError(f"{where} has dtype bool; only integers and real numbers can be segmented.")
    return image


def _opened(source: Any, axes: str | None) -> Image:
    """An image by whatever reader its source needs."""
    import zarr

    from .from_zarr import open_zarr

    if isinstance(source, Image):
        if axes is not None:
            raise ImageError(f"{source.name} is open already, with axes {source.axes!r}; leave the axes out.")
        return source
    if isinstance(source, zarr.Array):
        if isinstance(source.store, zarr.storage.LocalStore):
            return open_zarr(Path(source.store.root) / source.path, axes)
        return _from_memory(source, "zarr array", axes)
    if isinstance(source, np.ndarray):
        return _from_memory(source, "numpy array", axes)
    if hasattr(source, "__dask_graph__") and hasattr(source, "chunksize"):
        return _from_memory(source, "dask array", axes)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"a {type(source).__name__} is no image; give a path or an array.")
    path = location(source)
    if not isinstance(path, Path):
        return open_zarr(path, axes)
    return _opened_path(path, axes)


def _opened_path(path: Path, axes: str | None) -> Image:
    """An image on a disk."""
    from .from_folder import has_letters, open_folder
    from .from_hdf5 import open_hdf5, split_hdf5
    from .from_n5 import is_n5, open_n5
    from .from_slide import is_slide, open_slide
    from .from_tiff import open_tiff
    from .from_zarr import open_zarr

    if (in_hdf5 := split_hdf5(path)) is not None:
        return open_hdf5(*in_hdf5, axes)
    if path.is_file():
        return open_slide(path, axes) if is_slide(path) else open_tiff(path, axes)
    if not path.exists():
        if has_letters(path):
            return open_folder(path, axes)
        raise ImageError(f"{path} does not exist; check the path.")
    if any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup")):
        return open_zarr(path, axes)
    if is_n5(path):
        return open_n5(path, axes)
    if any(child.suffix.lower() in (".tif", ".tiff") for child in path.iterdir()):
        raise ImageError(
            f"{path} is a folder of TIFFs; say what the numbers in their names mean, e.g. {path}/img_{{z}}.tif for "
            "planes, t and c likewise, y and x for tiles."
        )
    return open_zarr(path, axes)


def channel_index(image: Image, channel: str | int | None) -> int:
    """Find a channel.

    Parameters
    ----------
    image : Image
    channel : str, int or None
        Name or index; text that is no name but a number is an index. None is the first.

    Returns
    -------
    index : int

    Raises
    ------
    ImageError
        If there is none, or several of that name.
    """
    known = ", ".join(f"{i} {name!r}" if name != str(i) else name for i, name in enumerate(image.channels))
    if channel is None:
        return 0
    named = [i for i, name in enumerate(image.channels) if name == channel]
    if len(named) > 1:
        raise ImageError(f"{image.name} has several channels {channel!r}; give an index ({known}).")
    if named:
        return named[0]
    number = str(channel)
    if number.isascii() and number.isdigit() and int(number) < image.n_channels:
        return int(number)
    raise ImageError(f"{image.name} has no channel {channel!r}; it has {known}.")


def _from_memory(array: Any, name: str, axes: str | None) -> Image:
    """An array the caller holds."""
    shape = tuple(array.shape)
    if any(math.isnan(size) for size in shape):
        raise ImageError(f"the {name} has an unknown shape {shape}; call compute_chunk_sizes() on it.")
    check_array(shape, array.dtype, f"the {name}")
    axes = given_axes(axes, shape, f"the {name}")
    chunks = getattr(array, "chunksize", None) or getattr(array, "chunks", None) or shape
    return assemble_image(name, MemorySource(array, axes), array.dtype, [StoredLevel("", shape, chunks)])
