"""The job of a run: scheduler and client, and workers that are replaced when they are lost.

Strategy: the scheduler lives in this process and the client, an ordinary ``tiledseg segment``, in one of its own.
Workers are jobs. Every few seconds the queue is asked which of them are left, and what is missing is submitted
again; that is all, so a job that was cancelled, one whose walltime is over and one whose node failed are the same
thing. There is no need of dask-jobqueue, which does not replace the jobs that it loses.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ClusterError
from .config import ClusterConfig, parse_seconds
from .scheduler import scheduler_of
from .scripts import SCHEDULER_FILE, tls_environment
from .systems import System

__all__ = ["CONTINUED", "Workers", "supervise"]

logger = logging.getLogger(__name__)

CONTINUED = 75
"""Exit code of a run that was stopped because the walltime of its job is nearly over."""
TRIES = 3
"""Jobs of a kind in a row that may end before a worker has come."""
CLIENT_TRIES = 3
"""Times that the client may be killed, as for want of memory, before the run is given up."""
TICK_S = 1.0
PATIENCE_S = 30
"""Given to a client that was asked to stop."""


@dataclass
class _Kind:
    """What is known of one kind of worker: jobs that should be there, and those of which a worker came."""

    ids: set[str] = field(default_factory=set)
    joined: set[str] = field(default_factory=set)
    n_failed: int = 0
    hopeless: str | None = None
    waits: list[str] = field(default_factory=list)


class Workers:
    """The jobs of workers, kept at their number.

    Parameters
    ----------
    system : System
    config : ClusterConfig
    folder : Path
        With the scripts ``KIND.sh``.
    name : str
        What the names of jobs begin with.
    """

    def __init__(self, system: System, config: ClusterConfig, folder: Path, name: str) -> None:
        self._system, self._config, self._folder, self._name = system, config, folder, name
        self._kinds = {kind: _Kind() for kind in config.workers}

    def clear(self) -> None:
        """Cancel what an earlier attempt left behind."""
        for kind in self._kinds:
            left = self._system.alive(f"{self._name}-{kind}")
            if left:
                logger.info("%s jobs of an earlier attempt are cancelled: %s.", kind, _listed(left))
                self._system.cancel(set(left))

    def note(self, names: Iterable[str]) -> bool:
        """Take down which workers the scheduler has; whether of every kind one has come so far."""
        for name in names:
            kind, _, rest = name.partition("/")
            if kind in self._kinds:
                self._kinds[kind].joined.add(rest.partition("/")[0])
        return all(known.joined for known in self._kinds.values())

    def replace(self) -> None:
        """Submit the jobs that are missing.

        Raises
        ------
        ClusterError
            If jobs of a kind end again and again before a worker has come, or the first is refused.
        """
        for kind, known in self._kinds.items():
            try:
                self._look(kind, known)
                while known.n_failed < TRIES and len(known.ids) < self._config.workers[kind].jobs:
                    known.ids.add(self._system.submit(self._folder / f"{kind}.sh", f"{self._name}-{kind}"))
            except ClusterError as error:
                # A queue that is out of order or full for a while costs workers and not the run.
                if not known.ids and not known.joined:
                    raise
                logger.warning("%s jobs stay as they are for now: %s", kind, error)
            if known.hopeless:
                raise ClusterError(
                    f"jobs of kind {kind!r} would wait for ever ({known.hopeless}); change the cluster file and submit "
                    "again."
                )
            if known.n_failed >= TRIES:
                raise ClusterError(
                    f"{known.n_failed} jobs of kind {kind!r} ended one after another before a worker had come; see "
                    f"their output in {self._folder / 'logs'} and their script {self._folder / f'{kind}.sh'}."
                )

    def cancel(self) -> None:
        """Cancel all."""
        for kind, known in self._kinds.items():
            with contextlib.suppress(ClusterError):
                known.ids |= self._system.alive(f"{self._name}-{kind}").keys()
            with contextlib.suppress(ClusterError):
                self._system.cancel(known.ids)

    def _look(self, kind: str, known: _Kind) -> None:
        """Ask the queue which jobs are left."""
        if not known.ids:
            return
        there = self._system.alive(f"{self._name}-{kind}")
        known.hopeless = next((why for why in there.values() if why in self._system.hopeless), None)
        waits = sorted({why for why in there.values() if why not in ("", "None")})
        if waits and waits != known.waits:
            logger.info("%s jobs wait: %s.", kind, ", ".join(waits))
        known.waits = waits
        gone = known.ids - there.keys()
        if gone:
            logger.info("%s jobs are over or lost and are replaced: %s.", kind, _listed(gone))
            known.ids -= gone
            known.n_failed = 0 if gone & known.joined else known.n_failed + len(gone)


def supervise(system: System, config: ClusterConfig, folder: Path, name: str, arguments: Sequence[str]) -> int:
    """Run ``tiledseg segment`` on workers of a batch system, to its end or to that of this job.

    Parameters
    ----------
    system : System
    config : ClusterConfig
    folder : Path
        With the scripts of the workers.
    name : str
        What the names of jobs begin with.
    arguments : sequence of str
        ``segment IMAGE ...`` as on the command line.

    Returns
    -------
    code : int
        Exit code of the run; `CONTINUED` if the walltime of this job stopped it and the same again goes on.

    Raises
    ------
    ClusterError
        If workers cannot be had, or the client is killed again and again.
    """
    deadline = None if config.run.seconds is None else time.monotonic() + 0.95 * config.run.seconds - PATIENCE_S
    workers = Workers(system, config, folder, name)
    workers.clear()
    command = [sys.executable, "-m", "tiledseg.cli", *arguments, "--scheduler", str(folder / SCHEDULER_FILE)]
    with _stopped_by_a_signal(), scheduler_of(system, config, folder) as cluster:
        environment = os.environ | (tls_environment(folder, "CLIENT") if config.cluster.security == "tls" else {})
        try:
            workers.replace()
            with _Client(command, environment) as client:
                return _watch(config, cluster, workers, client, deadline)
        finally:
            workers.cancel()


class _Client:
    """The process of the run itself, ended with the context."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._command, self._environment = command, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._n_killed = 0

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self, may_start: bool) -> int | None:
        """Wait a moment; the exit code of the run if that has ended."""
        if self._process is None:
            if not may_start:
                time.sleep(TICK_S)
                return None
            self._process = subprocess.Popen(self._command, env=self._environment)
        try:
            code = self._process.wait(TICK_S)
        except subprocess.TimeoutExpired:
            return None
        if code >= 0:
            return code
        self._n_killed += 1
        text = f"the run was killed by {signal.Signals(-code).name}"
        if self._n_killed >= CLIENT_TRIES:
            raise ClusterError(f"{text}, {CLIENT_TRIES} times by now; give [run] more memory and submit again.")
        logger.warning("%s and goes on.", text)
        self._process = None
        return None

    def stop(self) -> None:
        """Interrupt the run; what is done is kept."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _watch(config: ClusterConfig, cluster: Any, workers: Workers, client: _Client, deadline: float | None) -> int:
    """Wait for the end of the run, and replace what is lost meanwhile."""
    poll = parse_seconds("poll", config.cluster.poll)
    looked = time.monotonic()
    while deadline is None or time.monotonic() < deadline:
        names = [str(worker["name"]) for worker in list(cluster.scheduler_info["workers"].values())]
        code = client.wait(may_start=workers.note(names))
        if code is not None:
            return code
        if time.monotonic() - looked >= poll:
            looked = time.monotonic()
            workers.replace()
    logger.info("the walltime of this job is nearly over.")
    return CONTINUED


@contextlib.contextmanager
def _stopped_by_a_signal() -> Iterator[None]:
    """A batch system ends a job with SIGTERM: workers are then cancelled as well."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listed(ids: Iterable[str]) -> str:
    return ", ".join(sorted(ids))
