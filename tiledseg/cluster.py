"""Who does the work: threads of this process, or the workers of a Dask cluster.

Both offer one method, `stream`: run a function over many items with a bounded number in flight and
hand back results as they end. Nothing is ever mapped over everything, so the scheduler and the
client stay small however many blocks there are.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .cores import CORES
from .errors import ClusterError, DeviceError, SettingsError, TiledsegError
from .malloc import give_back_freed_memory
from .store import as_output_error
from .tls import require_certificates

__all__ = ["Crew", "Executor", "connect", "crew_of", "n_cores", "peak_memory", "resolve_device"]


Item = Any
Function = Callable[..., Any]

IN_FLIGHT_PER_THREAD = 3
RETRIES_OF_A_SUSPECT = 2
LOOPBACK = {"127.0.0.1", "::1", "localhost", "inproc"}


def n_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> tuple[int, int]:
    """Process id and the most memory in bytes this process ever had resident."""
    import resource
    import sys

    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says on Linux includes the peak of the process that started this one.
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return os.getpid(), int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return os.getpid(), peak if sys.platform == "darwin" else peak * 1024


def resolve_device(device: str) -> str:
    """The kind of device this process will use for ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises
    ------
    DeviceError
        If a GPU is asked for and torch finds none.
    """
    if device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise DeviceError(
            "device 'cuda' was asked for but torch finds no GPU here; check the driver and that torch was "
            "installed with CUDA, or use --device cpu."
        )
    return "cpu"


def machine_memory() -> int:
    """Bytes that all processes of this machine, container or session may have."""
    from distributed.system import MEMORY_LIMIT

    return int(MEMORY_LIMIT)


@dataclass(frozen=True)
class Crew:
    """The processes that work, and the memory they have.

    Attributes
    ----------
    n_workers : int
        Processes.
    n_threads : int
        Tasks at once in one of them; the most of any.
    worker_limit : int or None
        Bytes a worker may have before it is killed, the least of any; None if it has no limit.
    machine_bytes : int or None
        Bytes that this process and all workers have together; None if they are on other machines.
    in_process : bool
        Whether the one worker is this process.
    """

    n_workers: int
    n_threads: int
    worker_limit: int | None = None
    machine_bytes: int | None = None
    in_process: bool = False


def _run_task(function: Function, item: Item, *args: Any) -> Any:
    """Run a task on a core that it takes for itself."""
    try:
        with CORES.task():
            return function(item, *args)
    finally:
        give_back_freed_memory()


def _run_on_worker(function: Function, item: Item, *args: Any) -> Any:
    """The same on a Dask worker, whose threads are the cores."""
    from distributed import get_worker

    CORES.resize(int(get_worker().state.nthreads))
    return _run_task(function, item, *args)


class Executor(Protocol):
    """Runs functions over items with a bounded number in flight."""

    in_process: bool
    description: str

    @property
    def crew(self) -> Crew:
        """Who works, now."""

    def stream(self, function: Function, items: Iterable[Item], *args: Any) -> Iterator[tuple[Item, Any]]:
        """Yield ``(item, function(item, *args))`` as they end, in any order.

        An error of the function ends the stream after what is in flight has been handed back.
        """

    def device(self, wanted: str) -> str:
        """The kind of device the work will run on."""


class ThreadExecutor:
    """Threads of this process: no start-up, for images of a few blocks and machines of a few cores."""

    in_process = True

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.description = f"this process, {n_threads} threads"

    @property
    def crew(self) -> Crew:
        """Who works: this process."""
        return Crew(1, self.n_threads, machine_bytes=machine_memory(), in_process=True)

    def stream(self, function: Function, items: Iterable[Item], *args: Any) -> Iterator[tuple[Item, Any]]:
        """Yield ``(item, function(item, *args))`` as they end, in any order."""
        CORES.resize(self.n_threads)
        remaining = iter(items)
        failure: BaseException | None = None
        with ThreadPoolExecutor(self.n_threads, thread_name_prefix="tiledseg") as pool:
            live: dict[Future[Any], Item] = {}

            def submit(n: int) -> None:
                for item in itertools.islice(remaining, n):
                    live[pool.submit(_run_task, function, item, *args)] = item

            submit(2 * self.n_threads)
            while live:
                ended, _ = wait(live, return_when=FIRST_COMPLETED)
                for future in ended:
                    item = live.pop(future)
                    error = future.exception()
                    if error is None:
                        yield item, future.result()
                    elif failure is None:
                        failure = _explained(error, function, item)
                if failure is None:
                    submit(2 * self.n_threads - len(live))
        if failure is not None:
            raise failure

    def device(self, wanted: str) -> str:
        """The kind of device the work will run on."""
        return resolve_device(wanted)


class DaskExecutor:
    """Workers of a Dask cluster.

    Parameters
    ----------
    client : distributed.Client
        A synchronous client; closed by whoever made it.
    """

    in_process = False

    def __init__(self, client: Any) -> None:
        self.client = client
        workers = client.scheduler_info(n_workers=-1)["workers"]
        threads = sum(worker["nthreads"] for worker in workers.values())
        self.description = f"{len(workers)} workers, {threads} threads"

    @property
    def crew(self) -> Crew:
        """Who works, now."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        threads = [int(worker["nthreads"]) for worker in workers]
        limits = [int(worker["memory_limit"]) for worker in workers if worker["memory_limit"]]
        are_here = all(worker["host"] in LOOPBACK for worker in workers)
        return Crew(
            max(1, len(threads)),
            max(threads, default=1),
            min(limits, default=None),
            machine_memory() if are_here else None,
        )

    def _window(self) -> int:
        """Tasks to keep in flight for the workers there are now."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        return IN_FLIGHT_PER_THREAD * max(1, sum(int(worker["nthreads"]) for worker in workers))

    def stream(self, function: Function, items: Iterable[Item], *args: Any) -> Iterator[tuple[Item, Any]]:
        """Yield ``(item, function(item, *args))`` as they end, in any order.

        When a worker dies every task it held becomes a suspect; suspects run again one at a time,
        so that only a task that really kills workers fails.
        """
        from distributed import KilledWorker, as_completed

        remaining, suspects, tries = iter(items), deque[Item](), Counter[Item]()
        live: dict[str, tuple[Any, Item]] = {}
        ended = as_completed(loop=self.client.loop, with_results=True, raise_errors=False)
        failure: BaseException | None = None

        def submit(batch: list[Item]) -> None:
            futures = [self.client.submit(_run_on_worker, function, item, *args, pure=False) for item in batch]
            live.update({future.key: (future, item) for future, item in zip(futures, batch, strict=True)})
            ended.update(futures)

        try:
            submit(list(itertools.islice(remaining, self._window())))
            while live:
                for future, result in ended.next_batch(block=True):
                    _, item = live.pop(future.key)
                    error = _error_of(future, result)
                    if error is None:
                        yield item, result
                    elif isinstance(error, KilledWorker) and tries[item] < RETRIES_OF_A_SUSPECT:
                        tries[item] += 1
                        suspects.append(item)
                    else:
                        failure = failure or _explained(error, function, item)
                if failure is None:
                    submit(list(itertools.islice(remaining, max(0, self._window() - len(live)))))
                    if not live and suspects:
                        submit([suspects.popleft()])
        finally:
            self.client.cancel([future for future, _ in live.values()])
        if failure is not None:
            raise failure

    def device(self, wanted: str) -> str:
        """The kind of device the work will run on, the same on every worker."""
        kinds = set(self.client.run(resolve_device, wanted).values())
        if len(kinds) != 1:
            raise DeviceError(
                "some workers have a GPU and some have none, and their results would differ in the last bits; "
                "choose one kind with --device cpu or --device cuda."
            )
        return str(kinds.pop())


def _error_of(future: Any, result: Any) -> BaseException | None:
    """The exception of an ended future, None if it succeeded."""
    if future.status == "finished":
        return None
    if isinstance(result, tuple) and len(result) == 3 and isinstance(result[1], BaseException):
        return result[1]
    error = future.exception() if future.status == "error" else None
    return error or ClusterError(f"a task was lost ({future.status}); run the same command again.")


def _explained(error: BaseException, function: Function, item: Item) -> BaseException:
    """Our own errors as they are; what the disk or a dead worker says as a sentence."""
    if isinstance(error, TiledsegError):
        return error
    if isinstance(error, OSError):
        return as_output_error(error, error.filename or "the labels or the scratch folder")
    if type(error).__name__ == "KilledWorker":
        return ClusterError(
            f"workers died repeatedly at {function.__module__} {item}, most likely for want of memory; give "
            "smaller blocks (--block) or workers with more memory, then run the same command again: what is "
            "done is kept."
        )
    return error


def _devices(workers: int | None, device: str) -> list[str | None]:
    """For each process to make here the GPU it is pinned to, None on a CPU."""
    if device == "cpu" or resolve_device(device) == "cpu":
        return [None] * (workers or max(1, n_cores() // 4))
    import torch

    n_gpus = torch.cuda.device_count()
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))).split(",")
    return [visible[i % n_gpus] for i in range(workers or n_gpus)]


def crew_of(workers: int | None, device: str, small: bool) -> Crew:
    """Who would work, with neither client nor scheduler given; starts nothing. See `connect`."""
    if _stays_here(workers, device, small):
        return ThreadExecutor(n_cores()).crew
    n_workers = len(_devices(workers, device))
    return Crew(n_workers, max(1, n_cores() // n_workers), machine_bytes=machine_memory())


def _stays_here(workers: int | None, device: str, small: bool) -> bool:
    """Whether threads of this process do the work: a single process beside it would only cost its start."""
    return workers is None and (small or len(_devices(None, device)) == 1)


@contextlib.contextmanager
def _local_client(workers: int | None, device: str) -> Iterator[Any]:
    """A cluster of processes on this machine, gone with the context."""
    from distributed import Client, Nanny, Scheduler, SpecCluster

    devices = _devices(workers, device)
    options = {
        "host": "127.0.0.1",  # else workers would listen on every network this machine is in
        "nthreads": max(1, n_cores() // len(devices)),
        "memory_limit": 0,  # blocks bound the memory; a limit guessed here would kill workers instead
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
        # Without a dashboard nobody sees the profile, which grows with time.
        "config": {"distributed.worker.profile.enabled": False},
    }
    specs = {
        i: {"cls": Nanny, "options": {**options, "env": {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}}}
        for i, gpu in enumerate(devices)
    }
    addresses = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, **addresses}}
    with (
        SpecCluster(workers=specs, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextlib.contextmanager
def _remote_client(address: str) -> Iterator[Any]:
    """A client of the scheduler at an address or named in a scheduler file."""
    from distributed import Client

    is_file = "://" not in address and (address.endswith(".json") or Path(address).exists())
    if is_file and not Path(address).exists():
        raise ClusterError(f"scheduler file {address} does not exist; give the file the scheduler wrote.")
    require_certificates(address)
    try:
        where = {"scheduler_file": address} if is_file else {"address": address}
        client = Client(**where, timeout="15s", set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {address} ({type(error).__name__}); check the address and that it "
            "is running, or leave --scheduler out to work on this machine."
        ) from error
    with client:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            try:
                client.wait_for_workers(1, timeout=60)
            except TimeoutError as error:
                raise ClusterError(f"the scheduler at {address} has no workers; start some and try again.") from error
        yield client


@contextlib.contextmanager
def connect(
    client: Any = None,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    small: bool = False,
) -> Iterator[Executor]:
    """An executor for the cluster that was asked for.

    Parameters
    ----------
    client : distributed.Client or cluster, optional
        Used as it is and left open.
    scheduler : str, optional
        Address or scheduler file.
    workers : int, optional
        Processes on this machine; default one for every four cores, one per GPU, and where that is one,
        this process.
    device : str
        Setting of the run.
    small : bool
        The image has a few blocks only: with nothing else asked for, stay in this process.

    Raises
    ------
    ClusterError
        If the scheduler cannot be reached.
    """
    if client is not None and (scheduler is not None or workers is not None):
        raise SettingsError("give either a client or a scheduler or a number of workers, not two of them.")
    if scheduler is not None and workers is not None:
        raise SettingsError("workers belong to the cluster of the scheduler; leave out --workers or --scheduler.")
    if workers is not None and workers < 1:
        raise SettingsError(f"workers must be at least 1, not {workers}.")
    with contextlib.ExitStack() as stack:
        if client is not None:
            yield DaskExecutor(_as_client(client, stack))
        elif scheduler is not None:
            yield DaskExecutor(stack.enter_context(_remote_client(scheduler)))
        elif _stays_here(workers, device, small):
            yield ThreadExecutor(n_cores())
        else:
            yield DaskExecutor(stack.enter_context(_local_client(workers, device)))


def _as_client(client: Any, stack: contextlib.ExitStack) -> Any:
    """A client from a client or from any cluster object; what is opened here is closed again."""
    from distributed import Client

    if not hasattr(client, "submit"):
        if not hasattr(client, "scheduler_address"):
            raise SettingsError(f"client must be a Dask client or cluster, not {type(client).__name__}.")
        client = stack.enter_context(Client(client, set_as_default=False))
    if getattr(client, "asynchronous", False):
        raise SettingsError("an asynchronous Dask client was given; pass a synchronous one.")
    return client
