"""What a cluster is asked for, read from a small TOML file.

::

    [cluster]                 # optional, as every key in it
    setup = ["module load python"]
    interface = "ib0"
    security = "tls"

    [run]                     # the job that holds the scheduler and the run itself
    queue = "cpu"
    walltime = "24h"

    [workers.gpu]             # a kind of worker; the name is free
    jobs = 4
    gpus = 1
    memory = "32GiB"
    walltime = "4h"

    [workers.cpu]
    jobs = 2
    cores = 16
    memory = "64GiB"
    walltime = "4h"
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..clients import TASKS_PER_GPU
from ..errors import SettingsError

__all__ = ["ClusterConfig", "Common", "JobConfig", "WorkersConfig", "read_config"]

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SECURITIES = ("tls", "dask", "none")


@dataclass(frozen=True)
class Common:
    """What holds for all jobs: the table ``[cluster]``."""

    setup: tuple[str, ...] = ()
    """Lines of shell that every job runs first, such as ``module load``."""
    interface: str | None = None
    """Network interface over which the jobs talk, such as ``ib0``; None for the machine's first."""
    security: str = "tls"
    """``tls``: encrypted, by a certificate made for this run alone; ``dask``: as Dask's own configuration or
    environment says; ``none``: whoever reaches the scheduler's port can run code in your name."""
    poll: str = "15s"
    """How often the queue is asked for lost jobs."""

    def __post_init__(self) -> None:
        if self.security not in SECURITIES:
            raise SettingsError(f"security must be {' or '.join(SECURITIES)}, not {self.security!r}.")
        parse_seconds("poll", self.poll)


@dataclass(frozen=True)
class JobConfig:
    """A job: the table ``[run]``, and what it shares with the tables of workers."""

    queue: str | None = None
    """SLURM's partition, the queue of LSF and PBS; None for the default one."""
    walltime: str | None = None
    """How long a job may run, such as ``90min``, ``4h`` or ``1d``; None for the queue's own limit, and then jobs
    cannot leave in good time."""
    cores: int = 1
    """Cores of a job."""
    memory: str | None = None
    """Memory of a job, such as ``16GiB``; None for the queue's default, and workers are not limited further."""
    directives: tuple[str, ...] = ()
    """Further options as the batch system has them, such as ``--account=lab``."""
    jobs: int = 10
    """At most so many jobs one after another, each going on when the walltime of the one before is over."""

    def __post_init__(self) -> None:
        for name in ("cores", "jobs"):
            _at_least(name, getattr(self, name), 1)
        for name, parse in (("walltime", parse_seconds), ("memory", parse_bytes)):
            if getattr(self, name) is not None:
                parse(name, getattr(self, name))
        if any(not line.startswith("-") for line in self.directives):
            raise SettingsError(f"directives are options such as '--account=lab', not {list(self.directives)}.")

    @property
    def seconds(self) -> int | None:
        """The walltime."""
        return None if self.walltime is None else parse_seconds("walltime", self.walltime)

    @property
    def mebibytes(self) -> int | None:
        """The memory."""
        return None if self.memory is None else parse_bytes("memory", self.memory) // 2**20


@dataclass(frozen=True)
class WorkersConfig(JobConfig):
    """Jobs that hold workers: a table ``[workers.NAME]``."""

    jobs: int = 1
    """Jobs to keep in the queue or running; one that is lost or over is replaced."""
    gpus: int = 0
    """GPUs of a job. With them it holds one worker for each, else one on all of its cores. Where another table has no
    GPUs, workers with one do nothing but the network."""
    tasks_per_gpu: int = TASKS_PER_GPU
    """Tasks that take turns on a GPU; fewer take less memory and leave it idle for longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("gpus", self.gpus, 0)
        _at_least("tasks_per_gpu", self.tasks_per_gpu, 1)

    @property
    def n_workers(self) -> int:
        """Worker processes of one job."""
        return max(1, self.gpus)


@dataclass(frozen=True)
class ClusterConfig:
    """The whole file.

    Attributes
    ----------
    cluster : Common
    run : JobConfig
    workers : dict of str to WorkersConfig
        At least one.
    """

    cluster: Common = field(default_factory=Common)
    run: JobConfig = field(default_factory=JobConfig)
    workers: dict[str, WorkersConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.workers:
            raise SettingsError("there are no workers; add a table such as [workers.gpu] with jobs, gpus and memory.")
        for name in self.workers:
            if not re.fullmatch(r"[a-z][a-z0-9]{0,15}", name) or name == "run":
                raise SettingsError(f"workers need a name of small letters and digits other than 'run', not {name!r}.")


def read_config(path: Path) -> ClusterConfig:
    """Read and check a cluster file.

    Raises
    ------
    SettingsError
        If it is missing, is no TOML, or has a table, key or value that it may not have.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"cluster file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"cluster file {path} is no TOML: {error}.") from error
    try:
        _refuse_unknown("table", tables, {"cluster", "run", "workers"})
        kinds = _table("workers", tables.get("workers", {}))
        return ClusterConfig(
            _filled("cluster", Common, tables.get("cluster", {})),
            _filled("run", JobConfig, tables.get("run", {})),
            {name: _filled(f"workers.{name}", WorkersConfig, table) for name, table in kinds.items()},
        )
    except SettingsError as error:
        raise SettingsError(f"cluster file {path}: {error}") from error


def parse_seconds(name: str, text: str) -> int:
    """``90min``, ``1.5h`` or ``1-12:30:00`` in seconds."""
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if clock:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        n_seconds: float = 86_400 * days + 3600 * hours + 60 * minutes + seconds
    else:
        n_seconds = _quantity(name, text, SECONDS, "90min, 4h or 1-12:30:00")
    if n_seconds < 1:
        raise SettingsError(f"{name} must be at least a second, not {text!r}.")
    return int(n_seconds)


def parse_bytes(name: str, text: str) -> int:
    """``16GiB`` or ``500 MB`` in bytes."""
    n_bytes = int(_quantity(name, text, BYTES, "16GiB or 500MB"))
    if n_bytes < 2**20:
        raise SettingsError(f"{name} must be at least 1MiB, not {text!r}.")
    return n_bytes


def _quantity(name: str, text: str, units: dict[str, int], example: str) -> float:
    """A number with a unit, times the size of the unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if not found or found[2] not in units:
        raise SettingsError(f"{name} must be a text such as {example}, not {text!r}.")
    return float(found[1]) * units[found[2]]


def _filled(table: str, kind: type, values: object) -> Any:
    """A dataclass from a table of the file."""
    given = _table(table, values)
    hints = typing.get_type_hints(kind)
    _refuse_unknown(f"key of [{table}]", given, {f.name for f in dataclasses.fields(kind)})
    try:
        return kind(**{name: _typed(name, value, hints[name]) for name, value in given.items()})
    except SettingsError as error:
        raise SettingsError(f"[{table}] {error}") from error


def _typed(name: str, value: object, kind: Any) -> Any:
    """A value if it is of the type that a field has."""
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) and "\n" not in item for item in value):
            raise SettingsError(f"{name} must be a list of lines, not {value!r}.")
        return tuple(value)
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    wanted = next(k for k in kinds if k is not types.NoneType)
    if type(value) is not wanted:
        raise SettingsError(f"{name} must be a {'text' if wanted is str else 'whole number'}, not {value!r}.")
    if isinstance(value, str) and not re.fullmatch(r"[\w.,:@+ -]+", value):
        raise SettingsError(f"{name} may not hold {value!r}: it would not be safe in a job script.")
    return value


def _table(name: str, value: object) -> dict[str, Any]:
    """A value that must be a table."""
    if not isinstance(value, dict):
        raise SettingsError(f"{name} must be a table, not {value!r}.")
    return value


def _refuse_unknown(what: str, given: dict[str, Any], known: set[str]) -> None:
    """A name that nobody reads is a slip of the pen."""
    for name in given:
        if name not in known:
            raise SettingsError(f"unknown {what} {name!r}; known are {', '.join(sorted(known))}.")


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise SettingsError(f"{name} must be at least {low}, not {value}.")
