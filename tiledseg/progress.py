"""What a run tells while it works, and what it adds up for its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress"]

Listener = Callable[[str, int, int], None]


@dataclass
class _Open:
    """A stage that is at work."""

    since: float
    done: int
    total: int


class Progress:
    """Counts pieces per stage, seconds per stage and peak memory per process.

    Parameters
    ----------
    listener : callable, optional
        Called with the stage, the pieces done and all pieces, whenever one ends. Two stages may be at work at once.

    Attributes
    ----------
    seconds : dict of str to float
        Per stage, from its beginning to its end: stages that work at once count both.
    seconds_at_once : float
        In which more than one stage was at work: the whole took the sum of `seconds` less this.
    computed, kept : dict of str to int
        Pieces per stage computed now, and kept from an earlier run.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self._listener = listener
        self._peaks: dict[int, int] = {}
        self._open: dict[str, _Open] = {}
        self._changed = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.seconds_at_once = 0.0
        self.computed: dict[str, int] = {}
        self.kept: dict[str, int] = {}

    def start(self, stage: str, total: int, done: int, *, beside: bool = False) -> None:
        """A stage begins, with `done` of its `total` pieces kept from an earlier run.

        Others end with it, unless it is to work `beside` them: then those go on that have pieces to do.
        """
        for other in [name for name, of in self._open.items() if not beside or of.done >= of.total]:
            self._end(other)
        self._count_at_once()
        self._open[stage] = _Open(self._changed, done, total)
        self.kept[stage], self.computed[stage] = done, 0
        self._tell(stage)

    def step(self, peak: tuple[int, int] | None = None, stage: str | None = None) -> None:
        """A piece ended, of the stage that began last if none is named, in a process that had this much memory at
        most."""
        stage = stage or list(self._open)[-1]
        at = self._open[stage]
        at.done += 1
        self.computed[stage] += 1
        if peak is not None:
            self.note_peak(peak)
        self._tell(stage)
        if at.done >= at.total and len(self._open) > 1:
            self._end(stage)

    def stop(self) -> None:
        """What is at work ends."""
        for stage in list(self._open):
            self._end(stage)

    def seconds_so_far(self) -> dict[str, float]:
        """Seconds per stage, those of what is at work up to now."""
        seconds, now = dict(self.seconds), time.perf_counter()
        for stage, at in self._open.items():
            seconds[stage] = seconds.get(stage, 0.0) + now - at.since
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

    def _end(self, stage: str) -> None:
        """A stage ends."""
        self._count_at_once()
        since = self._open.pop(stage).since
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._changed - since

    def _count_at_once(self) -> None:
        """Add up the time up to now in which several stages were at work."""
        now = time.perf_counter()
        if len(self._open) > 1:
            self.seconds_at_once += now - self._changed
        self._changed = now

    def _tell(self, stage: str) -> None:
        if self._listener is not None:
            self._listener(stage, self._open[stage].done, self._open[stage].total)
