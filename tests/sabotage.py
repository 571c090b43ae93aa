"""Faults that are really produced, in the midst of a task: for test_faults.py."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import resource
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed import WorkerPlugin

TASKS = {
    "flows": ("tiledseg.flows", "compute_chunk"),
    "forward pass": ("tiledseg.networks.runner", "Network.predict"),
    "masks": ("tiledseg.masks", "label_block"),
    "stitch": ("tiledseg.stitch", "match_block"),
    "publish": ("tiledseg.publish", "paint_region"),
}

Deed = Callable[[], object]


class Saboteur(WorkerPlugin):
    """Notes every task that a worker begins, and does a deed once, before or after one of them.

    It also comes to the workers that are started in place of dead ones.
    """

    name = "saboteur"

    def __init__(self, log: Path, task: str, deed: Deed, *, number: int = 3, after: bool = False) -> None:
        self.log, self.task, self.deed, self.number, self.after = log, task, deed, number, after
        self._kept: list[tuple[Any, str, Any]] = []

    def setup(self, worker: Any) -> None:  # noqa: ARG002
        """Put a wrapper round every task."""
        for task, (module, path) in TASKS.items():
            holder = importlib.import_module(module)
            *inner, name = path.split(".")
            for part in inner:
                holder = getattr(holder, part)
            function = getattr(holder, name)
            self._kept.append((holder, name, function))
            setattr(holder, name, self._wrapped(task, function))

    def teardown(self, worker: Any) -> None:  # noqa: ARG002
        """Take the wrappers away."""
        for holder, name, function in self._kept:
            setattr(holder, name, function)

    def _wrapped(self, task: str, function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            with self.log.open("a") as log:
                log.write(f"{task}\n")
            if self.after:
                result = function(*args)
                self._act(task)
                return result
            self._act(task)
            return function(*args)

        return run

    def _act(self, task: str) -> None:
        """Do the deed if it is time, once in all processes together."""
        if task == self.task and begun(self.log)[task] >= self.number:
            with contextlib.suppress(FileExistsError):
                self.log.with_suffix(".done").touch(exist_ok=False)
                self.deed()


def begun(log: Path) -> Counter[str]:
    """How often each task was begun."""
    return Counter(log.read_text().splitlines() if log.exists() else [])


def kill() -> None:
    """As the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def later(seconds: float, command: str) -> None:
    """Have a shell do something when this process may no longer be able to."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; {command}"], start_new_session=True)


def freeze(seconds: float) -> None:
    """As a machine that swaps, or a batch system that suspends a job."""
    later(seconds, f"kill -CONT {os.getpid()}")
    os.kill(os.getpid(), signal.SIGSTOP)


def take_away(folder: Path, seconds: float) -> None:
    """As a network store that is lost for a while."""
    away = folder.with_name(f"{folder.name}.away")
    folder.rename(away)
    later(seconds, f"mv '{away}' '{folder}'")


def fill(folder: Path) -> None:
    """Fill the disk up."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))


def limit_files(size: int) -> None:
    """Let this process write no larger files, as a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def spoil(file: Path) -> None:
    """Put other bytes in the middle of a file."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = b"sabotage"
    file.write_bytes(content)


def cut(file: Path, share: float = 0.0) -> None:
    """Leave only the beginning of a file, or nothing."""
    os.truncate(file, int(file.stat().st_size * share))
