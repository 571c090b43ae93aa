"""Zarr's store in a folder, with files that last (disk.py), and waited for while it is gone (waiting.py)."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.storage import LocalStore

from .disk import make_home, write_whole
from .waiting import Patience

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

__all__ = ["FolderStore", "new_folder"]


class FolderStore(LocalStore):
    """A folder as a Zarr store whose files last, and which is waited for while it is gone.

    Parameters
    ----------
    root : Path
        Of an array or group; not made here, see `make_folders`.
    read_only : bool
    home : Path, optional
        There as long as the store is, see `waiting`; default `root`.
    drafts : Path, optional
        Folder to write files in before they get their name; default that of the file.
    is_full : bool
        Every chunk is there: one that is missing is lost, and not taken for zeros.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        read_only: bool = False,
        home: Path | None = None,
        drafts: Path | None = None,
        is_full: bool = False,
    ) -> None:
        super().__init__(Path(root), read_only=read_only)
        self.home = home or self.root
        self.drafts = drafts
        self.is_full = is_full

    def with_read_only(self, read_only: bool = False) -> FolderStore:
        """The same folder."""
        return type(self)(self.root, read_only=read_only, home=self.home, drafts=self.drafts, is_full=self.is_full)

    async def _open(self, **_: Any) -> None:
        """Nothing is made: a folder that is missing may be gone for a while."""
        self._is_open = True

    def _ensure_open_sync(self) -> None:
        self._is_open = True

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """A stored value, None if there is none."""
        patience = Patience(self.root / key, self.home)
        while True:
            try:
                value = self._checked(await super().get(key, prototype, byte_range), key, byte_range)
            except OSError as error:
                try:
                    await asyncio.sleep(patience.pause(error))
                except FileNotFoundError:
                    self._refuse_missing(key)
                    return None
            else:
                patience.end()
                return value

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """A stored value, None if there is none."""
        patience = Patience(self.root / key, self.home)
        while True:
            try:
                value = super().get_sync(key, prototype=prototype, byte_range=byte_range)
                value = self._checked(value, key, byte_range)
            except OSError as error:
                try:
                    time.sleep(patience.pause(error))
                except FileNotFoundError:
                    self._refuse_missing(key)
                    return None
            else:
                patience.end()
                return value

    def _refuse_missing(self, key: str) -> None:
        """Refuse to take a chunk that is not there for zeros."""
        if self.is_full and key.startswith(("c/", "c.")):
            raise ValueError(f"{self.root / key} is missing")

    def _checked(self, value: Buffer | None, key: str, byte_range: ByteRequest | None) -> Buffer:
        """What was read; a file without a byte, which zarr takes for zeros, is refused."""
        if value is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root / key))
        if byte_range is None and not len(value):
            raise ValueError(f"{self.root / key} is empty")
        return value

    async def set(self, key: str, value: Buffer) -> None:
        """Store a value."""
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Store a value."""
        self._check_writable()
        view = value.as_buffer_like()
        write_whole(self.root / key, lambda file: file.write(view), self.home, self.drafts)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Store a value unless there is one; used for metadata, which one process writes."""
        if not await self.exists(key):
            await self.set(key, value)


def new_folder(path: Path) -> FolderStore:
    """A store in a folder, which is made if it is not there."""
    make_home(path)
    return FolderStore(path)
