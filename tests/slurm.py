"""A real SLURM on loopback without systemd: munged, slurmctld and a slurmd for each node, all on this host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
CONFIG = """\
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
GresTypes=gpu
EnforcePartLimits=NO
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
KillWait=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
PartitionName=gpu Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


def skip_without_slurm() -> None:
    """Skip where no SLURM can be brought up."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.skip(f"SLURM is not installed here ({', '.join(missing)}): munge slurmctld slurmd slurm-client")
    if os.geteuid() != 0:
        pytest.skip("the daemons of SLURM are started as root")


@contextlib.contextmanager
def slurm(folder: Path, n_nodes: int = 2, n_gpus: int = 2, n_cores: int = 4) -> Iterator[Path]:
    """A cluster of nodes with fake GPUs; yields its configuration, for ``SLURM_CONF``."""
    for name in ("state", "munge", "dev"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    config = folder / "slurm.conf"
    pids = [folder / "munge" / "pid", folder / "slurmctld.pid"]
    pids += [folder / f"slurmd.n{node}.pid" for node in range(n_nodes)]
    _make_devices(folder, n_nodes * n_gpus)
    _write_config(config, n_nodes, n_gpus, n_cores)
    environment = os.environ | {"SLURM_CONF": str(config)}
    try:
        _start_munge(folder / "munge")
        subprocess.run(["slurmctld", "-f", config, "-c"], check=True, env=environment)
        for node in range(n_nodes):
            subprocess.run(["slurmd", "-f", config, "-N", f"n{node}"], check=True, env=environment)
        _wait_for_nodes(n_nodes, environment)
        yield config
    finally:
        _cancel_all(environment)
        _stop(pids)


def _make_devices(folder: Path, n: int) -> None:
    """Fake GPUs: SLURM sets CUDA_VISIBLE_DEVICES for character devices only, so clones of /dev/null."""
    for i in range(n):
        try:
            os.mknod(folder / "dev" / f"nvidia{i}", 0o600 | 0o020000, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("device files cannot be made in this container")


def _write_config(config: Path, n_nodes: int, n_gpus: int, n_cores: int) -> None:
    folder, ports = config.parent, _free_ports(n_nodes + 1)
    host = socket.gethostname().partition(".")[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    gpus = []
    with config.open("w") as file:
        for node in range(n_nodes):
            file.write(f"NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[node]} ")
            file.write(f"CPUs={n_cores} RealMemory={memory} Gres=gpu:{n_gpus} State=UNKNOWN\n")
            first = node * n_gpus
            devices = f"{folder}/dev/nvidia[{first}-{first + n_gpus - 1}]"
            gpus.append(f"NodeName=n{node} Name=gpu File={devices}\n")
        file.write(CONFIG.format(host=host, port=ports[-1], folder=folder))
    (folder / "gres.conf").write_text("".join(gpus))


def _start_munge(folder: Path) -> None:
    """A munged with a key and a socket of its own."""
    key = folder / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    names = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    files = [f"--{option}={folder / name}" for option, name in names.items()]
    subprocess.run(["munged", "--force", *files], check=True, capture_output=True)


def _wait_for_nodes(n: int, environment: dict[str, str]) -> None:
    until, states = time.monotonic() + 60, ""
    while time.monotonic() < until:
        shown = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True, env=environment, check=False
        )
        states = shown.stdout or shown.stderr
        if states.split().count("idle") == n:
            return
        time.sleep(0.2)
    pytest.fail(f"the nodes of SLURM are not up after a minute: {states!r}")


def _cancel_all(environment: dict[str, str]) -> None:
    subprocess.run(
        ["scancel", "--full", "-s", "KILL", "-u", "root"], env=environment, check=False, timeout=30, capture_output=True
    )
    until = time.monotonic() + 15
    while time.monotonic() < until:
        left = subprocess.run(
            ["squeue", "-h"], capture_output=True, text=True, env=environment, check=False, timeout=30
        )
        if not left.stdout.strip():
            return
        time.sleep(0.2)


def _stop(pid_files: list[Path]) -> None:
    """End the daemons that were started here, by their recorded ids."""
    pids = [int(path.read_text()) for path in reversed(pid_files) if path.exists()]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        until = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
            time.sleep(0.1)


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
