"""Commands run to their end while their time and the memory of all their processes are watched."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_S = 0.2
"""A look takes a millisecond of a core that what is measured may want."""
OMITTED = ("PYTHONPATH", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes
    ----------
    code : int
        Exit status.
    seconds : float
        From start to end, imports and start-up of workers included.
    root_peak : int
        Bytes: the most the command's own process ever had resident.
    child_peaks : tuple of int
        The same of each process below it, the largest first.
    together_peak : int
        The most all of them had resident at one time, of what was seen every 200 ms.
    log : str
        The end of what they printed.
    """

    code: int
    seconds: float
    root_peak: int
    child_peaks: tuple[int, ...]
    together_peak: int
    log: str

    @property
    def failure(self) -> dict[str, str]:
        """What a row says of a command that failed: the last line, and for the JSON file what came before."""
        last = (self.log.strip().splitlines() or ["it printed nothing"])[-1]
        return {"note": f"failed ({self.code}): {last[:150]}", "log": self.log}

    @property
    def total_peak(self) -> int:
        """Sum over all processes of the most each had resident: what tiledseg's own report gives."""
        return self.root_peak + sum(self.child_peaks)


def run_measured(
    command: Sequence[str], folder: Path, *, cores: int, env: Mapping[str, str] | None = None, timeout_s: float = 7200
) -> Measured:
    """Run a command on some cores and watch it.

    Parameters
    ----------
    command : sequence of str
        Program and arguments.
    folder : Path
        Where it runs; its output goes to ``log.txt`` there.
    cores : int
        It and its children may use the first so many of the cores this process may use.
    env : mapping, optional
        Environment variables to set; PYTHONPATH is not handed on unless given here.
    timeout_s : float
        After so long it is killed, with exit status 124.
    """
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    environment = {k: v for k, v in os.environ.items() if k not in OMITTED} | dict(env or {})
    peaks: dict[int, int] = {}
    together, is_late, has_ended = 0, False, threading.Event()
    log = folder / "log.txt"

    def watch() -> None:
        nonlocal together, is_late
        while not has_ended.wait(POLL_S):
            together = max(together, _look(running.pid, peaks))
            if time.perf_counter() - start > timeout_s:
                is_late = True
                _kill(running)

    start = time.perf_counter()
    with log.open("wb") as out:
        running = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        psutil.Process(running.pid).cpu_affinity(allowed)
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            running.wait()
            seconds = time.perf_counter() - start
        finally:
            has_ended.set()
            watcher.join()
            _kill(running)
    code = 124 if is_late else running.returncode
    children = sorted((peak for pid, peak in peaks.items() if pid != running.pid), reverse=True)
    return Measured(code, seconds, peaks.get(running.pid, 0), tuple(children), together, _end_of(log))


def _look(root: int, peaks: dict[int, int]) -> int:
    """Note the peak of every process of a tree; returns what they have resident now."""
    now = 0
    try:
        top = psutil.Process(root)
        tree = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            resident = process.memory_info().rss
        except psutil.Error:
            continue
        now += resident
        peaks[process.pid] = max(peaks.get(process.pid, 0), resident, high_water(process.pid))
    return now


def high_water(pid: int) -> int:
    """The kernel's own mark of the most a process had resident; 0 where it keeps none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _kill(running: subprocess.Popen[bytes]) -> None:
    """Kill a command with its children, if it still runs."""
    if running.poll() is None:
        for process in psutil.Process(running.pid).children(recursive=True):
            process.kill()
        running.kill()
        running.wait()


def _end_of(log: Path, n_characters: int = 4000) -> str:
    """The last lines a command printed."""
    return log.read_text(errors="replace")[-n_characters:]
