"""Images out: OME-Zarr 0.4 and 0.5 with a pyramid, made level by level; metadata come last.

References
----------
OME-Zarr 0.4 and 0.5, sections "multiscales" and "omero" metadata.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..axes import canonical_order, check_axes, spatial_axes
from ..disk import DRAFTS, sweep
from ..errors import OutputError, SettingsError
from ..remote import Location, location
from ..zarr_stores import new_store, zarr_store
from .groups import (
    FORMATS,
    check_writable,
    chunk_shape,
    count_levels,
    create_array,
    is_zarr,
    level_factors,
    level_shape,
    multiscales,
    open_group,
    update_ome,
    zarr_format,
)
from .shrink import METHODS, finer_region, shrink

__all__ = ["ImagePlan", "create_image", "finish_image", "image_level", "write_image"]

Window = tuple[float, float, float, float]
"""Least and largest value that can be, or is, and those that viewers show as black and white."""

_COLORS = ("0000FF", "00FF00", "FF0000", "FF00FF", "00FFFF", "FFFF00", "FFFFFF")
_GREY = "FFFFFF"
_NAMED = {"red": "FF0000", "green": "00FF00", "blue": "0000FF"}


@dataclass(frozen=True)
class ImagePlan:
    """Where an image goes, and how it is stored."""

    root: Location
    version: str
    """Of OME-Zarr, ``"0.4"`` or ``"0.5"``."""
    axes: str
    shape: tuple[int, ...]
    """Pixels of level 0 per axis."""
    dtype: str
    n_levels: int
    chunks: tuple[int, ...]
    """Pixels of a level-0 chunk per axis."""
    spacing: tuple[float | None, ...]
    """Size of a level-0 pixel per axis, in `units`; None if unknown."""
    translation: tuple[float, ...]
    units: tuple[str | None, ...]
    channels: tuple[str, ...]
    """Names; empty for an image that does not say how it is shown."""
    shards: tuple[int, ...] | None = None
    """Pixels of a file per axis, whole chunks; None for a file per chunk."""
    thickness: float | None = None
    """Of a plane in pixels of x, None if unknown."""
    method: str = "mean"
    """Of a level from the one before, see `shrink`."""

    def level_shape(self, level: int) -> tuple[int, ...]:
        """Pixels of a level per axis."""
        return level_shape(self.axes, self.shape, level, self.thickness)

    def level_chunks(self, level: int) -> tuple[int, ...]:
        """Pixels of a chunk of a level per axis."""
        return tuple(map(min, self.chunks, self.level_shape(level)))

    def level_files(self, level: int) -> tuple[int, ...]:
        """Pixels per axis of what is one file of a level: a shard, or a chunk."""
        chunks = self.level_chunks(level)
        if self.shards is None:
            return chunks
        shape = self.level_shape(level)
        return tuple(
            min(shard, -(-n // chunk) * chunk) for shard, n, chunk in zip(self.shards, shape, chunks, strict=True)
        )


def create_image(plan: ImagePlan) -> None:
    """Make the empty arrays of all levels, without the metadata that make an image of them.

    Parameters
    ----------
    plan : ImagePlan

    Notes
    -----
    Arrays that are there are kept: they are taken for those of the same plan, left by a run that was killed.
    """
    for level in range(plan.n_levels):
        path = plan.root / str(level)
        if not is_zarr(path):
            shape, chunks = plan.level_shape(level), plan.level_chunks(level)
            shards = None if plan.shards is None else plan.level_files(level)
            dtype = np.dtype(plan.dtype)
            create_array(path, plan.version, plan.axes, shape, chunks, dtype, keep_empty=True, shards=shards)


def image_level(plan: ImagePlan, level: int) -> Any:
    """Open one level for reading and writing.

    Parameters
    ----------
    plan : ImagePlan
    level : int
        0 is full size.

    Returns
    -------
    array : zarr.Array, shape ``plan.level_shape(level)``

    Raises
    ------
    OutputError
        If it is not there.
    """
    import zarr

    folder = plan.root / str(level)
    try:
        store = zarr_store(folder, home=plan.root, drafts=folder / DRAFTS)
        array = zarr.open_array(store, mode="r+", zarr_format=zarr_format(plan.version))
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(f"{folder} cannot be opened ({error}); start again with --overwrite.") from error
    return array.with_config({"write_empty_chunks": True})


def finish_image(plan: ImagePlan, windows: Sequence[Window] = ()) -> None:
    """Write the metadata that make an image of the arrays; the last step, and safe to repeat.

    Parameters
    ----------
    plan : ImagePlan
    windows : sequence of (float, float, float, float), optional
        Per channel, see `Window`. Default: all values of the dtype.
    """
    import zarr

    for folder in (plan.root / str(level) for level in range(plan.n_levels)):
        if isinstance(folder, Path):
            shutil.rmtree(folder / DRAFTS, ignore_errors=True)
            sweep(folder)
    sizes = [step or 1.0 for step in plan.spacing]
    factors = [level_factors(plan.axes, plan.shape, level, plan.thickness) for level in range(plan.n_levels)]
    scales = [[size * factor for size, factor in zip(sizes, of, strict=True)] for of in factors]
    shifts = [[size * shift for size, shift in zip(sizes, _centres(of, plan.method), strict=True)] for of in factors]
    shifts = [[a + b for a, b in zip(of, plan.translation, strict=True)] for of in shifts]
    entry = multiscales(plan.root.name.split(".")[0], plan.axes, plan.units, scales, shifts)
    entry["type"] = plan.method
    entry["metadata"] = {"description": METHODS[plan.method], "method": "tiledseg"}
    ome: dict[str, Any] = {"multiscales": [entry]}
    if plan.channels:
        ome["omero"] = _omero(plan.channels, windows or [_whole_range(plan.dtype)] * len(plan.channels))
    group = open_group(plan.root)
    if group is None:
        group = zarr.create_group(new_store(plan.root), zarr_format=zarr_format(plan.version))
    update_ome(group, plan.version, ome)


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
    place = location(path)
    n_channels = _check_image(place, array.shape, axes, spacing_um, channels, version)
    steps = dict(zip(spatial_axes(axes), spacing_um, strict=True)) if spacing_um else {}
    plan = ImagePlan(
        root=place,
        version=version,
        axes=axes,
        shape=tuple(array.shape),
        dtype=np.dtype(array.dtype).str,
        n_levels=n_levels or count_levels(axes, array.shape, chunk),
        chunks=chunk_shape(axes, array.shape, chunk),
        spacing=tuple(steps.get(axis) for axis in axes),
        translation=(0.0,) * len(axes),
        units=tuple("micrometer" if axis in steps else None for axis in axes),
        channels=tuple(channels or [str(i) for i in range(n_channels)]),
        thickness=steps["z"] / steps["x"] if "z" in steps else None,
    )
    create_image(plan)
    before: Any = array
    for level in range(plan.n_levels):
        after, shape = image_level(plan, level), plan.level_shape(level)
        for region in _regions(shape, plan.level_chunks(level)):
            wide = finer_region(region, shape, before.shape)
            after[region] = shrink(_pixels(before, wide), shape, before.shape)
        before = after
    finish_image(plan)


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


def _centres(factors: Sequence[int], method: str) -> list[float]:
    """Where pixel 0 of a level lies, in pixels of level 0: amid those it is the mean of, or on the one it is."""
    return [(factor - 1) / 2 if method == "mean" else 0.0 for factor in factors]


def _whole_range(dtype: str) -> Window:
    """All values of integers; of real numbers 0 to 1."""
    kind = np.dtype(dtype)
    low, top = (float(np.iinfo(kind).min), float(np.iinfo(kind).max)) if kind.kind in "ui" else (0.0, 1.0)
    return low, top, max(low, 0.0), top


def _omero(channels: Sequence[str], windows: Sequence[Window]) -> dict[str, Any]:
    """How viewers show the channels."""
    listed = []
    for i, (label, (low, top, start, end)) in enumerate(zip(channels, windows, strict=True)):
        color = _NAMED.get(label) or (_GREY if len(channels) == 1 else _COLORS[i % len(_COLORS)])
        window = {"min": low, "max": top, "start": start, "end": end}
        listed.append({"label": label, "color": color, "active": True, "window": window})
    return {"channels": listed}


def _regions(shape: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Every chunk of an array."""
    grid = [range(0, n, step) for n, step in zip(shape, chunks, strict=True)]
    for corner in product(*grid):
        yield tuple(slice(low, min(low + step, n)) for low, step, n in zip(corner, chunks, shape, strict=True))


def _pixels(array: Any, region: tuple[slice, ...]) -> npt.NDArray[Any]:
    """Pixels of a numpy, dask or zarr array."""
    found = array[region]
    return np.asarray(found.compute(scheduler="threads") if hasattr(found, "compute") else found)
