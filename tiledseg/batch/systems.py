"""Batch systems: how each is told what a job needs, and how jobs are tried, submitted, listed and cancelled.

SLURM is tested against a real one. LSF and PBS follow their manuals and have not been run. `Here` runs jobs as
processes of this machine.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import ClusterError
from .config import JobConfig, WorkersConfig

__all__ = ["SYSTEMS", "Here", "System", "system_of"]

PATIENCE_S = 60
"""A batch system that does not answer in this time is taken to be out of order."""


NEVER_STARTS = frozenset(
    {
        "AssocMaxWallDurationPerJobLimit",
        "BadConstraints",
        "InvalidAccount",
        "InvalidQOS",
        "PartitionNodeLimit",
        "PartitionTimeLimit",
        "QOSMaxWallDurationPerJobLimit",
    }
)
"""What SLURM lets a job wait for that will not come; sites may have it take such jobs without a word."""


class System(Protocol):
    """Where jobs are given to."""

    @property
    def name(self) -> str:
        """As people call it."""

    @property
    def job_id(self) -> str:
        """What a shell in a job finds its own id by."""

    @property
    def hopeless(self) -> frozenset[str]:
        """What a job that will never start waits for."""

    @property
    def host(self) -> str | None:
        """Where processes listen; None for the interface of the cluster file."""

    def directives(self, name: str, job: JobConfig, log: Path) -> list[str]:
        """Lines at the head of a script that say what the job needs; its output goes to `log`."""

    def check(self, script: Path) -> None:
        """Ask whether a script would be taken, without submitting it; a ClusterError with the answer if not."""

    def submit(self, script: Path, name: str) -> str:
        """Put a script in the queue and return its job's id; a ClusterError if it is not taken.

        The name is the one that its directives give.
        """

    def alive(self, name: str) -> dict[str, str]:
        """Jobs of this name that wait or run, and what each waits for; a ClusterError if the system does not say."""

    def cancel(self, ids: set[str]) -> None:
        """End jobs; those that are gone are no error."""


@dataclass(frozen=True)
class CommandSystem:
    """A system that is spoken to by commands.

    Attributes
    ----------
    name : str
    job_id : str
    prefix : str
        What a directive begins with.
    options : callable
        Directives of a job without the prefix, from its name, what it needs and where its output goes.
    try_command : tuple of str
        To which a script is added to see whether it would be taken; empty where there is no such thing.
    submit_command : tuple of str
        To which a script is added; with a last ``<`` it is fed the script instead.
    id_pattern : str
        Where the id is in what that prints.
    list_command : tuple of str
        To which a name is added; prints a line for each job, an id and what it waits for.
    nothing_found : str
        What listing says, with an error, when there are no such jobs; empty if it says nothing.
    cancel_command : tuple of str
        To which ids are added.
    hopeless : frozenset of str
        What a job that will never start waits for.
    host : None
    """

    name: str
    job_id: str
    prefix: str
    options: Callable[[str, JobConfig, Path], list[str]]
    try_command: tuple[str, ...]
    submit_command: tuple[str, ...]
    id_pattern: str
    list_command: tuple[str, ...]
    nothing_found: str
    cancel_command: tuple[str, ...]
    hopeless: frozenset[str] = frozenset()
    host: str | None = None

    def directives(self, name: str, job: JobConfig, log: Path) -> list[str]:
        """Lines at the head of a script."""
        return [f"{self.prefix} {option}" for option in [*self.options(name, job, log), *job.directives]]

    def check(self, script: Path) -> None:
        """Ask whether a script would be taken."""
        if self.try_command:
            self._answer(self.try_command, script)

    def submit(self, script: Path, name: str) -> str:
        """Put a script in the queue and return its job's id."""
        answer = self._answer(self.submit_command, script)
        found = re.search(self.id_pattern, answer, re.MULTILINE)
        if not found:
            raise ClusterError(
                f"{self.submit_command[0]} took {script} for {name} but named no job: {answer.strip()!r}."
            )
        return found[1]

    def alive(self, name: str) -> dict[str, str]:
        """Jobs of this name that wait or run."""
        ended = self._run([*self.list_command, name])
        if ended.returncode and not (self.nothing_found and self.nothing_found in ended.stderr + ended.stdout):
            raise ClusterError(f"{self.list_command[0]} does not list jobs: {_last_line(ended)}.")
        jobs = [] if ended.returncode else [line.strip().partition(" ") for line in ended.stdout.splitlines()]
        return {job: reason.strip() for job, _, reason in jobs if job}

    def cancel(self, ids: set[str]) -> None:
        """End jobs."""
        if ids:
            self._run([*self.cancel_command, *sorted(ids)])

    def _answer(self, command: tuple[str, ...], script: Path) -> str:
        """What a command says to a script that it takes."""
        if command[-1] == "<":
            ended = self._run(list(command[:-1]), script.read_text())
        else:
            ended = self._run([*command, str(script)])
        if ended.returncode:
            raise ClusterError(
                f"{command[0]} refuses {script}: {_last_line(ended)}; change the cluster file and submit again."
            )
        return ended.stdout

    def _run(self, command: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command that must answer in time."""
        try:
            return subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=PATIENCE_S, check=False, errors="replace"
            )
        except FileNotFoundError as error:
            raise ClusterError(
                f"{command[0]} is not on this machine; submit from one on which {self.name} is installed."
            ) from error
        except subprocess.TimeoutExpired as error:
            raise ClusterError(
                f"{command[0]} gave no answer in {PATIENCE_S} s; see whether {self.name} is up, then submit again."
            ) from error


def _last_line(ended: subprocess.CompletedProcess[str]) -> str:
    """What a command said at last, as part of a sentence."""
    lines = (ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}").splitlines()
    return lines[-1].strip().rstrip(".")


def _gpus(job: JobConfig) -> int:
    return job.gpus if isinstance(job, WorkersConfig) else 0


def _clock(seconds: int) -> str:
    """Hours, minutes and seconds."""
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _slurm(name: str, job: JobConfig, log: Path) -> list[str]:
    # A worker that is lost is replaced by us; the run itself is put in the queue again when its node fails.
    options = [f"--job-name={name}", f"--output={log}-%j.log", "--ntasks=1", f"--cpus-per-task={job.cores}"]
    options.append("--no-requeue" if isinstance(job, WorkersConfig) else "--requeue")
    options += [f"--partition={job.queue}"] if job.queue else []
    options += [f"--time={-(-job.seconds // 60)}"] if job.seconds else []
    options += [f"--mem={job.mebibytes}M"] if job.mebibytes else []
    return options + ([f"--gres=gpu:{_gpus(job)}"] if _gpus(job) else [])


def _lsf(name: str, job: JobConfig, log: Path) -> list[str]:
    options = [f"-J {name}", f"-o {log}-%J.log", f"-n {job.cores}", '-R "span[hosts=1]"']
    options.append("-rn" if isinstance(job, WorkersConfig) else "-r")
    options += [f"-q {job.queue}"] if job.queue else []
    options += [f"-W {-(-job.seconds // 60)}"] if job.seconds else []
    options += [f"-M {job.mebibytes}MB", f'-R "rusage[mem={job.mebibytes}MB]"'] if job.mebibytes else []
    return options + ([f'-gpu "num={_gpus(job)}"'] if _gpus(job) else [])


def _pbs(name: str, job: JobConfig, log: Path) -> list[str]:
    select = f"select=1:ncpus={job.cores}"
    select += f":mem={job.mebibytes}mb" if job.mebibytes else ""
    select += f":ngpus={_gpus(job)}" if _gpus(job) else ""
    options = [f"-N {name}", f"-o {log.parent}/", "-j oe", "-V", f"-l {select}"]
    options.append("-r n" if isinstance(job, WorkersConfig) else "-r y")
    options += [f"-q {job.queue}"] if job.queue else []
    return options + ([f"-l walltime={_clock(job.seconds)}"] if job.seconds else [])


class Here:
    """Processes of this machine in place of jobs, for trying a cluster file out."""

    name = "local"
    job_id = "$$"
    hopeless: frozenset[str] = frozenset()
    host: str | None = "127.0.0.1"

    def __init__(self) -> None:
        self._running: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}

    def directives(self, name: str, job: JobConfig, log: Path) -> list[str]:
        """None but the name, which says what the script is; its output goes to `log`."""
        wanted = f"{job.cores} cores" + (f", {_gpus(job)} GPUs" if _gpus(job) else "")
        return [f"# {name}, for {wanted}", f"exec > {shlex.quote(f'{log}-')}$$.log 2>&1"]

    def check(self, script: Path) -> None:
        """Everything is taken."""

    def submit(self, script: Path, name: str) -> str:
        """Start a script in a session of its own."""
        process = subprocess.Popen(["bash", str(script)], stdin=subprocess.DEVNULL, start_new_session=True)
        self._running[str(process.pid)] = (name, process)
        return str(process.pid)

    def alive(self, name: str) -> dict[str, str]:
        """Processes started here that still run."""
        return {pid: "" for pid, (of, process) in self._running.items() if of == name and process.poll() is None}

    def cancel(self, ids: set[str]) -> None:
        """End processes and all that they started; returns when they are gone."""
        ended = [self._running[pid][1] for pid in ids if pid in self._running]
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            for process in ended:
                if process.poll() is None:
                    os.killpg(process.pid, number)
            for process in ended:
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue


SYSTEMS: dict[str, Callable[[], System]] = {
    "slurm": lambda: CommandSystem(
        name="SLURM",
        job_id="$SLURM_JOB_ID",
        prefix="#SBATCH",
        options=_slurm,
        try_command=("sbatch", "--test-only"),
        submit_command=("sbatch", "--parsable"),
        id_pattern=r"^(\d+)",
        list_command=("squeue", "--noheader", "--format=%A %r", "--name"),
        nothing_found="",
        cancel_command=("scancel",),
        hopeless=NEVER_STARTS,
    ),
    "lsf": lambda: CommandSystem(
        name="LSF",
        job_id="$LSB_JOBID",
        prefix="#BSUB",
        options=_lsf,
        try_command=(),
        submit_command=("bsub", "<"),
        id_pattern=r"Job <(\d+)>",
        list_command=("bjobs", "-noheader", "-o", "jobid", "-J"),
        nothing_found="is not found",
        cancel_command=("bkill",),
    ),
    "pbs": lambda: CommandSystem(
        name="PBS",
        job_id="$PBS_JOBID",
        prefix="#PBS",
        options=_pbs,
        try_command=(),
        submit_command=("qsub",),
        id_pattern=r"^(\S+)",
        list_command=("qselect", "-N"),
        nothing_found="",
        cancel_command=("qdel",),
    ),
    "local": Here,
}


def system_of(name: str) -> System:
    """The batch system of a name in `SYSTEMS`."""
    return SYSTEMS[name]()
