"""Cores lent between the tasks of a process."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref

import pytest

from tiledseg.cores import ALONE, Cores


class Crowd:
    """Counts the threads that are at work at a time."""

    def __init__(self, pause_s: float = 0.005) -> None:
        self.pause_s = pause_s
        self.most = self._now = 0
        self._lock = threading.Lock()

    def work(self, piece: int) -> int:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.pause_s)
        with self._lock:
            self._now -= 1
        return piece * piece


def test_results_come_in_the_order_of_the_pieces() -> None:
    cores = Cores(4)
    with cores.task():
        assert cores.run(Crowd().work, range(30)) == [i * i for i in range(30)]


@pytest.mark.parametrize(("n_cores", "most"), [(1, 1), (2, 2), (3, 3)])
def test_a_lone_task_uses_all_cores_and_no_more(n_cores: int, most: int) -> None:
    cores, crowd = Cores(n_cores), Crowd()
    with cores.task():
        cores.run(crowd.work, range(30))
    assert crowd.most == most


def test_nothing_is_borrowed_without_cores() -> None:
    crowd = Crowd()
    ALONE.run(crowd.work, range(5))
    assert crowd.most == 1


def test_a_lent_core_is_given_back_when_a_task_begins() -> None:
    cores, crowd = Cores(2), Crowd(0.01)
    with cores.task():
        late: list[int] = []

        def work(piece: int) -> None:
            crowd.work(piece)
            if second.is_set():
                late.append(threading.get_ident())

        second = threading.Event()

        def begin() -> None:
            with cores.task():
                time.sleep(0.05)
                second.set()
                time.sleep(0.15)

        other = threading.Thread(target=begin)
        other.start()
        cores.run(work, range(20))
        other.join()
    # The second task runs in the meantime: all later pieces are done by one thread.
    assert late
    assert len(set(late)) == 1


def test_who_waits_for_a_disk_lends_its_core_meanwhile() -> None:
    cores = Cores(2)
    stored, seen = threading.Event(), threading.Event()

    def wait() -> None:
        with cores.task():
            with cores.lent():
                seen.set()
                assert stored.wait(10)
            seen.clear()
            assert not seen.wait(0.1)

    def helpers(pause_s: float) -> int:
        crowd = Crowd(pause_s)
        cores.run(crowd.work, range(8))
        return crowd.most

    with cores.task():
        other = threading.Thread(target=wait)
        other.start()
        assert seen.wait(10)
        assert helpers(0.01) == 2
        stored.set()
        while seen.is_set():
            time.sleep(0.001)
        assert helpers(0.001) == 1
        other.join()
        assert helpers(0.01) == 2


def test_a_core_is_lent_once_and_only_by_who_has_it() -> None:
    cores = Cores(1)
    for lent in ((cores.lent(), cores.task()), (cores.task(), cores.lent(), cores.lent())):
        with contextlib.ExitStack() as stack:
            for context in lent:
                stack.enter_context(context)
            crowd = Crowd()
            cores.run(crowd.work, range(5))
        assert crowd.most == len(lent) - 1
    with cores.task():
        crowd = Crowd()
        cores.run(crowd.work, range(5))
    assert crowd.most == 1


def test_an_error_ends_the_work_and_frees_the_cores() -> None:
    cores = Cores(3)
    begun: list[int] = []

    def fail(piece: int) -> None:
        begun.append(piece)
        if piece == 3:
            raise ValueError("piece 3")
        time.sleep(0.01)

    for _ in range(2):
        begun.clear()
        with cores.task(), pytest.raises(ValueError, match="piece 3"):
            cores.run(fail, range(1000))
        assert len(begun) < 20
    crowd = Crowd()
    with cores.task():
        cores.run(crowd.work, range(30))
    assert crowd.most == 3


def test_the_number_of_cores_can_change() -> None:
    cores, crowd = Cores(1), Crowd()
    cores.resize(3)
    with cores.task():
        cores.run(crowd.work, range(30))
    assert crowd.most == 3


def test_a_core_that_comes_free_joins() -> None:
    cores, crowd = Cores(2), Crowd(0.01)
    threads: list[int] = []

    def work(piece: int) -> None:
        threads.append(threading.get_ident())
        crowd.work(piece)

    begun = threading.Event()

    def begin() -> None:
        with cores.task():
            begun.set()
            time.sleep(0.05)

    other = threading.Thread(target=begin)
    other.start()
    begun.wait()
    with cores.task():
        cores.run(work, range(30))
    other.join()
    assert len(set(threads[:3])) == 1
    assert len(set(threads)) == 2
    assert crowd.most == 2


def test_a_core_that_comes_free_joins_while_a_piece_is_in_hand() -> None:
    cores = Cores(2)
    is_lent, others_are_done = threading.Event(), threading.Event()

    def work(piece: int) -> str:
        if piece == 0:
            is_lent.set()
            # Goes on once another thread has done all other pieces.
            assert others_are_done.wait(10)
        elif piece == 3:
            others_are_done.set()
        return threading.current_thread().name

    def lend() -> None:
        with cores.task():
            begun.set()
            assert is_lent.wait(10)
            with cores.lent():
                assert others_are_done.wait(10)

    begun = threading.Event()
    other = threading.Thread(target=lend)
    other.start()
    assert begun.wait(10)
    with cores.task():
        first, *others = cores.run(work, range(4))
    other.join()
    assert first not in others
    assert len(set(others)) == 1


def test_who_waits_for_its_helpers_lends_its_core() -> None:
    cores = Cores(3)
    last_is_in_hand, is_helped = threading.Event(), threading.Event()

    def wait(_piece: int) -> None:
        if threading.current_thread() is not owner:
            last_is_in_hand.set()
            assert is_helped.wait(10)
        else:
            assert last_is_in_hand.wait(10)

    def own() -> None:
        with cores.task():
            cores.run(wait, range(2))

    def work(piece: int) -> str:
        if piece == 0:
            assert is_helped.wait(10)
        is_helped.set()
        return threading.current_thread().name

    owner = threading.Thread(target=own)
    with cores.task():
        owner.start()
        assert last_is_in_hand.wait(10)
        # All three are at work: here, for the other task, and as its helper. Then its owner waits for that one.
        assert len(set(cores.run(work, range(2)))) == 2
    owner.join()


def test_what_was_worked_on_is_free_at_once() -> None:
    """No cycle of references holds a block's arrays until the garbage collector comes by."""

    class Block:
        pass

    cores, block = Cores(2), Block()
    watched = weakref.ref(block)
    gc.disable()
    try:
        with cores.task():
            cores.run(lambda piece, block=block: (piece, id(block)), range(5))
        del block
        assert watched() is None
    finally:
        gc.enable()
