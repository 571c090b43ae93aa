"""Zarr groups and arrays as OME-Zarr 0.4 and 0.5 want them: what labels and images out share.

References
----------
OME-Zarr 0.4 and 0.5, section "multiscales" metadata.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError
from ..remote import Location, absent
from ..zarr_stores import new_store, zarr_store

__all__ = [
    "FORMATS",
    "check_writable",
    "chunk_shape",
    "count_levels",
    "create_array",
    "is_zarr",
    "level_factors",
    "level_shape",
    "multiscales",
    "ome_attributes",
    "open_group",
    "shard_shape",
    "update_ome",
    "zarr_format",
]

FORMATS = {"0.4": 2, "0.5": 3}
_CHUNK_VOLUME = {"z": 32, "y": 256, "x": 256}
_SHARD_PIXELS = 2**24
_KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def open_group(path: Location) -> Any:
    """Open an existing group for reading and writing.

    Parameters
    ----------
    path : Path or RemotePath

    Returns
    -------
    group : zarr.Group or None
        None if no Zarr is there.

    Raises
    ------
    OutputError
        If it is an array, or its metadata cannot be read.
    """
    import zarr

    if not is_zarr(path):
        return None
    try:
        return zarr.open_group(zarr_store(path), mode="r+", use_consolidated=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path} is no readable Zarr group ({error}); choose another place with -o.") from error


def is_zarr(path: Location) -> bool:
    """Whether there is a group or an array.

    Parameters
    ----------
    path : Path or RemotePath

    Returns
    -------
    is_zarr : bool
    """
    names = ["zarr.json", ".zgroup", ".zarray"]
    return len(absent(path, names)) < len(names)


def ome_attributes(group: Any) -> dict[str, Any]:
    """The attributes OME-Zarr is about.

    Parameters
    ----------
    group : zarr.Group

    Returns
    -------
    attributes : dict
        Those under ``"ome"`` in Zarr 3, all of them in Zarr 2.
    """
    attributes = dict(group.attrs)
    inner = attributes.get("ome") if group.metadata.zarr_format == 3 else attributes
    return inner if isinstance(inner, dict) else {}


def update_ome(group: Any, version: str, values: dict[str, Any]) -> None:
    """Add OME-Zarr attributes, leaving all others.

    Parameters
    ----------
    group : zarr.Group
    version : str
        Of OME-Zarr, a key of `FORMATS`.
    values : dict
        Ready for JSON, without the version.
    """
    if FORMATS[version] == 3:
        group.attrs.update({"ome": {**ome_attributes(group), "version": version, **values}})
        return
    if "multiscales" in values:
        values = {**values, "multiscales": [{**entry, "version": version} for entry in values["multiscales"]]}
    group.attrs.update(values)


def multiscales(
    name: str,
    axes: str,
    units: Sequence[str | None],
    scales: Sequence[Sequence[float]],
    translations: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """One entry of the multiscales list.

    Parameters
    ----------
    name : str
    axes : str
        Subset of ``"tczyx"`` in that order.
    units : sequence of str or None
        Per axis; the channel axis has none.
    scales : sequence of sequences of float
        Size of a pixel in `units`, per level and axis.
    translations : sequence of sequences of float
        Position of the centre of pixel 0 in `units`, per level and axis.

    Returns
    -------
    entry : dict
        Ready for JSON, for datasets called ``"0"``, ``"1"``, ...; without version, type and metadata.
    """
    listed = [
        {"name": axis, "type": _KINDS[axis], **({"unit": unit} if unit and axis != "c" else {})}
        for axis, unit in zip(axes, units, strict=True)
    ]
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [float(value) for value in scale]},
                {"type": "translation", "translation": [float(value) for value in shift]},
            ],
        }
        for level, (scale, shift) in enumerate(zip(scales, translations, strict=True))
    ]
    return {"name": name, "axes": listed, "datasets": datasets}


def check_writable(path: Location) -> None:
    """Refuse a path in which nothing can be written.

    Parameters
    ----------
    path : Path or RemotePath
        Of a group, which need not exist.

    Raises
    ------
    OutputError
        If a file is in the way, or the folder, or its ``labels``, is read only; or it is on a web server. Of S3
        only writing shows whether it is allowed.
    """
    if not isinstance(path, Path):
        if not path.is_writable:
            raise OutputError(f"{path} is on a web server, which is read only; give another place with -o.")
        return
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise OutputError(f"{existing} is a file, so {path} cannot be made; choose another place with -o.")
    inner = existing / "labels"
    for folder in (existing, inner) if existing == path and inner.exists() else (existing,):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{folder} cannot be written to; choose another place with -o.")


def create_array(
    path: Location,
    version: str,
    axes: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    keep_empty: bool,
    shards: tuple[int, ...] | None = None,
) -> Any:
    """Make an empty array, with checksums where the format has them.

    Parameters
    ----------
    path : Path or RemotePath
    version : str
        Of OME-Zarr, a key of `FORMATS`.
    axes : str
    shape, chunks : tuple of int
        Pixels per axis.
    dtype : dtype
    keep_empty : bool
        Whether chunks of nothing but zeros are stored.
    shards : tuple of int, optional
        Pixels per axis of what is one file, whole chunks; OME-Zarr 0.5 only. To be written by one task, whole.

    Returns
    -------
    array : zarr.Array
    """
    import zarr
    from zarr.codecs import ZstdCodec

    own: dict[str, Any] = {"compressors": ZstdCodec(level=1, checksum=True), "dimension_names": axes}
    if version == "0.4":
        # As a dict, because that is what zarr writes; other readers reject the key of numcodecs.Zstd.
        blosc = {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 0, "blocksize": 0}
        own = {"compressors": blosc, "chunk_key_encoding": {"name": "v2", "separator": "/"}}
    return zarr.create_array(
        new_store(path),
        shape=shape,
        chunks=chunks,
        shards=shards,
        dtype=dtype,
        fill_value=0,
        zarr_format=zarr_format(version),
        config={"write_empty_chunks": keep_empty},
        **own,
    )


def zarr_format(version: str) -> Any:
    """The format of Zarr below a version of OME-Zarr.

    Parameters
    ----------
    version : str
        A key of `FORMATS`.

    Returns
    -------
    zarr_format : int
        2 or 3; typed as Any because zarr wants a literal.
    """
    return FORMATS[version]


def level_factors(axes: str, shape: Sequence[int], level: int, thickness: float | None = None) -> tuple[int, ...]:
    """How many pixels of level 0 a pixel of a level covers along each axis.

    Parameters
    ----------
    axes : str
    shape : sequence of int
        Pixels of level 0 per axis.
    level : int
    thickness : float, optional
        Of a plane in pixels of x. Default 1.

    Returns
    -------
    factors : tuple of int
        Along y and x double for every level. Along z as well from the level on at which pixels are about as wide as
        planes are thick, as long as there are more planes than two chunks hold.
    """
    planes = shape[axes.index("z")] if "z" in axes else 1
    halvings = max(0, math.ceil(math.log2(planes / (2 * _CHUNK_VOLUME["z"]))))
    behind = max(0, round(math.log2(thickness or 1.0)))
    times = {"y": level, "x": level, "z": min(max(0, level - behind), halvings)}
    return tuple(2 ** times.get(axis, 0) for axis in axes)


def level_shape(axes: str, shape: Sequence[int], level: int, thickness: float | None = None) -> tuple[int, ...]:
    """Pixels of a level, rounded up.

    Parameters
    ----------
    axes : str
    shape : sequence of int
        Pixels of level 0 per axis.
    level : int
    thickness : float, optional
        As in `level_factors`.

    Returns
    -------
    shape : tuple of int
        Pixels per axis.
    """
    factors = level_factors(axes, shape, level, thickness)
    return tuple(-(-n // factor) for n, factor in zip(shape, factors, strict=True))


def _sides(axes: str, shape: Sequence[int], chunk: int) -> dict[str, int]:
    """Pixels of a chunk: squares of a side of `chunk` in pictures, of 32 planes and at most 256 in volumes."""
    is_volume = "z" in axes and shape[axes.index("z")] > 1
    sides = {"z": 1, "y": chunk, "x": chunk}
    return {axis: min(n, chunk) for axis, n in _CHUNK_VOLUME.items()} if is_volume else sides


def chunk_shape(axes: str, shape: Sequence[int], chunk: int) -> tuple[int, ...]:
    """Pixels of a chunk: a single frame of a series and channel.

    Parameters
    ----------
    axes : str
    shape : sequence of int
        Pixels of the array per axis.
    chunk : int
        Side in pictures, and the largest in volumes.

    Returns
    -------
    chunks : tuple of int
        Pixels per axis, at most `shape`.
    """
    wanted = _sides(axes, shape, chunk)
    return tuple(min(wanted.get(axis, 1), n) for axis, n in zip(axes, shape, strict=True))


def shard_shape(chunks: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Pixels of a shard: chunks put together along all axes in turn, while there are at most 2**24 pixels.

    Parameters
    ----------
    chunks, shape : sequence of int
        Pixels of a chunk and of the array per axis.

    Returns
    -------
    shards : tuple of int
        Pixels per axis, a power of two of chunks: 4096 x 4096 in pictures, 64 x 512 x 512 in volumes.
    """
    sides = list(chunks)
    while True:
        before = list(sides)
        for axis in reversed(range(len(sides))):
            if sides[axis] < shape[axis] and 2 * math.prod(sides) <= _SHARD_PIXELS:
                sides[axis] *= 2
        if sides == before:
            return tuple(sides)


def count_levels(axes: str, shape: Sequence[int], chunk: int) -> int:
    """Levels until y and x are both at most one chunk.

    Parameters
    ----------
    axes : str
    shape : sequence of int
        Pixels of level 0 per axis.
    chunk : int
        Side of a chunk in pictures, and the largest in volumes.

    Returns
    -------
    n_levels : int
        At least 1.
    """
    largest = max(n for axis, n in zip(axes, shape, strict=True) if axis in "yx")
    return 1 + max(0, math.ceil(math.log2(largest / _sides(axes, shape, chunk)["y"])))
