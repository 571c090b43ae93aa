"""The scratch: where stages leave their arrays and what is done.

Layout of the scratch folder, the only home of these names::

    run.json                 settings, image and model of the run, and the batch on GPUs
    survey.json              percentiles, diameter, foreground summary
    totals.json              what all calls have cost
    survey.zarr/...          samples and foreground statistics per region, map of the normalisation
    flows.zarr               pieces of the flows chunks
    shortage.json            tiles that were computed in halved batches
    masks-<digest>/          one folder per set of mask settings
        labels.zarr          local labels of every padded block
        objects.zarr, ...    see masks.py, stitch.py, publish.py
    <stage>.journal          a line per piece that is done
    .drafts                  files that are being written
    lock                     held by the process that hands out the work, see lock.py

Done-marks are kept apart from the arrays: the
process that hands out the work appends a line after a piece is stored. A piece that was stored but
not yet noted when the process died is computed again, to the same bits.

What a task writes is on the disk when the task ends, and so before it is marked as done (disk.py). A store that
is gone for a while is waited for (waiting.py). What turns out to be damaged is named by a `ScratchError`, for
repair.py to take back its mark.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .chunks import chunk_key, compressors, encoded, is_encoded_so
from .cores import CORES
from .disk import DRAFTS, make_folders, make_home, sweep, sync_folder, write_whole
from .errors import OutputError, ScratchError
from .images.damage import BAD_FILE, failing_chunks
from .lock import LOCK
from .meters import carried, metered
from .waiting import is_stored, patiently

__all__ = ["DiskStore", "MemoryStore", "Store", "as_output_error", "disk_errors"]

SYNCED_AT_ONCE = 16
"""Files."""

Array = Any
"""A zarr or numpy array: both are read and written by slices."""


class Store(Protocol):
    """What a stage needs of the scratch."""

    def create(
        self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, codec: str = "lz4"
    ) -> None:
        """Make an array filled with 0; keep one that is there already."""

    def open(self, name: str) -> Array:
        """An array made before."""

    def save(self, name: str, values: npt.NDArray[Any]) -> None:
        """Store a small array whole."""

    def save_all(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Store small arrays, each whole."""

    def load(self, name: str) -> npt.NDArray[Any]:
        """A small array stored whole."""

    def view(self, name: str) -> npt.NDArray[Any]:
        """An array stored whole, to be read where it is indexed and not changed."""

    def done(self, stage: str) -> set[int]:
        """Numbers of the pieces of a stage that are stored."""

    def mark(self, stage: str, pieces: Iterable[int]) -> None:
        """Note pieces of a stage as stored."""

    def unmark(self, stage: str, pieces: Iterable[int]) -> None:
        """Take back that pieces of a stage are stored."""

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A small document, None if there is none."""

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Write a small document; it is there completely or not at all."""

    def remove(self, name: str) -> None:
        """Delete arrays, documents and done-marks whose name starts with `name`."""

    def discard(self) -> None:
        """Delete the whole scratch."""


class MemoryStore:
    """Scratch in the memory of this process, for images of a few blocks."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._documents: dict[str, dict[str, Any]] = {}
        self._done: dict[str, set[int]] = {}

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],  # noqa: ARG002
        dtype: str,
        codec: str = "lz4",  # noqa: ARG002
    ) -> None:
        """Make an array filled with 0; keep one that is there already."""
        self._arrays.setdefault(name, np.zeros(shape, dtype))

    def open(self, name: str) -> Array:
        """An array made before."""
        return self._arrays[name]

    def save(self, name: str, values: npt.NDArray[Any]) -> None:
        """Store a small array whole."""
        self._arrays[name] = values

    def save_all(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Store small arrays, each whole."""
        self._arrays.update(arrays)

    def load(self, name: str) -> npt.NDArray[Any]:
        """A small array stored whole."""
        return self._arrays[name]

    def view(self, name: str) -> npt.NDArray[Any]:
        """An array stored whole, to be read where it is indexed and not changed."""
        return self._arrays[name]

    def done(self, stage: str) -> set[int]:
        """Numbers of the pieces of a stage that are stored."""
        return set(self._done.get(stage, ()))

    def mark(self, stage: str, pieces: Iterable[int]) -> None:
        """Note pieces of a stage as stored."""
        self._done.setdefault(stage, set()).update(pieces)

    def unmark(self, stage: str, pieces: Iterable[int]) -> None:
        """Take back that pieces of a stage are stored."""
        self._done.get(stage, set()).difference_update(pieces)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A small document, None if there is none."""
        return self._documents.get(name)

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Write a small document."""
        self._documents[name] = document

    def remove(self, name: str) -> None:
        """Delete arrays, documents and done-marks whose name starts with `name`."""
        for kept in (self._arrays, self._documents, self._done):
            for key in [key for key in kept if key.startswith(name)]:
                del kept[key]

    def discard(self) -> None:
        """Delete the whole scratch."""
        self.remove("")


class DiskStore:
    """Scratch in a folder that every worker can reach.

    Parameters
    ----------
    path : Path
        The folder; made on first use. From then on, in this process and in those that it is sent to, a
        folder that is missing is one that is gone for a while.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_made = False
        self._opened: dict[str, _StoredArray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def begin(self) -> None:
        """Make the folder, or remove what killed writers left in it."""
        self._make()
        with disk_errors(self._drafts):
            sweep(self._drafts)

    @property
    def _home(self) -> Path:
        """What is there as long as the scratch is."""
        return self.path if self._is_made else Path(self.path.absolute().anchor)

    @property
    def _drafts(self) -> Path:
        return self.path / DRAFTS

    def _array(self, name: str, is_full: bool = False) -> Any:
        """The folder of an array as a Zarr store."""
        from .folders import FolderStore

        return FolderStore(self.path / name, home=self._home, drafts=self._drafts, is_full=is_full)

    def _make(self) -> None:
        """Make the folder on first use."""
        if not self._is_made:
            make_home(self.path)
            self._is_made = True

    def write_chunk(self, name: str, parts: Iterable[bytes]) -> None:
        """Write the file of a chunk of an array."""
        self._write(self.path / name, lambda file: file.writelines(parts))

    def _write(self, path: Path, write: Callable[[Any], object]) -> None:
        """Write a file that lasts; it is there completely or not at all."""
        with disk_errors(path):
            self._make()
            write_whole(path, write, self.path, self._drafts)

    def create(
        self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, codec: str = "lz4"
    ) -> None:
        """Make an array filled with 0; keep one that is there already."""
        import zarr
        from zarr.codecs import ZstdCodec

        where = self.path / name
        with disk_errors(where):
            self._make()
            if (where / "zarr.json").exists():
                return
            zarr.create_array(
                self._array(name),
                shape=shape,
                chunks=chunks,
                dtype=dtype,
                fill_value=0,
                compressors=compressors(dtype) if codec == "lz4" else [ZstdCodec(level=1, checksum=True)],
                zarr_format=3,
                # All files in one folder: each is synced, and so is every folder that leads to a new file.
                chunk_key_encoding={"name": "default", "separator": "."},
            )

    def open(self, name: str) -> Array:
        """An array made before; its metadata are read once, whichever task of this process asks first."""
        return self._opened.setdefault(name, _StoredArray(self, name))

    def open_zarr(self, name: str, to_read: bool) -> Any:
        """The same as zarr has it: every chunk is stored, also one of zeros, and must be there when it is read."""
        import zarr

        with self._whole(f"{name}/zarr.json"):
            store = self._array(name, is_full=to_read)
            return zarr.open_array(store, mode="r+").with_config({"write_empty_chunks": True})

    @metered("write")
    def save(self, name: str, values: npt.NDArray[Any]) -> None:
        """Store a small array whole; it is there completely or not at all."""
        self._write(self.path / f"{name}.npy", lambda file: np.save(file, values, allow_pickle=False))

    def save_all(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Store small arrays, each whole."""
        # At once, for a disk that is asked by several threads to sync does it for all of them together.
        with CORES.lent(), ThreadPoolExecutor(min(len(arrays), SYNCED_AT_ONCE) or 1, "tiledseg-files") as pool:
            list(pool.map(carried(self.save), arrays.keys(), arrays.values()))

    @metered("read")
    def load(self, name: str) -> npt.NDArray[Any]:
        """A small array stored whole."""
        return self._load(f"{name}.npy", None)

    def view(self, name: str) -> npt.NDArray[Any]:
        """An array stored whole, to be read where it is indexed and not changed."""
        return self._load(f"{name}.npy", "r")

    def _load(self, file: str, mmap_mode: Any) -> npt.NDArray[Any]:
        path = self.path / file
        with self._whole(file):
            values: npt.NDArray[Any] = patiently(
                lambda: np.load(path, mmap_mode=mmap_mode, allow_pickle=False), path, self._home
            )
            return values

    @contextlib.contextmanager
    def _whole(self, file: str) -> Iterator[None]:
        """Name a file of the scratch that turns out to be missing or damaged."""
        try:
            yield
        except BAD_FILE as error:
            if not _is_damage(error):
                raise
            raise ScratchError(self.path, file, error) from error

    def done(self, stage: str) -> set[int]:
        """Numbers of the pieces of a stage that are stored."""
        journal = self.path / f"{stage}.journal"
        try:
            text = patiently(journal.read_bytes, journal, self._home)
        except FileNotFoundError:
            return set()
        # A line may be torn if the process died while writing it: only those with their full stop count.
        done: set[int] = set()
        for line in text.decode("ascii", "replace").split():
            number = line[:-1].removeprefix("-")
            if line.endswith(".") and number.isascii() and number.isdigit():
                (done.discard if line.startswith("-") else done.add)(int(number))
        return done

    def mark(self, stage: str, pieces: Iterable[int]) -> None:
        """Note pieces of a stage as stored."""
        self._note(stage, [str(piece) for piece in pieces])

    def unmark(self, stage: str, pieces: Iterable[int]) -> None:
        """Take back that pieces of a stage are stored."""
        self._note(stage, [f"-{piece}" for piece in pieces])

    def _note(self, stage: str, words: list[str]) -> None:
        """Append to the journal of a stage."""
        journal = self.path / f"{stage}.journal"

        def append() -> None:
            make_folders(journal.parent, self.path)
            is_new = not journal.exists()
            with journal.open("a") as file:
                # A leading newline keeps a line torn by a kill from merging with this one.
                file.write("".join(f"\n{word}.\n" for word in words))
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                sync_folder(journal.parent)

        with disk_errors(journal):
            self._make()
            patiently(append, journal, self.path)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A small document, None if there is none."""
        path = self.path / name
        if not is_stored(path, self._home):
            return None
        with self._whole(name):
            document: dict[str, Any] = json.loads(patiently(path.read_bytes, path, self._home))
        return document

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Write a small document; it is there completely or not at all."""
        text = json.dumps(document, indent=1).encode()
        self._write(self.path / name, lambda file: file.write(text))

    def remove(self, name: str) -> None:
        """Delete arrays, documents and done-marks whose name starts with `name`."""
        beginning = Path(os.path.normpath(self.path / name))
        if self.path not in beginning.parents:
            raise ValueError(f"{name!r} names nothing inside the scratch folder")
        self._opened.clear()
        for path in beginning.parent.glob(f"{beginning.name}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the whole scratch but for its lock."""
        self._opened.clear()
        for path in [path for path in self.path.glob("*") if path.name != LOCK]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()


class _StoredArray:
    """An array of the scratch, opened when it is used; reading a chunk that is damaged or missing names its file."""

    def __init__(self, store: DiskStore, name: str) -> None:
        self._store, self._name = store, name
        self._opening, self._opened = threading.Lock(), dict[bool, Any]()

    @property
    def _read(self) -> Any:
        return self._open(to_read=True)

    @property
    def _written(self) -> Any:
        # A chunk that is written in part is read before, and may not be there yet.
        return self._open(to_read=False)

    def _open(self, to_read: bool) -> Any:
        with self._opening:
            if to_read not in self._opened:
                self._opened[to_read] = self._store.open_zarr(self._name, to_read)
            return self._opened[to_read]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        shape: tuple[int, ...] = self._read.shape
        return shape

    def __getitem__(self, region: Any) -> npt.NDArray[Any]:
        try:
            with CORES.lent():
                return np.asarray(self._read[region])
        except BAD_FILE as error:
            if not _is_damage(error) or isinstance(error, ScratchError):
                raise
            failing = failing_chunks(self._read, _bounds(region, self.shape))
            if not failing:
                raise
            raise ScratchError(self._store.path, f"{self._name}/{failing[0]}", error) from error

    def __setitem__(self, region: Any, values: Any) -> None:
        array = self._written
        bounds = _bounds(region, array.shape)
        single = [axis for axis, part in enumerate(bounds) if not isinstance(part, slice)]
        kept = tuple(part if isinstance(part, slice) else slice(part, part + 1) for part in bounds)
        if np.ndim(values):
            values = np.expand_dims(values, single)
        key = chunk_key(kept, array.chunks) if is_encoded_so(array) else None
        if key is not None:
            content = encoded(np.broadcast_to(values, array.chunks).astype(array.dtype, copy=False))
        with CORES.lent():
            if key is None:
                # With all its axes a whole chunk is stored as it is; if single indices leave some out zarr copies it.
                array[kept] = values
            else:
                self._store.write_chunk(f"{self._name}/{key}", content)


def _bounds(region: Any, shape: tuple[int, ...]) -> list[slice | int]:
    """What a selection touches along each axis."""
    parts = region if isinstance(region, tuple) else (region,)
    parts = (*parts, *(slice(None),) * (len(shape) - len(parts)))
    return [
        slice(*part.indices(n)[:2]) if isinstance(part, slice) else int(part)
        for part, n in zip(parts, shape, strict=True)
    ]


def _is_damage(error: BaseException) -> bool:
    """Whether an error says that a file is missing or not what was written, and not that it cannot be reached."""
    return not isinstance(error, OSError | MemoryError) or isinstance(error, FileNotFoundError | IsADirectoryError)


def as_output_error(error: OSError, where: object) -> OutputError:
    """What the disk says as a sentence."""
    advice = "see that it can be reached and written to"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "free some space or choose another folder (-o, --scratch)"
    verb = "reach" if isinstance(error, TimeoutError) else "write"
    return OutputError(
        f"cannot {verb} {where}: {error.strerror or error}; {advice}, then run the same command again: what is done "
        "is kept."
    )


@contextlib.contextmanager
def disk_errors(where: object) -> Iterator[None]:
    """Turn what the disk says into a sentence that names the file."""
    try:
        yield
    except OSError as error:
        raise as_output_error(error, where) from error
