"""Labels, pyramids and metadata out: OME-Zarr 0.4 and 0.5 with plain zarr.

Labels lie in ``ROOT/labels/NAME/0..n``, where ROOT is the image itself or a group of its own. They are
listed last, so a half-written image is never shown. One process writes metadata; chunks may be
written by many, one whole chunk at a time.

References
----------
OME-Zarr 0.4 and 0.5, sections "multiscales" and "labels" metadata.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..disk import DRAFTS, sweep
from ..errors import ImageError, OutputError, SettingsError, TiledsegError
from ..images import Image, open_image
from ..images.damage import BAD_FILE, failing_chunks
from ..remote import Location, location, remove_tree
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
    ome_attributes,
    open_group,
    shard_shape,
    update_ome,
    zarr_format,
)

__all__ = [
    "LabelsPlan",
    "LevelZero",
    "create_labels",
    "finish_labels",
    "label_names",
    "labels_exist",
    "level_array",
    "open_labels",
    "plan_labels",
    "read_level",
    "remove_labels",
]

_CHUNK = 1024


@dataclass(frozen=True)
class LabelsPlan:
    """Where labels go, and how they are stored."""

    root: Location
    """Group that holds ``labels/``."""
    name: str
    version: str
    """Of OME-Zarr, ``"0.4"`` or ``"0.5"``."""
    axes: str
    """Those of the image without c."""
    shape: tuple[int, ...]
    """Pixels of level 0 per axis."""
    spacing: tuple[float | None, ...]
    """Size of a level-0 pixel per axis, in `units`; None if unknown."""
    translation: tuple[float, ...]
    units: tuple[str | None, ...]
    n_levels: int
    chunks: tuple[int, ...]
    """Pixels of a level-0 chunk per axis."""
    source: str | None
    """Path from the labels to the image they were made from; None if that is no OME-Zarr on the same disk."""
    shards: tuple[int, ...] | None = None
    """Pixels of a level-0 shard per axis; None if every chunk is a file."""
    thickness: float | None = None
    """Of a plane in pixels of x, None if unknown."""
    placement: tuple[tuple[float, float], ...] = ()
    """Per axis where pixel 0 begins and how wide a pixel is, in pixels of the full-size image."""

    @property
    def in_image(self) -> bool:
        """Whether `root` is the image the labels were made from."""
        return self.source == "../../"

    @property
    def path(self) -> Location:
        """Folder of the label image."""
        return self.root / "labels" / self.name

    @property
    def zarr_format(self) -> int:
        """2 or 3."""
        return FORMATS[self.version]

    def level_shape(self, level: int) -> tuple[int, ...]:
        """Pixels of a level per axis."""
        return level_shape(self.axes, self.shape, level, self.thickness)

    def level_chunks(self, level: int) -> tuple[int, ...]:
        """Pixels of a chunk of a level per axis."""
        return tuple(map(min, self.chunks, self.level_shape(level)))

    def level_shards(self, level: int) -> tuple[int, ...] | None:
        """Pixels of a shard of a level per axis; None if every chunk is a file, as where there is a single one."""
        if self.shards is None:
            return None
        shape, chunks = self.level_shape(level), self.level_chunks(level)
        counts = [
            min(-(-n // chunk), max(1, shard // chunk))
            for n, chunk, shard in zip(shape, chunks, self.shards, strict=True)
        ]
        sides = tuple(count * chunk for count, chunk in zip(counts, chunks, strict=True))
        return sides if max(counts) > 1 else None

    @property
    def n_files(self) -> int:
        """Chunks, or shards, of all levels; those without objects are not stored."""
        n_files = 0
        for level in range(self.n_levels):
            sides = self.level_shards(level) or self.level_chunks(level)
            n_files += math.prod(-(-n // side) for n, side in zip(self.level_shape(level), sides, strict=True))
        return n_files


def plan_labels(
    image: Image, output: Location | None, name: str, version: str | None, shard: bool = False
) -> LabelsPlan:
    """Decide where labels go; writes nothing.

    Parameters
    ----------
    image : Image
        What was segmented.
    output : Path or RemotePath, optional
        Group to hold the labels, made if it is missing. None is the image itself.
    name : str
        Of the labels: letters, digits, ``-``, ``_`` and ``.``.
    version : str, optional
        Of OME-Zarr. None is that of the image or of an existing `output`, else ``"0.5"``.
    shard : bool
        Put chunks together in shards, see :func:`groups.shard_shape`.

    Returns
    -------
    plan : LabelsPlan

    Raises
    ------
    SettingsError
        If the name is no plain name, or the version unknown or another than that of the container, or it has no
        shards.
    OutputError
        If labels cannot be written there.

    Notes
    -----
    Whether labels of that name are there already is for :func:`labels_exist` to say, because a run that
    is resumed finds its own.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or name == "zarr.json":
        raise SettingsError(f"labels name {name!r} is not allowed; use letters, digits, - _ and . only (--name).")
    if version is not None and version not in FORMATS:
        raise SettingsError(f"OME-Zarr version {version!r} cannot be written; use 0.4 or 0.5.")
    if output is None and image.writable_group is None:
        raise OutputError(f"{image.name} is no OME-Zarr image that can hold labels; say where with -o OUT.zarr.")
    # Absolute: workers may run in another folder.
    root = (output or image.writable_group or Path()).absolute()
    check_writable(root)
    found, n_datasets = _container(root)
    if None not in (found, version) and found != version:
        raise SettingsError(f"{root} is OME-Zarr {found}, not {version}; leave out the version.")
    written = version or found or "0.5"
    if shard and written == "0.4":
        raise SettingsError(
            f"OME-Zarr 0.4, in which {root} is written, has no shards; leave out --shard, or write OME-Zarr 0.5 to "
            "another place (-o)."
        )
    keep = [at for at, letter in enumerate(image.axes) if letter != "c"]
    axes = "".join(image.axes[at] for at in keep)
    shape = tuple(image.shape[at] for at in keep)
    known = [image.spacing[at] is not None for at in keep]
    chunks = chunk_shape(axes, shape, _CHUNK)
    return LabelsPlan(
        root=root,
        name=name,
        version=written,
        axes=axes,
        shape=shape,
        spacing=tuple(image.spacing[at] for at in keep),
        translation=tuple(image.translation[at] for at in keep),
        units=tuple(image.units[at] if is_known else None for at, is_known in zip(keep, known, strict=True)),
        # The specification: as many levels as the image around the labels has.
        n_levels=n_datasets or count_levels(axes, shape, _CHUNK),
        chunks=chunks,
        source=_source(image, root),
        shards=shard_shape(chunks, shape) if shard else None,
        thickness=image.plane_thickness(),
        placement=tuple(image.placement[at] for at in keep),
    )


def _source(image: Image, root: Location) -> str | None:
    """Path from labels below a container to their image."""
    group = image.writable_group
    if group is None:
        return None
    if root.resolve() == group.resolve():
        return "../../"
    if not isinstance(root, Path) or not isinstance(group, Path):
        return None
    root, group = root.resolve(), group.resolve()
    return "../../" + Path(os.path.relpath(group, root)).as_posix() if root.drive == group.drive else None


def labels_exist(plan: LabelsPlan) -> bool:
    """Whether anything of that name is there, finished or not.

    Parameters
    ----------
    plan : LabelsPlan

    Returns
    -------
    exists : bool
        False for an empty folder or group, which holds nothing to lose.
    """
    if plan.name in _listed_labels(plan):
        return True
    if not plan.path.is_dir():
        return plan.path.exists()
    group = open_group(plan.path)
    if group is None:
        return any(plan.path.iterdir())
    return bool(dict(group.attrs)) or any(child.is_dir() for child in plan.path.iterdir())


def create_labels(plan: LabelsPlan, *, attributes: dict[str, Any]) -> None:
    """Make the groups and the empty arrays of all levels, not yet listed.

    What a killed run left is kept if it has the same arrays.

    Parameters
    ----------
    plan : LabelsPlan
    attributes : dict
        Attributes of the label image, ready for JSON, beside those of OME-Zarr.

    Raises
    ------
    OutputError
        If something else is in the way or the disk refuses.
    """
    import zarr

    try:
        sweep(*_draft_folders(plan))  # of writers that were killed
        # labels/ becomes a group in finish_labels: an image around a group that lists none is not valid.
        for path in (plan.root, plan.path):
            if open_group(path) is None:
                own = attributes if path == plan.path else {}
                zarr.create_group(new_store(path), zarr_format=zarr_format(plan.version), attributes=own)
        _must_open(plan.path).attrs.update(attributes)
        for level in range(plan.n_levels):
            _create_level(plan, level)
    except (OSError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{plan.path} cannot be made ({error}); choose another place with -o.") from error


def level_array(plan: LabelsPlan, level: int) -> Any:
    """Open one level for reading and writing.

    Parameters
    ----------
    plan : LabelsPlan
    level : int
        0 is full size.

    Returns
    -------
    array : zarr.Array of uint32, shape ``plan.level_shape(level)``

    Raises
    ------
    OutputError
        If it is not there.
    """
    import zarr

    try:
        folder = plan.path / str(level)
        store = zarr_store(folder, home=plan.root, drafts=folder / DRAFTS)
        return zarr.open_array(store, mode="r+", zarr_format=zarr_format(plan.version))
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(f"{plan.path}/{level} cannot be opened ({error}); start the run again.") from error


def read_level(plan: LabelsPlan, level: int, region: tuple[slice, ...]) -> npt.NDArray[np.uint32]:
    """Read what was published.

    Parameters
    ----------
    plan : LabelsPlan
    level : int
        0 is full size.
    region : tuple of slice
        One per axis, step 1, inside the level.

    Returns
    -------
    labels : array of uint32, shape of `region`

    Raises
    ------
    OutputError
        If a chunk is damaged, or the level is not there.
    """
    array = level_array(plan, level)
    try:
        labels: npt.NDArray[np.uint32] = np.asarray(array[region])
    except BAD_FILE as error:
        if isinstance(error, OSError | MemoryError | TiledsegError):
            raise
        raise OutputError(
            f"chunk {', '.join(failing_chunks(array, region)) or region} of {plan.path}/{level} is damaged ({error}); "
            f"delete {plan.path}, then run the same command again: labels are published again from what is done."
        ) from error
    return labels


def finish_labels(plan: LabelsPlan) -> None:
    """Write the metadata of the label image and list it; the last step, and safe to repeat.

    Parameters
    ----------
    plan : LabelsPlan

    Raises
    ------
    OutputError
        If :func:`create_labels` was not called.
    """
    import zarr

    sweep(*_draft_folders(plan))
    for drafts in _draft_folders(plan):
        if drafts.name == DRAFTS:
            shutil.rmtree(drafts, ignore_errors=True)
    label_info: dict[str, Any] = {} if plan.source is None else {"source": {"image": plan.source}}
    if plan.version == "0.4":
        label_info["version"] = "0.4"
    steps = [step or 1.0 for step in plan.spacing]
    factors = [level_factors(plan.axes, plan.shape, level, plan.thickness) for level in range(plan.n_levels)]
    scales = [[step * factor for step, factor in zip(steps, of, strict=True)] for of in factors]
    entry = multiscales(plan.name, plan.axes, plan.units, scales, [list(plan.translation)] * plan.n_levels)
    entry["type"] = "nearest"
    entry["metadata"] = {"description": "every second pixel of the level before", "method": "tiledseg"}
    update_ome(_must_open(plan.path), plan.version, {"multiscales": [entry], "image-label": label_info})
    listed = _listed_labels(plan)
    if plan.name not in listed:
        if open_group(plan.root / "labels") is None:
            zarr.create_group(new_store(plan.root / "labels"), zarr_format=zarr_format(plan.version))
        update_ome(_must_open(plan.root / "labels"), plan.version, {"labels": [*listed, plan.name]})
    _refresh_consolidated(plan.root)


def remove_labels(plan: LabelsPlan) -> None:
    """Unlist the labels and delete them; nothing happens if there are none.

    Parameters
    ----------
    plan : LabelsPlan
    """
    listed = _listed_labels(plan)
    if plan.name in listed:
        left = [name for name in listed if name != plan.name]
        update_ome(_must_open(plan.root / "labels"), plan.version, {"labels": left})
    remove_tree(plan.path)
    folder = plan.root / "labels"
    metadata = {"zarr.json", ".zgroup", ".zattrs", ".zmetadata"}
    if folder.is_dir() and not _listed_labels(plan) and {child.name for child in folder.iterdir()} <= metadata:
        remove_tree(folder)  # a group that lists no labels would make the image around it invalid
    _refresh_consolidated(plan.root)


def _refresh_consolidated(root: Location) -> None:
    """Where a container keeps a copy of all metadata, make it tell of what has changed."""
    import zarr

    if not root.is_dir():
        return
    with warnings.catch_warnings():
        # zarr warns that the copy is no part of the specification of Zarr 3; here it is there already.
        warnings.simplefilter("ignore", UserWarning)
        try:
            zarr.open_consolidated(zarr_store(root))
        except (OSError, ValueError, KeyError):
            return
        zarr.consolidate_metadata(zarr_store(root))


def label_names(root: Location) -> list[str]:
    """Names of the label images that a group lists.

    Parameters
    ----------
    root : Path or RemotePath
        Group around ``labels/``.

    Returns
    -------
    names : list of str
        In the order listed; none if there is no such group.

    Raises
    ------
    ImageError
        If its list cannot be read, or names something outside.
    """
    if isinstance(root, Path) and not root.is_dir():
        return []
    group = open_group(root / "labels")
    names = ome_attributes(group).get("labels", []) if group is not None else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ImageError(f"{root / 'labels'} lists its labels as {names!r}; correct its metadata.")
    for name in names:
        if not name or {"..", "", "."} & set(name.split("/")) or set(name) & set("\\:\0"):
            raise ImageError(f"{root / 'labels'} names the labels {name!r}, which are not inside it; refused.")
    return names


def open_labels(path: str | Path) -> Any:
    """A label image by path or address, as an array that can be sliced.

    Parameters
    ----------
    path : path
        A label image or any array of integers; an OME-Zarr with exactly one label image stands for
        that one.

    Returns
    -------
    labels : array-like, shape of level 0

    Raises
    ------
    ImageError
        If there is nothing there, or several label images to choose from.
    """
    folder = location(path)
    names = label_names(folder)
    if len(names) > 1:
        raise ImageError(f"{path} holds labels {', '.join(names)}; give one, as in {path}/labels/{names[0]}.")
    return LevelZero(open_image(str(folder / "labels" / names[0]) if names else path))


class LevelZero:
    """Level 0 of an image as something that has a shape and can be sliced."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.shape = image.shape
        self.dtype = image.dtype
        self.chunks = image.levels[0].chunks

    def __getitem__(self, region: Any) -> npt.NDArray[Any]:
        """Read a region given as slices of step 1, and whole numbers, which drop their axis."""
        parts = region if isinstance(region, tuple) else (region,)
        parts = (*parts, *(slice(None),) * (len(self.shape) - len(parts)))
        read: list[slice] = []
        kept: list[Any] = []
        for part, n in zip(parts, self.shape, strict=True):
            if not isinstance(part, slice):
                part = range(n)[part]
                read.append(slice(part, part + 1))
                kept.append(0)
                continue
            start, stop, step = part.indices(n)
            if step != 1:
                raise SettingsError(f"labels are read with steps of 1, not {step}.")
            read.append(slice(start, max(start, stop)))
            kept.append(slice(None))
        pixels = self._image.read(0, tuple(read))
        return np.asarray(pixels[tuple(kept)])


def _draft_folders(plan: LabelsPlan) -> list[Path]:
    """Folders in which files of the labels are written before they get their name; none of a remote store's."""
    if not isinstance(plan.path, Path):
        return []
    levels = [plan.path / str(level) for level in range(plan.n_levels)]
    return [plan.path.parent, plan.path, *levels, *(level / DRAFTS for level in levels)]


def _listed_labels(plan: LabelsPlan) -> list[str]:
    """Names in the labels group, none if it is not there."""
    group = open_group(plan.root / "labels")
    names = ome_attributes(group).get("labels", []) if group is not None else []
    if not isinstance(names, list):
        raise OutputError(f"{plan.root / 'labels'} lists its labels as {names!r}; correct its metadata.")
    return names


def _must_open(path: Location) -> Any:
    """An existing group."""
    group = open_group(path)
    if group is None:
        raise OutputError(f"{path} is missing; start the run again.")
    return group


def _container(root: Location) -> tuple[str | None, int]:
    """OME-Zarr version that an existing container demands, and the levels if it is an image."""
    if not root.is_dir() or not any(root.iterdir()):
        return None, 0
    group = open_group(root)
    if group is None:
        raise OutputError(f"{root} exists and is neither empty nor a Zarr group; choose another place with -o.")
    entries = ome_attributes(group).get("multiscales")
    entry = entries[0] if isinstance(entries, list) and entries else None
    datasets = entry.get("datasets") if isinstance(entry, dict) else None
    return ("0.4" if group.metadata.zarr_format == 2 else "0.5"), len(datasets or [])


def _create_level(plan: LabelsPlan, level: int) -> None:
    """Make one level, or check that what is there is the same."""
    path = plan.path / str(level)
    shape, chunks = plan.level_shape(level), plan.level_chunks(level)
    if not is_zarr(path):
        kind, shards = np.dtype(np.uint32), plan.level_shards(level)
        create_array(path, plan.version, plan.axes, shape, chunks, kind, keep_empty=False, shards=shards)
        return
    found = level_array(plan, level)
    wanted = (shape, chunks, plan.level_shards(level), np.dtype(np.uint32))
    if (found.shape, found.chunks, found.shards, found.dtype) != wanted:
        raise OutputError(
            f"{path} is left from another run (shape {found.shape}, chunks {found.chunks}, {found.dtype}); "
            f"delete {plan.path} or choose another name with --name."
        )
