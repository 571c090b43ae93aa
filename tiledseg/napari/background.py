"""Work beside the window: in a thread, with progress, and an end when it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from qtpy.QtCore import QObject, Signal  # type: ignore[attr-defined]  # a name of qtpy's own

from ..progress import Listener

__all__ = ["Background", "CancelledError"]


class CancelledError(Exception):
    """Whoever began the work no longer wants it."""


class Background(QObject):
    """Does one thing at a time in a thread of its own.

    Parameters
    ----------
    progressed : Signal of (str, int, int)
        The stage, the pieces done and all pieces, sent to the window's thread whenever one ends.
    ended : Signal of concurrent.futures.Future
        Sent to the window's thread; it holds the result, or the error: `CancelledError` after `cancel`.
    """

    progressed = Signal(str, int, int)
    ended = Signal(object)

    def __init__(self) -> None:
        super().__init__()
        # One of Qt's threads has too small a stack for networks on some systems.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tiledseg-napari")
        self._is_unwanted = threading.Event()

    def start(self, work: Callable[[Listener], Any]) -> None:
        """Begin something that tells its progress."""
        self._is_unwanted.clear()
        future: Future[Any] = self._pool.submit(work, self._listen)
        future.add_done_callback(self.ended.emit)

    def cancel(self) -> None:
        """End what is under way, with its next piece."""
        self._is_unwanted.set()

    def _listen(self, stage: str, done: int, total: int) -> None:
        """In the thread of the work: tell the window, or stop."""
        if self._is_unwanted.is_set():
            raise CancelledError
        self.progressed.emit(stage, done, total)
