"""What this machine, and this process, have: cores, memory, a kind of device."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .claims import visible_devices
from .errors import DeviceError

__all__ = ["machine_memory", "n_cores", "peak_memory", "resolve_device", "usable_gpus"]

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")


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


def machine_memory() -> int:
    """Bytes that all processes of this machine, container or job of a batch system may have."""
    import psutil

    return min([int(psutil.virtual_memory().total), *_limits_of_groups()])


def _limits_of_groups() -> Iterator[int]:
    """What Linux allows the control groups that this process is in, from the innermost outwards.

    distributed looks at the outermost only, and batch systems set the limit of a job further in.
    """
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (GROUPS / "memory", "memory.limit_in_bytes") if controllers else (GROUPS, "memory.max")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (limit := _read_limit(folder / name)) is not None:
                yield limit


def _read_limit(file: Path) -> int | None:
    """The limit that a file of a control group holds, None without one."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None  # of another container's view, or of a group without this controller
    return int(text) if text.isdecimal() else None


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


def usable_gpus(device: str) -> list[str]:
    """The GPUs that a run on this machine will use, as entries of ``CUDA_VISIBLE_DEVICES``: indices or UUIDs.

    Raises
    ------
    DeviceError
        As `resolve_device`.
    """
    if resolve_device(device) == "cpu":
        return []
    import torch

    return visible_devices() or [str(i) for i in range(torch.cuda.device_count())]
