"""The scratch: where stages leave their arrays and what is done.

Layout of the scratch folder, the only home of these names::

    run.json                 settings, image and model of the run, and the batch on GPUs
    survey.json              percentiles, diameter, foreground summary
    survey.zarr/...          samples and foreground statistics per region, map of the normalisation
    flows.zarr               pieces of the flows chunks
    shortage.json            tiles that were computed in halved batches
    masks-<digest>/          one folder per set of mask settings
        labels.zarr          local labels of every padded block
        objects.zarr, ...    see masks.py, stitch.py, publish.py
    <stage>.journal          a line per piece that is done

An array in Zarr tells nothing of a chunk that is all zero, so done-marks are kept apart: the
process that hands out the work appends a line after a piece is stored. A piece that was stored but
not yet noted when the process died is computed again, to the same bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import OutputError

__all__ = ["DiskStore", "MemoryStore", "Store", "as_output_error", "disk_errors"]

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

    def load(self, name: str) -> npt.NDArray[Any]:
        """A small array stored whole."""

    def view(self, name: str) -> npt.NDArray[Any]:
        """An array stored whole, to be read where it is indexed and not changed."""

    def done(self, stage: str) -> set[int]:
        """Numbers of the pieces of a stage that are stored."""

    def mark(self, stage: str, pieces: Iterable[int]) -> None:
        """Note pieces of a stage as stored."""

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
        The folder; made on first use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(
        self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, codec: str = "lz4"
    ) -> None:
        """Make an array filled with 0; keep one that is there already."""
        import zarr
        from zarr.codecs import BloscCodec, ZstdCodec

        where = self.path / name
        if (where / "zarr.json").exists():
            return
        compressor: Any = ZstdCodec(level=1, checksum=True)
        if codec == "lz4":
            compressor = BloscCodec(cname="lz4", clevel=1, shuffle="shuffle", typesize=np.dtype(dtype).itemsize)
        with disk_errors(where):
            where.parent.mkdir(parents=True, exist_ok=True)
            zarr.create_array(
                where,
                shape=shape,
                chunks=chunks,
                dtype=dtype,
                fill_value=0,
                compressors=compressor,
                zarr_format=3,
            )

    def open(self, name: str) -> Array:
        """An array made before."""
        import zarr

        return zarr.open_array(self.path / name, mode="r+")

    def save(self, name: str, values: npt.NDArray[Any]) -> None:
        """Store a small array whole; it is there completely or not at all."""
        path = self.path / f"{name}.npy"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
            with draft.open("wb") as file:
                np.save(file, values, allow_pickle=False)
            draft.replace(path)

    def load(self, name: str) -> npt.NDArray[Any]:
        """A small array stored whole."""
        values: npt.NDArray[Any] = np.load(self.path / f"{name}.npy", allow_pickle=False)
        return values

    def view(self, name: str) -> npt.NDArray[Any]:
        """An array stored whole, to be read where it is indexed and not changed."""
        values: npt.NDArray[Any] = np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return values

    def done(self, stage: str) -> set[int]:
        """Numbers of the pieces of a stage that are stored."""
        journal = self.path / f"{stage}.journal"
        if not journal.exists():
            return set()
        # A line may be torn if the process died while writing it: only those with their full stop count.
        lines = journal.read_text().split()
        return {int(line[:-1]) for line in lines if line.endswith(".") and line[:-1].isdigit()}

    def mark(self, stage: str, pieces: Iterable[int]) -> None:
        """Note pieces of a stage as stored."""
        journal = self.path / f"{stage}.journal"
        with disk_errors(journal), journal.open("a") as file:
            # A leading newline keeps a line torn by a kill from merging with this one.
            file.write("".join(f"\n{piece}.\n" for piece in pieces))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A small document, None if there is none."""
        path = self.path / name
        if not path.exists():
            return None
        document: dict[str, Any] = json.loads(path.read_text())
        return document

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Write a small document; it is there completely or not at all."""
        path = self.path / name
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}.partial")
            draft.write_text(json.dumps(document, indent=1))
            draft.replace(path)

    def remove(self, name: str) -> None:
        """Delete arrays, documents and done-marks whose name starts with `name`."""
        beginning = Path(os.path.normpath(self.path / name))
        if self.path not in beginning.parents:
            raise ValueError(f"{name!r} names nothing inside the scratch folder")
        for path in beginning.parent.glob(f"{beginning.name}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the whole scratch."""
        shutil.rmtree(self.path, ignore_errors=True)


def as_output_error(error: OSError, where: object) -> OutputError:
    """What the disk says as a sentence."""
    return OutputError(
        f"cannot write {where}: {error.strerror or error}; free some space or choose another folder "
        "(-o, --scratch), then run the same command again: what is done is kept."
    )


@contextlib.contextmanager
def disk_errors(where: object) -> Iterator[None]:
    """Turn what the disk says into a sentence that names the file."""
    try:
        yield
    except OSError as error:
        raise as_output_error(error, where) from error
