"""What this machine, and this process, have: cores, memory, a kind of device."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .claims import visible_devices
from .errors import DeviceError

__all__ = ["machine_memory", "n_cores", "peak_memory", "resolve_device", "usable_gpus"]


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
    """Bytes that all processes of this machine, container or session may have."""
    from distributed.system import MEMORY_LIMIT

    return int(MEMORY_LIMIT)


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
