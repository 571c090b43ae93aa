"""The cores of this process, shared between the tasks that run in it.

A task has one core for itself. What no task uses it may borrow, piece by piece: when another task
begins, the lent core is given back after the piece in hand, so a process never has more threads at
work than cores for longer than one piece takes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["ALONE", "CORES", "Cores"]


class Cores:
    """A number of cores.

    Parameters
    ----------
    n_cores : int
        Threads that may be at work at a time.
    """

    def __init__(self, n_cores: int) -> None:
        self._lock = threading.Lock()
        self._n_cores = self._n_free = n_cores
        self._helpers: ThreadPoolExecutor | None = None

    def resize(self, n_cores: int) -> None:
        """Set the number of cores; what is running goes on."""
        with self._lock:
            if n_cores != self._n_cores:
                self._n_free += n_cores - self._n_cores
                self._n_cores = n_cores
                self._helpers = None

    @contextlib.contextmanager
    def task(self) -> Iterator[None]:
        """Take a core while a task runs, from a borrower if there is none left."""
        with self._lock:
            self._n_free -= 1
        try:
            yield
        finally:
            with self._lock:
                self._n_free += 1

    def run(self, function: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
        """``[function(piece) for piece in pieces]`` on this thread and as many as are free.

        Called within :meth:`task`. The function must release the GIL, and what it does for one
        piece must not depend on the others.
        """
        queue = iter(enumerate(pieces))
        results: dict[int, Any] = {}
        taking = threading.Lock()

        def work(is_borrowed: bool) -> None:
            try:
                while not (is_borrowed and self._n_free < 0):
                    with taking:
                        number, piece = next(queue, (-1, None))
                    if number < 0:
                        break
                    results[number] = function(piece)
            finally:
                if is_borrowed:
                    with self._lock:
                        self._n_free += 1

        borrowed = self._borrow(work)
        try:
            work(False)
        finally:
            # Also after an error: nothing may still write to the caller's arrays.
            errors = [future.exception() for future in borrowed]
        for error in errors:
            if error is not None:
                raise error
        return [results[number] for number in sorted(results)]

    def _borrow(self, work: Callable[[bool], None]) -> list[Future[None]]:
        """Start a helper on every free core."""
        with self._lock:
            n_borrowed = max(0, self._n_free)
            self._n_free -= n_borrowed
            if n_borrowed and self._helpers is None:
                self._helpers = ThreadPoolExecutor(self._n_cores, thread_name_prefix="tiledseg-helper")
            helpers = self._helpers
        if helpers is None:
            return []
        return [helpers.submit(work, True) for _ in range(n_borrowed)]


CORES = Cores(1)
"""Of this process; whoever runs tasks here says how many there are."""

ALONE = Cores(0)
"""Nothing to borrow: the calling thread does everything."""
