"""Who does the work: threads of this process, or the workers of a Dask cluster.

Both run functions over many items with a bounded number in flight and hand back results as they end: `stream`
those of one function, `work` those of several stages at once; see `tasks`.

Workers may say by Dask's resources what they are for. Where any has ``GPU``, tasks of the network go to those
alone, as many at a time as it has of it; where any has ``CPU``, all other tasks go to those. Workers that say
nothing take what there is, and where the network runs on a GPU a claim keeps all but one task at a time
from each device (see `claims`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import pickle
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import cloudpickle

from .claims import bind, claimed
from .clients import CPU, GPU, TASKS_PER_GPU, client_of, local_client, local_processes, remote_client
from .cores import CORES
from .errors import ClusterError, DeviceError, SettingsError
from .machine import machine_memory, n_cores, peak_memory, resolve_device, usable_gpus
from .malloc import give_back_freed_memory
from .meters import Totals, measured
from .tasks import Item, Pool, Tasks, Troubles, run_tasks
from .workers import Workers, has_slots

__all__ = ["Crew", "Executor", "connect", "crew_of", "n_cores", "peak_memory", "resolve_device"]

logger = logging.getLogger(__name__)

Function = Callable[..., Any]

IN_FLIGHT_PER_THREAD = 3
LOOPBACK = {"127.0.0.1", "::1", "localhost", "inproc"}
POLL_S = 0.1
FAILED = ("error", "cancelled")
SILENT_S = 60.0
"""Without a worker for what is to be done for so long, it is said aloud."""
CALLS_KEPT = 4
"""By a worker, unpacked: of the stages at once, and of those before."""


@dataclass(frozen=True)
class Crew:
    """The processes that work, and the memory they have.

    Attributes
    ----------
    n_workers : int
        Processes.
    n_threads : int
        Tasks at once in one of them that are not of a network on a GPU; the most of any.
    worker_limit : int or None
        Bytes a worker may have before it is killed, the least of any; None if it has no limit.
    machine_bytes : int or None
        Bytes that this process and all workers have together; None if they are on other machines.
    in_process : bool
        Whether the one worker is this process.
    n_network : int
        Of the processes, those that run the network; 0 for all of them.
    n_on_gpu : int
        Tasks of a network on a GPU at once in one of them.
    does_both : bool
        Whether one does these and others at once.
    """

    n_workers: int
    n_threads: int
    worker_limit: int | None = None
    machine_bytes: int | None = None
    in_process: bool = False
    n_network: int = 0
    n_on_gpu: int = 0
    does_both: bool = False


def _run_task(function: Function, item: Item, *args: Any) -> Any:
    """Run a task on a core that it takes for itself; its result comes with what it cost, for `Totals.take`."""
    give_back_freed_memory(getattr(function, "__qualname__", ""))
    with CORES.task():
        return measured(function, item, *args)


@dataclass(frozen=True, eq=False)
class _Call:
    """The same on a Dask worker, whose threads are the cores.

    It is sent with every item, and unpacked once by a process: so all its tasks share the arrays that are open, and the
    chunks that were read lately.
    """

    function: Function
    args: tuple[Any, ...]
    uses_gpu: bool
    claims: bool
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @functools.cached_property
    def _packed(self) -> bytes:
        return bytes(cloudpickle.dumps((self.function, self.args, self.uses_gpu, self.claims, self.token)))

    def __reduce__(self) -> tuple[Any, tuple[str, bytes]]:
        return _unpacked, (self.token, self._packed)

    def __call__(self, item: Item) -> Any:
        from distributed import get_worker

        state = get_worker().state
        # A process that has a GPU and does the rest as well has more threads than cores, for they wait for the GPU.
        CORES.resize(int(state.total_resources.get(CPU, state.nthreads)))
        if self.uses_gpu:
            bind()
        with claimed() if self.claims else contextlib.nullcontext():
            return _run_task(self.function, item, *self.args)


_unpacking = threading.Lock()
_calls: OrderedDict[str, _Call] = OrderedDict()


def _unpacked(token: str, packed: bytes) -> _Call:
    """A call that was sent to this process, the same object whenever it is sent."""
    with _unpacking:
        call = _calls.get(token)
        if call is None:
            call = _calls[token] = _Call(*pickle.loads(packed))
        _calls.move_to_end(token)
        while len(_calls) > CALLS_KEPT:
            _calls.popitem(last=False)
        return call


def _device_of_worker(wanted: str) -> str:
    """The kind of device of a Dask worker, which chooses one of its GPUs before torch sees them."""
    if wanted != "cpu":
        bind()
    return resolve_device(wanted)


class Executor(Protocol):
    """Runs functions over items with a bounded number in flight."""

    in_process: bool
    description: str
    troubles: Troubles
    totals: Totals

    @property
    def crew(self) -> Crew:
        """Who works, now."""

    @property
    def dashboard(self) -> str | None:
        """Where Dask shows what it does, None if it does not."""

    def stream(
        self, function: Function, items: Iterable[Item], *args: Any, name: str = "", **how: Any
    ) -> Iterator[tuple[Item, Any]]:
        """Yield ``(item, function(item, *args))`` as they end, in any order.

        An error of the function that says what is wrong ends the stream after what is in flight has been handed
        back; one that nobody foresaw, and the death of a worker, when all else is done. `name` and `how` are as in
        `tasks.Tasks`.
        """

    def work(self, *tasks: Tasks) -> None:
        """Do tasks of several stages at once; errors as in `stream`."""

    def device(self, wanted: str) -> str:
        """The kind of device the network will run on."""

    def ask(self, function: Callable[[], Any]) -> list[Any]:
        """What a function says in every process that works for the network now."""


class _Streams:
    """What both executors do alike with the tasks that they are given."""

    def __init__(self) -> None:
        self.troubles = Troubles()
        self.totals = Totals()

    def _pool(self) -> Pool:
        raise NotImplementedError

    def stream(
        self, function: Function, items: Iterable[Item], *args: Any, name: str = "", **how: Any
    ) -> Iterator[tuple[Item, Any]]:
        """Yield ``(item, function(item, *args))`` as they end, in any order."""
        tasks = Tasks(name or getattr(function, "__name__", "task"), function, items, args, **how)
        for _, item, result in run_tasks(self._pool(), [tasks], self.troubles):
            yield item, self.totals.take(result)

    def work(self, *tasks: Tasks) -> None:
        """Do tasks of several stages at once."""
        for done, item, result in run_tasks(self._pool(), tasks, self.troubles):
            done.took(item, self.totals.take(result))


class ThreadExecutor(_Streams):
    """Threads of this process: no start-up, for images of a few blocks and machines of a few cores."""

    in_process = True
    dashboard: str | None = None

    def __init__(self, n_threads: int) -> None:
        super().__init__()
        self.n_threads = n_threads
        self.description = f"this process, {n_threads} threads"
        self._has_gpu = False

    @property
    def crew(self) -> Crew:
        """Who works: this process."""
        n_on_gpu = TASKS_PER_GPU if self._has_gpu else 0
        memory = machine_memory()
        return Crew(1, self.n_threads, machine_bytes=memory, in_process=True, n_on_gpu=n_on_gpu, does_both=True)

    def _pool(self) -> Pool:
        CORES.resize(self.n_threads)
        return _ThreadPool(self.n_threads, TASKS_PER_GPU if self._has_gpu else 0)

    def device(self, wanted: str) -> str:
        """The kind of device the network will run on."""
        kind = resolve_device(wanted)
        self._has_gpu = kind != "cpu"
        return kind

    def ask(self, function: Callable[[], Any]) -> list[Any]:
        """What a function says in every process that works for the network now."""
        return [function()]


class _ThreadPool:
    """Does tasks in threads; those of the network in some of their own, if so many are given."""

    def __init__(self, n_threads: int, n_network: int) -> None:
        counts = {"cpu": n_threads, "network": n_network}
        self._counts = {kind: n for kind, n in counts.items() if n}
        self._pools = {
            kind: ThreadPoolExecutor(n, thread_name_prefix=f"tiledseg-{kind}") for kind, n in self._counts.items()
        }
        self._live: dict[Future[Any], str] = {}

    def _kind(self, kind: str) -> str:
        return kind if kind in self._pools else "cpu"

    def room(self, kind: str) -> int:
        """How many tasks of a kind may be added now."""
        n_live = sum(of == self._kind(kind) for of in self._live.values())
        return 2 * self._counts[self._kind(kind)] - n_live

    def submit(self, tasks: Tasks, items: Sequence[Item]) -> Sequence[Future[Any]]:
        """Begin some items."""
        kind = self._kind(tasks.kind)
        futures = [self._pools[kind].submit(_run_task, tasks.function, item, *tasks.args) for item in items]
        self._live.update(dict.fromkeys(futures, kind))
        return futures

    def ended(self) -> Iterator[tuple[Future[Any], BaseException | None, Any]]:
        """Wait until something ends."""
        done = wait(self._live, return_when=FIRST_COMPLETED).done
        for future in [future for future in self._live if future in done]:
            del self._live[future]
            error = future.exception()
            yield future, error, None if error else future.result()

    def has_died(self, error: BaseException) -> bool:  # noqa: ARG002
        """Whether an error means that workers died: threads die with this process."""
        return False

    def close(self) -> None:
        """Wait for what has begun, forget what has not."""
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)


class DaskExecutor(_Streams):
    """Workers of a Dask cluster.

    Parameters
    ----------
    client : distributed.Client
        A synchronous client; closed by whoever made it.
    has_dashboard : bool
        Whether its scheduler was started with a dashboard.
    """

    in_process = False

    def __init__(self, client: Any, has_dashboard: bool = True) -> None:
        super().__init__()
        self.client = client
        self.has_dashboard = has_dashboard
        self._workers = Workers(client)
        workers = self._workers.now.values()
        threads = sum(int(worker["nthreads"]) for worker in workers)
        self.description = f"{len(workers)} workers, {threads} threads"
        if n_gpu := sum(has_slots(worker, GPU) > 0 for worker in workers):
            self.description += f", {n_gpu} for the network"

    @property
    def dashboard(self) -> str | None:
        """Where the scheduler shows what it does, None if it does not."""
        try:
            return self.client.dashboard_link or None if self.has_dashboard else None
        except KeyError:  # how distributed says that a scheduler that others started has none
            return None

    @property
    def crew(self) -> Crew:
        """Who works, now."""
        workers = self._workers.now.values()
        threads = [n for worker in workers if (n := _n_others(worker))]
        limits = [int(worker["memory_limit"]) for worker in workers if worker["memory_limit"]]
        are_here = all(worker["host"] in LOOPBACK for worker in workers)
        return Crew(
            max(1, len(workers)),
            max(threads, default=1),
            min(limits, default=None),
            machine_memory() if are_here else None,
            n_network=len(self._workers.addresses("network")) if self._workers.resource("network") else 0,
            n_on_gpu=max((has_slots(worker, GPU) for worker in workers), default=0),
            does_both=any(has_slots(worker, GPU) and has_slots(worker, CPU) for worker in workers),
        )

    def _pool(self) -> Pool:
        return _DaskPool(self.client, self._workers)

    def device(self, wanted: str) -> str:
        """The kind of device the network will run on, the same on every worker that it goes to."""
        self._workers.is_on_any = wanted == "cpu"
        addresses = self._workers.addresses("network")
        if not addresses:
            raise ClusterError("the cluster has no workers for the network; start some and try again.")
        kinds = set(self.client.run(_device_of_worker, wanted, workers=addresses).values())
        if len(kinds) != 1:
            raise DeviceError(
                "some workers have a GPU and some have none, and their results would differ in the last bits; start "
                f"those that have one with --nthreads {TASKS_PER_GPU} --resources GPU={TASKS_PER_GPU} and the others "
                "with --resources CPU=N for N threads, or choose one kind with --device cpu."
            )
        return str(kinds.pop())

    def ask(self, function: Callable[[], Any]) -> list[Any]:
        """What a function says in every process that works for the network now."""
        return list(self.client.run(function, workers=self._workers.addresses("network")).values())


def _n_others(worker: dict[str, Any]) -> int:
    """How many tasks a worker does at once that are not of a network on a GPU; 0 if it is for the network alone."""
    if has_slots(worker, CPU):
        return has_slots(worker, CPU)
    return 0 if has_slots(worker, GPU) else int(worker["nthreads"])


class _DaskPool:
    """Does tasks on Dask's workers."""

    def __init__(self, client: Any, workers: Workers) -> None:
        from distributed import as_completed

        self._client, self._workers = client, workers
        self._stream, self._numbers = uuid.uuid4().hex[:8], itertools.count()
        self._calls: dict[tuple[Tasks, bool], _Call] = {}
        self._live: dict[Any, tuple[Any, str]] = {}
        self._failed: set[Any] = set()
        self._ended = as_completed(loop=client.loop, with_results=True, raise_errors=False)
        self._lacks_since: float | None = None

    def room(self, kind: str) -> int:
        """How many tasks of a kind may be added now."""
        n_live = Counter(of for _, of in self._live.values())
        same = self._workers.share(kind)
        n_here = sum(n for of, n in n_live.items() if of == kind or self._workers.share(of) == same)
        return max(1, IN_FLIGHT_PER_THREAD * self._workers.slots(kind)) - n_here

    def submit(self, tasks: Tasks, items: Sequence[Item]) -> Sequence[Any]:
        """Begin some items."""
        keys = [(f"{tasks.name}-{self._stream}", next(self._numbers)) for _ in items]
        # Where workers say how many tasks a GPU is for, that counts.
        claims = tasks.claims and self._workers.resource(tasks.kind) is None
        call = self._calls.setdefault((tasks, claims), _Call(tasks.function, tasks.args, tasks.claims, claims))
        options = self._workers.options(tasks.kind)
        futures = self._client.map(call, list(items), key=keys, pure=False, **options)
        self._live.update({future.key: (future, tasks.kind) for future in futures})
        self._ended.update(futures)
        return keys

    def ended(self) -> Iterator[tuple[Any, BaseException | None, Any]]:
        """Wait until something ends."""
        condition, stranded = self._ended.thread_condition, list[Any]()
        while not self._ended.has_ready() and not stranded:
            with condition:
                # Asked again under its lock: what ends meanwhile wakes this thread.
                if not self._ended.has_ready():
                    condition.wait(POLL_S)
            self._look_for_workers()
            stranded = self._stranded()
        for future, result in [*self._ended.next_batch(block=False), *((future, None) for future in stranded)]:
            if self._live.pop(future.key, None) is None:
                continue  # handed back as stranded before
            error = _error_of(future, result)
            yield future.key, error, None if error else result

    def _stranded(self) -> list[Any]:
        """Futures that have failed for longer than it takes to be told.

        `distributed.as_completed` forgets a task that had ended, whose result was lost with its worker before it was
        fetched, and that failed when it was done again: fetching raises where nobody looks.
        """
        failed = {key for key, (future, _) in self._live.items() if future.status in FAILED}
        again, self._failed = failed & self._failed, failed
        return [self._live[key][0] for key in again]

    def _look_for_workers(self) -> None:
        """Say it when nobody is there for long who could do what is in flight."""
        lacking = [kind for kind in {kind for _, kind in self._live.values()} if not self._workers.slots(kind)]
        if not lacking:
            self._lacks_since = None
            return
        now = time.monotonic()
        if self._lacks_since is None:
            self._lacks_since = now
        elif now - self._lacks_since > SILENT_S:
            needed = self._workers.resource(lacking[0])
            what = f"with {needed} among its resources " if needed else ""
            logger.warning("no worker %sis left; waiting until one comes.", what)
            self._lacks_since = float("inf")

    def has_died(self, error: BaseException) -> bool:
        """Whether an error means that workers died at a task."""
        from distributed import KilledWorker

        return isinstance(error, KilledWorker)

    def close(self) -> None:
        """Forget what is in flight."""
        self._client.cancel([future for future, _ in self._live.values()])


def _error_of(future: Any, result: Any) -> BaseException | None:
    """The exception of an ended future, None if it succeeded."""
    if future.status == "finished":
        return None
    if isinstance(result, tuple) and len(result) == 3 and isinstance(result[1], BaseException):
        return result[1]
    error = future.exception() if future.status == "error" else None
    return error or ClusterError(
        f"a task was lost ({future.status}), most likely with its scheduler; run the same command again: what is done "
        "is kept."
    )


def crew_of(workers: int | None, device: str, small: bool) -> Crew:
    """Who would work, with neither client nor scheduler given; starts nothing. See `connect`."""
    if _stays_here(workers, device, small):
        here = ThreadExecutor(n_cores()).crew
        return replace(here, n_on_gpu=TASKS_PER_GPU if usable_gpus(device) else 0)
    processes = local_processes(workers, device)
    return Crew(
        len(processes),
        max(process.n_others for process in processes),
        machine_bytes=machine_memory(),
        n_network=sum(process.gpu is not None for process in processes),
        n_on_gpu=max(dict(process.resources).get(GPU, 0) for process in processes),
        does_both=any(process.gpu is not None and process.n_others for process in processes),
    )


def _stays_here(workers: int | None, device: str, small: bool) -> bool:
    """Whether threads of this process do the work: a single process beside it would only cost its start."""
    return workers is None and (small or len(local_processes(None, device)) == 1)


@contextlib.contextmanager
def connect(
    client: Any = None,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    small: bool = False,
    security: Any = None,
) -> Iterator[Executor]:
    """An executor for the cluster that was asked for.

    Parameters
    ----------
    client : distributed.Client or cluster, optional
        Used as it is and left open. Any object with a ``scheduler_address`` counts as a cluster.
    scheduler : str, optional
        Address or scheduler file.
    workers : int, optional
        Processes on this machine. Default: one for every GPU and one for every four of the cores that are left; where
        that is one, this process.
    device : str
        Setting of the run.
    small : bool
        The image has a few blocks only: with nothing else asked for, stay in this process.
    security : distributed.Security, optional
        Certificates for a scheduler behind TLS; without, those that Dask's configuration names.

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
    if security is not None and scheduler is None:
        raise SettingsError("certificates are for a scheduler that is given by its address or file; give --scheduler.")
    with contextlib.ExitStack() as stack:
        if client is not None:
            yield DaskExecutor(stack.enter_context(client_of(client)))
        elif scheduler is not None:
            yield DaskExecutor(stack.enter_context(remote_client(scheduler, security)))
        elif _stays_here(workers, device, small):
            stack.callback(give_back_freed_memory, "what comes after the run")
            yield ThreadExecutor(n_cores())
        else:
            yield DaskExecutor(stack.enter_context(local_client(local_processes(workers, device))), has_dashboard=False)
