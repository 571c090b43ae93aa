"""Faults that are really produced, in the midst of a task: for test_faults.py."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed import WorkerPlugin

TASKS = {
    "flows": ("tiledseg.flows", "compute_chunk"),
    "forward pass": ("tiledseg.networks.runner", "Network.start"),
    "masks": ("tiledseg.masks", "label_block"),
    "stitch": ("tiledseg.stitch", "match_block"),
    "publish": ("tiledseg.publish", "paint_region"),
}

Deed = Callable[[], object]


class Saboteur(WorkerPlugin):
    """Notes every task that a worker begins, and does a deed before or after one of them.

    It also comes to the workers that are started in place of dead ones.

    Parameters
    ----------
    log : Path
        Gets a line for each task that is begun. Beside it lies a file ``.done`` once the deed is.
    task : str
        Of `TASKS`.
    deed : callable
    number : int
        The deed is done with the so-many-th task of that kind, whichever that is.
    after : bool
        When the task has stored its result, not before it begins.
    always : int, optional
        Do it whenever this piece is begun, until there is a file ``.mended``.
    """

    name = "saboteur"

    def __init__(
        self, log: Path, task: str, deed: Deed, *, number: int = 3, after: bool = False, always: int | None = None
    ) -> None:
        self.log, self.task, self.deed, self.number, self.after, self.always = log, task, deed, number, after, always
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
                log.write(f"{task}|{args[0] if isinstance(args[0], int) else ''}\n")
            if self.after:
                result = function(*args)
                self._act(task, args[0])
                return result
            self._act(task, args[0])
            return function(*args)

        return run

    def _act(self, task: str, piece: Any) -> None:
        """Do the deed if it is time, once in all processes together."""
        if task != self.task:
            return
        if self.always is not None:
            if piece == self.always and not self.log.with_suffix(".mended").exists():
                self.log.with_suffix(".done").touch()
                self.deed()
        elif sum(begun(self.log, task).values()) >= self.number:
            with contextlib.suppress(FileExistsError):
                self.log.with_suffix(".done").touch(exist_ok=False)
                self.deed()


def begun(log: Path, task: str) -> Counter[str]:
    """How often each piece of a kind of task was begun."""
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(line.partition("|")[2] for line in lines if line.startswith(f"{task}|"))


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


def hold(until: Path) -> None:
    """Take long: until there is a file."""
    end = time.monotonic() + 60
    while not until.exists() and time.monotonic() < end:
        time.sleep(0.02)


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


def record_syncs(log: Path) -> None:
    """Note from now on what this process syncs: of files how much, of folders which names they had."""
    fsync = os.fsync

    def recorded(file: Any) -> None:
        handle = file if isinstance(file, int) else file.fileno()
        fsync(handle)
        state = os.fstat(handle)
        note: dict[str, Any] = {"inode": state.st_ino, "bytes": state.st_size, "time": state.st_mtime_ns}
        if stat.S_ISDIR(state.st_mode):
            note["names"] = {entry.name: entry.inode() for entry in os.scandir(f"/proc/self/fd/{handle}")}
        with log.open("a") as notes:
            notes.write(f"{json.dumps(note)}\n")

    os.fsync = recorded


def cut_power(folder: Path, log: Path) -> None:
    """Leave in a folder, which itself lasts, only what was synced.

    The worst that POSIX allows: names that their folder was not synced with are gone, and files have the
    bytes that they had when they were synced, or none.
    """
    notes = {note["inode"]: note for note in map(json.loads, log.read_text().splitlines())}
    for entry in list(os.scandir(folder)):
        path, inode = Path(entry.path), entry.inode()
        note = notes.get(inode, {"bytes": 0, "time": 0})
        if notes.get(folder.stat().st_ino, {}).get("names", {}).get(entry.name) != inode:
            shutil.rmtree(path) if entry.is_dir() else path.unlink()
        elif entry.is_dir():
            cut_power(path, log)
        elif note["time"] != path.stat().st_mtime_ns:
            os.truncate(path, min(note["bytes"], path.stat().st_size))
