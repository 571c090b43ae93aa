"""What glibc's memory allocator does with freed memory; nothing happens where there is another one.

Left alone it gives memory back to the system in the middle of a network, which takes it again at the next layer, and
keeps what a task freed in every thread it ran on, so that a worker grows with the tasks it has done. So: kept from
one task to the next of the same kind, which takes it again, and given back before one of another kind. And on few cores
one pool of it serves all threads: what one freed the other takes.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import time
from typing import Any

from .machine import n_cores

__all__ = ["give_back_freed_memory", "keep_freed_memory", "share_freed_memory", "sharing_environment"]

# Of glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8

MIB = 2**20
KEPT = 256 * MIB
"""Of freed memory at most, at the end of a pool."""
FEW_CORES = 4
"""With more, threads would wait for each other at the one pool."""
SECONDS_BETWEEN = 1.0
"""At least, where kinds of tasks take turns: to take memory again costs a few milliseconds for each 10 MiB."""
SECONDS_AT_MOST = 10.0
"""Also of one kind tasks differ."""


@functools.cache
def _glibc() -> Any:
    """The library that this process has loaded, None if it is not glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keep_freed_memory() -> None:
    """Keep some megabytes of what is freed for what is taken next.

    A network frees and takes the same few megabytes at every layer. Where they go back to the system in between, as
    Dask's nanny has it with MALLOC_TRIM_THRESHOLD_, its tiles take three times as long.
    """
    if _glibc() is not None:
        _glibc().mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        _glibc().mallopt(M_TRIM_THRESHOLD, KEPT)


def share_freed_memory() -> None:
    """Have one pool of freed memory for all threads of this process, where cores are few; before there are others.

    Otherwise every thread has its own, of 64 MiB pieces that go back to the system whenever one is empty: of the arrays
    of a block, which fill a third of it, nearly every one would be taken anew.
    """
    if _glibc() is not None and n_cores() <= FEW_CORES:
        _glibc().mallopt(M_ARENA_MAX, 1)


def sharing_environment(n_threads: int) -> dict[str, str]:
    """Environment in which a process of so many threads starts, for it to do the same."""
    return {"MALLOC_ARENA_MAX": "1"} if n_threads <= FEW_CORES else {}


class _Clock:
    """When memory was last given back, and before which kind of task."""

    def __init__(self) -> None:
        self._lock, self._at, self._kind = threading.Lock(), -SECONDS_AT_MOST, ""

    def is_due(self, kind: str) -> bool:
        """Whether it is time again; if so, the time counts from now."""
        with self._lock:
            now = time.monotonic()
            if now - self._at < (SECONDS_AT_MOST if kind == self._kind else SECONDS_BETWEEN):
                return False
            self._at, self._kind = now, kind
            return True


_clock = _Clock()


def give_back_freed_memory(kind: str) -> None:
    """Give all that is free back to the system before a task begins, unless the next of the same kind takes it again.

    Parameters
    ----------
    kind : str
        Of the task.
    """
    if _glibc() is not None and _clock.is_due(kind):
        _glibc().malloc_trim(0)
