"""One run at a time: a scratch is locked by the process that hands out its work.

The lock is one of the operating system on an open file (``flock``), so it ends with the process however that ends, and
nothing has to be cleared up after a ``kill -9`` or a power cut. Over NFS, Linux hands it to the server, so that it also
holds between machines, if the server offers locks; a file system without any (Lustre mounted without ``-o flock``) is
told of aloud and gone on without.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .disk import make_home
from .errors import OutputError

__all__ = ["LOCK", "locked"]

logger = logging.getLogger(__name__)

LOCK = "lock"
"""Name of the file in the scratch."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a scratch, which is made if it is not there.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    OutputError
        If another process holds it, or the folder cannot be made.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        try:
            file = _open(path, stack)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror or error}; choose another folder (-o, --scratch)."
            ) from error
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    """The lock file, locked until the stack ends."""
    while True:
        make_home(path.parent)
        file = stack.enter_context(path.open("a+"))
        file.seek(0)
        _lock(file, path)
        # Whoever held it before may have removed the folder in the meantime.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file


def _lock(file: Any, path: Path) -> None:
    """Lock an open file, or say who has locked it."""
    try:
        import fcntl
    except ImportError:
        logger.warning("this system has no file locks: see that no other run works in %s.", path.parent)
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise OutputError(
                f"another run works in {path.parent} ({file.read() or 'it is starting'}); wait until it ends, end it, "
                "or choose another place for this one (-o, --scratch, --name)."
            ) from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            raise
        logger.warning("%s cannot be locked (%s): see that no other run works there.", path, error.strerror)
