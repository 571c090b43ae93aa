"""One task at a time on a GPU, over all processes of a host.

Workers that somebody else started need not have a GPU each: several may see the same one, or the same
list of them. So a process binds to one of the devices that it may see, to one that no other process is
bound to if there is such, and while a task of it uses the device it holds the device's claim.

Both are locks on files in a folder of the host, which the kernel drops when a process dies. Two names of
one device (an index, a UUID) lead to one file where ``nvidia-smi`` can be asked.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from .errors import DeviceError

__all__ = ["bind", "claimed", "claimed_if_free", "is_bound", "listed_devices", "visible_devices"]

VARIABLE = "CUDA_VISIBLE_DEVICES"
NO_DEVICE = ("", "-1")
LIST_TIMEOUT_S = 20
GPU_LINE = re.compile(r"^GPU (\d+): .*\(UUID: (GPU-[0-9a-fA-F-]+)\)")
MIG_LINE = re.compile(r"^\s+MIG .*\(UUID: (MIG-[^)]+)\)")


@functools.cache
def listed_devices() -> dict[str, str]:
    """UUID of each device by the name it has in ``CUDA_VISIBLE_DEVICES``, as ``nvidia-smi -L`` lists them.

    A GPU has its index for a name; where it is split, the parts have their UUIDs. Empty without ``nvidia-smi``.
    """
    try:
        said = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=LIST_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    found: dict[str, str] = {}
    index = ""
    for line in said.splitlines():
        if whole := GPU_LINE.match(line):
            index = whole[1]
            found[index] = whole[2]
        elif part := MIG_LINE.match(line):
            found.pop(index, None)
            found[part[1]] = part[1]
    return found


def visible_devices() -> list[str]:
    """The devices this process may use, named as ``CUDA_VISIBLE_DEVICES`` names them: all, if it is not set."""
    value = os.environ.get(VARIABLE)
    if value is None:
        return list(listed_devices())
    names: list[str] = []
    for name in map(str.strip, value.split(",")):
        if name in NO_DEVICE:  # CUDA reads no further either
            break
        names.append(name)
    return names


def _uuid_of(name: str) -> str:
    """What a device is called whoever names it; its name if that cannot be told."""
    listed = listed_devices()
    # CUDA takes any beginning of a UUID that only one device has.
    whole = [uuid for uuid in listed.values() if uuid.startswith(name)] if not name.isdigit() else []
    return listed.get(name, whole[0] if len(whole) == 1 else name)


def _folder() -> Path:
    """The folder of the locks, which belongs to this user alone."""
    path = Path(tempfile.gettempdir()) / f"tiledseg-gpus-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    facts = path.lstat()
    if path.is_symlink() or not path.is_dir() or facts.st_uid != os.getuid():
        raise DeviceError(f"{path} is not a folder of this user, and GPUs are claimed there; remove it.")
    return path


def _lock(name: str, *, wait: bool) -> int | None:
    """Descriptor of a locked file, None if others hold the lock and it is not waited for."""
    import fcntl

    path = _folder() / re.sub(r"[^\w.-]", "_", name)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class _Bound:
    """The device of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.device: str | None = None
        self.descriptor: int | None = None


_BOUND = _Bound()


def bind() -> str | None:
    """Bind this process to one of the devices it may see, before CUDA starts in it; returns its UUID, or its name.

    None if it may see no device. Later calls return what the first one chose. ``CUDA_VISIBLE_DEVICES`` names
    that device alone from then on.
    """
    with _BOUND.lock:
        if _BOUND.device is not None:
            return _BOUND.device
        names = visible_devices()
        if not names:
            return None
        chosen = names[0]
        for name in names:
            _BOUND.descriptor = _lock(f"{_uuid_of(name)}.bound", wait=False)
            if _BOUND.descriptor is not None:
                chosen = name
                break
        _BOUND.device = _uuid_of(chosen)
        os.environ[VARIABLE] = chosen
        return _BOUND.device


def is_bound() -> bool:
    """Whether this process shares its host's devices with others by claims."""
    return _BOUND.device is not None


@contextlib.contextmanager
def claimed() -> Iterator[str | None]:
    """Hold the claim of this process's device, which one task at a time has; gives the device."""
    device = bind()
    if device is None:
        yield None
        return
    descriptor = _lock(f"{device}.task", wait=True)
    try:
        yield device
    finally:
        _unlock(descriptor)


@contextlib.contextmanager
def claimed_if_free() -> Iterator[bool]:
    """The same if no task has it; whether it is held. A process that never bound has its device for itself."""
    if not is_bound():
        yield True
        return
    descriptor = _lock(f"{_BOUND.device}.task", wait=False)
    try:
        yield descriptor is not None
    finally:
        _unlock(descriptor)


def _unlock(descriptor: int | None) -> None:
    """Let a lock go."""
    if descriptor is not None:
        os.close(descriptor)
