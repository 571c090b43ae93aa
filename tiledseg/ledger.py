"""What a run has done and what it cost: of one call, and kept in the scratch of all calls on it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from .errors import OutputError
from .meters import OTHER_THREADS, Totals
from .progress import Listener, Progress
from .store import Store

__all__ = ["Ledger", "Work"]

TOTALS = "totals.json"
"""Of the scratch: what all calls on it have cost."""
SAVE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What was done and what it cost, in one call or several.

    Attributes
    ----------
    wall_seconds : float
        From before the first stage to after the last.
    seconds : dict of str to float
        Per stage; flows and masks may be at work at once, and both count then.
    seconds_at_once : float
        In which more than one stage was at work.
    computed : dict of str to int
        Pieces per stage.
    n_tiles, n_skipped_tiles : int
        Network tiles computed, and those skipped as empty; 0 without a network.
    task_seconds : dict of str to float
        By kind of work: what the threads of tasks spent on it, waiting for disks and devices included.
    cpu_seconds : dict of str to float
        By kind of work: what they computed meanwhile. Zarr (which compresses) and torch also compute in threads of
        their own, of which no kind is known: these, and what the processes did beside tasks, are an entry of
        their own.
    busy_seconds : dict of str to float
        Per GPU: how long a forward pass was under way in the flows stage; empty on the CPU.
    bytes_read, bytes_written : int or None
        What processes had the system read and write while tasks ran in them, from its caches too
        (``/proc/self/io``); None if the system does not tell.
    retries : int
        What was done again because a worker died or a store did not answer.
    """

    wall_seconds: float
    seconds: dict[str, float]
    seconds_at_once: float
    computed: dict[str, int]
    n_tiles: int
    n_skipped_tiles: int
    task_seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    busy_seconds: dict[str, float]
    bytes_read: int | None
    bytes_written: int | None
    retries: int

    @classmethod
    def of(cls, wall_seconds: float, progress: Progress, totals: Totals) -> Self:
        """What was done up to now."""
        whole, flows = totals.whole(), totals.of("flows")
        beside = max(0.0, whole.process_seconds - sum(whole.cpu_seconds.values()))
        # No task, no bytes; a task of which none are known had no system to tell.
        unknown = None if whole.process_seconds else 0
        return cls(
            wall_seconds=wall_seconds,
            seconds=progress.seconds_so_far(),
            seconds_at_once=progress.seconds_at_once,
            computed=dict(progress.computed),
            n_tiles=whole.counts.get("n_tiles", 0),
            n_skipped_tiles=whole.counts.get("n_skipped_tiles", 0),
            task_seconds=_largest_first(whole.seconds),
            cpu_seconds={**_largest_first(whole.cpu_seconds), OTHER_THREADS: beside},
            busy_seconds=flows.busy_seconds,
            bytes_read=whole.counts.get("bytes_read", unknown),
            bytes_written=whole.counts.get("bytes_written", unknown),
            retries=whole.counts.get("retries", 0),
        )

    def plus(self, other: Work) -> Work:
        """Both together; what one of them does not know is not known of both."""
        parts = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in _FIELDS}
        return Work(**{name: _sum(*both) for name, both in parts.items()})

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """From a document."""
        return cls(**document)


_FIELDS = dataclasses.fields(Work)


def _sum(one: Any, other: Any) -> Any:
    """The sum of numbers, or of those in dicts key by key."""
    if one is None or other is None:
        return None
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in [*one, *(k for k in other if k not in one)]}
    return one + other


def _largest_first(values: dict[str, float]) -> dict[str, float]:
    """Sorted by value."""
    return dict(sorted(values.items(), key=lambda item: -item[1]))


class Ledger:
    """Adds up what a call costs, and in the scratch what all calls on it have cost, and what they set aside.

    Parameters
    ----------
    store : Store
        The scratch.
    totals : Totals
        Of the executor that works.
    quarantined : sequence
        What the executor has put in quarantine up to now, see `tasks.Quarantined`.
    listener : callable, optional
        Of the progress.
    """

    def __init__(
        self, store: Store, totals: Totals, quarantined: Sequence[object] = (), listener: Listener | None = None
    ) -> None:
        self._store, self._totals, self._listener = store, totals, listener
        self._quarantined = quarantined
        document = store.read_json(TOTALS)
        self._before = None if document is None else Work.from_json(document["work"])
        self._set_aside = [] if document is None else document["quarantined"]
        self.n_calls = 1 + (0 if document is None else int(document["n_calls"]))
        self.progress = Progress(self._tell)
        self._began = self._saved = time.monotonic()

    def work(self) -> Work:
        """Of this call up to now."""
        return Work.of(time.monotonic() - self._began, self.progress, self._totals)

    def whole_run(self) -> Work:
        """Of all calls up to now."""
        return self.work() if self._before is None else self._before.plus(self.work())

    @property
    def quarantined(self) -> tuple[str, ...]:
        """What all calls have put in quarantine, in words, each piece once; later calls may have done it."""
        return tuple(dict.fromkeys([*self._set_aside, *map(str, self._quarantined)]))

    def save(self) -> None:
        """Keep what is known by now."""
        work = dataclasses.asdict(self.whole_run())
        facts = {"n_calls": self.n_calls, "work": work, "quarantined": list(self.quarantined)}
        self._store.write_json(TOTALS, facts)
        self._saved = time.monotonic()

    def _tell(self, stage: str, done: int, total: int) -> None:
        """A piece ended: time to save now and then, for a run that is killed cannot."""
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save()
        if self._listener is not None:
            self._listener(stage, done, total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # If something failed, it may be the disk: what is told is the first error.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OutputError):
            self.save()
