"""Dask clients: of a cluster made on this machine, of a scheduler that runs somewhere, of what the caller has.

What is opened here is closed again, and nothing else. A cluster made here listens on loopback only.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .claims import VARIABLE
from .ending import end_process
from .errors import ClusterError, SettingsError
from .machine import n_cores, usable_gpus
from .malloc import sharing_environment
from .tls import require_certificates

__all__ = [
    "CPU",
    "GPU",
    "TASKS_PER_GPU",
    "Process",
    "certificates",
    "client_of",
    "local_client",
    "local_processes",
    "remote_client",
]

GPU, CPU = "GPU", "CPU"
"""Resources of workers: how many tasks of the network, and others, one takes at a time."""

TASKS_PER_GPU = 6
"""That are under way at once: one computes while others read, and put together and write what is computed. On an H100
with cpsam 1, 2 and 3 of them kept it busy for 30, 54 and 70 % of the time."""
CORES_PER_PROCESS = 4
WORKER_TTL_S = 120.0
"""A worker that says nothing for so long is started anew. It says something every second unless a task keeps Python's
lock for itself."""
CONNECT_TIMEOUT = "15s"
WORKERS_TIMEOUT_S = 60
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Process:
    """A worker of this machine.

    Attributes
    ----------
    n_threads : int
    gpu : str or None
        The one device it sees, as an entry of ``CUDA_VISIBLE_DEVICES``; None for one that sees none.
    resources : dict of str to int
        Empty where all workers are alike.
    """

    n_threads: int
    gpu: str | None = None
    resources: tuple[tuple[str, int], ...] = ()

    @property
    def n_others(self) -> int:
        """How many tasks it does at once that are not of the network."""
        return dict(self.resources).get(CPU, 0 if self.resources else self.n_threads)

    def spec(self) -> dict[str, Any]:
        """For `distributed.SpecCluster`."""
        from distributed import Nanny

        options = {
            "nthreads": self.n_threads,
            "resources": dict(self.resources),
            "env": {VARIABLE: self.gpu or ""} if self.resources else {},
            "memory_limit": 0,  # blocks bound the memory; a limit guessed here would kill workers instead
            "host": LOOPBACK,
            "dashboard": False,
            "dashboard_address": f"{LOOPBACK}:0",
            "silence_logs": logging.CRITICAL,
            # Without a dashboard nobody sees the profile, which grows with time.
            "config": {"distributed.worker.profile.enabled": False},
        }
        return {"cls": Nanny, "options": options}


def local_processes(workers: int | None, device: str) -> list[Process]:
    """The workers that are made on this machine.

    Parameters
    ----------
    workers : int, optional
        So many. Default: one for every GPU and, of the cores that are left, one for every four.
    device : str
        Setting of the run.

    Returns
    -------
    processes : list of Process
        Those with a GPU first: for the network alone, unless there are no others to do the rest.
    """
    gpus, cores = usable_gpus(device), n_cores()
    if not gpus:
        n = workers or max(1, cores // CORES_PER_PROCESS)
        return [Process(max(1, cores // n))] * n
    gpus = gpus[:workers]
    left = max(1, cores - len(gpus))
    n = max(1, left // CORES_PER_PROCESS) if workers is None else workers - len(gpus)
    if n == 0:
        threads = max(1, cores // len(gpus))
        resources = ((GPU, TASKS_PER_GPU), (CPU, threads))
        return [Process(TASKS_PER_GPU + threads, gpu, resources) for gpu in gpus]
    threads = max(1, left // n)
    network = [Process(TASKS_PER_GPU, gpu, ((GPU, TASKS_PER_GPU),)) for gpu in gpus]
    return network + [Process(threads, None, ((CPU, threads),))] * n


@contextlib.contextmanager
def local_client(processes: list[Process]) -> Iterator[Any]:
    """A client of processes on this machine, gone with the context."""
    from distributed import Client, Scheduler, SpecCluster

    options = {
        "host": LOOPBACK,
        "dashboard": False,
        "dashboard_address": f"{LOOPBACK}:0",
        "worker_ttl": WORKER_TTL_S,
        # What a dying worker had is tried again by our own rule, with nothing beside it.
        "allowed_failures": 0,
    }
    with (
        _started_in(sharing_environment(max(process.n_threads for process in processes))),
        SpecCluster(
            workers=dict(enumerate(process.spec() for process in processes)),
            scheduler={"cls": Scheduler, "options": options},
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run(_end_at_once)
        yield client


def _end_at_once() -> None:
    """In a worker: have it end so, see `ending`."""
    atexit.register(end_process)  # what others register later is done before


def certificates(ca: str | None, cert: str | None, key: str | None) -> Any:
    """What a client shows to a scheduler behind TLS, and believes of it.

    Parameters
    ----------
    ca, cert, key : str, optional
        Files in PEM: of the authority that signed, of the client's certificate and its key.

    Returns
    -------
    security : distributed.Security or None
        None if none is given.

    Raises
    ------
    ClusterError
        If only some are given, or one does not exist.
    """
    files = {"--tls-ca-file": ca, "--tls-cert": cert, "--tls-key": key}
    if not any(files.values()):
        return None
    from distributed.security import Security

    for flag, file in files.items():
        if not file:
            raise ClusterError(f"TLS takes three files; give {flag} as well.")
        if not Path(file).is_file():
            raise ClusterError(f"{flag} {file} is no file; give one in PEM.")
    return Security(tls_ca_file=ca, tls_client_cert=cert, tls_client_key=key, require_encryption=True)


@contextlib.contextmanager
def remote_client(address: str, security: Any = None) -> Iterator[Any]:
    """A client of the scheduler at an address or named in a scheduler file.

    Parameters
    ----------
    address : str
    security : distributed.Security, optional
        Certificates; Dask's own configuration says them if this does not.

    Raises
    ------
    ClusterError
        If nobody answers there, or there are no workers.
    """
    from distributed import Client

    is_file = "://" not in address and (address.endswith(".json") or Path(address).exists())
    if is_file and not Path(address).exists():
        raise ClusterError(f"scheduler file {address} does not exist; give the file the scheduler wrote.")
    if security is None:
        require_certificates(address)
    try:
        where = {"scheduler_file": address} if is_file else {"address": address}
        client = Client(**where, security=security, timeout=CONNECT_TIMEOUT, set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}".lower()
        tls = ", and for one behind TLS the certificates" if "ssl" in said or "tls" in said else ""
        raise ClusterError(
            f"no Dask scheduler answers at {address} ({type(error).__name__}); check the address{tls} and that it "
            "is running, or leave --scheduler out to work on this machine."
        ) from error
    with client:
        _wait_for_a_worker(client, f"the scheduler at {address}")
        yield client


def _wait_for_a_worker(client: Any, who: str) -> None:
    """Refuse a cluster that nobody works in."""
    if not client.scheduler_info(n_workers=-1)["workers"]:
        try:
            client.wait_for_workers(1, timeout=WORKERS_TIMEOUT_S)
        except TimeoutError as error:
            raise ClusterError(f"{who} has no workers; start some and try again.") from error


@contextlib.contextmanager
def client_of(given: Any) -> Iterator[Any]:
    """A client from a client, or from any object that has a scheduler's address as clusters have.

    Raises
    ------
    SettingsError
        If it is neither, or asynchronous.
    ClusterError
        If there are no workers.
    """
    from distributed import Client

    with contextlib.ExitStack() as stack:
        client = given
        if not hasattr(given, "submit"):
            if not hasattr(given, "scheduler_address"):
                raise SettingsError(f"client must be a Dask client or cluster, not {type(given).__name__}.")
            if getattr(given, "asynchronous", False):
                raise SettingsError("an asynchronous Dask cluster was given; pass a synchronous one.")
            # What has no status of its own, or keeps it to itself, is known by its address.
            where = given if hasattr(given, "status") else given.scheduler_address
            security = getattr(given, "security", None)
            client = stack.enter_context(Client(where, security=security, set_as_default=False))
        if getattr(client, "asynchronous", False):
            raise SettingsError("an asynchronous Dask client was given; pass a synchronous one.")
        _wait_for_a_worker(client, "the Dask cluster that was given")
        yield client


@contextlib.contextmanager
def _started_in(environment: dict[str, str]) -> Iterator[None]:
    """Within, workers start in some environment; distributed leaves it to this process as well."""
    import dask

    name, before = "distributed.nanny.pre-spawn-environ", {key: os.environ.get(key) for key in environment}
    try:
        with dask.config.set({name: {**dask.config.get(name), **environment}}):
            yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
