"""What work costs is counted once, for the right kind, whoever helps with it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tiledseg.cluster import connect
from tiledseg.cores import Cores
from tiledseg.meters import IO, OTHER_THREADS, Tally, Totals, busy, measured, meter, metered, note

MIB = 2**20


def spin(seconds: float) -> None:
    """Compute for so many CPU seconds of this thread."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@metered("outer")
def outer() -> None:
    spin(0.05)
    with meter("inner"):
        spin(0.1)
        with meter("outer"):
            spin(0.05)


def nested(_: Any) -> None:
    outer()
    spin(0.05)


def test_a_kind_within_another_takes_over_and_nothing_counts_twice() -> None:
    before = time.thread_time()
    cpu = measured(nested, 0).tally.cpu_seconds
    spent = time.thread_time() - before
    assert set(cpu) == {"outer", "inner", "other"}
    assert cpu["outer"] >= 0.1
    assert cpu["inner"] >= 0.1
    assert cpu["other"] >= 0.05
    assert sum(cpu.values()) <= spent
    assert max(cpu["outer"], cpu["inner"]) < 0.2, "the time of one kind was counted for the other as well"


def helped(cores: Cores) -> None:
    with cores.task(), meter("network"):
        cores.run(lambda _: spin(0.02), range(10))


def test_threads_that_help_count_into_the_task_and_its_kind() -> None:
    tally = measured(helped, Cores(3)).tally
    assert tally.cpu_seconds["network"] >= 0.2
    assert measured(spin, 0.0).tally.cpu_seconds.keys() == {"other"}


def failing(_: Any) -> None:
    with meter("network"):
        raise RuntimeError("no")


def test_after_an_error_a_thread_counts_for_nothing_any_more() -> None:
    with pytest.raises(RuntimeError):
        measured(failing, 0)
    with meter("outer"):
        spin(0.01)
    assert measured(spin, 0.0).tally.cpu_seconds.keys() == {"other"}


def noting(n: int) -> None:
    note("retries", n)
    thread = threading.Thread(target=note, args=("retries", 10))
    thread.start()
    thread.join()


def test_what_is_noted_arrives_once_from_whatever_thread() -> None:
    """A store's own threads know of no task: what they note comes with the next one that ends."""
    totals = Totals()
    totals.whole()
    for n in (1, 2):
        totals.take(measured(noting, n))
    note("retries", 100)
    assert totals.whole().counts["retries"] == 123
    assert totals.whole().counts["retries"] == 123
    assert totals.of("test_meters").counts["retries"] == 23
    assert Totals().whole().counts == {}


@pytest.mark.skipif(not IO.exists(), reason="this system does not tell what a process reads and writes")
def test_bytes_read_and_written_are_those_of_the_process(tmp_path: Path) -> None:
    def copy(path: Path) -> None:
        path.write_bytes(bytes(3 * MIB))
        path.read_bytes()
        path.read_bytes()

    counts = measured(copy, tmp_path / "file").tally.counts
    assert 3 * MIB <= counts["bytes_written"] < 4 * MIB
    assert 6 * MIB <= counts["bytes_read"] < 7 * MIB
    (tmp_path / "between").write_bytes(bytes(3 * MIB))
    assert measured(spin, 0.0).tally.counts["bytes_written"] < MIB


def forward(barrier: threading.Barrier) -> None:
    with busy("gpu"):
        barrier.wait()
        time.sleep(0.2)


def test_a_device_is_busy_once_however_many_use_it() -> None:
    barrier, totals = threading.Barrier(3), Totals()
    threads = [threading.Thread(target=lambda: totals.take(measured(forward, barrier))) for _ in range(3)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - start
    assert 0.2 <= totals.whole().busy_seconds["gpu"] <= spent
    assert measured(forward, threading.Barrier(1)).tally.busy_seconds["gpu"] >= 0.2


def test_tallies_add_up() -> None:
    total = Tally({"a": 1.0}, {}, {}, {"n": 1}, 2.0)
    total.add(Tally({"a": 2.0, "b": 1.0}, {"a": 1.0}, {"g": 1.0}, {"n": 2}, 3.0))
    assert total == Tally({"a": 3.0, "b": 1.0}, {"a": 1.0}, {"g": 1.0}, {"n": 3}, 5.0)


def piece(number: int) -> int:
    with meter("network"):
        spin(0.01)
    note("pieces")
    return os.getpid() if number < 0 else number


@pytest.mark.parametrize("where", ["here", "workers"])
def test_whoever_works_hands_back_what_it_cost(client: Any, where: str) -> None:
    with connect(client if where == "workers" else None, small=True) as executor:
        results = dict(executor.stream(piece, range(20)))
        whole = executor.totals.whole()
    assert results == {n: n for n in range(20)}
    assert whole.counts["pieces"] == 20
    assert whole.cpu_seconds["network"] >= 0.2
    assert whole.process_seconds >= sum(whole.cpu_seconds.values())
    assert OTHER_THREADS not in whole.cpu_seconds


def test_the_dashboard_of_a_cluster_is_known_and_our_own_has_none(client: Any) -> None:
    with connect(client) as executor:
        assert executor.dashboard == client.dashboard_link
    with connect(scheduler=client.scheduler.address) as executor:
        assert executor.dashboard == client.dashboard_link
    with connect(workers=1, device="cpu") as executor:
        assert executor.dashboard is None
    with connect(small=True) as executor:
        assert executor.dashboard is None
