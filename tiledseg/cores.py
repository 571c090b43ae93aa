"""The cores of this process, shared between the tasks that run in it.

A task has one core for itself, which it lends while it waits for a disk or a network. What no task uses
another may borrow, piece by piece: when its owner wants it back, or another task begins, a borrowed core is
given back after the piece in hand, so a process never has more threads at work than cores for longer than
one piece takes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .meters import carried

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
        self._under_way: list[_Todo] = []
        self._mine = threading.local()

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
        self._take()
        self._mine.is_held = True
        try:
            yield
        finally:
            self._mine.is_held = False
            self._give()

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Let others borrow this thread's core while it waits for a disk or a network; nothing where it has none."""
        if not getattr(self._mine, "is_held", False):
            yield
            return
        self._mine.is_held = False
        self._give()
        try:
            yield
        finally:
            self._take()
            self._mine.is_held = True

    def run(self, function: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
        """``[function(piece) for piece in pieces]`` on this thread and as many as are free, at once or meanwhile.

        Called within :meth:`task`. The function must release the GIL, and what it does for one
        piece must not depend on the others.
        """
        todo = _Todo(function, pieces, carried(self._help))
        with self._lock:
            self._under_way.append(todo)
            self._hand_out()
        try:
            while todo.do_next():
                pass
        finally:
            with self._lock:
                self._under_way.remove(todo)
            # Also after an error: nothing may still write to the caller's arrays.
            with self.lent():
                errors = [future.exception() for future in todo.helpers]
        for error in errors:
            if error is not None:
                raise error
        return [todo.results[number] for number in sorted(todo.results)]

    def _help(self, todo: _Todo) -> None:
        """Do pieces on a borrowed core until it is wanted back."""
        try:
            while self._n_free >= 0 and todo.do_next():
                pass
        finally:
            self._give()

    def _take(self) -> None:
        with self._lock:
            self._n_free -= 1

    def _give(self) -> None:
        """A core is free: who has pieces left gets it."""
        with self._lock:
            self._n_free += 1
            self._hand_out()

    def _hand_out(self) -> None:
        """Start helpers on the cores that are free, for those who have pieces left; called with the lock."""
        for todo in self._under_way:
            while self._n_free > 0 and not todo.is_empty:
                self._n_free -= 1
                if self._helpers is None:
                    self._helpers = ThreadPoolExecutor(self._n_cores, thread_name_prefix="tiledseg-helper")
                todo.helpers.append(self._helpers.submit(todo.help_with, todo))


class _Todo:
    """Pieces that several threads take from, and what came of them."""

    def __init__(
        self, function: Callable[[Any], Any], pieces: Iterable[Any], help_with: Callable[[_Todo], None]
    ) -> None:
        self.results: dict[int, Any] = {}
        self.help_with = help_with
        self.helpers: list[Future[None]] = []
        self.is_empty = False
        self._function = function
        self._queue: Iterator[tuple[int, Any]] = iter(enumerate(pieces))
        self._taking = threading.Lock()

    def do_next(self) -> bool:
        """Do a piece on this thread; whether there was one."""
        with self._taking:
            number, piece = next(self._queue, (-1, None))
            self.is_empty = number < 0
        if number < 0:
            return False
        try:
            self.results[number] = self._function(piece)
        except BaseException:
            with self._taking:
                self._queue, self.is_empty = iter(()), True
            raise
        return True


CORES = Cores(1)
"""Of this process; whoever runs tasks here says how many there are."""

ALONE = Cores(0)
"""Nothing to borrow: the calling thread does everything."""
