"""Remote stores: what a path is to a disk, for S3 and web servers.

Only an address travels to other processes; each opens it itself. Servers of http need not list: what is there
is found by asking for it.
"""

from __future__ import annotations

import functools
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .patience import NothingThereError, request
from .remote_clients import client_of
from .urls import is_remote, split_address

__all__ = ["Location", "RemotePath", "absent", "location", "read_file", "remove_tree"]

ASKED_AT_ONCE = 16
"""Objects."""


@dataclass(frozen=True)
class RemotePath:
    """An object of a remote store, or all below a prefix: what `pathlib.Path` is to a disk.

    Parameters
    ----------
    root : str
        The bucket or server, as ``"s3://bucket"``.
    key : str
        Without slashes at its ends, not percent-encoded.
    """

    root: str
    key: str

    def __str__(self) -> str:
        key = quote(self.key) if self.root.startswith("http") else self.key
        return f"{self.root}/{key}" if key else self.root

    def __truediv__(self, component: object) -> RemotePath:
        parts = [part for part in (self.key, str(component)) if part not in ("", ".")]
        return RemotePath(self.root, "/".join(parts))

    @property
    def name(self) -> str:
        """The last part of the key; of a bucket or server itself its name."""
        return self.key.rpartition("/")[2] or self.root.partition("://")[2]

    @property
    def parent(self) -> RemotePath:
        """What it lies in; of a bucket itself the bucket."""
        return RemotePath(self.root, self.key.rpartition("/")[0])

    @property
    def is_writable(self) -> bool:
        """Whether a store of this kind can be written, and listed."""
        return self.root.startswith("s3://")

    def absolute(self) -> RemotePath:
        """Itself: there is no folder it could be relative to."""
        return self

    def resolve(self) -> RemotePath:
        """Itself: there are no links."""
        return self

    def is_file(self) -> bool:
        """Whether the object is there, found by asking for it."""
        import obstore

        if not self.key:
            return False
        try:
            self._ask(lambda: obstore.head(client_of(self.root), self.key))
        except NothingThereError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether anything lies below it."""
        return any(self.iterdir())

    def exists(self) -> bool:
        """Whether there is an object of that name, or anything below it."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly below it."""
        import obstore

        found = self._ask(lambda: obstore.list_with_delimiter(client_of(self.root), prefix=self.key or None))
        for key in [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]:
            yield RemotePath(self.root, key)

    def read_bytes(self) -> bytes:
        """The object."""
        import obstore

        return bytes(self._ask(lambda: obstore.get(client_of(self.root), self.key).bytes()))

    def upload(self, content: Path | bytes) -> None:
        """Make the object from a file, or of some bytes; it is there completely or not at all."""
        import obstore

        self._ask(lambda: obstore.put(client_of(self.root), self.key, content), "written")

    def check_writable(self) -> None:
        """Write and delete an object below it; raises what the store says if that is not allowed."""
        import obstore

        client, key = client_of(self.root), (self / ".tiledseg").key
        self._ask(lambda: obstore.put(client, key, b""), "written")
        self._ask(lambda: obstore.delete(client, key), "written")

    def remove_below(self) -> None:
        """Delete all that lies below it, never a whole bucket."""
        import obstore

        if not self.key:
            raise ValueError(f"{self} is a whole bucket")
        client, prefix = client_of(self.root), f"{self.key}/"
        found = self._ask(lambda: [[entry["path"] for entry in page] for page in obstore.list(client, prefix)])
        for keys in found:
            self._ask(functools.partial(obstore.delete, client, keys), "written")

    def _ask(self, call: Callable[[], Any], to: str = "read") -> Any:
        """Ask the store, with patience."""
        return request(self.root, str(self), call, to)


Location = Path | RemotePath
"""A place on a disk or in a remote store."""


def location(source: str | os.PathLike[str]) -> Location:
    """A path, or what an address means.

    Parameters
    ----------
    source : str or path

    Returns
    -------
    location : Path or RemotePath

    Raises
    ------
    RemoteError
        If it is an address that cannot be used, or what is needed for it is not installed.
    """
    return RemotePath(*split_address(os.fspath(source))) if is_remote(source) else Path(source)


def read_file(place: Location) -> tuple[bytes, int] | None:
    """A small file, and a number that is another one when it was written anew.

    Parameters
    ----------
    place : Path or RemotePath

    Returns
    -------
    content : bytes
    stamp : int
        Nothing at all if there is no such file.

    Raises
    ------
    OSError, RemoteError
        If it cannot be read.
    """
    if isinstance(place, Path):
        return (place.read_bytes(), place.stat().st_mtime_ns) if place.is_file() else None
    try:
        content = place.read_bytes()
    except NothingThereError:
        return None
    return content, zlib.crc32(content)


def absent(folder: Location, keys: Sequence[str]) -> list[str]:
    """Which files are not there.

    Parameters
    ----------
    folder : Path or RemotePath
    keys : sequence of str
        Paths below the folder.

    Returns
    -------
    keys : list of str
        In the same order.
    """
    if isinstance(folder, Path):
        return [key for key in keys if not (folder / key).is_file()]
    with ThreadPoolExecutor(ASKED_AT_ONCE, "tiledseg-asking") as pool:
        are_there = list(pool.map(lambda key: (folder / key).is_file(), keys))
    return [key for key, is_there in zip(keys, are_there, strict=True) if not is_there]


def remove_tree(place: Location) -> None:
    """Delete a folder with all that is in it; of a link the link. Nothing happens if it is not there.

    Parameters
    ----------
    place : Path or RemotePath
    """
    if isinstance(place, RemotePath):
        place.remove_below()
    elif place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
