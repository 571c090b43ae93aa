"""Waiting for a disk or network store that is gone for a while.

What the system says of a lost connection, a server that restarts or a mount that went away is taken to pass: the
operation is tried again, with growing pauses, for at most a minute, and a line says so. ``TILEDSEG_PATIENCE_S`` in the
environment of a process sets another number of seconds; 0 waits for nothing. A full disk, a quota that is used up or a
folder that may not be written is told at once.

Strategy: a store that is gone often looks like one in which files are missing, and of an array in Zarr a missing chunk
reads as zeros. So a file that is not there counts as missing only if its home is there: a folder or file that is there
as long as the store is.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["PASSING", "Patience", "is_stored", "patiently", "stored_size"]

logger = logging.getLogger(__name__)

PATIENCE_S = float(os.environ.get("TILEDSEG_PATIENCE_S") or 60)
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0

_NAMES = (
    "ESTALE EIO EREMOTEIO ETIMEDOUT ECONNRESET ECONNABORTED ECONNREFUSED ENOTCONN ESHUTDOWN EPIPE ENETDOWN "
    "ENETUNREACH ENETRESET EHOSTDOWN EHOSTUNREACH ENOLINK"
)
PASSING = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))
"""Numbers of errors that may pass."""

Result = TypeVar("Result")


class Patience:
    """How long one operation is tried again.

    Parameters
    ----------
    path : Path
        What it works on, for messages.
    home : Path
        Of `path`: there as long as the store is.
    """

    def __init__(self, path: Path, home: Path) -> None:
        self._path, self._home = path, home
        self._since: float | None = None
        self._pause = FIRST_PAUSE_S
        self._looked_again = False

    def pause(self, error: OSError) -> float:
        """Seconds to wait after an error before the next try.

        Raises
        ------
        OSError
            `error`, if it does not pass; TimeoutError if it did not within `PATIENCE_S`.
        """
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            if os.path.exists(self._home):
                if self._looked_again:
                    raise error
                self._looked_again = True  # the store may have come back just now
                return 0.0
        elif error.errno not in PASSING:
            raise error
        now = time.monotonic()
        if self._since is None:
            self._since = now
            logger.warning("%s: %s; trying again for %g s.", self._path, error.strerror or error, PATIENCE_S)
        if now - self._since >= PATIENCE_S:
            what = f"{error.strerror or error}, also after {PATIENCE_S:g} s"
            raise TimeoutError(errno.ETIMEDOUT, what, str(self._path)) from error
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_S)
        return min(pause, max(0.0, self._since + PATIENCE_S - now))

    def end(self) -> None:
        """The operation succeeded."""
        if self._since is not None:
            logger.warning("%s: there again after %.1f s.", self._path, time.monotonic() - self._since)


def patiently(function: Callable[[], Result], path: Path, home: Path) -> Result:
    """Do something with a file, again and again while its store is gone.

    Parameters
    ----------
    function : callable
        Can be called again after it failed.
    path, home : Path
        See `Patience`.

    Returns
    -------
    result
        Of the function.

    Raises
    ------
    OSError
        Of the function, if it does not pass; TimeoutError if it did not within `PATIENCE_S`.
    """
    patience = Patience(path, home)
    while True:
        try:
            result = function()
        except OSError as error:
            time.sleep(patience.pause(error))
        else:
            patience.end()
            return result


def is_stored(path: Path, home: Path) -> bool:
    """Whether a file is there; a store that is gone is waited for."""
    return stored_size(path, home) is not None


def stored_size(path: Path, home: Path) -> int | None:
    """Bytes of a file, None if there is none; a store that is gone is waited for."""
    try:
        facts = patiently(path.stat, path, home)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None
