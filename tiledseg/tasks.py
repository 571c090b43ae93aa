"""Streams of tasks: several stages at once, a bounded number in flight, and what is done about failures.

Nothing is ever mapped over everything, so the scheduler and the client stay small however many blocks
there are. A stage that waits for another says so by its items: where none may begin yet it gives None, and
is asked again when something has ended.

Failures are of two kinds. What can be foreseen and said in a sentence (an input that cannot be read, a full
disk, a lost scheduler) ends the stream after what is in flight. A worker that dies, or an error that nobody
foresaw, makes its task a suspect: when all else is done it runs again with nothing beside it. One that fails
then as well is put in quarantine, and the stream ends by naming what is there.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .errors import QuarantineError, TiledsegError
from .meters import note
from .store import as_output_error

__all__ = ["Item", "Pool", "Quarantined", "Tasks", "Troubles", "run_tasks"]

logger = logging.getLogger(__name__)

Item = Any
Function = Callable[..., Any]

TRIES = {"died": 3, "raised": 2}
"""How often a task may end so before it is put in quarantine."""
MANY_SUSPECTS = 32
"""With so many, they are tried before anything else is begun."""
MANY_QUARANTINED = 16
"""With so many something is wrong with all: nothing more is begun."""
NAMED = 5
"""Pieces that a message names."""


def _nothing(*_: Any) -> None:
    """What is done where nothing is to be done."""


def _as_text(item: Item) -> str:
    return str(item)


@dataclass(frozen=True, eq=False)
class Tasks:
    """One function over many items.

    Attributes
    ----------
    name : str
        The stage, for messages and Dask's dashboard.
    function : callable
        Called as ``function(item, *args)``; pure but for what it writes to its own place.
    items : iterable
        Hashable; None where the next one may not begin yet.
    args : tuple
        The same for all items.
    kind : str
        ``"network"`` for tasks that go to GPU workers where there are such, else ``"cpu"``.
    claims : bool
        Whether a task uses a GPU, which it must have to itself where workers do not say how many it takes.
    where : callable
        An item as a piece of the image, for messages.
    begin : callable
        Called before the first item, or when there is none.
    took : callable
        Called with every item that is done and its result.
    """

    name: str
    function: Function
    items: Iterable[Item]
    args: tuple[Any, ...] = ()
    kind: str = "cpu"
    claims: bool = False
    where: Callable[[Item], str] = _as_text
    begin: Callable[[], None] = _nothing
    took: Callable[[Item, Any], None] = _nothing


@dataclass(frozen=True)
class Quarantined:
    """A piece that failed whenever it was tried.

    Attributes
    ----------
    stage : str
    piece : str
        Which, and where in the image.
    reason : str
        How it fails.
    """

    stage: str
    piece: str
    reason: str

    def __str__(self) -> str:
        return f"{self.stage} {self.piece} ({self.reason})"


@dataclass
class Troubles:
    """What went wrong in the streams of an executor, for its report.

    Attributes
    ----------
    n_retried : int
        Times that a task was tried again.
    quarantined : list of Quarantined
    """

    n_retried: int = 0
    quarantined: list[Quarantined] = field(default_factory=list)


class Pool(Protocol):
    """Who does the tasks of a stream."""

    def room(self, kind: str) -> int:
        """How many tasks of a kind may be added now; at least one if nothing is in flight."""

    def submit(self, tasks: Tasks, items: Sequence[Item]) -> Sequence[Any]:
        """Begin some items; returns a ticket for each."""

    def ended(self) -> Iterable[tuple[Any, BaseException | None, Any]]:
        """Wait until something ends; ticket, error or None, and result of each that has."""

    def has_died(self, error: BaseException) -> bool:
        """Whether an error means that workers died at a task."""

    def close(self) -> None:
        """Let go of what is in flight."""


class _Source:
    """What is left of some tasks."""

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        self._items = iter(tasks.items)
        self._has_begun = False

    def take(self, n: int) -> list[Item]:
        """The next items, fewer where no more may begin yet."""
        batch: list[Item] = []
        while len(batch) < n and (item := next(self._items, self)) is not None:
            self._begin()
            if item is self:
                break
            batch.append(item)
        return batch

    def _begin(self) -> None:
        """Say once that there is a first item, or none."""
        if not self._has_begun:
            self._has_begun = True
            self.tasks.begin()


class _Failures:
    """What failed in a stream, and what is done about it."""

    def __init__(self, pool: Pool, troubles: Troubles) -> None:
        self._pool, self._troubles, self._tries = pool, troubles, Counter[tuple[str, Item]]()
        self.suspects: deque[tuple[Tasks, Item]] = deque()
        self.quarantined: list[Quarantined] = []
        self.fatal: BaseException | None = None
        self._first: BaseException | None = None

    def take(self, tasks: Tasks, item: Item, error: BaseException) -> None:
        """Judge a failure."""
        if isinstance(error, TiledsegError) or not isinstance(error, Exception):
            self.fatal = self.fatal or error
            return
        if isinstance(error, OSError):
            self.fatal = self.fatal or as_output_error(error, error.filename or "the labels or the scratch folder")
            return
        how = "died" if self._pool.has_died(error) else "raised"
        self._tries[tasks.name, item] += 1
        if self._tries[tasks.name, item] < TRIES[how]:
            self._troubles.n_retried += 1
            note("retries")
            self.suspects.append((tasks, item))
            return
        said = str(error).strip().splitlines()[:1]
        reason = "workers die at it" if how == "died" else ": ".join([type(error).__name__, *said])
        piece = Quarantined(tasks.name, tasks.where(item), reason)
        logger.warning("set aside: %s.", piece)
        self._first = self._first or error
        self.quarantined.append(piece)
        self._troubles.quarantined.append(piece)

    @property
    def are_many(self) -> bool:
        """Whether nothing more should be begun."""
        return len(self.quarantined) >= MANY_QUARANTINED

    def raise_last(self) -> None:
        """End the stream by what ended it, or by what is in quarantine."""
        if self.fatal is not None:
            raise self.fatal
        if self.quarantined:
            raise QuarantineError(_sentence(self.quarantined), tuple(self.quarantined)) from self._first


def _sentence(pieces: Sequence[Quarantined]) -> str:
    """What is in quarantine, and what to do."""
    named = "; ".join(map(str, pieces[:NAMED]))
    more = f"; and {len(pieces) - NAMED} more" if len(pieces) > NAMED else ""
    have, them = ("piece has", "it") if len(pieces) == 1 else ("pieces have", "them")
    advice = ""
    if any("die" in piece.reason for piece in pieces):
        advice = ", with smaller blocks (--block) or more memory if workers died for want of it"
    return (
        f"{len(pieces)} {have} failed whenever tried: {named}{more}; all that can be done without {them} is done and "
        f"kept, and the same command tries {them} again{advice}."
    )


def run_tasks(pool: Pool, works: Sequence[Tasks], troubles: Troubles) -> Iterator[tuple[Tasks, Item, Any]]:
    """Do tasks of several kinds at once; yields ``(tasks, item, result)`` as they end, in any order.

    Parameters
    ----------
    pool : Pool
        Closed at the end.
    works : sequence of Tasks
        Where they share workers, the first come first: later ones get what room these leave.
    troubles : Troubles
        Is told what is tried again, and what is put in quarantine.

    Raises
    ------
    QuarantineError
        At the end, if something is in quarantine.
    TiledsegError
        What ended the stream; what was in flight has been handed back before.
    """
    sources = [_Source(tasks) for tasks in works]
    failures, live = _Failures(pool, troubles), dict[Any, tuple[Tasks, Item]]()
    is_alone = False

    def submit(tasks: Tasks, items: Sequence[Item]) -> None:
        if items:
            live.update(zip(pool.submit(tasks, items), ((tasks, item) for item in items), strict=True))

    def fill() -> bool:
        """Begin what may begin; whether it is a suspect by itself."""
        if failures.fatal is not None or failures.are_many:
            return False
        if len(failures.suspects) < MANY_SUSPECTS:
            for source in sources:
                submit(source.tasks, source.take(max(0, pool.room(source.tasks.kind))))
        if live or not failures.suspects:
            return False
        tasks, item = failures.suspects.popleft()
        submit(tasks, [item])
        return True

    try:
        fill()
        while live:
            for ticket, error, result in pool.ended():
                tasks, item = live.pop(ticket)
                if error is None:
                    yield tasks, item, result
                else:
                    failures.take(tasks, item, error)
            if not (is_alone and live):
                is_alone = fill()
    finally:
        pool.close()
    failures.raise_last()
