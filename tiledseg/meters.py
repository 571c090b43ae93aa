"""What work costs, counted where it is done: seconds by kind, bytes, and how long devices were busy.

A task has one tally, into which every thread that works for it counts. A thread does one kind of work at a time: a kind
that begins within another takes over until it ends. So the kinds add up to all that the threads did, and
nothing is counted twice. Outside of tasks meters cost next to nothing and count nothing.

What Zarr and torch do in threads of their own is known for the process only, not by kind: `OTHER_THREADS`. There is
also what the process did beside its tasks, as compiling kernels for the next stage.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

__all__ = ["OTHER_THREADS", "Tally", "Totals", "busy", "carried", "measured", "meter", "metered", "note"]

P = ParamSpec("P")
R = TypeVar("R")

REST = "other"
OTHER_THREADS = "other threads"
IO = Path("/proc/self/io")
HAS_IO = IO.exists()
MOST_BYTES = 4096


@dataclass
class Tally:
    """What some work cost.

    Attributes
    ----------
    seconds : dict of str to float
        By kind: what threads spent on it, waiting for a disk or a device included.
    cpu_seconds : dict of str to float
        By kind: what these threads computed meanwhile.
    busy_seconds : dict of str to float
        By device: how long at least one forward pass was under way on it.
    counts : dict of str to int
        What was counted by `note`; ``bytes_read`` and ``bytes_written``: what processes had the system read and
        write while tasks ran in them, wherever the system tells it.
    process_seconds : float
        Of computing, by all threads of the processes while tasks ran in them.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    busy_seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    process_seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Count what another tally has as well."""
        for name in ("seconds", "cpu_seconds", "busy_seconds", "counts"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + value
        self.process_seconds += other.process_seconds


class _Here(threading.local):
    """What the thread at hand works for, the kind of its work, and until when that is charged."""

    tally: Tally | None = None
    kind = REST
    wall = 0.0
    cpu = 0.0


_here = _Here()
_adding = threading.Lock()
_outside = Tally()


def _turn_to(kind: str) -> None:
    """Charge what the thread did since the last turn; from now on it does another kind of work."""
    wall, cpu, tally = time.perf_counter(), time.thread_time(), _here.tally
    if tally is not None:
        with _adding:
            tally.seconds[_here.kind] = tally.seconds.get(_here.kind, 0.0) + wall - _here.wall
            tally.cpu_seconds[_here.kind] = tally.cpu_seconds.get(_here.kind, 0.0) + cpu - _here.cpu
    _here.kind, _here.wall, _here.cpu = kind, wall, cpu


@contextlib.contextmanager
def meter(kind: str) -> Iterator[None]:
    """Within, the thread does this kind of work."""
    if _here.tally is None:
        yield
        return
    before = _here.kind
    _turn_to(kind)
    try:
        yield
    finally:
        _turn_to(before)


def metered(kind: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function does this kind of work."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with meter(kind):
                return function(*args, **kwargs)

        return run

    return decorate


def note(name: str, n: int = 1) -> None:
    """Count something for the task at hand; in a thread that works for none, for the next task that ends here."""
    with _adding:
        counts = (_here.tally or _outside).counts
        counts[name] = counts.get(name, 0) + n


def _noted_outside() -> Tally:
    """What threads of this process noted that work for no task, once."""
    with _adding:
        noted = Tally(counts=dict(_outside.counts))
        _outside.counts.clear()
    return noted


@contextlib.contextmanager
def _working_for(tally: Tally, kind: str) -> Iterator[None]:
    """Within, the thread counts into a tally."""
    before = (_here.tally, _here.kind)
    _turn_to(kind)
    _here.tally = tally
    try:
        yield
    finally:
        _turn_to(before[1])
        _here.tally = before[0]


def carried(function: Callable[P, R]) -> Callable[P, R]:
    """The function to be called in another thread that helps with the task and the kind of work at hand."""
    tally, kind = _here.tally, _here.kind
    if tally is None:
        return function

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _working_for(tally, kind):
            return function(*args, **kwargs)

    return run


class _Devices:
    """Since when forward passes are under way on the devices of this process."""

    def __init__(self) -> None:
        self._under_way: dict[str, int] = {}
        self._charged: dict[str, float] = {}

    def change(self, device: str, by: int) -> None:
        """One more or less; charges the thread's tally with what went by if there were any."""
        with _adding:
            now, n = time.perf_counter(), self._under_way.get(device, 0)
            if n and _here.tally is not None:
                charged = _here.tally.busy_seconds
                charged[device] = charged.get(device, 0.0) + now - self._charged[device]
            self._under_way[device], self._charged[device] = n + by, now


_devices = _Devices()


@contextlib.contextmanager
def busy(device: str | None) -> Iterator[None]:
    """Within, a forward pass is under way on a device; several at once count once. None is nothing to keep busy."""
    if device is None:
        yield
        return
    _devices.change(device, +1)
    try:
        yield
    finally:
        _devices.change(device, -1)


class _Process:
    """What the whole process used while tasks ran in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_running = 0
        self._before = (0.0, 0, 0)

    def begin(self) -> None:
        """A task begins."""
        with self._lock:
            if self._n_running == 0:
                self._before = _used()
            self._n_running += 1

    def end(self) -> Tally:
        """A task ends; what was used since the last one ended."""
        with self._lock:
            now, before = _used(), self._before
            self._before = now
            self._n_running -= 1
        used = Tally(process_seconds=now[0] - before[0])
        if HAS_IO:
            used.counts = {"bytes_read": now[1] - before[1], "bytes_written": now[2] - before[2]}
        return used


def _used() -> tuple[float, int, int]:
    """CPU seconds of this process, and the bytes that it had the system read and write; 0 where it does not tell."""
    seconds = time.process_time()
    try:
        lines = _text_of(IO).splitlines()
    except OSError:
        return seconds, 0, 0
    said = dict(line.split(": ") for line in lines)
    return seconds, int(said["rchar"]), int(said["wchar"])


def _text_of(file: Path) -> str:
    """A short text that the system keeps, in three calls; as an ordinary file it would take eight, and after each the
    thread waits for Python's lock."""
    handle = os.open(file, os.O_RDONLY)
    try:
        return os.read(handle, MOST_BYTES).decode("ascii")
    finally:
        os.close(handle)


_process = _Process()


@dataclass(frozen=True)
class Measured:
    """What came of a task, and what it cost."""

    result: Any
    stage: str
    tally: Tally


def stage_of(function: Callable[..., Any]) -> str:
    """The stage that a task is of: the module that has it."""
    return function.__module__.rpartition(".")[2]


def measured(function: Callable[..., Any], *args: Any) -> Measured:
    """Run a task, with all that is metered in it."""
    tally = Tally()
    _process.begin()
    try:
        with _working_for(tally, REST):
            result = function(*args)
    finally:
        used = _process.end()
    tally.add(used)
    tally.add(_noted_outside())
    return Measured(result, stage_of(function), tally)


class Totals:
    """What all tasks of a run cost, by stage."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, Tally] = {}

    def take(self, task: Measured) -> Any:
        """Count a task; returns what came of it."""
        with self._lock:
            self._stages.setdefault(task.stage, Tally()).add(task.tally)
        return task.result

    def of(self, stage: str) -> Tally:
        """What a stage has cost."""
        total = Tally()
        with self._lock:
            total.add(self._stages.get(stage, Tally()))
        return total

    def whole(self) -> Tally:
        """What all stages have cost, and what was noted in this process outside of tasks."""
        total = Tally()
        with self._lock:
            self._stages.setdefault("", Tally()).add(_noted_outside())
            for tally in self._stages.values():
                total.add(tally)
        return total
