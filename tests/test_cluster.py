"""Dask workers of every kind, really started: GPUs pinned and claimed, who does what, who dies and who freezes.

There is no GPU here. What counts is what workers are told of one: the environment, the resources, the locks.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import socket
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import distributed
import numpy as np
import psutil
import pytest

import tiledseg
from tiledseg import claims, clients, cluster
from tiledseg.clients import certificates
from tiledseg.cluster import DaskExecutor, connect, crew_of
from tiledseg.errors import ClusterError, DeviceError, QuarantineError, SettingsError
from tiledseg.omezarr import write_image
from tiledseg.tasks import Tasks

from .conftest import Slide

NVIDIA_SMI = """#!/bin/sh
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa1111-0000-0000-0000-000000000000)"
echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb2222-0000-0000-0000-000000000000)"
echo "  MIG 1g.10gb     Device  0: (UUID: MIG-cccc3333-0000-0000-0000-000000000000)"
echo "  MIG 1g.10gb     Device  1: (UUID: MIG-dddd4444-0000-0000-0000-000000000000)"
"""
MIGS = ["MIG-cccc3333-0000-0000-0000-000000000000", "MIG-dddd4444-0000-0000-0000-000000000000"]
FIRST = "GPU-aaaa1111-0000-0000-0000-000000000000"

ROLES = ("client", "scheduler", "worker")

Seen = tuple[str, str | None, int, float, float]


def look(_: int, seconds: float = 0.05) -> Seen:
    """Task: what the worker sees, and when it was at it."""
    from distributed import get_worker

    start = time.time()
    time.sleep(seconds)
    return str(get_worker().name), os.environ.get(claims.VARIABLE), os.getpid(), start, time.time()


NOBODY: Seen = ("", None, 0, 0.0, 0.0)


def at_once(one: Seen, other: Seen) -> bool:
    return one[3] < other[4] and other[3] < one[4]


def lethal(item: int, folder: str) -> int:
    """Task: 7 kills its worker, 3 does so once."""
    once = Path(folder) / "once"
    if item == 7 or (item == 3 and not once.exists()):
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def freezing(item: int, folder: str) -> int:
    """Task: the first to come to 5 stops its process."""
    once = Path(folder) / "frozen"
    if item == 5 and not once.exists():
        once.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return item


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program of that name that knows two GPUs, one of them split."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(NVIDIA_SMI)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    claims.listed_devices.cache_clear()
    yield
    claims.listed_devices.cache_clear()


@contextlib.contextmanager
def workers(*options: dict[str, Any]) -> Iterator[Any]:
    """A client of workers with these options, one thread each unless they say otherwise."""
    from distributed import Client, Nanny, Scheduler, SpecCluster

    common = {"nthreads": 1, "memory_limit": 0, "host": "127.0.0.1", "dashboard": False, "silence_logs": 50}
    specs = {f"w{i}": {"cls": Nanny, "options": {**common, **more}} for i, more in enumerate(options)}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    with (
        SpecCluster(workers=specs, scheduler=scheduler, silence_logs=50) as spec,
        Client(spec, set_as_default=False) as client,
    ):
        client.wait_for_workers(len(options), timeout=60)
        yield client


@pytest.mark.usefixtures("nvidia_smi")
def test_devices_are_known_by_index_and_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(claims.VARIABLE, raising=False)
    assert claims.visible_devices() == ["0", *MIGS]
    for value, names in (("1,0", ["1", "0"]), ("", []), ("-1", []), ("0,-1,1", ["0"]), (MIGS[0], [MIGS[0]])):
        monkeypatch.setenv(claims.VARIABLE, value)
        assert claims.visible_devices() == names
    for name in ("0", "GPU-aaaa", FIRST):
        assert claims._uuid_of(name) == FIRST
    assert claims._uuid_of("GPU-unknown") == "GPU-unknown"


def test_without_nvidia_smi_devices_have_the_names_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv(claims.VARIABLE, raising=False)
    claims.listed_devices.cache_clear()
    assert claims.visible_devices() == []
    assert claims._uuid_of("2") == "2"
    claims.listed_devices.cache_clear()


def test_locks_lie_in_a_folder_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims.tempfile, "tempdir", str(tmp_path))
    assert stat.S_IMODE(claims._folder().stat().st_mode) == 0o700
    claims._folder().rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"tiledseg-gpus-{os.getuid()}").symlink_to("elsewhere")
    with pytest.raises(DeviceError, match="is not a folder of this user, and GPUs are claimed there; remove it"):
        claims._folder()


@pytest.mark.parametrize(
    ("gpus", "cores", "n_workers", "threads"),
    [
        ([], 16, None, [4, 4, 4, 4]),
        ([], 16, 3, [5, 5, 5]),
        (["0", "1"], 16, None, [6, 6, 4, 4, 4]),
        (["0", FIRST], 2, None, [6, 6, 1]),
        (["0", "1"], 16, 1, [6 + 16]),
        (["0", "1"], 16, 2, [6 + 8, 6 + 8]),
        (["0", "1"], 16, 4, [6, 6, 7, 7]),
    ],
)
def test_a_local_cluster_fits_the_machine(
    gpus: list[str], cores: int, n_workers: int | None, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "usable_gpus", lambda _: list(gpus))
    monkeypatch.setattr(clients, "n_cores", lambda: cores)
    processes = clients.local_processes(n_workers, "auto")
    assert [process.n_threads for process in processes] == threads
    n_gpus = min(len(gpus), len(processes))
    assert [process.gpu for process in processes] == gpus[:n_gpus] + [None] * (len(processes) - n_gpus)
    assert [dict(process.resources).get("GPU", 0) for process in processes[:n_gpus]] == [6] * n_gpus
    has_others = len(processes) > n_gpus > 0
    assert [dict(process.resources).get("CPU", 0) for process in processes] == [
        0 if not gpus or (has_others and process.gpu) else process.n_threads - (6 if process.gpu else 0)
        for process in processes
    ]
    crew = crew_of(n_workers, "auto", small=False)
    assert crew.n_network == n_gpus
    assert (crew.n_workers, crew.n_on_gpu) == (len(threads), 6 if gpus else 0)
    assert crew.n_threads == max(process.n_others for process in processes)
    assert crew_of(None, "auto", small=True).in_process


def test_a_local_cluster_pins_its_gpus_and_keeps_other_work_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "usable_gpus", lambda _: ["0", FIRST])
    monkeypatch.setattr(clients, "n_cores", lambda: 4)
    with connect() as executor:
        assert isinstance(executor, DaskExecutor)
        assert executor.crew.n_network == 2
        assert executor.description == "3 workers, 14 threads, 2 for the network"
        assert executor.device("auto") == "cpu", "torch finds no GPU here, whatever it is told"
        seen: dict[str, list[Seen]] = {"network": [], "cpu": []}

        def some(kind: str, n: int) -> Tasks:
            return Tasks(kind, look, range(n), kind=kind, took=lambda _, found: seen[kind].append(found))

        executor.client.run(at_once, NOBODY, NOBODY)  # imports this module there
        executor.work(some("network", 72), some("cpu", 12))
        counts = Counter(device for _, device, *_ in seen["network"])
        assert set(counts) == {"0", FIRST}
        assert min(counts.values()) >= 3
        assert {device for _, device, *_ in seen["cpu"]} == {""}
        beside = sum(any(at_once(one, other) for other in seen["network"]) for one in seen["cpu"])
        assert beside >= 6, "work for GPUs and for other cores did not overlap"
        for device in ("0", FIRST):
            mine = [found for found in seen["network"] if found[1] == device]
            assert 1 < max(sum(other[3] <= one[3] < other[4] for other in mine) for one in mine) <= 6
        (pid,) = {found[2] for found in seen["network"] if found[1] == FIRST}
        os.kill(pid, signal.SIGKILL)
        until, pids = time.monotonic() + 60, {pid}
        while (pid in pids or len(pids) < 3) and time.monotonic() < until:
            time.sleep(0.1)
            pids = set(executor.client.run(os.getpid, on_error="ignore").values())
        again = executor.client.run(os.getenv, claims.VARIABLE).values()
        assert sorted(again) == ["", "0", FIRST], "a worker that is started anew is not pinned as before"


def test_a_local_cluster_listens_on_loopback_only_and_is_gone_with_its_context() -> None:
    with connect(workers=2) as executor:
        assert executor.in_process is False
        pids = [os.getpid(), *executor.ask(os.getpid), *(process.pid for process in psutil.Process().children())]
        heard = {
            connection.laddr.ip
            for pid in pids
            for connection in psutil.Process(pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        workers = executor.ask(os.getpid)
    assert heard == {"127.0.0.1"}
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers)


def failing(item: int) -> int:
    """Task: 3 fails."""
    if item == 3:
        raise ArithmeticError(item)
    return item


class _Torn:
    """Leaves a file when Python takes apart what there is."""

    def __init__(self, folder: Path) -> None:
        self._file, self._open = folder / "torn", open

    def __del__(self) -> None:
        self._open(self._file, "w").close()


def _leave_traces(_: int, folder: str) -> None:
    atexit.register((Path(folder) / "ended").touch)
    globals()["_kept"] = _Torn(Path(folder))


def test_a_worker_made_here_ends_without_taking_apart_what_it_loaded(tmp_path: Path) -> None:
    with connect(workers=1) as executor:
        list(executor.stream(_leave_traces, [0], str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["ended"]


class _Sent:
    """Counts how often it comes to a process."""

    n_received = 0

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _receive, ()


def _receive() -> _Sent:
    _Sent.n_received += 1
    return _Sent()


def _n_received(_item: int, _sent: _Sent) -> tuple[int, int]:
    time.sleep(0.01)
    return os.getpid(), _Sent.n_received


def test_what_tasks_share_is_unpacked_once_by_a_process() -> None:
    with connect(workers=2) as executor:
        found = dict(executor.stream(_n_received, range(40), _Sent()))
        assert sorted(found) == list(range(40))
        assert len({pid for pid, _ in found.values()}) == 2
        assert {n for _, n in found.values()} == {1}
        assert 2 in {n for _, n in dict(executor.stream(_n_received, range(40), _Sent())).values()}


def test_a_result_that_is_lost_before_it_is_fetched_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """distributed raises in its own tracking of a task that fails when it is done again for a lost result."""

    async def lost(future: Any, raiseit: bool = True) -> Any:
        await future._state.wait()
        if future.status == "error":
            raise future._state.exception
        return await whole(future, raiseit)

    whole = distributed.Future._result
    monkeypatch.setattr(distributed.Future, "_result", lost)
    with connect(workers=1) as executor, ThreadPoolExecutor(1) as beside:
        done: list[int] = []

        def work() -> None:
            done.extend(item for item, _ in executor.stream(failing, range(8), name="masks"))

        with pytest.raises(QuarantineError, match="1 piece has failed whenever tried: masks 3 "):
            beside.submit(work).result(timeout=60)
    assert sorted(done) == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.slow
def test_a_task_that_kills_its_workers_is_set_aside_and_one_that_freezes_them_given_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "WORKER_TTL_S", 4.0)
    with connect(workers=2) as executor:
        found = dict(executor.stream(freezing, range(20), str(tmp_path)))
        assert found == {item: item for item in range(20)}
        assert not psutil.pid_exists(int((tmp_path / "frozen").read_text())), "what was frozen is ended"
        done = []
        with pytest.raises(QuarantineError) as caught:
            done.extend(item for item, _ in executor.stream(lethal, range(20), str(tmp_path), name="masks"))
    assert sorted(done) == [item for item in range(20) if item != 7]
    assert str(caught.value) == (
        "1 piece has failed whenever tried: masks 7 (workers die at it); all that can be done without it is done and "
        "kept, and the same command tries it again, with smaller blocks (--block) or more memory if workers died for "
        "want of it."
    )
    assert executor.troubles.n_retried >= 3


@pytest.mark.usefixtures("nvidia_smi")
@pytest.mark.parametrize(("visible", "n_devices"), [("0", 1), (f"GPU-aaaa,{MIGS[1]}", 2)])
def test_a_device_that_several_workers_see_has_one_task_at_a_time(tmp_path: Path, visible: str, n_devices: int) -> None:
    env = {claims.VARIABLE: visible, "PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    with workers({"env": env}, {"env": env, "nthreads": 2}) as client:
        executor = DaskExecutor(client)
        assert executor.device("auto") == "cpu"
        tasks = executor.stream(look, range(24), kind="network", claims=True)
        by_device: dict[str | None, list[Seen]] = {}
        for _, seen in tasks:
            by_device.setdefault(seen[1], []).append(seen)
        assert len(by_device) == n_devices, "workers share a device though another is free"
        for of_one in by_device.values():
            of_one.sort(key=lambda seen: seen[3])
            assert all(one[4] <= other[3] for one, other in itertools.pairwise(of_one))
        assert len({seen[2] for of_one in by_device.values() for seen in of_one}) == 2, "a worker was not used"
        unclaimed = [seen for _, seen in executor.stream(look, range(24), kind="network")]
        assert any(at_once(one, other) for one in unclaimed for other in unclaimed if one is not other)


def test_of_mixed_workers_those_with_a_gpu_do_the_network(
    slide: Slide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "slide.ome.zarr"
    pixels = slide[0][:200, :500]
    write_image(image, pixels, axes="yx", spacing_um=(0.5, 0.5), chunk=256)
    settings = {"diameter": 8.0, "block": 100}
    with workers({"resources": {"GPU": 1}}, {}) as client:
        executor = DaskExecutor(client)
        executor.device("auto")
        network = [seen for _, seen in executor.stream(look, range(8), 0.01, kind="network")]
        others = [seen for _, seen in executor.stream(look, range(8), 0.01)]
        assert {name for name, *_ in network} == {"w0"}
        assert {name for name, *_ in others} == {"w1"}
        found = tiledseg.segment(image, tmp_path / "out.zarr", client=client, **settings)
        assert client.status == "running"
        reference = tiledseg.segment(pixels, **settings)
        assert found.report.n_objects == reference.report.n_objects > 30
        assert np.array_equal(found.labels.compute(), reference.labels.compute())
        assert found.report.seconds_at_once > 0, "masks did not begin before the flows had ended"
        monkeypatch.setattr(cluster, "_device_of_worker", kind_by_name)
        plain = DaskExecutor(client)
        plain._workers.resource = lambda _: None  # type: ignore[method-assign]
        with pytest.raises(DeviceError, match=r"with --nthreads 6 --resources GPU=6 and the others with"):
            plain.device("auto")


def kind_by_name(_: str, dask_worker: Any) -> str:
    """What a worker would say if the first had a GPU."""
    return "cuda" if dask_worker.name == "w0" else "cpu"


def test_anything_with_the_address_of_a_scheduler_is_a_cluster(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    class Gateway:
        """Like dask-gateway's, which is no `distributed.deploy.Cluster`."""

        scheduler_address = client.scheduler.address
        security = None
        asynchronous = False

    with connect(Gateway()) as executor:
        assert dict(executor.stream(abs, range(-3, 0))) == {-3: 3, -2: 2, -1: 1}
    assert client.status == "running"
    with pytest.raises(SettingsError, match="client must be a Dask client or cluster, not str"), connect("here"):
        pass
    monkeypatch.setattr(clients, "WORKERS_TIMEOUT_S", 0.5)
    with (
        LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", silence_logs=50) as empty,
        pytest.raises(ClusterError, match="the Dask cluster that was given has no workers; start some and try again"),
        connect(empty),
    ):
        pass
    asleep = type("Asleep", (), {"scheduler_address": client.scheduler.address, "asynchronous": True})()
    with pytest.raises(SettingsError, match="asynchronous Dask cluster"), connect(asleep):
        pass


def signed_files(folder: Path, name: str) -> dict[str, str]:
    """Files of an authority and of a key that it signed."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *new, "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl("req", *new, "-subj", "/CN=tiledseg", "-keyout", f"{name}-own.key", "-out", f"{name}.csr")
    signed = ("-CA", f"{name}.pem", "-CAkey", f"{name}.key", "-CAcreateserial", "-days", "2")
    openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}-own.pem")
    return {
        key: str(folder / f"{name}{end}") for key, end in (("ca", ".pem"), ("cert", "-own.pem"), ("key", "-own.key"))
    }


@pytest.mark.skipif(subprocess.call(["which", "openssl"], stdout=subprocess.DEVNULL) != 0, reason="needs openssl")
def test_a_scheduler_behind_tls_is_reached_with_its_certificates_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import LocalCluster
    from distributed.security import Security

    monkeypatch.setattr(clients, "CONNECT_TIMEOUT", "2s")

    def security(files: dict[str, str]) -> Any:
        keys = {f"tls_{role}_{part}": files[part] for role in ROLES for part in ("cert", "key")}
        return Security(tls_ca_file=files["ca"], require_encryption=True, **keys)

    tls = signed_files(tmp_path, "own")
    own, foreign = security(tls), security(signed_files(tmp_path, "foreign"))
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(security=own, protocol="tls", host="127.0.0.1", silence_logs=50, **options) as made:
        address = made.scheduler_address
        assert address.startswith("tls://127.0.0.1:")
        for given in ({"scheduler": address, "security": own}, {"client": made}):
            with connect(given.pop("client", None), **given) as executor:
                assert dict(executor.stream(abs, [-1])) == {-1: 1}
        files = {"tls_ca_file": "ca", "tls_client_cert": "cert", "tls_client_key": "key"}
        named = certificates(*(tls[name] for name in files.values()))
        assert {name: getattr(named, name) for name in files} == {name: tls[short] for name, short in files.items()}
        with connect(scheduler=address, security=named) as executor:
            assert dict(executor.stream(abs, [-1])) == {-1: 1}
        names = {"ca-file": "ca", "client.cert": "cert", "client.key": "key"}
        named_there = {f"distributed.comm.tls.{name}": tls[short] for name, short in names.items()}
        with dask.config.set(named_there), connect(scheduler=address) as executor:
            assert dict(executor.stream(abs, [-2])) == {-2: 2}
        for where, keys in ((address, foreign), (address.replace("tls", "tcp"), None), (address, None)):
            with (
                pytest.raises(ClusterError, match=rf"no Dask scheduler answers at {where} "),
                connect(scheduler=where, security=keys),
            ):
                pass
    with pytest.raises(ClusterError, match="TLS takes three files; give --tls-key as well"):
        certificates(tls["ca"], tls["cert"], None)
    with pytest.raises(ClusterError, match=r"--tls-cert nowhere\.pem is no file; give one in PEM"):
        certificates(tls["ca"], "nowhere.pem", tls["key"])
    with pytest.raises(SettingsError, match="certificates are for a scheduler that is given"), connect(security=own):
        pass


def test_a_scheduler_file_that_is_stale_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "CONNECT_TIMEOUT", "1s")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "scheduler.json").write_text(f'{{"address": "tcp://127.0.0.1:{free.getsockname()[1]}"}}')
    with (
        pytest.raises(ClusterError, match=r"no Dask scheduler answers at .*scheduler\.json"),
        connect(scheduler=str(tmp_path / "scheduler.json")),
    ):
        pass
