"""Files that last: on the disk, not on their way there, when a write returns.

A file is written as a draft, synced, renamed, and the folders that lead to it are synced: after a crash, or when the
power is cut, it is there completely or not at all, and what was reported as written is there. Neither zarr nor numpy
does this, and after a power cut zarr reads a chunk of 0 bytes, as a lost write leaves it, as zeros.

Drafts of chunks lie in a folder of their own, so that those of killed writers are found without a walk through all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .waiting import patiently

__all__ = ["DRAFTS", "make_folders", "make_home", "settle", "sweep", "sync_folder", "write_whole"]

DRAFTS = ".drafts"
"""Name of the folder that files are written in before they get their name."""
MOST_KNOWN = 2**14

_lasting: set[tuple[str, int]] = set()
"""Folders, with their inode, whose names and those of all above them are on the disk."""


def sync_folder(folder: Path) -> None:
    """Put on the disk which files a folder has."""
    if os.name == "nt":
        return  # folders cannot be synced there, and need not be
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no such thing for folders: their servers do it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def make_folders(folder: Path, home: Path) -> None:
    """Make a folder below a home.

    Raises
    ------
    FileNotFoundError
        If the home is not there: making it, too, would hide that a network store is gone.
    """
    if folder.is_dir():
        return
    if folder == home or folder == folder.parent:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    make_folders(folder.parent, home)
    folder.mkdir(exist_ok=True)


def make_home(home: Path) -> None:
    """Make a folder and all above it, to last."""
    if home.is_dir():
        return
    above = next(parent for parent in home.absolute().parents if parent.is_dir())
    home.mkdir(parents=True, exist_ok=True)
    _sync_up(home.absolute().parent, above)


def settle(draft: Path, path: Path) -> None:
    """Give a draft its name once it is on the disk."""
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def write_whole(path: Path, write: Callable[[BinaryIO], object], home: Path, drafts: Path | None = None) -> None:
    """Write a file that is there completely or not at all, and lasts.

    Parameters
    ----------
    path : Path
        Of the file; folders below `home` are made.
    write : callable
        Writes the content; called again if the store was gone.
    home : Path
        There as long as the store is, see `waiting`.
    drafts : Path, optional
        Folder on the same file system, below `home`; default that of the file.

    Raises
    ------
    OSError
        What the disk says; TimeoutError if the store did not come back.
    """
    draft = (drafts or path.parent) / f"{uuid.uuid4().hex}.partial"

    def attempt() -> None:
        make_folders(path.parent, home)
        make_folders(draft.parent, home)
        try:
            with draft.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise
        _sync_up(path.parent, home)

    patiently(attempt, path, home)


def _sync_up(folder: Path, home: Path) -> None:
    """Sync a folder and, unless this process did so before, those above it up to its home: another writer may have
    made one of them and not yet synced it."""
    sync_folder(folder)
    known = str(folder), folder.stat().st_ino
    if known in _lasting or folder in (home, folder.parent):
        return
    _sync_up(folder.parent, home)
    if len(_lasting) >= MOST_KNOWN:
        _lasting.clear()
    _lasting.add(known)


def sweep(*folders: Path) -> None:
    """Remove the drafts that killed writers left in some folders."""
    for folder in folders:
        for leftover in folder.glob("*.partial"):
            leftover.unlink(missing_ok=True)
