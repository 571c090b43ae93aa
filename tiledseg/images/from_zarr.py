"""Opening Zarr arrays and OME-Zarr images. Their metadata is written by others and is not trusted."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from ..axes import ALL_AXES, check_axes, spatial_axes
from ..errors import ImageError, TiledsegError
from ..patience import ForbiddenError
from ..remote import Location, location, read_file
from ..zarr_stores import zarr_store
from .assembly import StoredLevel, assemble_image, channel_names, check_array, given_axes, is_number
from .damage import BAD_FILE
from .display import omero_displays
from .image import Image, listed_names
from .units import unit_name
from .view import at_level

__all__ = ["ZarrSource", "open_zarr"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZarrSource:
    """Zarr arrays in a local folder or a remote store."""

    folder: str
    """Its path or address."""
    axes: str
    zarr_format: int
    stamp: int
    """Modification time or checksum of the metadata: an image written anew is opened anew."""

    def open(self, level: int, path: str) -> Any:  # noqa: ARG002
        """The array of one level."""
        return _open_zarr_array(str(location(self.folder) / path), self.zarr_format, self.stamp)

    def chunk_folder(self, path: str) -> Location:
        """Folder of a level's chunks."""
        return location(self.folder) / path


def open_zarr(path: Location, axes: str | None) -> Image:
    """Open a folder: an array, an image, or a container of images.

    Parameters
    ----------
    path : Path or RemotePath
        An OME-Zarr image, one of its levels, a bioformats2raw container or a Zarr array.
    axes : str, optional
        Axes of the stored array, in its order, where the metadata does not say.

    Returns
    -------
    image : Image

    Raises
    ------
    ImageError
        If it is no image, or its metadata cannot be read.
    RemoteError
        If the store cannot be reached, or refuses.
    """
    node = _read_node(path)
    if node is None and isinstance(path, Path):
        raise ImageError(f"{path} is a folder but no Zarr; give an OME-Zarr image, a Zarr array or a TIFF.")
    if node is None:
        raise ImageError(
            f"{path} is no Zarr: there is no zarr.json, .zarray or .zgroup; check the address (a TIFF must be on a "
            "local disk)."
        )
    if not node.is_array:
        return _open_group(path, node, axes)
    parent = _parent_node(path)
    if parent is not None and not parent.is_array and "multiscales" in parent.ome:
        image = _open_multiscales(path.parent, parent, axes)
        for number, level in enumerate(image.levels):
            if level.path == path.name:
                return _only_level(image, number, path, node)
    return _open_bare(path, node, axes)


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


def _read_json(path: Location) -> tuple[dict[str, Any], int] | None:
    """A JSON object and its stamp, None if there is no such file."""
    try:
        found = read_file(path)
        content = None if found is None else json.loads(found[0])
    except (ValueError, OSError, RecursionError) as error:
        raise ImageError(f"{path} is not readable as JSON ({error}); restore it.") from error
    if found is None:
        return None
    if not isinstance(content, dict):
        raise ImageError(f"{path} holds no JSON object; restore it.")
    return content, found[1]


def _read_node(folder: Location) -> _Node | None:
    """The Zarr metadata of a folder, None if it has none."""
    refusal: ForbiddenError | None = None
    for name in ("zarr.json", ".zarray", ".zgroup"):
        try:
            found = _read_json(folder / name)
        except ForbiddenError as error:  # of S3 also for what is not there, where listing is forbidden
            refusal = refusal or error
            continue
        if found is not None:
            return _node_of(folder / name, *found)
    if refusal is not None:
        raise refusal
    return None


def _node_of(file: Location, content: Mapping[str, Any], stamp: int) -> _Node:
    """What a metadata file describes."""
    if file.name == "zarr.json":
        attributes, kind = content.get("attributes", {}), content.get("node_type")
        if kind not in ("array", "group") or not isinstance(attributes, dict):
            raise ImageError(f"{file} describes no Zarr array or group; restore it.")
        return _Node(3, kind == "array", attributes, stamp)
    if '"pickle"' in json.dumps([content.get("compressor"), content.get("filters")]):
        raise ImageError(f"{file} asks for the pickle codec, which can run code; refused.")
    try:
        attributes, _ = _read_json(file.parent / ".zattrs") or ({}, 0)
    except ForbiddenError:  # the same
        attributes = {}
    return _Node(2, file.name == ".zarray", attributes, stamp)


def _parent_node(path: Location) -> _Node | None:
    """The Zarr metadata of the folder around; None also if that is not for us."""
    try:
        return _read_node(path.parent)
    except ForbiddenError:
        return None


def _held(path: Location) -> list[str] | None:
    """Names of the folders in a folder, None if they cannot be listed."""
    if not isinstance(path, Path):
        return None
    return sorted(child.name for child in path.iterdir() if child.is_dir())


def _open_group(path: Location, node: _Node, axes: str | None) -> Image:
    """Open a group as an image, or say what it is instead."""
    ome = node.ome
    if "multiscales" in ome:
        return _open_multiscales(path, node, axes)
    if "bioformats2raw.layout" in ome:
        names = _series_names(path)
        if len(names) > 1:
            others = listed_names([f"{path}/{name}" for name in names[1:]])
            _log.warning("%s holds %d images; using the first, others are %s", path, len(names), others)
        child = _inside(path, names[0], path)
        inner = _read_node(child)
        if inner is None or "multiscales" not in inner.ome:
            raise ImageError(f"{path} names the image {names[0]!r}, which is missing; give another's path.")
        return _open_multiscales(child, inner, axes)
    folders = _held(path)
    held = "" if folders is None else f" ({listed_names(folders) or 'nothing'})"
    for key, what in (("plate", "plate of wells"), ("well", "well of fields"), ("labels", "list of labels")):
        if key in ome:
            raise ImageError(f"{path} is a {what}, not an image; give the path of one inside it{held}.")
    raise ImageError(f"{path} is a Zarr group but no OME-Zarr image; give one of its arrays{held}.")


def _series_names(path: Location) -> list[str]:
    """Images of a bioformats2raw container, in its order."""
    listing = _read_node(path / "OME")
    names = listing.ome.get("series") if listing is not None else None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return names
    held = _held(path)
    if held is None:
        return ["0"]  # the name of the first in every such container
    numbered: list[str] = sorted(filter(str.isdigit, held), key=int)
    if not numbered:
        raise ImageError(f"{path} is a container without images.")
    return numbered


def _inside(folder: Location, component: Any, where: Location) -> Location:
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

    place = location(path)
    home = place / ("zarr.json" if zarr_format == 3 else ".zarray")
    store = zarr_store(place, read_only=True, home=home)
    return zarr.open_array(store, mode="r", zarr_format=3 if zarr_format == 3 else 2)


def _load_array(path: Location, node: _Node) -> Any:
    """A Zarr array with metadata that can be trusted."""
    try:
        array = _open_zarr_array(str(path), node.zarr_format, node.stamp)
        check_array(array.shape, array.dtype, str(path))
        if min(array.chunks, default=0) < 1 or min(array.shards or (1,)) < 1:
            raise ValueError(f"chunks {array.chunks}")
    except BAD_FILE as error:
        if isinstance(error, TiledsegError):
            raise
        raise ImageError(f"{path} has Zarr metadata that cannot be read ({error}); restore it.") from error
    return array


def _open_bare(path: Location, node: _Node, axes: str | None) -> Image:
    """An array without OME metadata."""
    array = _load_array(path, node)
    names = getattr(array.metadata, "dimension_names", None) or node.attributes.get("_ARRAY_DIMENSIONS")
    if axes is None and isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        letters = [name.lower() for name in names]
        if set(letters) <= set(ALL_AXES) and len(letters) == array.ndim == len(set(letters)):
            axes = "".join(letters)
    axes = given_axes(axes, array.shape, str(path))
    source = ZarrSource(str(path.absolute()), axes, node.zarr_format, node.stamp)
    image = assemble_image(str(path), source, array.dtype, [StoredLevel("", array.shape, array.chunks)])
    return replace(image, zarr_format=node.zarr_format)


def _open_multiscales(path: Location, node: _Node, axes: str | None) -> Image:
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
    source = ZarrSource(str(path.absolute()), disk_axes, node.zarr_format, first.stamp if first else 0)
    image = assemble_image(str(path), source, arrays[0].dtype, stored, units)
    writable = (version, node.zarr_format) in (("0.4", 2), ("0.5", 3)) and "image-label" not in node.ome
    return replace(
        image,
        channels=_ome_channels(node.ome, image.n_channels),
        writable_group=path if writable and (isinstance(path, Path) or path.is_writable) else None,
        zarr_format=node.zarr_format,
        ome_version=version if isinstance(version, str) else None,
        displays=omero_displays(node.ome, image.n_channels),
    )


def _dataset_array(path: Location, dataset: Any, ndim: int) -> Any:
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


def _placed(path: Location, entry: Mapping[str, Any], arrays: Sequence[Any]) -> list[StoredLevel]:
    """Datasets with the scale and shift of both levels of coordinate transformations."""
    ndim = arrays[0].ndim
    outer_scale, outer_shift = _transforms(path, entry.get("coordinateTransformations"), ndim)
    outer_scale, outer_shift = outer_scale or [1.0] * ndim, outer_shift or [0.0] * ndim
    stored: list[StoredLevel] = []
    for dataset, array in zip(entry["datasets"], arrays, strict=True):
        scale, shift = _transforms(path, dataset.get("coordinateTransformations"), ndim)
        if shift is None and not stored:
            shift = [0.0] * ndim
        if scale is not None:
            scale = [a * b for a, b in zip(scale, outer_scale, strict=True)]
        if shift is not None:
            shift = [a * b + c for a, b, c in zip(shift, outer_scale, outer_shift, strict=True)]
        stored.append(StoredLevel(dataset["path"], array.shape, array.chunks, scale, shift))
    return stored


def _unreadable(path: Location, what: str) -> ImageError:
    return ImageError(f"{path} has OME-Zarr metadata that cannot be read: {what}; correct the metadata.")


def _ome_axes(path: Location, entry: Mapping[str, Any], version: Any) -> tuple[str, list[str | None]]:
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
    return axes, [unit_name(item.get("unit")) for item in items]


def _transforms(path: Location, listed: Any, ndim: int) -> tuple[list[float] | None, list[float] | None]:
    """Scale and translation of a list of coordinate transformations, None where there is none."""
    found: dict[str, list[float]] = {}
    for item in [] if listed is None else listed if isinstance(listed, list) else [listed]:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "identity":
            continue
        values = item.get(kind) if kind in ("scale", "translation") else None
        if not isinstance(values, list) or len(values) != ndim or not all(map(is_number, values)):
            raise _unreadable(path, f"coordinate transformation {json.dumps(item)[:80]}")
        found[str(kind)] = [float(value) for value in values]
    return found.get("scale"), found.get("translation")


def _ome_channels(ome: Mapping[str, Any], n_channels: int) -> tuple[str, ...]:
    """Names from the optional omero block."""
    omero = ome.get("omero")
    listed = omero.get("channels") if isinstance(omero, dict) else None
    items = listed if isinstance(listed, list) else []
    return channel_names([i.get("label") if isinstance(i, dict) else None for i in items], n_channels)


def _only_level(image: Image, level: int, path: Location, node: _Node) -> Image:
    """An image of one of its levels alone."""
    view = at_level(image, level)
    return replace(
        view,
        name=str(path),
        levels=(replace(view.levels[0], path=""),),
        source=ZarrSource(str(path.absolute()), image.source.axes, node.zarr_format, node.stamp),
        writable_group=None,
    )
