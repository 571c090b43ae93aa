"""Opening inputs: OME-Zarr, Zarr, TIFF and arrays in memory behind one :class:`Image`.

An image is opened from its metadata alone. Pixels are read region by region, in the canonical order
of axes, from any process: only a path travels. Metadata is written by others and is not trusted.
"""

from __future__ import annotations

import json
import logging
import lzma
import math
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from .axes import ALL_AXES, canonical_order, check_axes, spatial_axes
from .errors import ImageError

__all__ = ["Image", "Level", "channel_index", "open_image"]

_log = logging.getLogger(__name__)

# What json, zarr, numcodecs, tifffile and imagecodecs were seen to raise on damaged files.
# fmt: off
_BAD_FILE = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, NotImplementedError,
    OSError, EOFError, RuntimeError, MemoryError, struct.error, zlib.error, lzma.LZMAError,
)
_UNIT_NAMES = {
    "pm": "picometer", "Å": "angstrom", "\u212b": "angstrom", "nm": "nanometer", "nanometre": "nanometer",
    "um": "micrometer", "µm": "micrometer", "μm": "micrometer", "\\u00B5m": "micrometer",
    "micron": "micrometer", "microns": "micrometer", "micrometre": "micrometer",
    "mm": "millimeter", "millimetre": "millimeter", "cm": "centimeter", "m": "meter",
}
_MICROMETERS = {
    "picometer": 1e-6, "angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0,
    "millimeter": 1e3, "centimeter": 1e4, "decimeter": 1e5, "meter": 1e6,
}
# fmt: on
_DROPPED = "-"  # stands in the disk order for an axis of length 1 that an image does not have
_SHOWN = 5


@dataclass(frozen=True)
class Level:
    """One resolution of an image."""

    path: str
    """Component inside the container, e.g. ``"0"``; ``""`` for a bare array."""
    shape: tuple[int, ...]
    """Pixels per axis of `Image.axes`."""
    chunks: tuple[int, ...]
    """Pixels read at once per axis of `Image.axes`; inside a shard, its inner chunk."""
    scale: tuple[float, ...]
    """Level-0 pixels per pixel of this level, per spatial axis."""
    offset: tuple[float, ...]
    """Level-0 coordinate of the centre of pixel 0 of this level, per spatial axis."""


class Source(Protocol):
    """Where pixels come from: opens lazily, and in another process anew."""

    @property
    def axes(self) -> str:
        """Axes in the order on disk; ``-`` for an axis to be dropped."""

    def open(self, level: int, path: str) -> Any:
        """An array that can be sliced."""


@dataclass(frozen=True)
class Image:
    """An opened image; pixels are read by :meth:`read` only."""

    name: str
    """What the user gave, for messages."""
    axes: str
    """Subset of ``"tczyx"`` in that order."""
    dtype: np.dtype[Any]
    levels: tuple[Level, ...]
    """Finest first, never empty."""
    spacing: tuple[float | None, ...]
    """Size of a level-0 pixel per axis, in `units`; None if unknown."""
    translation: tuple[float, ...]
    """Position of the centre of level-0 pixel 0 per axis, in `units`."""
    units: tuple[str | None, ...]
    """Unit per axis, e.g. ``"micrometer"``."""
    channels: tuple[str, ...]
    """Names, or ``"0"``, ``"1"``, ...; one if there is no channel axis."""
    source: Source
    writable_group: Path | None = None
    """Local OME-Zarr image that labels can be written into."""
    zarr_format: int | None = None
    ome_version: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels of level 0 per axis."""
        return self.levels[0].shape

    @property
    def spatial_axes(self) -> str:
        """``"yx"`` or ``"zyx"``."""
        return spatial_axes(self.axes)

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Pixels of level 0 per spatial axis."""
        return tuple(self.shape[self.axes.index(letter)] for letter in self.spatial_axes)

    @property
    def n_channels(self) -> int:
        """Length of the channel axis, 1 if there is none."""
        return len(self.channels)

    @property
    def is_shippable(self) -> bool:
        """Whether another process can open it; an array in memory cannot be."""
        return not isinstance(self.source, MemorySource)

    def spacing_um(self) -> tuple[float, ...] | None:
        """Size of a level-0 pixel in micrometres per spatial axis, None unless all are known."""
        found = []
        for letter in self.spatial_axes:
            at = self.axes.index(letter)
            spacing, unit = self.spacing[at], self.units[at]
            if spacing is None or unit not in _MICROMETERS:
                return None
            found.append(spacing * _MICROMETERS[unit])
        return tuple(found)

    def read(self, level: int, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read pixels.

        Parameters
        ----------
        level : int
            Index into `levels`.
        region : tuple of slice
            One per axis of `axes`, step 1, inside the level.

        Returns
        -------
        pixels : array of `dtype`, shape of `region`
            In the order of `axes`, contiguous, native byte order. NaN is left as it is.

        Raises
        ------
        ImageError
            If the region is outside the image, or a chunk it touches is corrupt.
        """
        bounds = self._bounds(level, region)
        array = self._array(level)
        torn = _torn_chunks(array, self._folder(level), self._on_disk(bounds))
        if torn:
            self._raise_corrupt(level, bounds, torn, "the stored file is cut short", None)
        try:
            pixels = array[self._on_disk(bounds)]
            if hasattr(pixels, "__dask_graph__"):
                pixels = pixels.compute(scheduler="threads")
        except _BAD_FILE as error:
            if not hasattr(array, "metadata"):
                raise
            failing = _failing_chunks(array, self._on_disk(bounds))
            if not failing and isinstance(error, MemoryError):
                raise
            self._raise_corrupt(level, bounds, failing, str(error) or type(error).__name__, error)
        kept = self.source.axes.replace(_DROPPED, "")
        pixels = np.asarray(pixels).transpose([kept.index(letter) for letter in self.axes])
        return np.ascontiguousarray(pixels, dtype=self.dtype)

    def missing_chunks(self, level: int, region: tuple[slice, ...]) -> list[str]:
        """Chunks that a region touches and that are not stored, so that it reads as fill value there.

        Parameters
        ----------
        level : int
            Index into `levels`.
        region : tuple of slice
            One per axis of `axes`, step 1, inside the level.

        Returns
        -------
        keys : list of str
            Storage keys such as ``"0/c/1/2"`` (of shards, if there are any) of a Zarr on a local disk;
            empty for other sources.
        """
        bounds = self._bounds(level, region)
        folder = self._folder(level)
        if folder is None:
            return []
        keys = _stored_keys(self._array(level), self._on_disk(bounds))
        return [_join(self.levels[level].path, key) for key in keys if not (folder / key).is_file()]

    def describe(self) -> dict[str, Any]:
        """What is known about the image, ready for JSON."""
        return {
            "name": self.name,
            "axes": self.axes,
            "dtype": str(self.dtype),
            "shape": list(self.shape),
            "spacing": list(self.spacing),
            "units": list(self.units),
            "translation": list(self.translation),
            "spacing_um": self.spacing_um(),
            "channels": list(self.channels),
            "zarr_format": self.zarr_format,
            "ome_version": self.ome_version,
            "levels": [{key: _plain(value) for key, value in vars(level).items()} for level in self.levels],
        }

    def _array(self, level: int) -> Any:
        """The array of one level, in the order on disk."""
        try:
            return self.source.open(level, self.levels[level].path)
        except _BAD_FILE as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"{self._where(level)} can no longer be opened: {error}.") from error

    def _folder(self, level: int) -> Path | None:
        """Folder of a level's chunks, None for what is no local Zarr."""
        if not isinstance(self.source, ZarrSource):
            return None
        return Path(self.source.folder) / self.levels[level].path

    def _where(self, level: int) -> str:
        """Name of one level's array, for messages."""
        return _join(self.name, self.levels[level].path) if self._folder(level) else self.name

    def _bounds(self, level: int, region: tuple[slice, ...]) -> list[tuple[int, int]]:
        """First and one-past-last index per axis of `axes`."""
        if not 0 <= level < len(self.levels):
            raise ImageError(f"{self.name} has levels 0 to {len(self.levels) - 1} and no level {level}.")
        shape = self.levels[level].shape
        if len(region) != len(shape):
            raise ImageError(f"{self.name} has axes {self.axes!r} but the region has {len(region)} slices.")
        bounds = []
        for letter, size, part in zip(self.axes, shape, region, strict=True):
            start = 0 if part.start is None else int(part.start)
            stop = size if part.stop is None else int(part.stop)
            if part.step not in (None, 1) or not 0 <= start <= stop <= size:
                raise ImageError(f"{self._where(level)} has no {letter} {start}:{stop} (length {size}).")
            bounds.append((start, stop))
        return bounds

    def _on_disk(self, bounds: Sequence[tuple[int, int]]) -> tuple[slice | int, ...]:
        """The selection in the order on disk."""
        return tuple(
            0 if letter == _DROPPED else slice(*bounds[self.axes.index(letter)])
            for letter in self.source.axes
        )

    def _raise_corrupt(
        self, level: int, bounds: Any, keys: list[str], why: str, cause: Exception | None
    ) -> NoReturn:
        """Raise an error that names the chunks and the region."""
        region = ", ".join(f"{a} {start}:{stop}" for a, (start, stop) in zip(self.axes, bounds, strict=True))
        what = f"chunk {_listed(keys)} of {self._where(level)}" if keys else self._where(level)
        why = why.rstrip(".")
        advice = "restore the file or write the image again"
        raise ImageError(f"{what} cannot be read ({why}) for region {region}; {advice}.") from cause


@dataclass(frozen=True)
class ZarrSource:
    """Zarr arrays in a local folder."""

    folder: str
    axes: str
    zarr_format: int
    stamp: int
    """Modification time of the metadata: an image written anew is opened anew."""

    def open(self, level: int, path: str) -> Any:  # noqa: ARG002
        """The array of one level."""
        return _open_zarr_array(os.path.join(self.folder, path), self.zarr_format, self.stamp)


@dataclass(frozen=True)
class TiffSource:
    """The first series of a TIFF file."""

    path: str
    axes: str
    stamp: int

    def open(self, level: int, path: str) -> Any:  # noqa: ARG002
        """The array of one level."""
        return _open_tiff_level(self.path, level, self.stamp)


@dataclass(frozen=True, eq=False)
class MemorySource:
    """An array the caller holds."""

    array: Any
    axes: str

    def open(self, level: int, path: str) -> Any:  # noqa: ARG002
        """The array itself."""
        return self.array

    def __reduce__(self) -> NoReturn:
        raise ImageError(
            "an array in memory cannot be sent to other processes; save it as OME-Zarr or TIFF and open that."
        )


def open_image(source: Any, *, axes: str | None = None) -> Image:
    """Open an image without reading its pixels.

    Parameters
    ----------
    source : str, path, zarr.Array, dask array or numpy array
        An OME-Zarr 0.4 or 0.5 image, a Zarr array, a TIFF or OME-TIFF, a path inside a Zarr container,
        or an array. A dask array is computed region by region, in threads of this process.
    axes : str, optional
        Axes of the stored array, in its order, where the file does not say.

    Returns
    -------
    image : Image

    Raises
    ------
    ImageError
        If there is nothing there, or it is not an image that can be read.
    """
    import zarr

    if isinstance(source, zarr.Array):
        if isinstance(source.store, zarr.storage.LocalStore):
            return _open_zarr(Path(source.store.root) / source.path, axes)
        return _from_memory(source, "zarr array", axes)
    if isinstance(source, np.ndarray):
        return _from_memory(source, "numpy array", axes)
    if hasattr(source, "__dask_graph__") and hasattr(source, "chunksize"):
        return _from_memory(source, "dask array", axes)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"a {type(source).__name__} is no image; give a path or an array.")
    if "://" in os.fspath(source):
        raise ImageError(f"{source} is remote, which is not supported yet; copy it to a local disk.")
    path = Path(source)
    if not path.exists():
        raise ImageError(f"{path} does not exist; check the path.")
    return _open_zarr(path, axes) if path.is_dir() else _open_tiff(path, axes)


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


# ---- Zarr ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Node:
    zarr_format: int
    is_array: bool
    attributes: Mapping[str, Any]
    stamp: int

    @property
    def ome(self) -> Mapping[str, Any]:
        """The attributes OME-Zarr is about."""
        inner = self.attributes.get("ome")
        return inner if isinstance(inner, dict) else self.attributes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ImageError(f"{path} is not readable as JSON ({error}); restore it.") from error
    if not isinstance(content, dict):
        raise ImageError(f"{path} holds no JSON object; restore it.")
    return content


def _read_node(folder: Path) -> _Node | None:
    """The Zarr metadata of a folder, None if it has none."""
    if (folder / "zarr.json").is_file():
        content = _read_json(folder / "zarr.json")
        attributes, kind = content.get("attributes", {}), content.get("node_type")
        if kind not in ("array", "group") or not isinstance(attributes, dict):
            raise ImageError(f"{folder / 'zarr.json'} describes no Zarr array or group; restore it.")
        return _Node(3, kind == "array", attributes, (folder / "zarr.json").stat().st_mtime_ns)
    for name in (".zarray", ".zgroup"):
        if (folder / name).is_file():
            content = _read_json(folder / name)
            if '"pickle"' in json.dumps([content.get("compressor"), content.get("filters")]):
                raise ImageError(f"{folder / name} asks for the pickle codec, which can run code; refused.")
            attributes = _read_json(folder / ".zattrs") if (folder / ".zattrs").is_file() else {}
            return _Node(2, name == ".zarray", attributes, (folder / name).stat().st_mtime_ns)
    return None


def _open_zarr(path: Path, axes: str | None) -> Image:
    """Open a folder: an array, an image, or a container of images."""
    node = _read_node(path)
    if node is None:
        raise ImageError(f"{path} is a folder but no Zarr; give an OME-Zarr image, a Zarr array or a TIFF.")
    if not node.is_array:
        return _open_group(path, node, axes)
    parent = _read_node(path.parent)
    if parent is not None and not parent.is_array and "multiscales" in parent.ome:
        image = _open_multiscales(path.parent, parent, axes)
        for level in image.levels:
            if level.path == path.name:
                return _only_level(image, level, path, node)
    return _open_bare(path, node, axes)


def _open_group(path: Path, node: _Node, axes: str | None) -> Image:
    """Open a group as an image, or say what it is instead."""
    ome = node.ome
    if "multiscales" in ome:
        return _open_multiscales(path, node, axes)
    if "bioformats2raw.layout" in ome:
        names = _series_names(path)
        if len(names) > 1:
            others = _listed([f"{path}/{name}" for name in names[1:]])
            _log.warning("%s holds %d images; using the first, others are %s", path, len(names), others)
        child = _inside(path, names[0], path)
        inner = _read_node(child)
        if inner is None or "multiscales" not in inner.ome:
            raise ImageError(f"{path} names the image {names[0]!r}, which is missing; give another's path.")
        return _open_multiscales(child, inner, axes)
    held = _listed(sorted(child.name for child in path.iterdir() if child.is_dir())) or "nothing"
    for key, what in (("plate", "plate of wells"), ("well", "well of fields"), ("labels", "list of labels")):
        if key in ome:
            raise ImageError(f"{path} is a {what}, not an image; give the path of one inside it ({held}).")
    raise ImageError(f"{path} is a Zarr group but no OME-Zarr image; give one of its arrays ({held}).")


def _series_names(path: Path) -> list[str]:
    """Images of a bioformats2raw container, in its order."""
    listing = _read_node(path / "OME")
    names = listing.ome.get("series") if listing is not None else None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return names
    numbered = sorted((c.name for c in path.iterdir() if c.is_dir() and c.name.isdigit()), key=int)
    if not numbered:
        raise ImageError(f"{path} is a container without images.")
    return numbered


def _inside(folder: Path, component: Any, where: Path) -> Path:
    """Path of a component that metadata names, refused if it leaves its group."""
    if not isinstance(component, str) or "\\" in component or ":" in component or "\0" in component:
        raise ImageError(f"{where} names the path {component!r}, which is none; its metadata is unreadable.")
    pure = PurePosixPath(component)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise ImageError(f"{where} names the path {component!r}, which is not inside it; refused.")
    return folder / pure


@lru_cache(maxsize=64)
def _open_zarr_array(path: str, zarr_format: int, stamp: int) -> Any:  # noqa: ARG001
    """A Zarr array, opened once per process; the stamp keys the cache only."""
    import zarr

    return zarr.open_array(path, mode="r", zarr_format=3 if zarr_format == 3 else 2)


def _load_array(path: Path, node: _Node) -> Any:
    """A Zarr array with metadata that can be trusted."""
    try:
        array = _open_zarr_array(str(path), node.zarr_format, node.stamp)
        _check_array(array.shape, array.dtype, str(path))
        if min(array.chunks, default=0) < 1 or min(array.shards or (1,)) < 1:
            raise ValueError(f"chunks {array.chunks}")
    except _BAD_FILE as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path} has Zarr metadata that cannot be read ({error}); restore it.") from error
    return array


def _open_bare(path: Path, node: _Node, axes: str | None) -> Image:
    """An array without OME metadata."""
    array = _load_array(path, node)
    names = getattr(array.metadata, "dimension_names", None) or node.attributes.get("_ARRAY_DIMENSIONS")
    if axes is None and isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        letters = [name.lower() for name in names]
        if set(letters) <= set(ALL_AXES) and len(letters) == array.ndim == len(set(letters)):
            axes = "".join(letters)
    axes = _given_axes(axes, array.shape, str(path))
    source = ZarrSource(str(path), axes, node.zarr_format, node.stamp)
    image = _assemble(str(path), source, array.dtype, [_Stored("", array.shape, array.chunks)])
    return replace(image, zarr_format=node.zarr_format)


def _open_multiscales(path: Path, node: _Node, axes: str | None) -> Image:
    """An OME-Zarr image (OME-Zarr 0.4 and 0.5, section "multiscales" metadata)."""
    entries = node.ome.get("multiscales")
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        raise _unreadable(path, "multiscales is no list of objects")
    entry = entries[0]
    if len(entries) > 1:
        _log.warning("%s holds %d multiscales; using the first", path, len(entries))
    version = node.ome.get("version", entry.get("version"))
    disk_axes, units = _ome_axes(path, entry, version)
    if axes is not None and axes != disk_axes:
        raise ImageError(f"{path} has axes {disk_axes!r} in its metadata, not {axes!r}; leave out axes.")
    datasets = entry.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise _unreadable(path, "it lists no datasets")
    arrays = [_dataset_array(path, dataset, len(disk_axes)) for dataset in datasets]
    if len({array.dtype for array in arrays}) > 1:
        raise _unreadable(path, "its levels differ in dtype")
    stored = _placed(path, entry, arrays)
    if any(stored[0].scale and stored[0].scale[disk_axes.index(a)] <= 0 for a in spatial_axes(disk_axes)):
        _log.warning("%s gives a pixel size of zero or less, taken as unknown", path)
    first = _read_node(path / stored[0].path)
    source = ZarrSource(str(path), disk_axes, node.zarr_format, first.stamp if first else 0)
    image = _assemble(str(path), source, arrays[0].dtype, stored, units)
    writable = (version, node.zarr_format) in (("0.4", 2), ("0.5", 3)) and "image-label" not in node.ome
    return replace(
        image,
        channels=_ome_channels(node.ome, image.n_channels),
        writable_group=path if writable else None,
        zarr_format=node.zarr_format,
        ome_version=version if isinstance(version, str) else None,
    )


def _dataset_array(path: Path, dataset: Any, ndim: int) -> Any:
    """The array a dataset names."""
    if not isinstance(dataset, dict):
        raise _unreadable(path, "a dataset is no object")
    component = dataset.get("path")
    folder = _inside(path, component, path)
    node = _read_node(folder)
    if node is None or not node.is_array:
        raise ImageError(f"{path} names the array {component!r}, which is missing; restore it.")
    array = _load_array(folder, node)
    if array.ndim != ndim:
        raise _unreadable(path, f"array {component!r} has {array.ndim} dimensions for {ndim} axes")
    return array


def _placed(path: Path, entry: Mapping[str, Any], arrays: Sequence[Any]) -> list[_Stored]:
    """Datasets with the scale and shift of both levels of coordinate transformations."""
    ndim = arrays[0].ndim
    outer_scale, outer_shift = _transforms(path, entry.get("coordinateTransformations"), ndim)
    outer_scale, outer_shift = outer_scale or [1.0] * ndim, outer_shift or [0.0] * ndim
    stored: list[_Stored] = []
    for dataset, array in zip(entry["datasets"], arrays, strict=True):
        scale, shift = _transforms(path, dataset.get("coordinateTransformations"), ndim)
        if shift is None and not stored:
            shift = [0.0] * ndim
        if scale is not None:
            scale = [a * b for a, b in zip(scale, outer_scale, strict=True)]
        if shift is not None:
            shift = [a * b + c for a, b, c in zip(shift, outer_scale, outer_shift, strict=True)]
        stored.append(_Stored(dataset["path"], array.shape, array.chunks, scale, shift))
    return stored


def _unreadable(path: Path, what: str) -> ImageError:
    return ImageError(f"{path} has OME-Zarr metadata that cannot be read: {what}; correct the metadata.")


def _ome_axes(path: Path, entry: Mapping[str, Any], version: Any) -> tuple[str, list[str | None]]:
    """Axes in the order on disk, and their units."""
    listed = entry.get("axes")
    if listed is None and version in ("0.1", "0.2"):
        return ALL_AXES, [None] * 5  # before 0.3 there was no other order
    if not isinstance(listed, list):
        raise _unreadable(path, "it lists no axes")
    items = [{"name": item} if isinstance(item, str) else item for item in listed]
    if not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items):
        raise _unreadable(path, "an axis has no name")
    names = [item["name"] for item in items]
    if any(len(name) != 1 for name in names):
        raise _unreadable(path, f"axes are {names}, each must be one of t, c, z, y, x")
    axes = check_axes("".join(names), len(names), str(path))
    return axes, [_unit_name(item.get("unit")) for item in items]


def _transforms(path: Path, listed: Any, ndim: int) -> tuple[list[float] | None, list[float] | None]:
    """Scale and translation of a list of coordinate transformations, None where there is none."""
    found: dict[str, list[float]] = {}
    for item in [] if listed is None else listed if isinstance(listed, list) else [listed]:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "identity":
            continue
        values = item.get(kind) if kind in ("scale", "translation") else None
        if not isinstance(values, list) or len(values) != ndim or not all(map(_is_number, values)):
            raise _unreadable(path, f"coordinate transformation {json.dumps(item)[:80]}")
        found[str(kind)] = [float(value) for value in values]
    return found.get("scale"), found.get("translation")


def _ome_channels(ome: Mapping[str, Any], n_channels: int) -> tuple[str, ...]:
    """Names from the optional omero block."""
    omero = ome.get("omero")
    listed = omero.get("channels") if isinstance(omero, dict) else None
    items = listed if isinstance(listed, list) else []
    return _channel_names([i.get("label") if isinstance(i, dict) else None for i in items], n_channels)


def _only_level(image: Image, level: Level, path: Path, node: _Node) -> Image:
    """An image of one of its levels alone."""
    spacing, translation = list(image.spacing), list(image.translation)
    for letter, scale, offset in zip(image.spatial_axes, level.scale, level.offset, strict=True):
        at = image.axes.index(letter)
        step = spacing[at]
        if step is not None:
            translation[at] += offset * step
            spacing[at] = step * scale
    n_spatial = len(level.scale)
    return replace(
        image,
        name=str(path),
        levels=(replace(level, path="", scale=(1.0,) * n_spatial, offset=(0.0,) * n_spatial),),
        spacing=tuple(spacing),
        translation=tuple(translation),
        source=ZarrSource(str(path), image.source.axes, node.zarr_format, node.stamp),
        writable_group=None,
    )


# ---- TIFF ----------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _open_tiff_level(path: str, level: int, stamp: int) -> Any:  # noqa: ARG001
    """One level of the first series, opened once per process; the stamp keys the cache only."""
    import tifffile
    import zarr

    tif = tifffile.TiffFile(path)
    try:
        series = tif.series[0]
        if series.levels[level].dataoffset is not None:
            # Contiguous and uncompressed: mapped, any window reads no more than itself.
            tif.close()
            return tifffile.memmap(path, series=0, level=level, mode="r")
        array = zarr.open_array(series.aszarr(level=level), mode="r")
    except _BAD_FILE:
        tif.close()
        raise
    weakref.finalize(array, tif.close)
    return array


def _open_tiff(path: Path, axes: str | None) -> Image:
    """The first series of a TIFF, with its pyramid."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            if not len(tif.series):
                raise ImageError(f"{path} is a TIFF without images.")
            series = tif.series[0]
            if len(tif.series) > 1:
                _log.info("%s holds %d series; using the first", path, len(tif.series))
            disk_axes = _tiff_axes(path, series.axes, series.shape, axes)
            calibration, channels = _tiff_calibration(tif, series)
            levels = [level for level in series.levels if level.ndim == series.ndim]
            _check_array(series.shape, np.dtype(series.dtype), str(path))
            _warn_one_strip(path, series)
        stamp = path.stat().st_mtime_ns
        stored: list[_Stored] = []
        for index, level in enumerate(levels):
            array = _open_tiff_level(str(path), index, stamp)
            rows = getattr(array, "chunks", (1,) * (level.ndim - 2) + level.shape[-2:])
            stored.append(_Stored("", level.shape, rows))
    except _BAD_FILE as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path} is not a readable TIFF ({error}); give a TIFF or a Zarr.") from error
    source = TiffSource(str(path), disk_axes, stamp)
    known = [calibration.get(letter, (0.0, None)) for letter in disk_axes]
    stored[0] = replace(stored[0], scale=[size for size, _ in known])
    image = _assemble(str(path), source, np.dtype(series.dtype), stored, [unit for _, unit in known])
    return replace(image, channels=_channel_names(channels, image.n_channels))


def _warn_one_strip(path: Path, series: Any) -> None:
    """Say so if every window reads a whole plane."""
    page = series.keyframe
    if series.dataoffset is None and not page.is_tiled and page.rowsperstrip >= page.imagelength:
        _log.warning("%s is compressed as one strip, so any window reads a whole plane; save it tiled", path)


def _tiff_axes(path: Path, letters: str, shape: Sequence[int], axes: str | None) -> str:
    """Axes in the order on disk; a letter of length 1 that means nothing here is dropped."""
    if axes is not None:
        return check_axes(axes, len(shape), str(path))
    found: list[str] = []
    for letter, size in zip(letters, shape, strict=True):
        axis = "c" if letter == "S" else letter.lower()
        if axis in ALL_AXES and axis not in found:
            found.append(axis)
        elif size == 1:
            found.append(_DROPPED)
        elif axis == "c" and shape[found.index("c")] == 1:
            found[found.index("c")] = _DROPPED
            found.append("c")
        else:
            raise ImageError(
                f"{path} has an axis {letter!r} of length {size} whose meaning is unknown (axes {letters!r}, "
                f"shape {tuple(shape)}); give axes with one of t, c, z, y, x per dimension."
            )
    kept = "".join(found)
    check_axes(kept.replace(_DROPPED, ""), len(kept.replace(_DROPPED, "")), str(path))
    return kept


def _tiff_calibration(tif: Any, series: Any) -> tuple[dict[str, tuple[float, str | None]], list[Any]]:
    """Pixel sizes and units by axis, and channel names, where the file gives reliable ones."""
    if series.kind == "ome":
        return _ome_xml(tif.ome_metadata)
    resolution = tif.pages[0].resolution
    sizes: dict[str, float] = {}
    unit: str | None = None
    if tif.imagej_metadata:
        unit = _unit_name(tif.imagej_metadata.get("unit"))
        sizes = {"z": tif.imagej_metadata.get("spacing", 0)}
        steps = 1.0
    elif tif.pages[0].resolutionunit == 3:  # inches are a printer's resolution, centimetres a microscope's
        unit, steps = "micrometer", 1e4
    for axis, per_unit in zip("xy", resolution, strict=False):
        if unit in _MICROMETERS and per_unit:
            sizes[axis] = steps / per_unit
    found = {axis: (float(size), unit) for axis, size in sizes.items() if _is_number(size) and size > 0}
    return ({} if unit not in _MICROMETERS else found), []


def _ome_xml(text: str) -> tuple[dict[str, tuple[float, str | None]], list[Any]]:
    """Pixel sizes and channel names of the first image of OME-XML."""
    from xml.etree import ElementTree

    pixels = ElementTree.fromstring(text).find("{*}Image/{*}Pixels")
    if pixels is None:
        return {}, []
    found: dict[str, tuple[float, str | None]] = {}
    for axis in "xyz":
        size = float(pixels.get(f"PhysicalSize{axis.upper()}", "nan"))
        unit = _unit_name(pixels.get(f"PhysicalSize{axis.upper()}Unit", "µm"))
        if math.isfinite(size) and size > 0 and unit in _MICROMETERS:
            found[axis] = (size, unit)
    return found, [channel.get("Name") for channel in pixels.findall("{*}Channel")]


# ---- shared --------------------------------------------------------------------------------------


def _from_memory(array: Any, name: str, axes: str | None) -> Image:
    """An array the caller holds."""
    shape = tuple(array.shape)
    if any(math.isnan(size) for size in shape):
        raise ImageError(f"the {name} has an unknown shape {shape}; call compute_chunk_sizes() on it.")
    _check_array(shape, array.dtype, f"the {name}")
    axes = _given_axes(axes, shape, f"the {name}")
    chunks = getattr(array, "chunksize", None) or getattr(array, "chunks", None) or shape
    return _assemble(name, MemorySource(array, axes), array.dtype, [_Stored("", shape, chunks)])


def _given_axes(axes: str | None, shape: Sequence[int], where: str) -> str:
    """Axes as given, or yx of a plane; never guessed from lengths."""
    if axes is None and len(shape) == 2:
        return "yx"
    if axes is None:
        what = f"{len(shape)} dimensions of lengths {tuple(shape)} and does not name them"
        raise ImageError(f"{where} has {what}; give axes, e.g. axes='zyx' (--axes zyx).")
    return check_axes(axes, len(shape), where)


def _check_array(shape: Sequence[int], dtype: np.dtype[Any], where: str) -> None:
    """Refuse what cannot be segmented."""
    if 0 in shape:
        raise ImageError(f"{where} is empty: its shape is {tuple(shape)}.")
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise ImageError(f"{where} has dtype {dtype}; only integers and real numbers can be segmented.")


@dataclass(frozen=True)
class _Stored:
    """One stored level; everything in the order on disk."""

    path: str
    shape: Sequence[int]
    chunks: Sequence[int]
    scale: Sequence[float] | None = None  # size of a pixel, 0 unknown
    shift: Sequence[float] | None = None  # position of pixel 0


def _assemble(
    name: str,
    source: Source,
    dtype: np.dtype[Any],
    stored: Sequence[_Stored],
    units: Sequence[str | None] | None = None,
) -> Image:
    """An image in canonical order from what is stored; level 0 has a scale if spacing is known."""
    disk = source.axes
    axes = canonical_order(disk)
    order = [disk.index(letter) for letter in axes]
    space = [at for at in order if disk[at] in spatial_axes(axes)]
    first = stored[0]
    sizes, shifts = first.scale or [0.0] * len(disk), first.shift or [0.0] * len(disk)
    levels = []
    for one in stored:
        scales, offsets = zip(*(_level_geometry(name, disk[at], at, first, one) for at in space), strict=True)
        shape = tuple(int(one.shape[at]) for at in order)
        chunks = tuple(max(1, min(int(one.chunks[at]), int(one.shape[at]))) for at in order)
        levels.append(Level(one.path, shape, chunks, scales, offsets))
    return Image(
        name=name,
        axes=axes,
        dtype=np.dtype(dtype).newbyteorder("="),
        levels=tuple(levels),
        spacing=tuple(sizes[at] if sizes[at] > 0 else None for at in order),
        translation=tuple(shifts[at] for at in order),
        units=tuple(units[at] if units else None for at in order),
        channels=_channel_names([], levels[0].shape[axes.index("c")] if "c" in axes else 1),
        source=source,
    )


def _level_geometry(name: str, axis: str, at: int, first: _Stored, one: _Stored) -> tuple[float, float]:
    """Scale and offset of a level on one axis, in level-0 pixels."""
    full, size = first.shape[at], one.shape[at]
    by_shape = full / size
    if abs(full / max(1, round(by_shape)) - size) <= 1:
        by_shape = float(max(1, round(by_shape)))  # 101 pixels to 50 or 51 is a factor of 2
    if first.scale is None or one.scale is None or first.scale[at] <= 0 or one.scale[at] <= 0:
        return by_shape, (by_shape - 1) / 2
    scale = one.scale[at] / first.scale[at]
    if abs(scale * size / full - 1) > 0.25 and abs(full / scale - size) > 1:
        text = "%s/%s: scale %g on %s contradicts lengths %d and %d; using %g"
        _log.warning(text, name, one.path, scale, axis, full, size, by_shape)
        return by_shape, (by_shape - 1) / 2
    if first.shift is None or one.shift is None:
        return scale, (scale - 1) / 2
    return scale, (one.shift[at] - first.shift[at]) / first.scale[at]


def _channel_names(names: Sequence[Any], n_channels: int) -> tuple[str, ...]:
    """One name per channel, its index where there is none."""
    named = [name if isinstance(name, str) and name else str(i) for i, name in enumerate(names)][:n_channels]
    return (*named, *(str(i) for i in range(len(named), n_channels)))


def _unit_name(unit: Any) -> str | None:
    """The name OME-Zarr uses for a unit."""
    if not isinstance(unit, str) or unit.lower() in ("", "pixel", "pixels", "reference frame"):
        return None
    return _UNIT_NAMES.get(unit, unit)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path and key else path or key


def _listed(names: Sequence[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _cells(selection: Sequence[slice | int], chunks: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Indices of the chunks a selection touches."""
    spans = [(part, part + 1) if isinstance(part, int) else (part.start, part.stop) for part in selection]
    return product(
        *(
            range(low // step, -(-high // step) if high > low else low // step)
            for (low, high), step in zip(spans, chunks, strict=True)
        )
    )


def _stored_keys(array: Any, selection: Sequence[slice | int]) -> list[str]:
    """Storage keys a selection touches."""
    cells = _cells(selection, array.shards or array.chunks)
    return [array.metadata.encode_chunk_key(cell) for cell in cells]


def _torn_chunks(array: Any, folder: Path | None, selection: Sequence[slice | int]) -> list[str]:
    """Chunks whose file is shorter than it must be, which zarr reads as zeros or garbage without a word."""
    if folder is None:
        return []
    codec = type(array.compressors[-1]).__name__ if array.compressors and not array.shards else ""
    torn = []
    for key in _stored_keys(array, selection):
        path = folder / key
        try:
            size = path.stat().st_size if path.is_file() else None
            if size == 0 or (size and codec.startswith("Blosc") and _blosc_bytes(path) != size):
                torn.append(key)
        except OSError:
            torn.append(key)
    return torn


def _blosc_bytes(path: Path) -> int:
    """Length a Blosc buffer says it has."""
    with path.open("rb") as file:
        header = file.read(16)
    return int.from_bytes(header[12:16], "little") if len(header) == 16 else -1


def _failing_chunks(array: Any, selection: Sequence[slice | int]) -> list[str]:
    """Storage keys of the chunks that cannot be decoded, found by reading them one by one."""
    outer = array.shards or array.chunks
    failing: dict[str, None] = {}
    for cell in _cells(selection, array.chunks):
        box = tuple(slice(i * step, (i + 1) * step) for i, step in zip(cell, array.chunks, strict=True))
        try:
            array[box]
        except _BAD_FILE:
            at = tuple(i * inner // whole for i, inner, whole in zip(cell, array.chunks, outer, strict=True))
            failing[array.metadata.encode_chunk_key(at)] = None
    return list(failing)
