"""When freed memory is given back: before another kind of task, and now and then; whose it is meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tiledseg import malloc
from tiledseg.clients import Process, local_client

POOLS = """
import ctypes, threading
from tiledseg import malloc
malloc.n_cores = lambda: {n_cores}
malloc.share_freed_memory()
arrive = threading.Barrier(4)
def take():
    arrive.wait()
    bytearray(75_000)
    arrive.wait()
threads = [threading.Thread(target=take) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
library = ctypes.CDLL(None)
library.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(library.fdopen(1, b"w"))
library.malloc_info(0, out)
library.fflush(out)
"""


def test_memory_is_kept_from_one_task_to_the_next_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [
        (100.0, "flows", True),
        (105.0, "flows", False),
        (105.5, "masks", True),
        (106.0, "flows", False),  # kinds take turns
        (106.4, "masks", False),
        (106.6, "flows", True),
        (109.0, "flows", False),
        (116.7, "flows", True),
    ]
    times = iter([at for at, _, _ in calls])
    monkeypatch.setattr(malloc.time, "monotonic", lambda: next(times))
    clock = malloc._Clock()
    assert [clock.is_due(kind) for _, kind, _ in calls] == [is_due for _, _, is_due in calls]


@pytest.mark.skipif(malloc._glibc() is None, reason="needs glibc, whose allocator this is about")
@pytest.mark.parametrize(("n_cores", "is_shared"), [(2, True), (64, False)])
def test_on_few_cores_one_pool_serves_all_threads(n_cores: int, is_shared: bool) -> None:
    command = [sys.executable, "-c", POOLS.format(n_cores=n_cores)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (told.count("<heap nr=") == 1) == is_shared


@pytest.mark.parametrize(("n_threads", "expected"), [(4, "1"), (5, None)])
def test_workers_of_few_threads_start_with_one_pool(n_threads: int, expected: str | None) -> None:
    with local_client([Process(n_threads)]) as client:
        (found,) = client.run(lambda: os.environ.get("MALLOC_ARENA_MAX")).values()
    assert found == expected
