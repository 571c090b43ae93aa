"""Chunks that were read in part lately are read once."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from tiledseg.images import recent
from tiledseg.images.recent import RecentChunks


class Counted:
    """An array that notes which chunks were asked for."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.asked: list[tuple[slice, ...]] = []
        self.shape, self.chunks, self.dtype = array.shape, array.chunks, array.dtype

    def __getitem__(self, selection: tuple[slice, ...]) -> Any:
        self.asked.append(selection)
        return self._array[selection]


def stored(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Counted:
    array = zarr.create_array({}, shape=shape, chunks=chunks, dtype="uint16")
    array[...] = np.random.default_rng(0).integers(0, 2**16, shape)
    return Counted(array)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_read_is_what_is_stored(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4), label="shape"))
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    array, chunk_bytes = stored(shape, chunks), 2 * int(np.prod(chunks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent, "RECENT_BYTES", data.draw(st.integers(3, 12), label="room") * chunk_bytes)
        kept = RecentChunks()
        for _ in range(data.draw(st.integers(1, 6))):
            selection: list[slice | int] = []
            for n in shape:
                low = data.draw(st.integers(0, n - 1))
                high = data.draw(st.integers(low + 1, n))
                selection.append(low if data.draw(st.booleans()) else slice(low, high))
            found = kept.read(array, "0", tuple(selection))
            np.testing.assert_array_equal(found, array._array[tuple(selection)])
            assert kept.n_bytes <= recent.RECENT_BYTES


READ = [(0, 16), (16, 24), (24, 32), (32, 40), (40, 48), (48, 56), (56, 64)]


def test_a_chunk_is_read_once_by_regions_side_by_side() -> None:
    array, kept = stored((8, 64), (8, 8)), RecentChunks()
    for start in range(0, 60, 5):
        kept.read(array, "0", (slice(1, 7), slice(start, min(start + 9, 64))))
    assert array.asked == [(slice(0, 8), slice(a, b)) for a, b in READ]


def test_whole_chunks_and_large_ones_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    array, kept = stored((20, 20), (8, 8)), RecentChunks()
    kept.read(array, "0", (slice(8, 20), slice(0, 16)))
    assert kept.n_bytes == 0
    monkeypatch.setattr(recent, "RECENT_BYTES", 3 * 2 * 64)
    kept.read(array, "0", (slice(0, 3), slice(0, 3)))
    assert kept.n_bytes == 0
    assert array.asked == [(slice(8, 20), slice(0, 16)), (slice(0, 3), slice(0, 3))]


def test_arrays_are_told_apart_by_name() -> None:
    one, other, kept = stored((9, 9), (4, 4)), stored((9, 9), (3, 3)), RecentChunks()
    other._array[...] = 7
    where = (slice(1, 6), slice(2, 7))
    np.testing.assert_array_equal(kept.read(one, "0", where), one._array[where])
    np.testing.assert_array_equal(kept.read(other, "1", where), np.full((5, 5), 7))


def test_another_process_begins_anew_once() -> None:
    array, kept = stored((9, 9), (4, 4)), RecentChunks()
    kept.read(array, "0", (slice(1, 6), slice(2, 7)))
    assert kept.n_bytes > 0
    there = pickle.loads(pickle.dumps(kept))
    assert there.n_bytes == 0
    assert pickle.loads(pickle.dumps(kept)) is there
    other = pickle.loads(pickle.dumps(RecentChunks()))
    assert other is not there
    assert pickle.loads(pickle.dumps(kept)) is not there  # the latest is kept, so that memory does not grow


class Slow(Counted):
    """An array that is read when it may be; the first time in vain, if so."""

    def __init__(self, array: Any, fails: bool) -> None:
        super().__init__(array)
        self.fails = fails
        self.n_asked, self.may = threading.Semaphore(0), threading.Event()

    def __getitem__(self, selection: tuple[slice, ...]) -> Any:
        fails, self.fails = self.fails, False
        self.n_asked.release()
        assert self.may.wait(60)
        if fails:
            raise OSError("gone")
        return super().__getitem__(selection)


@pytest.mark.parametrize("fails", [False, True])
def test_what_one_thread_reads_others_wait_for(fails: bool) -> None:
    array, kept = Slow(stored((8, 24), (8, 8))._array, fails), RecentChunks()
    left, right = (slice(1, 8), slice(0, 12)), (slice(0, 7), slice(10, 23))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kept.read, array, "0", left)
        assert array.n_asked.acquire(timeout=60)
        second = pool.submit(kept.read, array, "0", right)
        assert array.n_asked.acquire(timeout=60)  # for the chunk that nobody reads yet
        array.may.set()
        if fails:
            with pytest.raises(OSError, match="gone"):
                first.result()
        else:
            np.testing.assert_array_equal(first.result(), array._array[left])
        np.testing.assert_array_equal(second.result(), array._array[right])
    asked = sorted((part.start, part.stop) for _, part in array.asked)
    assert asked == ([(8, 16), (16, 24)] if fails else [(0, 16), (16, 24)])


def test_an_image_that_changes_after_a_run_is_read_anew(tmp_path: Path) -> None:
    """Also by what the run returned."""
    import tiledseg
    from tiledseg.omezarr import write_image
    from tiledseg.slides import synthetic_slide

    pixels, _ = synthetic_slide((150, 150), diameter=20.0)
    write_image(tmp_path / "a.ome.zarr", pixels, axes="yx", chunk=64)
    result = tiledseg.segment(tmp_path / "a.ome.zarr", diameter=20.0, output=tmp_path / "b.ome.zarr")
    assert result.report.n_objects > 5
    where = (slice(10, 20), slice(10, 20))
    np.testing.assert_array_equal(result.image.read(0, where), pixels[where])
    zarr.open_array(tmp_path / "a.ome.zarr" / "0", mode="r+")[...] = 1
    assert (result.image.read(0, where) == 1).all()
