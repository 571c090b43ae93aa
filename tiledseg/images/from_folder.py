"""Opening many TIFF files as one image: a pattern says what the numbers in their names mean.

``stack/{t}/dapi_{z}.tif`` is a series of volumes, ``tiles/r{y}_c{x}.tif`` a picture in tiles side by side. Nothing
is guessed from names: what no letter stands for must be the same in all.
"""

from __future__ import annotations

import glob
import itertools
import logging
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..axes import ALL_AXES, canonical_order
from ..errors import ImageError
from .assembly import StoredLevel, assemble_image, channel_names
from .from_tiff import open_tiff
from .image import Image, listed_names

__all__ = ["FolderSource", "has_letters", "open_folder"]

_log = logging.getLogger(__name__)

_LETTER = re.compile(r"\{([tczyx])\}")
_TILED = "yx"


@dataclass(frozen=True)
class FolderSource:
    """Files of TIFF whose names follow a pattern."""

    pattern: str
    axes: str
    """Those that letters of the pattern stand for, but for tiles, then those of the files."""
    names: tuple[tuple[str, tuple[str, ...]], ...]
    """Per letter of the pattern what stands in its place, in order."""
    starts: tuple[tuple[str, tuple[int, ...]], ...]
    """Per axis of tiles the first pixel of each, and one past the last."""
    file_axes: str | None
    """As given for the files."""
    file_shape: tuple[int, ...]
    """Of those that are no tiles at the far edges."""
    dtype: str
    stamp: int

    def open(self, level: int, path: str) -> Any:  # noqa: ARG002
        """All files as one array."""
        return _Files(self)

    def chunk_folder(self, path: str) -> None:
        """None: the chunks lie inside the files."""


def has_letters(path: Path) -> bool:
    """Whether a path is a pattern: it holds ``{t}``, ``{c}``, ``{z}``, ``{y}`` or ``{x}``."""
    return _LETTER.search(str(path)) is not None


def open_folder(path: Path, axes: str | None) -> Image:
    """Open files as one image.

    Parameters
    ----------
    path : path
        With ``{t}``, ``{c}``, ``{z}`` for files that are planes or stacks, and ``{y}``, ``{x}`` for tiles that lie
        side by side without overlap, in place of what differs. Numbers are in numeric order, names of channels
        in alphabetical.
    axes : str, optional
        Axes of each file, where it does not say them.

    Returns
    -------
    image : Image

    Raises
    ------
    ImageError
        If files are missing or do not fit each other.
    """
    names, stamp = _found(path)
    first = _open_file(_name_of(str(path), {letter: texts[0] for letter, texts in names.items()}), axes, stamp)
    twice = [letter for letter in names if letter in first.axes and letter not in _TILED]
    if twice:
        raise ImageError(
            f"{path} names {twice[0]!r}, which the files have themselves (axes {first.axes!r}); leave it out."
        )
    stacked = canonical_order("".join(letter for letter in names if letter not in _TILED))
    starts = {letter: _starts(path, letter, names, axes, stamp) for letter in _TILED if letter in names}
    disk_axes = stacked + first.axes
    sizes = dict(zip(first.axes, first.shape, strict=True))
    sizes |= {letter: len(names[letter]) for letter in stacked} | {a: edges[-1] for a, edges in starts.items()}
    chunks = dict(zip(first.axes, first.levels[0].chunks, strict=True))
    spacing = dict(zip(first.axes, first.spacing, strict=True))
    units = dict(zip(first.axes, first.units, strict=True))
    level = StoredLevel(
        "",
        [sizes[axis] for axis in disk_axes],
        [chunks.get(axis, 1) for axis in disk_axes],
        [spacing.get(axis) or 0.0 for axis in disk_axes],
    )
    source = FolderSource(
        pattern=str(path.absolute()),
        axes=disk_axes,
        names=tuple(names.items()),
        starts=tuple(starts.items()),
        file_axes=axes,
        file_shape=first.shape,
        dtype=first.dtype.str,
        stamp=stamp,
    )
    image = assemble_image(str(path), source, first.dtype, [level], [units.get(axis) for axis in disk_axes])
    _log.info("%s: %s.", path, "; ".join(_said(letter, texts) for letter, texts in names.items()))
    known = names.get("c", ()) if not all(text.isdigit() for text in names.get("c", ())) else ()
    return replace(image, channels=channel_names(known if "c" in stacked else first.channels, image.n_channels))


class _Files:
    """All files of a pattern as one array."""

    def __init__(self, source: FolderSource) -> None:
        self._source = source
        self._names, self._starts = dict(source.names), dict(source.starts)
        n_own = len(source.file_shape)
        self._stacked, self._own = source.axes[:-n_own], source.axes[-n_own:]

    def __getitem__(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read a region given as one slice per axis."""
        parts = dict(zip(self._source.axes, selection, strict=True))
        pixels = np.empty([part.stop - part.start for part in selection], np.dtype(self._source.dtype))
        places = {axis: self._places(axis, parts[axis]) for axis in self._names}
        for chosen in itertools.product(*places.values()):
            at = dict(zip(places, chosen, strict=True))
            texts = {axis: self._names[axis][place[0]] for axis, place in at.items()}
            inner = tuple(at[axis][1] if axis in at else parts[axis] for axis in self._own)
            outer = tuple(at[axis][2] if axis in at else slice(None) for axis in self._source.axes)
            image = self._file(texts, {axis: place[0] for axis, place in at.items()})
            own = image.read(0, inner)
            pixels[outer] = own.reshape((1,) * len(self._stacked) + own.shape)
        return pixels

    def _places(self, axis: str, part: slice) -> list[tuple[int, slice, slice]]:
        """Which files a range touches: number, part of the file, and where it lies in the range."""
        if axis not in self._starts:
            return [(i, slice(0, 1), slice(i - part.start, i - part.start + 1)) for i in range(part.start, part.stop)]
        places = []
        for number, (low, high) in enumerate(itertools.pairwise(self._starts[axis])):
            first, last = max(low, part.start), min(high, part.stop)
            if first < last:
                places.append((number, slice(first - low, last - low), slice(first - part.start, last - part.start)))
        return places

    def _file(self, texts: dict[str, str], numbers: dict[str, int]) -> Image:
        """A file, which must have the shape that its place wants."""
        source = self._source
        name = _name_of(source.pattern, texts)
        image = _open_file(name, source.file_axes, source.stamp)
        wanted = list(source.file_shape)
        for axis, edges in self._starts.items():
            wanted[self._own.index(axis)] = edges[numbers[axis] + 1] - edges[numbers[axis]]
        if (image.axes, image.shape, image.dtype) != (self._own, tuple(wanted), np.dtype(source.dtype)):
            raise ImageError(
                f"{name} has axes {image.axes!r}, shape {image.shape} and dtype {image.dtype}, but {self._own!r}, "
                f"{tuple(wanted)} and {np.dtype(source.dtype)} would fit the other files; replace it."
            )
        return image


@lru_cache(maxsize=64)
def _open_file(path: str, axes: str | None, stamp: int) -> Image:  # noqa: ARG001
    """One of the files; the stamp keys the cache only."""
    if not Path(path).is_file():
        raise ImageError(f"{path} is missing; restore it.")
    return open_tiff(Path(path), axes, aloud=False)


def _name_of(pattern: str, texts: dict[str, str]) -> str:
    """The file of a pattern with these texts in place of its letters."""
    return _LETTER.sub(lambda found: texts[found.group(1)], pattern)


def _found(path: Path) -> tuple[dict[str, tuple[str, ...]], int]:
    """Per letter of a pattern what stands in its place, in order; and a number that changes with the files."""
    at = next(i for i, part in enumerate(path.parts) if _LETTER.search(part))
    home, rest = Path(*path.parts[:at]), "/".join(path.parts[at:])
    pieces, letters = _LETTER.split(rest)[::2], _LETTER.findall(rest)
    expression, seen = re.escape(pieces[0]), set[str]()
    for letter, piece in zip(letters, pieces[1:], strict=True):
        text = "[^/]+?" if letter == "c" else "[0-9]+"
        expression += f"(?P={letter})" if letter in seen else f"(?P<{letter}>{text})"
        expression += re.escape(piece)
        seen.add(letter)
    files = sorted(home.glob("*".join(map(glob.escape, pieces)))) if home.is_dir() else []
    fitting = {file: re.fullmatch(expression, file.relative_to(home).as_posix()) for file in files}
    groups = {file: found.groupdict() for file, found in fitting.items() if found}
    if not groups:
        raise ImageError(f"{path} fits no file; check the names in {home}.")
    if len(groups) < len(files):
        left = [file.name for file in files if file not in groups]
        _log.warning("%s: %d files do not fit and are left out: %s.", path, len(left), listed_names(left))
    names = {
        letter: _in_order(path, letter, {of[letter] for of in groups.values()}) for letter in ALL_AXES if letter in seen
    }
    there = {tuple(of[letter] for letter in names) for of in groups.values()}
    for texts in itertools.product(*names.values()):
        if texts not in there:
            missing = _name_of(rest, dict(zip(names, texts, strict=True)))
            raise ImageError(f"{path} fits {len(groups)} files, but {home / missing} is missing; restore it.")
    stamps = [f"{file}:{file.stat().st_mtime_ns}" for file in groups]
    return names, zlib.crc32("\n".join(stamps).encode())


def _in_order(path: Path, letter: str, texts: set[str]) -> tuple[str, ...]:
    """Texts by number, or by name where they are no numbers."""
    if not all(text.isascii() and text.isdigit() for text in texts):
        return tuple(sorted(texts))
    ordered = sorted(texts, key=int)
    numbers = [int(text) for text in ordered]
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if 0 in steps:
        raise ImageError(
            f"{path}: several files have the same number for {letter!r} ({listed_names(ordered)}); rename them."
        )
    if len(steps) > 1:
        gap = next(a + min(steps) for a, b in itertools.pairwise(numbers) if b - a != min(steps))
        raise ImageError(f"{path}: {letter} goes from {numbers[0]} to {numbers[-1]} but {gap} is missing; restore it.")
    return tuple(ordered)


def _starts(
    path: Path, letter: str, names: dict[str, tuple[str, ...]], axes: str | None, stamp: int
) -> tuple[int, ...]:
    """First pixel of every tile along an axis, from the sizes of those in the first row or column."""
    others = {of: texts[0] for of, texts in names.items()}
    sizes = []
    for text in names[letter]:
        image = _open_file(_name_of(str(path), {**others, letter: text}), axes, stamp)
        sizes.append(image.shape[image.axes.index(letter)])
    if len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]:
        raise ImageError(
            f"{path}: tiles along {letter} have sizes {listed_names([str(n) for n in sizes])}; only the last may be "
            "smaller."
        )
    return tuple(itertools.accumulate(sizes, initial=0))


def _said(letter: str, texts: Sequence[str]) -> str:
    """What a letter was found to stand for."""
    return (
        f"{letter} is {texts[0]}" if len(texts) == 1 else f"{letter} is {texts[0]} to {texts[-1]}, {len(texts)} of them"
    )
