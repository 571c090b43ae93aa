"""The job scripts: text that says everything a job does, kept in the folder of the run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import ClusterConfig, WorkersConfig
from .systems import System

__all__ = ["SCHEDULER_FILE", "TLS_FOLDER", "lifetime_of", "run_script", "tls_environment", "worker_script"]

SCHEDULER_FILE = "scheduler.json"
TLS_FOLDER = "tls"
DEATH_TIMEOUT_S = 60
"""Workers that find no scheduler for so long leave."""


def run_script(system: System, name: str, config: ClusterConfig, folder: Path, command: Sequence[str]) -> str:
    """The job that holds the scheduler and the run: the command that looks after both."""
    return "\n".join([*_head(system, name, config, folder, "run"), f"exec {shlex.join(command)}", ""])


def worker_script(system: System, name: str, config: ClusterConfig, folder: Path, kind: str) -> str:
    """A job of one kind of worker: a process for each of its GPUs, or one with all of its cores."""
    wanted = config.workers[kind]
    lines = _head(system, name, config, folder, kind)
    if config.cluster.security == "tls":
        lines += [f"export {k}={shlex.quote(v)}" for k, v in tls_environment(folder, "WORKER").items()]
    if not wanted.gpus:
        return "\n".join([*lines, f"export CUDA_VISIBLE_DEVICES=\nexec {_worker(system, config, folder, kind, 0)}", ""])
    lines += [
        f'IFS=, read -ra gpus <<< "${{CUDA_VISIBLE_DEVICES:-{",".join(map(str, range(wanted.gpus)))}}}"',
        'for gpu in "${gpus[@]}"; do',
        f"  CUDA_VISIBLE_DEVICES=$gpu {_worker(system, config, folder, kind, '$gpu')} &",
        "done",
        "wait",
    ]
    return "\n".join([*lines, ""])


def lifetime_of(walltime_s: int) -> tuple[int, int]:
    """Seconds after which workers leave by themselves, and how far these may differ from one to the next.

    A worker that leaves hands its tasks on and is no suspect; all leave before the walltime kills them, and not
    all at once.
    """
    stagger = min(600, walltime_s // 10)
    return max(1, walltime_s - stagger - min(300, max(1, walltime_s // 10))), stagger


def tls_environment(folder: Path, role: str) -> dict[str, str]:
    """What makes a process of Dask, ``WORKER`` or ``CLIENT``, use the certificate of a run and accept no other."""
    certificate, key = folder / TLS_FOLDER / "cert.pem", folder / TLS_FOLDER / "key.pem"
    prefix = "DASK_DISTRIBUTED__COMM__"
    return {
        f"{prefix}REQUIRE_ENCRYPTION": "True",
        f"{prefix}TLS__CA_FILE": str(certificate),
        f"{prefix}TLS__{role}__CERT": str(certificate),
        f"{prefix}TLS__{role}__KEY": str(key),
    }


def _head(system: System, name: str, config: ClusterConfig, folder: Path, kind: str) -> list[str]:
    """What all scripts begin with."""
    job = config.run if kind == "run" else config.workers[kind]
    return [
        "#!/bin/bash",
        *system.directives(f"{name}-{kind}", job, folder / "logs" / kind),
        f"cd {shlex.quote(str(Path.cwd()))}",
        *config.cluster.setup,
    ]


def _worker(system: System, config: ClusterConfig, folder: Path, kind: str, number: object) -> str:
    """The command of one worker process."""
    wanted = config.workers[kind]
    n_threads, resources = _shares(config, wanted)
    words = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(folder / SCHEDULER_FILE)]
    words += ["--nthreads", str(n_threads), "--resources", resources, "--no-dashboard"]
    words += ["--death-timeout", str(DEATH_TIMEOUT_S), "--memory-limit", _memory_of(wanted)]
    if system.host:
        words += ["--host", system.host]
    elif config.cluster.interface:
        words += ["--interface", config.cluster.interface]
    if wanted.seconds:
        lifetime, stagger = lifetime_of(wanted.seconds)
        words += ["--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{stagger}s"]
    named = f'--name "{kind}/{system.job_id}/{number}" --local-directory "${{TMPDIR:-/tmp}}"'
    return f"{shlex.join(words)} {named}"


def _shares(config: ClusterConfig, wanted: WorkersConfig) -> tuple[int, str]:
    """Threads of a worker process, and what it offers: a GPU alone where other workers do the rest."""
    if not wanted.gpus:
        return wanted.cores, f"CPU={wanted.cores}"
    if any(not kind.gpus for kind in config.workers.values()):
        return wanted.tasks_per_gpu, f"GPU={wanted.tasks_per_gpu}"
    n_threads = max(1, wanted.cores // wanted.gpus)
    return wanted.tasks_per_gpu + n_threads, f"GPU={wanted.tasks_per_gpu} CPU={n_threads}"


def _memory_of(wanted: WorkersConfig) -> str:
    """What one worker process may have of its job's memory; 0 for no limit but the batch system's."""
    return "0" if wanted.mebibytes is None else f"{wanted.mebibytes // wanted.n_workers}MiB"
