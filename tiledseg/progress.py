"""What a run tells while it works, and what it adds up for its report."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Progress"]

Listener = Callable[[str, int, int], None]


class Progress:
    """Counts pieces per stage, seconds per stage and peak memory per process.

    Parameters
    ----------
    listener : callable, optional
        Called with the stage, the pieces done and all pieces, whenever one ends.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self._listener = listener
        self._peaks: dict[int, int] = {}
        self._stage = ""
        self._since = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.computed: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self._done = self._total = 0

    def start(self, stage: str, total: int, done: int) -> None:
        """A stage begins, with `done` of its `total` pieces kept from an earlier run."""
        self.stop()
        self._stage, self._done, self._total = stage, done, total
        self.kept[stage], self.computed[stage] = done, 0
        self._tell()

    def step(self, peak: tuple[int, int] | None = None) -> None:
        """A piece ended in a process that had this much memory at most."""
        self._done += 1
        self.computed[self._stage] += 1
        if peak is not None:
            self._peaks[peak[0]] = max(self._peaks.get(peak[0], 0), peak[1])
        self._tell()

    def stop(self) -> None:
        """The current stage ends."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = "", now

    def seconds_so_far(self) -> dict[str, float]:
        """Seconds per stage, those of the current one up to now."""
        seconds = dict(self.seconds)
        if self._stage:
            seconds[self._stage] = seconds.get(self._stage, 0.0) + time.perf_counter() - self._since
        return seconds

    @property
    def peaks(self) -> dict[int, int]:
        """Per process the most bytes it had resident."""
        return dict(self._peaks)

    @property
    def peak_memory(self) -> int:
        """Sum over processes of the most bytes each had resident."""
        return sum(self._peaks.values())

    def note_peak(self, peak: tuple[int, int]) -> None:
        """Count a process that did not end a piece."""
        self._peaks[peak[0]] = max(self._peaks.get(peak[0], 0), peak[1])

    def _tell(self) -> None:
        if self._listener is not None:
            self._listener(self._stage, self._done, self._total)
