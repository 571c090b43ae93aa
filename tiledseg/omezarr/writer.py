"""Small images out: OME-Zarr 0.4 and 0.5 with a pyramid of means.

References
----------
OME-Zarr 0.4 and 0.5, sections "multiscales" and "omero" metadata.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from ..axes import canonical_order, check_axes, spatial_axes
from ..errors import OutputError, SettingsError
from ..remote import Location, location
from ..zarr_stores import new_store
from .groups import (
    FORMATS,
    check_writable,
    chunk_shape,
    count_levels,
    create_array,
    level_factors,
    level_shape,
    multiscales,
    update_ome,
    zarr_format,
)

__all__ = ["write_image"]

_COLORS = ("0000FF", "00FF00", "FF0000", "FF00FF", "00FFFF", "FFFF00", "FFFFFF")


def write_image(
    path: str | os.PathLike[str],
    array: Any,
    *,
    axes: str,
    spacing_um: Sequence[float] | None = None,
    channels: Sequence[str] | None = None,
    version: str = "0.5",
    n_levels: int | None = None,
    chunk: int = 1024,
) -> None:
    """Write a small OME-Zarr image with a pyramid of means, chunk by chunk.

    Parameters
    ----------
    path : path or address
        Must not exist, or be an empty folder; of a remote store, ``s3://`` only.
    array : numpy or dask array
        Pixels in the order of `axes`; the dtype is kept.
    axes : str
        Subset of ``"tczyx"`` in that order.
    spacing_um : sequence of float, optional
        Size of a pixel in micrometres per spatial axis.
    channels : sequence of str, optional
        One name per channel.
    version : str
        Of OME-Zarr.
    n_levels : int, optional
        None halves y and x until both are at most `chunk`.
    chunk : int
        Pixels of a chunk along y and x.

    Raises
    ------
    OutputError
        If something is there already.
    SettingsError
        If axes, spacing, channels or version do not fit.
    """
    import zarr

    place = location(path)
    space = spatial_axes(axes)
    n_channels = _check_image(place, array.shape, axes, spacing_um, channels, version)
    steps = dict(zip(space, spacing_um, strict=True)) if spacing_um else {}
    count = n_levels or count_levels(axes, array.shape, chunk)
    factors = [level_factors(axes, array.shape, level) for level in range(count)]
    sizes = [steps.get(axis, 1.0) for axis in axes]
    scales = [[size * factor for size, factor in zip(sizes, of, strict=True)] for of in factors]
    shifts = [[size * (factor - 1) / 2 for size, factor in zip(sizes, of, strict=True)] for of in factors]
    group = zarr.create_group(new_store(place), zarr_format=zarr_format(version))
    _write_levels(place, array, version, axes, count, chunk)
    units = ["micrometer" if axis in steps else None for axis in axes]
    entry = multiscales(place.name.split(".")[0], axes, units, scales, shifts)
    entry["type"] = "mean"
    entry["metadata"] = {
        "description": "mean of 2 pixels of the level before along each axis that is halved",
        "method": "tiledseg",
    }
    ome: dict[str, Any] = {"multiscales": [entry]}
    if n_channels:
        ome["omero"] = _omero(channels or [str(i) for i in range(n_channels)], np.dtype(array.dtype))
    update_ome(group, version, ome)


def _write_levels(path: Location, array: Any, version: str, axes: str, n_levels: int, chunk: int) -> None:
    """Write every level from the one before, chunk by chunk."""
    before: Any = array
    for level in range(n_levels):
        shape = level_shape(axes, array.shape, level)
        chunks = chunk_shape(axes, shape, chunk)
        after = create_array(path / str(level), version, axes, shape, chunks, array.dtype, keep_empty=True)
        for region in _regions(shape, chunks):
            after[region] = _pixels(before, region) if level == 0 else _mean(before, shape, region)
        before = after


def _check_image(
    path: Location,
    shape: Sequence[int],
    axes: str,
    spacing_um: Sequence[float] | None,
    channels: Sequence[str] | None,
    version: str,
) -> int:
    """Refuse what cannot be written; returns the length of the channel axis, 0 if there is none."""
    check_axes(axes, len(shape), str(path))
    n_channels = int(shape[axes.index("c")]) if "c" in axes else 0
    n_spatial = len(spatial_axes(axes))
    if version not in FORMATS or axes != canonical_order(axes):
        raise SettingsError(f"axes {axes!r} in OME-Zarr {version!r} cannot be written; use 'tczyx' in 0.4 or 0.5.")
    if (channels and len(channels) != n_channels) or (spacing_um and len(spacing_um) != n_spatial):
        raise SettingsError(f"{path} has axes {axes!r}; give {n_channels} channels and {n_spatial} spacings.")
    check_writable(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} exists already; choose another path.")
    return n_channels


def _omero(channels: Sequence[str], dtype: np.dtype[Any]) -> dict[str, Any]:
    """How viewers show the channels."""
    top = float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1.0
    window = {"min": 0.0, "max": top, "start": 0.0, "end": top}
    return {
        "channels": [
            {"label": label, "color": _COLORS[i % len(_COLORS)], "active": True, "window": dict(window)}
            for i, label in enumerate(channels)
        ]
    }


def _regions(shape: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Every chunk of an array."""
    grid = [range(0, n, step) for n, step in zip(shape, chunks, strict=True)]
    for corner in product(*grid):
        yield tuple(slice(low, min(low + step, n)) for low, step, n in zip(corner, chunks, shape, strict=True))


def _pixels(array: Any, region: tuple[slice, ...]) -> npt.NDArray[Any]:
    """Pixels of a numpy, dask or zarr array."""
    found = array[region]
    return np.asarray(found.compute(scheduler="threads") if hasattr(found, "compute") else found)


def _mean(finer: Any, shape: Sequence[int], region: tuple[slice, ...]) -> npt.NDArray[Any]:
    """Means of 2 pixels along each axis that is halved to get to a shape; an odd last one counts twice."""
    steps = [-(-a // b) for a, b in zip(finer.shape, shape, strict=True)]
    wide = tuple(
        slice(part.start * step, min(part.stop * step, n))
        for part, step, n in zip(region, steps, finer.shape, strict=True)
    )
    pixels = _pixels(finer, wide)
    pixels = np.pad(pixels, [(0, -n % step) for n, step in zip(pixels.shape, steps, strict=True)], mode="edge")
    boxes = [size for n, step in zip(pixels.shape, steps, strict=True) for size in (n // step, step)]
    means = pixels.reshape(boxes).mean(axis=tuple(range(1, len(boxes), 2)), dtype=np.float64)
    rounded = np.rint(means) if pixels.dtype.kind in "ui" else means
    return np.asarray(rounded, dtype=pixels.dtype)
