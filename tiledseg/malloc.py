"""What glibc's memory allocator does with freed memory; nothing happens where there is another one.

Left alone it gives memory back to the system in the middle of a network, which takes it again at the next layer, and
keeps what a task freed in every thread it ran on, so that a worker grows with the tasks it has done. So: kept within
a task, given back after it, but not after every one of many short ones: the next takes it again, page by page.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import time
from typing import Any

__all__ = ["give_back_freed_memory", "keep_freed_memory"]

# Of glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

MIB = 2**20
SECONDS_BETWEEN = 1.0


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
        _glibc().mallopt(M_TRIM_THRESHOLD, 64 * MIB)


class _Clock:
    """When memory was last given back."""

    def __init__(self) -> None:
        self._lock, self._at = threading.Lock(), -SECONDS_BETWEEN

    def is_due(self) -> bool:
        """Whether it is time again; if so, the time counts from now."""
        with self._lock:
            now = time.monotonic()
            if now - self._at < SECONDS_BETWEEN:
                return False
            self._at = now
            return True


_clock = _Clock()


def give_back_freed_memory() -> None:
    """Give all that is free back to the system, if that was not done within the last second."""
    if _glibc() is not None and _clock.is_due():
        _glibc().malloc_trim(0)
