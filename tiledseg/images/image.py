"""An opened image: its metadata, and its pixels region by region in the canonical order of axes.

Only a path travels to other processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from ..axes import spatial_axes
from ..cores import CORES
from ..displayed import Displayed
from ..errors import ImageError, TiledsegError
from ..meters import metered
from ..remote import Location, absent
from ..waiting import is_stored
from .damage import BAD_FILE, TornError, WholeFiles, failing_chunks, stored_keys
from .display import Display
from .recent import RecentChunks
from .units import MICROMETERS

__all__ = ["DROPPED", "Image", "Level", "MemorySource", "Source", "listed_names"]

DROPPED = "-"  # stands in the disk order for an axis of length 1 that an image does not have
_SHOWN = 5
_DESCRIBED = ("path", "shape", "chunks", "scale", "offset")


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
    number: int
    """Position among the stored levels, 0 the finest."""
    start: tuple[int, ...]
    """Stored pixels before pixel 0 per axis of `Image.axes`: more than 0 if the image is part of what is stored."""
    stored_shape: tuple[int, ...]
    """Stored pixels per axis of `Image.axes`."""


class Source(Protocol):
    """Where pixels come from: opens lazily, and in another process anew."""

    @property
    def axes(self) -> str:
        """Axes in the order on disk; ``-`` for an axis to be dropped."""

    def open(self, level: int, path: str) -> Any:
        """The array of one stored level, which can be sliced."""

    def chunk_folder(self, path: str) -> Location | None:
        """Folder of a level's chunks, None for what is no stored Zarr."""


@dataclass(frozen=True, repr=False)
class Image(Displayed):
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
    writable_group: Location | None = None
    """OME-Zarr image that labels can be written into."""
    zarr_format: int | None = None
    ome_version: str | None = None
    displays: tuple[Display, ...] = ()
    """How each channel is shown, empty if the file does not say."""
    within: tuple[tuple[float, float], ...] = ()
    """Per axis where pixel 0 begins and how wide a pixel is, in pixels of the full-size image; empty for all of it."""
    recent: RecentChunks | None = field(default=None, compare=False)
    """What was read lately, for a run, during which images do not change."""

    def __repr__(self) -> str:
        sides = " x ".join(map(str, self.shape))
        n = len(self.levels)
        return f"<Image {self.name}: {self.axes} {sides}, {self.dtype}, {n} level{'s' if n > 1 else ''}>"

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels of level 0 per axis."""
        return self.levels[0].shape

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Pixels stored per axis, of which those of level 0 may be a part."""
        return self.levels[0].stored_shape

    @property
    def position(self) -> tuple[int, ...]:
        """Pixels of `full_shape` that lie before pixel 0 of level 0, per axis."""
        return self.levels[0].start

    @property
    def placement(self) -> tuple[tuple[float, float], ...]:
        """As `within`, also of an image that is no part of another."""
        return self.within or ((0.0, 1.0),) * len(self.axes)

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

    def for_a_run(self) -> Image:
        """The same image, which remembers what was read lately: it must not change meanwhile."""
        return replace(self, recent=RecentChunks())

    def spacing_um(self) -> tuple[float, ...] | None:
        """Size of a level-0 pixel in micrometres per spatial axis, None unless all are known."""
        found = []
        for letter in self.spatial_axes:
            at = self.axes.index(letter)
            spacing, unit = self.spacing[at], self.units[at]
            if spacing is None or unit not in MICROMETERS:
                return None
            found.append(spacing * MICROMETERS[unit])
        return tuple(found)

    def plane_thickness(self) -> float | None:
        """Thickness of a plane in pixels of x, None if there are no planes or if sizes or units do not say."""
        if "z" not in self.axes:
            return None
        where = [self.axes.index(axis) for axis in "zx"]
        (thick, wide), units = (self.spacing[i] for i in where), {self.units[i] for i in where}
        if thick is None or wide is None:
            return None
        if len(units) > 1:
            in_um = self.spacing_um()
            return None if in_um is None else in_um[0] / in_um[-1]
        return thick / wide

    @metered("read")
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
        RemoteError
            If the store cannot be reached, or refuses.
        """
        bounds = self._bounds(level, region)
        array = self._array(level)
        selection = self._on_disk(level, bounds)
        is_zarr = hasattr(array, "metadata")
        try:
            with self._reached(level), CORES.lent():
                whole = WholeFiles(array, self._folder(level)) if is_zarr else array
                recent, path = self.recent if is_zarr else None, self.levels[level].path
                pixels: Any = whole[selection] if recent is None else recent.read(whole, path, selection)
            if hasattr(pixels, "__dask_graph__"):
                pixels = pixels.compute(scheduler="threads")
        except TornError as error:
            self._raise_corrupt(level, bounds, error.keys, str(error), None)
        except BAD_FILE as error:
            if isinstance(error, TiledsegError) or not self.is_shippable:
                raise
            failing = failing_chunks(array, selection) if is_zarr else []
            if not failing and isinstance(error, MemoryError):
                raise
            self._raise_corrupt(level, bounds, failing, str(error) or type(error).__name__, error)
        kept = self.source.axes.replace(DROPPED, "")
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
            Storage keys such as ``"0/c/1/2"`` (of shards, if there are any) of a Zarr; empty for other sources.
        """
        bounds = self._bounds(level, region)
        folder = self._folder(level)
        if folder is None:
            return []
        keys = stored_keys(self._array(level), self._on_disk(level, bounds))
        with self._reached(level):
            if isinstance(folder, Path):
                missing = [key for key in keys if not is_stored(folder / key, folder)]
            else:
                missing = absent(folder, keys)
            return [_join(self.levels[level].path, key) for key in missing]

    def describe(self) -> dict[str, Any]:
        """What is known about the image, ready for JSON."""
        return {
            "name": self.name,
            "axes": self.axes,
            "dtype": str(self.dtype),
            "shape": list(self.shape),
            "position": list(self.position),
            "full_shape": list(self.full_shape),
            "spacing": list(self.spacing),
            "units": list(self.units),
            "translation": list(self.translation),
            "spacing_um": self.spacing_um(),
            "channels": list(self.channels),
            "zarr_format": self.zarr_format,
            "ome_version": self.ome_version,
            "levels": [{key: _plain(getattr(level, key)) for key in _DESCRIBED} for level in self.levels],
        }

    def _array(self, level: int) -> Any:
        """The array of one level, in the order on disk."""
        try:
            return self.source.open(self.levels[level].number, self.levels[level].path)
        except BAD_FILE as error:
            if isinstance(error, TiledsegError):
                raise
            raise ImageError(f"{self._where(level)} can no longer be opened: {error}.") from error

    @contextlib.contextmanager
    def _reached(self, level: int) -> Iterator[None]:
        """Say so if a level cannot be reached, rather than that it is damaged."""
        try:
            yield
        except TimeoutError as error:
            raise ImageError(
                f"{self._where(level)} cannot be reached: {error.strerror or error}; see that its disk or server is "
                "there, then run the same command again: what is done is kept."
            ) from error

    def _folder(self, level: int) -> Location | None:
        """Folder of a level's chunks, None for what is no stored Zarr."""
        return self.source.chunk_folder(self.levels[level].path)

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

    def _on_disk(self, level: int, bounds: Sequence[tuple[int, int]]) -> tuple[slice | int, ...]:
        """The selection of stored pixels, in the order on disk."""
        starts = self.levels[level].start
        parts = {
            letter: slice(start + low, start + high)
            for letter, start, (low, high) in zip(self.axes, starts, bounds, strict=True)
        }
        return tuple(0 if letter == DROPPED else parts[letter] for letter in self.source.axes)

    def _raise_corrupt(self, level: int, bounds: Any, keys: list[str], why: str, cause: Exception | None) -> NoReturn:
        """Raise an error that names the chunks and the region."""
        region = ", ".join(f"{a} {start}:{stop}" for a, (start, stop) in zip(self.axes, bounds, strict=True))
        what = f"chunk {listed_names(keys)} of {self._where(level)}" if keys else self._where(level)
        why = why.rstrip(".")
        advice = "restore the file or write the image again"
        raise ImageError(f"{what} cannot be read ({why}) for region {region}; {advice}.") from cause


@dataclass(frozen=True, eq=False)
class MemorySource:
    """An array the caller holds."""

    array: Any
    axes: str

    def open(self, level: int, path: str) -> Any:  # noqa: ARG002
        """The array itself."""
        return self.array

    def chunk_folder(self, path: str) -> None:
        """None: nothing is stored."""

    def __reduce__(self) -> NoReturn:
        raise ImageError(
            "an array in memory cannot be sent to other processes; save it as OME-Zarr or TIFF and open that."
        )


def listed_names(names: Sequence[str]) -> str:
    """Join the first few names and count the rest, for messages.

    Parameters
    ----------
    names : sequence of str

    Returns
    -------
    text : str
        For example ``"a, b, c, d, e and 3 more"``; empty if there are none.
    """
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path and key else path or key
