"""Files that last, stores that are waited for, and the lock of a scratch."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tiledseg import waiting
from tiledseg.disk import make_folders, sweep, write_whole
from tiledseg.errors import OutputError, ScratchError
from tiledseg.folders import FolderStore, new_folder
from tiledseg.lock import locked
from tiledseg.store import DiskStore
from tiledseg.waiting import PASSING, is_stored, patiently


class Flaky:
    """Fails some times before it succeeds."""

    def __init__(self, *errors: OSError) -> None:
        self.errors, self.n_tries = list(errors), 0

    def __call__(self) -> str:
        self.n_tries += 1
        if self.errors:
            raise self.errors.pop(0)
        return "there"


@pytest.mark.parametrize("number", sorted(PASSING))
def test_what_may_pass_is_tried_again_and_said(number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flaky = Flaky(*[OSError(number, os.strerror(number))] * 3)
    with caplog.at_level(logging.WARNING):
        assert patiently(flaky, tmp_path / "file", tmp_path) == "there"
    assert flaky.n_tries == 4
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"{tmp_path / 'file'}: {os.strerror(number)}; trying again for 60 s."
    assert said[1].startswith(f"{tmp_path / 'file'}: there again after 0.")
    assert len(said) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EFBIG])
def test_what_does_not_pass_is_told_at_once(number: int, tmp_path: Path) -> None:
    flaky = Flaky(OSError(number, os.strerror(number)))
    with pytest.raises(OSError, match=os.strerror(number)):
        patiently(flaky, tmp_path, tmp_path)
    assert flaky.n_tries == 1


def test_a_missing_file_is_waited_for_only_while_its_home_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    file = home / "file"
    home.mkdir()
    assert not is_stored(file, home)
    assert not is_stored(home, home)
    file.touch()
    home.rename(away)
    threading.Timer(0.3, away.rename, [home]).start()
    assert is_stored(file, home)
    home.rename(away)
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.1)
    with pytest.raises(TimeoutError, match=r"No such file or directory, also after 0\.1 s"):
        is_stored(file, home)


def test_a_home_is_never_made_in_passing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.1)
    home = tmp_path / "mount"
    with pytest.raises(FileNotFoundError):
        make_folders(home / "a" / "b", home)
    with pytest.raises(TimeoutError):
        write_whole(home / "a" / "file", lambda file: file.write(b"x"), home, home / "drafts")
    store = DiskStore(tmp_path / "scratch")
    store.create("array", (4,), (2,), "uint8")
    (tmp_path / "scratch").rename(tmp_path / "away")
    with pytest.raises(OutputError, match="also after"):
        store.save("a/b", np.zeros(3))
    with pytest.raises(OutputError, match="also after"):
        store.mark("stage", [1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away"]


def test_a_write_that_fails_leaves_what_was_there_and_no_draft(tmp_path: Path) -> None:
    def fail(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    write_whole(tmp_path / "a" / "file", lambda file: file.write(b"whole"), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a" / "file", fail, tmp_path)
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "a").iterdir()] == [("file", b"whole")]
    (tmp_path / "a" / "0.partial").touch()
    sweep(tmp_path / "a", tmp_path / "nowhere")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_zarr_in_a_folder_that_lasts(tmp_path: Path) -> None:
    array = zarr.create_array(new_folder(tmp_path / "a"), shape=(4, 4), chunks=(2, 2), dtype="uint8", zarr_format=3)
    array[:2] = 7
    assert np.array_equal(zarr.open_array(tmp_path / "a", mode="r")[:], array[:])
    assert zarr.open_array(FolderStore(tmp_path / "a"), mode="r+")[3, 3] == 0
    full = zarr.open_array(FolderStore(tmp_path / "a", is_full=True), mode="r")
    assert full[0, 0] == 7
    with pytest.raises(ValueError, match="c/1/1 is missing"):
        full[3, 3]
    (tmp_path / "a" / "c" / "0" / "0").write_bytes(b"")
    with pytest.raises(ValueError, match="c/0/0 is empty"):
        array[0, 0]


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom tiledseg.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        refused = rf"another run works in .*scratch \(process {holder.pid} on .* since .*\); wait until it ends"
        with pytest.raises(OutputError, match=refused), locked(folder):
            pass
        holder.kill()
    with locked(folder), pytest.raises(OutputError, match=rf"process {os.getpid()} "), locked(folder):
        pass
    DiskStore(folder).discard()
    with locked(folder):
        pass


def test_a_scratch_is_discarded_but_for_the_lock_that_is_held(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "scratch")
    with locked(store.path):
        store.write_json("a.json", {})
        store.discard()
        assert [path.name for path in store.path.iterdir()] == ["lock"]
        with pytest.raises(OutputError, match="another run works"), locked(store.path):
            pass


def test_what_is_not_a_folder_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*lock: .*; choose another folder"), locked(tmp_path / "file"):
        pass


def test_a_damaged_file_is_named_also_from_another_process(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.save("a/3", np.arange(4))
    (tmp_path / "a" / "3.npy").write_bytes(b"")
    with pytest.raises(ScratchError) as caught:
        store.load("a/3")
    sent = pickle.loads(pickle.dumps(caught.value))
    assert sent.file == "a/3.npy"
    assert str(sent) == str(caught.value)
    assert str(sent).startswith(f"a/3.npy of the scratch {tmp_path} is damaged or missing (")
    assert str(sent).endswith("); run the same command again with --restart.")


def test_chunks_of_zeros_are_stored_and_one_that_is_not_is_missed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.create("array", (4, 5), (2, 2), "uint8", codec="zstd")
    store.open("array")[:3] = 0
    array = store.open("array")
    assert not array[:4].any()
    array[0, 0] = 5
    assert store.open("array")[0, 0] == 5
    assert (array.shape, len(list((tmp_path / "array").glob("c.*")))) == ((4, 5), 6)
    (tmp_path / "array" / "c.1.2").unlink()
    assert array[:, :4].sum() == 5
    with pytest.raises(ScratchError, match=r"array/c\.1\.2 of the scratch .* \(.*c\.1\.2 is missing\)"):
        array[3, 4]
    with pytest.raises(ScratchError, match=r"other/zarr\.json of the scratch"):
        store.open("other")[0]


def test_a_mark_is_taken_back(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.mark("stage", [1, 2, 30])
    store.unmark("stage", [2, 30])
    store.mark("stage", [30])
    assert store.done("stage") == {1, 30}


def test_an_array_is_opened_once_until_it_is_removed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "scratch")
    store.create("a.zarr", (4, 4), (2, 2), "uint8")
    store.open("a.zarr")[:2] = 7
    (tmp_path / "scratch/a.zarr/zarr.json").rename(tmp_path / "zarr.json")
    store.open("a.zarr")[2:] = 8
    with pytest.raises(ScratchError, match=r"a.zarr/zarr.json"):
        pickle.loads(pickle.dumps(store)).open("a.zarr")[:]
    (tmp_path / "zarr.json").rename(tmp_path / "scratch/a.zarr/zarr.json")
    assert pickle.loads(pickle.dumps(store)).open("a.zarr")[:].tolist() == [[7] * 4] * 2 + [[8] * 4] * 2
    store.remove("a")
    store.create("a.zarr", (2,), (2,), "uint16")
    store.open("a.zarr")[:] = 300
    assert store.open("a.zarr")[:].tolist() == [300, 300]


@pytest.mark.parametrize("dtype", ["float16", "uint32", "int64"])
def test_a_whole_chunk_is_stored_as_zarr_stores_it(dtype: str, tmp_path: Path) -> None:
    store, rng = DiskStore(tmp_path / "scratch"), np.random.default_rng(0)
    values = rng.integers(0, 50, (2, 6, 40, 50)).astype(dtype)
    for name in ("ours", "zarrs"):
        store.create(name, values.shape, (1, 3, 20, 25), dtype)
    array = store.open("ours")
    array[0, 0:3, 20:40, 0:25] = values[0, :3, 20:, :25]  # one chunk
    array[1, 3:6, 0:20] = values[1, 3:, :20]  # two of them
    array[0, 3:6, 0:20, 25:50] = 7
    array[0, 3:6, 20:40, 25:30] = values[0, 3:, 20:, 25:30]  # a part of one
    expected = np.zeros_like(values)
    expected[0, :3, 20:, :25] = values[0, :3, 20:, :25]
    expected[1, 3:, :20] = values[1, 3:, :20]
    expected[0, 3:, :20, 25:] = 7
    expected[0, 3:, 20:, 25:30] = values[0, 3:, 20:, 25:30]
    zarr.open_array(tmp_path / "scratch/zarrs").with_config({"write_empty_chunks": True})[...] = expected
    found = zarr.open_array(tmp_path / "scratch/ours")
    np.testing.assert_array_equal(found[...], expected)
    files = sorted(path.name for path in (tmp_path / "scratch/ours").glob("c.*"))
    assert files == ["c.0.0.1.0", "c.0.1.0.1", "c.0.1.1.1", "c.1.1.0.0", "c.1.1.0.1"]
    for name in files:
        assert (tmp_path / "scratch/ours" / name).read_bytes() == (tmp_path / "scratch/zarrs" / name).read_bytes()
