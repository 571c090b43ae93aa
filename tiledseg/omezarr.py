"""Labels, pyramids and metadata out: OME-Zarr 0.4 and 0.5 with plain zarr.

Labels lie in ``ROOT/labels/NAME/0..n``, where ROOT is the image itself or a group of its own. They are
listed last, so a half-written image is never shown. One process writes metadata; chunks may be
written by many, one whole chunk at a time.

References
----------
OME-Zarr 0.4 and 0.5, sections "multiscales", "labels" and "omero" metadata.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .axes import canonical_order, check_axes, spatial_axes
from .errors import OutputError, SettingsError

if TYPE_CHECKING:
    from .images import Image

__all__ = [
    "LabelsPlan",
    "create_labels",
    "finish_labels",
    "labels_exist",
    "level_array",
    "plan_labels",
    "remove_labels",
    "write_image",
]

_FORMATS = {"0.4": 2, "0.5": 3}
_CHUNK = 1024
_CHUNK_Z = 16
_KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
_COLORS = ("0000FF", "00FF00", "FF0000", "FF00FF", "00FFFF", "FFFF00", "FFFFFF")


@dataclass(frozen=True)
class LabelsPlan:
    """Where labels go, and how they are stored."""

    root: Path
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
    in_image: bool
    """Whether `root` is the image the labels were made from."""

    @property
    def path(self) -> Path:
        """Folder of the label image."""
        return self.root / "labels" / self.name

    @property
    def zarr_format(self) -> int:
        """2 or 3."""
        return _FORMATS[self.version]

    def level_shape(self, level: int) -> tuple[int, ...]:
        """Pixels of a level per axis."""
        return _level_shape(self.axes, self.shape, level)

    def level_chunks(self, level: int) -> tuple[int, ...]:
        """Pixels of a chunk of a level per axis."""
        return tuple(map(min, self.chunks, self.level_shape(level)))


def plan_labels(image: Image, output: Path | None, name: str, version: str | None) -> LabelsPlan:
    """Decide where labels go; writes nothing.

    Parameters
    ----------
    image : Image
        What was segmented.
    output : path, optional
        Group to hold the labels, made if it is missing. None is the image itself.
    name : str
        Of the labels: letters, digits, ``-``, ``_`` and ``.``.
    version : str, optional
        Of OME-Zarr. None is that of the image or of an existing `output`, else ``"0.5"``.

    Returns
    -------
    plan : LabelsPlan

    Raises
    ------
    SettingsError
        If the name is no plain name, or the version unknown or another than that of the container.
    OutputError
        If labels cannot be written there.

    Notes
    -----
    Whether labels of that name are there already is for :func:`labels_exist` to say, because a run that
    is resumed finds its own.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or name == "zarr.json":
        raise SettingsError(
            f"labels name {name!r} is not allowed; use letters, digits, - _ and . only (--name)."
        )
    if version is not None and version not in _FORMATS:
        raise SettingsError(f"OME-Zarr version {version!r} cannot be written; use 0.4 or 0.5.")
    if output is None and image.writable_group is None:
        raise OutputError(
            f"{image.name} is no OME-Zarr image that can hold labels; say where with -o OUT.zarr."
        )
    root = Path(output) if output is not None else Path(image.writable_group or "")
    found, n_datasets = _container(root)
    if None not in (found, version) and found != version:
        raise SettingsError(f"{root} is OME-Zarr {found}, not {version}; leave out the version.")
    _check_writable(root)
    keep = [at for at, letter in enumerate(image.axes) if letter != "c"]
    axes = "".join(image.axes[at] for at in keep)
    shape = tuple(image.shape[at] for at in keep)
    known = [image.spacing[at] is not None for at in keep]
    return LabelsPlan(
        root=root,
        name=name,
        version=version or found or "0.5",
        axes=axes,
        shape=shape,
        spacing=tuple(image.spacing[at] for at in keep),
        translation=tuple(image.translation[at] for at in keep),
        units=tuple(image.units[at] if is_known else None for at, is_known in zip(keep, known, strict=True)),
        # The specification: as many levels as the image around the labels has.
        n_levels=n_datasets or _count_levels(axes, shape, _CHUNK),
        chunks=_chunk_shape(axes, shape, _CHUNK),
        in_image=image.writable_group is not None and root.resolve() == Path(image.writable_group).resolve(),
    )


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
    group = _open_group(plan.path)
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
        # labels/ becomes a group in finish_labels: an image around a group that lists none is not valid.
        for path in (plan.root, plan.path):
            if _open_group(path) is None:
                own = attributes if path == plan.path else {}
                zarr.create_group(path, zarr_format=_zarr_format(plan.version), attributes=own)
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
        return zarr.open_array(plan.path / str(level), mode="r+", zarr_format=_zarr_format(plan.version))
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(f"{plan.path}/{level} cannot be opened ({error}); start the run again.") from error


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

    for leftover in [*plan.path.rglob("*.partial"), *plan.path.parent.glob("*.partial")]:
        leftover.unlink(missing_ok=True)  # of writers that were killed
    label_info: dict[str, Any] = {"source": {"image": "../../"}} if plan.in_image else {}
    if plan.version == "0.4":
        label_info["version"] = "0.4"
    steps = [step or 1.0 for step in plan.spacing]
    scales = [
        [step * (2**level if axis in "yx" else 1) for axis, step in zip(plan.axes, steps, strict=True)]
        for level in range(plan.n_levels)
    ]
    entry = _multiscales(plan.name, plan.axes, plan.units, scales, [list(plan.translation)] * plan.n_levels)
    entry["type"] = "nearest"
    entry["metadata"] = {"description": "every second pixel of the level before", "method": "tiledseg"}
    _update_ome(_must_open(plan.path), plan.version, {"multiscales": [entry], "image-label": label_info})
    listed = _listed_labels(plan)
    if plan.name in listed:
        return
    if _open_group(plan.root / "labels") is None:
        zarr.create_group(plan.root / "labels", zarr_format=_zarr_format(plan.version))
    _update_ome(_must_open(plan.root / "labels"), plan.version, {"labels": [*listed, plan.name]})


def remove_labels(plan: LabelsPlan) -> None:
    """Unlist the labels and delete them; nothing happens if there are none.

    Parameters
    ----------
    plan : LabelsPlan
    """
    listed = _listed_labels(plan)
    if plan.name in listed:
        left = [name for name in listed if name != plan.name]
        _update_ome(_must_open(plan.root / "labels"), plan.version, {"labels": left})
    if plan.path.is_symlink():
        plan.path.unlink()
    elif plan.path.exists():
        shutil.rmtree(plan.path)
    folder = plan.root / "labels"
    metadata = {"zarr.json", ".zgroup", ".zattrs", ".zmetadata"}
    if (
        folder.is_dir()
        and not _listed_labels(plan)
        and {child.name for child in folder.iterdir()} <= metadata
    ):
        shutil.rmtree(folder)  # a group that lists no labels would make the image around it invalid


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
    path : path
        Must not exist, or be an empty folder.
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

    path = Path(path)
    space = spatial_axes(axes)
    n_channels = _check_image(path, array.shape, axes, spacing_um, channels, version)
    steps = dict(zip(space, spacing_um, strict=True)) if spacing_um else {}
    count = n_levels or _count_levels(axes, array.shape, chunk)
    scales = [[steps.get(a, 1.0) * (2**k if a in "yx" else 1) for a in axes] for k in range(count)]
    shifts = [
        [steps.get(a, 1.0) * ((2**k - 1) / 2 if a in "yx" else 0.0) for a in axes] for k in range(count)
    ]
    group = zarr.create_group(path, zarr_format=_zarr_format(version))
    before: Any = array
    for level in range(count):
        shape = _level_shape(axes, array.shape, level)
        chunks = _chunk_shape(axes, shape, chunk)
        after = _create_array(path / str(level), version, axes, shape, chunks, array.dtype, keep_empty=True)
        for region in _regions(shape, chunks):
            after[region] = _pixels(before, region) if level == 0 else _mean(before, axes, region)
        before = after
    units = ["micrometer" if axis in steps else None for axis in axes]
    entry = _multiscales(path.name.split(".")[0], axes, units, scales, shifts)
    entry["type"] = "mean"
    entry["metadata"] = {"description": "mean of 2 x 2 pixels of the level before", "method": "tiledseg"}
    ome: dict[str, Any] = {"multiscales": [entry]}
    if n_channels:
        ome["omero"] = _omero(channels or [str(i) for i in range(n_channels)], np.dtype(array.dtype))
    _update_ome(group, version, ome)


def _check_image(
    path: Path,
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
    if version not in _FORMATS or axes != canonical_order(axes):
        raise SettingsError(
            f"axes {axes!r} in OME-Zarr {version!r} cannot be written; use 'tczyx' in 0.4 or 0.5."
        )
    if (channels and len(channels) != n_channels) or (spacing_um and len(spacing_um) != n_spatial):
        raise SettingsError(f"{path} has axes {axes!r}; give {n_channels} channels and {n_spatial} spacings.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} exists already; choose another path.")
    _check_writable(path)
    return n_channels


# ---- metadata ------------------------------------------------------------------------------------


def _multiscales(
    name: str,
    axes: str,
    units: Sequence[str | None],
    scales: Sequence[Sequence[float]],
    translations: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """One entry of the multiscales list."""
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


def _ome(group: Any) -> dict[str, Any]:
    """The attributes OME-Zarr is about."""
    attributes = dict(group.attrs)
    inner = attributes.get("ome") if group.metadata.zarr_format == 3 else attributes
    return inner if isinstance(inner, dict) else {}


def _update_ome(group: Any, version: str, values: dict[str, Any]) -> None:
    """Add OME-Zarr attributes, leaving all others."""
    if _FORMATS[version] == 3:
        group.attrs.update({"ome": {**_ome(group), "version": version, **values}})
        return
    if "multiscales" in values:
        values = {**values, "multiscales": [{**entry, "version": version} for entry in values["multiscales"]]}
    group.attrs.update(values)


def _listed_labels(plan: LabelsPlan) -> list[str]:
    """Names in the labels group, none if it is not there."""
    group = _open_group(plan.root / "labels")
    names = _ome(group).get("labels", []) if group is not None else []
    if not isinstance(names, list):
        raise OutputError(f"{plan.root / 'labels'} lists its labels as {names!r}; correct its metadata.")
    return names


def _open_group(path: Path) -> Any:
    """An existing group, None if nothing is there."""
    import zarr

    if not any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray")):
        return None
    try:
        return zarr.open_group(path, mode="r+", use_consolidated=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{path} is no readable Zarr group ({error}); choose another place with -o."
        ) from error


def _must_open(path: Path) -> Any:
    """An existing group."""
    group = _open_group(path)
    if group is None:
        raise OutputError(f"{path} is missing; start the run again.")
    return group


def _container(root: Path) -> tuple[str | None, int]:
    """OME-Zarr version that an existing container demands, and the levels if it is an image."""
    if not root.is_dir() or not any(root.iterdir()):
        return None, 0
    group = _open_group(root)
    if group is None:
        raise OutputError(
            f"{root} exists and is neither empty nor a Zarr group; choose another place with -o."
        )
    entries = _ome(group).get("multiscales")
    entry = entries[0] if isinstance(entries, list) and entries else None
    datasets = entry.get("datasets") if isinstance(entry, dict) else None
    return ("0.4" if group.metadata.zarr_format == 2 else "0.5"), len(datasets or [])


def _check_writable(path: Path) -> None:
    """Refuse a path in which nothing can be written."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise OutputError(f"{existing} is a file, so {path} cannot be made; choose another place with -o.")
    inner = existing / "labels"
    for folder in (existing, inner) if existing == path and inner.exists() else (existing,):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{folder} cannot be written to; choose another place with -o.")


# ---- arrays --------------------------------------------------------------------------------------


def _create_level(plan: LabelsPlan, level: int) -> None:
    """Make one level, or check that what is there is the same."""
    path = plan.path / str(level)
    shape, chunks = plan.level_shape(level), plan.level_chunks(level)
    if not any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")):
        _create_array(path, plan.version, plan.axes, shape, chunks, np.dtype(np.uint32), keep_empty=False)
        return
    found = level_array(plan, level)
    if (found.shape, found.chunks, found.dtype) != (shape, chunks, np.dtype(np.uint32)):
        raise OutputError(
            f"{path} is left from another run (shape {found.shape}, chunks {found.chunks}, {found.dtype}); "
            f"delete {plan.path} or choose another name with --name."
        )


def _create_array(
    path: Path,
    version: str,
    axes: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    keep_empty: bool,
) -> Any:
    """An empty array, with checksums where the format has them."""
    import zarr
    from zarr.codecs import ZstdCodec

    own: dict[str, Any] = {
        "compressors": ZstdCodec(level=1, checksum=True),
        "dimension_names": axes,
    }
    if version == "0.4":
        # As a dict, because that is what zarr writes; other readers reject the key of numcodecs.Zstd.
        blosc = {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 0, "blocksize": 0}
        own = {"compressors": blosc, "chunk_key_encoding": {"name": "v2", "separator": "/"}}
    return zarr.create_array(
        path,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=0,
        zarr_format=_zarr_format(version),
        config={"write_empty_chunks": keep_empty},
        **own,
    )


def _zarr_format(version: str) -> Any:
    """2 or 3; Any because zarr wants a literal."""
    return _FORMATS[version]


def _level_shape(axes: str, shape: Sequence[int], level: int) -> tuple[int, ...]:
    """Half of y and x, rounded up, for every level."""
    return tuple(-(-n // 2**level) if axis in "yx" else n for axis, n in zip(axes, shape, strict=True))


def _chunk_shape(axes: str, shape: Sequence[int], chunk: int) -> tuple[int, ...]:
    """Planes of a side of `chunk`, a few along z."""
    wanted = {"t": 1, "c": 1, "z": _CHUNK_Z, "y": chunk, "x": chunk}
    return tuple(min(wanted[axis], n) for axis, n in zip(axes, shape, strict=True))


def _count_levels(axes: str, shape: Sequence[int], chunk: int) -> int:
    """Levels until y and x are both at most one chunk."""
    largest = max(n for axis, n in zip(axes, shape, strict=True) if axis in "yx")
    return 1 + max(0, math.ceil(math.log2(largest / chunk)))


def _regions(shape: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Every chunk of an array."""
    grid = [range(0, n, step) for n, step in zip(shape, chunks, strict=True)]
    for corner in product(*grid):
        yield tuple(
            slice(low, min(low + step, n)) for low, step, n in zip(corner, chunks, shape, strict=True)
        )


def _pixels(array: Any, region: tuple[slice, ...]) -> npt.NDArray[Any]:
    """Pixels of a numpy, dask or zarr array."""
    found = array[region]
    return np.asarray(found.compute(scheduler="threads") if hasattr(found, "compute") else found)


def _mean(finer: Any, axes: str, region: tuple[slice, ...]) -> npt.NDArray[Any]:
    """Means of 2 x 2 pixels; an odd last row or column counts twice."""
    wide = tuple(
        slice(2 * part.start, min(2 * part.stop, size)) if axis in "yx" else part
        for axis, part, size in zip(axes, region, finer.shape, strict=True)
    )
    pixels = _pixels(finer, wide)
    pad = [(0, pixels.shape[at] % 2 if axis in "yx" else 0) for at, axis in enumerate(axes)]
    pixels = np.pad(pixels, pad, mode="edge")
    *rest, height, width = pixels.shape
    means = pixels.reshape(*rest, height // 2, 2, width // 2, 2).mean(axis=(-3, -1), dtype=np.float64)
    rounded = np.rint(means) if pixels.dtype.kind in "ui" else means
    return np.asarray(rounded, dtype=pixels.dtype)


def open_labels(path: str | Path) -> Any:
    """A label image by path, as an array that can be sliced.

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
    from .images import open_image

    folder = Path(path)
    group = _open_group(folder / "labels") if folder.is_dir() else None
    names = [str(name) for name in _ome(group).get("labels", [])] if group is not None else []
    if len(names) > 1:
        raise ImageError(f"{path} holds labels {', '.join(names)}; give one, as in {path}/labels/{names[0]}.")
    return LevelZero(open_image(folder / "labels" / names[0] if names else path))


class LevelZero:
    """Level 0 of an image as something that has a shape and can be sliced."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.shape = image.shape
        self.dtype = image.dtype
        self.chunks = image.levels[0].chunks

    def __getitem__(self, region: Any) -> npt.NDArray[Any]:
        """Read a region given as slices."""
        parts = region if isinstance(region, tuple) else (region,)
        parts = (*parts, *(slice(None),) * (len(self.shape) - len(parts)))
        return self._image.read(0, tuple(slice(*p.indices(n)[:2]) for p, n in zip(parts, self.shape, strict=True)))
