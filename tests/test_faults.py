"""Nothing lost: every fault is really produced in the midst of a run, which then gives the same bits.

Recomputed are at most the pieces that were in flight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

import tiledseg
from tiledseg.errors import ClusterError, ImageError, OutputError, QuarantineError, ScratchError, TiledsegError
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide
from tiledseg.store import DiskStore

from . import sabotage
from .sabotage import Deed, Saboteur

N_FRAMES = 8
SHAPE = (96, 180)
SETTINGS: dict[str, Any] = {"diameter": 16.0, "block": 100}
WINDOW = 6
"""Pieces in flight: three for each thread of two workers."""


def above(pixels: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Connected parts above a threshold."""
    from scipy.ndimage import gaussian_filter, label

    labels: npt.NDArray[np.int32] = label(gaussian_filter(pixels.astype(float), 1) > 2000)[0]
    return labels


@dataclass(frozen=True)
class Scene:
    """A series of pictures on disk, and a place for what is made of it."""

    image: Path
    folder: Path
    by_function: bool
    client: Any = None
    at_end: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    @property
    def output(self) -> Path:
        return self.folder / "out.ome.zarr"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch" / "out.ome.zarr.cells.tiledseg"

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.txt"

    @property
    def is_done(self) -> bool:
        """Whether the fault was produced."""
        return self.log.with_suffix(".done").exists()

    def run(self, **how: Any) -> tiledseg.Segmentation:
        """Segment, or go on with it."""
        by = {"segmenter": above} if self.by_function else {}
        where = {"client": self.client, "scratch": self.folder / "scratch"}
        return tiledseg.segment(self.image, self.output, **{**where, **SETTINGS, **by, **how})

    def run_until(self, stage: str, done: int = 0) -> None:
        """Segment as far as that, in this process."""

        def listen(at: str, n_done: int, _: int) -> None:
            if (at, n_done) == (stage, done):
                raise StoppedError

        with pytest.raises(StoppedError):
            self.run(progress=listen)

    def scratch_file(self, pattern: str) -> Path:
        """A file of the scratch that holds something."""
        return max(self.scratch.glob(pattern), key=lambda path: (path.is_file(), path.stat().st_size))


class StoppedError(Exception):
    """A run that was asked to stop."""


Undisturbed = Callable[[Scene], tiledseg.Segmentation]


@pytest.fixture(scope="module")
def pictures() -> npt.NDArray[np.uint16]:
    image, _ = synthetic_slide((N_FRAMES * SHAPE[0], SHAPE[1]), diameter=16.0, seed=1)
    return image.reshape(N_FRAMES, *SHAPE)


@pytest.fixture(scope="module")
def undisturbed(pictures: npt.NDArray[np.uint16]) -> Undisturbed:
    """The same by the network or the function, in this process and with nothing written."""

    @functools.cache
    def run(by_function: bool) -> tiledseg.Segmentation:
        how = {"segmenter": above} if by_function else {}
        found = tiledseg.segment(pictures, axes="tyx", **SETTINGS, **how)
        assert found.report.n_objects > 100
        return found

    return lambda scene: run(scene.by_function)


@pytest.fixture
def image_path(pictures: npt.NDArray[np.uint16], tmp_path: Path) -> Path:
    path = tmp_path / "series" / "image.ome.zarr"
    write_image(path, pictures, axes="tyx", chunk=128)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    return path


def check(scene: Scene, found: tiledseg.Segmentation, expected: tiledseg.Segmentation, culprit: str = "") -> None:
    """The same bits, the same table, nothing left over, no piece lost, none begun again but those in flight."""
    assert np.array_equal(found.labels.compute(), expected.labels.compute())
    assert found.table.equals(expected.table)
    assert [path for name in ("*.partial", ".drafts/*") for path in scene.folder.rglob(name)] == []
    for stage, n_pieces in expected.report.computed.items():
        assert found.report.kept[stage] + found.report.computed[stage] == n_pieces, stage
        begun = sabotage.begun(scene.log, stage)
        assert sum(n - 1 for piece, n in begun.items() if piece != culprit) <= WINDOW, stage


def check_all_was_begun(scene: Scene, expected: tiledseg.Segmentation) -> None:
    """That what workers begin was counted."""
    for stage in sabotage.TASKS.keys() & expected.report.computed.keys():
        n_pieces = expected.report.computed[stage] - (stage == "stitch")  # its merge is not counted
        assert len(sabotage.begun(scene.log, stage)) == n_pieces, stage


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in the midst of a run."""

    name: str
    task: str
    deed: Callable[[Scene], Deed]
    says: str = ""
    """What the run ends with; nothing if it goes on by itself."""
    mend: Callable[[Scene], object] = lambda _: None
    """How the cause is removed."""
    how: dict[str, Any] = dataclasses.field(default_factory=dict)
    """When it happens, see `Saboteur`; default with the third of the tasks."""


def killed(_: Scene) -> Deed:
    return sabotage.kill


def frozen(_: Scene) -> Deed:
    return functools.partial(sabotage.freeze, 3.0)


def gone(which: str) -> Callable[[Scene], Deed]:
    """The folder that the image, the scratch or the labels lie in is gone for a while."""
    folders: dict[str, Callable[[Scene], Path]] = {
        "image": lambda scene: scene.image.parent,
        "scratch": lambda scene: scene.scratch.parent,
        "output": lambda scene: scene.output,
    }
    return lambda scene: functools.partial(sabotage.take_away, folders[which](scene), 2.0)


def spoilt(scene: Scene) -> Deed:
    """A chunk of the image that is read late."""
    chunk = scene.image / "0" / "c" / str(N_FRAMES - 1) / "0" / "0"
    (scene.folder / "chunk").write_bytes(chunk.read_bytes())
    return functools.partial(sabotage.spoil, chunk)


def restored(scene: Scene) -> None:
    (scene.folder / "chunk").replace(scene.image / "0" / "c" / str(N_FRAMES - 1) / "0" / "0")


def disk_full(scene: Scene) -> Deed:
    """The scratch lies on a disk of 16 MiB, and something fills it."""
    disk = scene.scratch.parent
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("to mount a small disk takes root")
    scene.at_end.callback(subprocess.run, ["umount", "-l", disk], check=True)
    return functools.partial(sabotage.fill, disk)


def limited(_: Scene) -> Deed:
    """No file may be larger than 300 bytes, in one of the workers."""
    return functools.partial(sabotage.limit_files, 300)


FAULTS = [
    Fault("worker killed in flows", "flows", killed),
    Fault("worker killed in a forward pass", "forward pass", killed),
    Fault("worker killed in masks", "masks", killed),
    Fault("worker killed with results stored and not yet marked", "masks", killed, how={"after": True}),
    Fault("worker killed in stitch", "stitch", killed),
    Fault("worker killed in publish", "publish", killed, how={"number": 1}),
    Fault("worker frozen", "masks", frozen),
    Fault("image gone for a while", "flows", gone("image")),
    Fault("scratch gone for a while", "masks", gone("scratch")),
    Fault("output gone for a while", "publish", gone("output"), how={"number": 1}),
    Fault("image chunk spoilt", "flows", spoilt, r"chunk c/7/0/0 of .*image.ome.zarr/0 cannot be read", restored),
    Fault(
        "disk full",
        "masks",
        disk_full,
        r"cannot write .*No space left on device; free some space or choose another folder",
        lambda scene: (scene.scratch.parent / "filler").unlink(),
    ),
    Fault(
        "file too large",
        "masks",
        limited,
        r"cannot write .*File too large; free some space or choose another folder",
        lambda scene: scene.client.run(sabotage.limit_files, -1),
    ),
]
BY_NETWORK = {"flows", "forward pass"}
SLOW = {
    "worker killed in flows",
    "worker killed with results stored and not yet marked",
    "worker killed in stitch",
    "worker killed in publish",
    "scratch gone for a while",
}


@pytest.fixture
def sabotaged(client: Any) -> Iterator[Callable[..., None]]:
    """Has workers do a deed; afterwards they are as before."""
    with contextlib.ExitStack() as stack:

        def begin(*args: Any, **how: Any) -> None:
            client.register_plugin(Saboteur(*args, **how))
            stack.callback(client.unregister_worker_plugin, Saboteur.name)
            stack.callback(client.wait_for_workers, 2, timeout=60)

        yield begin


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=[pytest.mark.slow] * (fault.name in SLOW), id=fault.name) for fault in FAULTS],
)
def test_nothing_is_lost(
    fault: Fault, image_path: Path, folder: Path, client: Any, sabotaged: Callable[..., None], undisturbed: Undisturbed
) -> None:
    scene = Scene(image_path, folder, fault.task not in BY_NETWORK, client)
    with scene.at_end:
        sabotaged(scene.log, fault.task, fault.deed(scene), **fault.how)
        if fault.says:
            with pytest.raises(TiledsegError, match=fault.says):
                scene.run()
            fault.mend(scene)
        found = scene.run()
        assert scene.is_done
        check(scene, found, undisturbed(scene))
        check_all_was_begun(scene, undisturbed(scene))


@pytest.mark.slow
def test_a_task_that_always_kills_its_worker_is_set_aside_and_the_rest_done(
    image_path: Path, folder: Path, client: Any, sabotaged: Callable[..., None], undisturbed: Undisturbed
) -> None:
    scene = Scene(image_path, folder, True, client)
    client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
    try:
        sabotaged(scene.log, "masks", sabotage.kill, always=5)
        with pytest.raises(QuarantineError, match=r"1 piece has failed whenever tried: masks .*workers die at it"):
            scene.run()
    finally:
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 3))
    scene.log.with_suffix(".mended").touch()
    found = scene.run()
    assert found.report.computed["masks"] == 1
    assert len(found.report.quarantined) == 1
    check(scene, found, undisturbed(scene), culprit="5")


def test_a_second_run_on_the_same_scratch_is_refused(
    image_path: Path, folder: Path, client: Any, sabotaged: Callable[..., None], undisturbed: Undisturbed
) -> None:
    scene, go_on = Scene(image_path, folder, True, client), folder / "go-on"
    sabotaged(scene.log, "masks", functools.partial(sabotage.hold, go_on))
    with ThreadPoolExecutor(1) as beside:
        first = beside.submit(scene.run)
        sabotage.hold(scene.log.with_suffix(".done"))
        for restart in (False, True):
            with pytest.raises(OutputError, match=rf"another run works in .*\(process {os.getpid()} on .*; wait until"):
                scene.run(restart=restart)
        go_on.touch()
        check(scene, first.result(), undisturbed(scene))


CLIENT = """
import os, signal, sys, tiledseg
from tests import sabotage
image, output, scratch, scheduler, log, stage, done = sys.argv[1:]
if log:
    sabotage.record_syncs(sabotage.Path(log))
def listen(at, n_done, n):
    if (at, n_done) == (stage, int(done)):
        os.kill(os.getpid(), signal.SIGKILL)
tiledseg.segment(image, output, scratch=scratch, scheduler=scheduler or None, progress=listen, diameter=16.0, block=100)
"""


def kill_client(scene: Scene, stage: str, done: int, scheduler: str = "", log: str = "") -> None:
    """Run in a process of its own, which is killed when so many pieces of a stage are done."""
    where = [scene.image, scene.output, scene.folder / "scratch", scheduler, log, stage, str(done)]
    ended = subprocess.run([sys.executable, "-c", CLIENT, *where], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


def test_a_killed_client_loses_what_was_in_flight(
    image_path: Path, folder: Path, client: Any, sabotaged: Callable[..., None], undisturbed: Undisturbed
) -> None:
    scene = Scene(image_path, folder, False, client)
    sabotaged(scene.log, "flows", list)
    kill_client(scene, "flows", 3, scheduler=client.scheduler.address)
    found = scene.run()
    assert found.report.kept["flows"] == 3
    check(scene, found, undisturbed(scene))
    check_all_was_begun(scene, undisturbed(scene))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "done"), [("flows", 3), ("masks", 5), ("publish", 1)])
def test_a_power_cut_takes_nothing_that_was_marked(
    image_path: Path, folder: Path, undisturbed: Undisturbed, stage: str, done: int
) -> None:
    scene, log = Scene(image_path, folder, False), folder.parent / "syncs.txt"
    kill_client(scene, stage, done, log=str(log))
    lost = [scene.scratch / "lost", scene.output / "lost"]
    for path in lost:
        path.touch()
    sabotage.cut_power(folder, log)
    assert not any(path.exists() for path in lost)
    found = scene.run()
    assert found.report.kept[stage] >= done
    check(scene, found, undisturbed(scene))


@pytest.mark.slow
def test_a_killed_scheduler_loses_what_was_in_flight(image_path: Path, folder: Path, undisturbed: Undisturbed) -> None:
    scene, address = Scene(image_path, folder, False), folder.parent / "scheduler.json"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    scheduler = subprocess.Popen([*start, "--no-dashboard", "--scheduler-file", str(address)], **quiet)
    start = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    worker = subprocess.Popen([*start, "--scheduler-file", str(address)], **quiet)

    def listen(at: str, n_done: int, _: int) -> None:
        if (at, n_done) == ("masks", 3):
            scheduler.kill()

    try:
        sabotage.hold(address)
        with pytest.raises(ClusterError):
            scene.run(scheduler=str(address), client=None, progress=listen)
    finally:
        for process in (worker, scheduler):
            process.kill()
            process.wait()
    found = scene.run()
    assert found.report.kept["masks"] >= 3
    check(scene, found, undisturbed(scene))


def test_a_chunk_of_the_image_that_is_missing_is_named_and_what_was_surveyed_kept(
    image_path: Path, folder: Path, undisturbed: Undisturbed
) -> None:
    scene = Scene(image_path, folder, False)
    scene.run_until("flows", 2)
    chunk = image_path / "0" / "c" / "6" / "0" / "0"
    content = chunk.read_bytes()
    chunk.write_bytes(b"")
    with pytest.raises(ImageError, match=r"chunk c/6/0/0 of .*image.ome.zarr/0 cannot be read .*cut short"):
        scene.run()
    chunk.write_bytes(content)
    found = scene.run()
    assert found.report.kept["flows"] >= 2
    check(scene, found, undisturbed(scene))


DAMAGED = {
    # File: stage and pieces of it to stop at, stage it belongs to, pieces that are computed again.
    "flows.zarr/*/*/c.3.*": ("masks", 0, "flows", 1),
    "flows.zarr/*/*/zarr.json": ("masks", 0, "flows", 0),
    "masks-*/labels.zarr/c.5.*": ("stitch", 0, "masks", 1),
    "masks-*/objects/6.npy": ("stitch", 0, "masks", 1),
    "masks-*/pairs/7.npy": ("stitch", 2 * N_FRAMES, "stitch", 2),
    "masks-*/ids/8.npy": ("publish", 0, "stitch", 1),
}
HOW: dict[str, Callable[[Path], object]] = {
    "empty": sabotage.cut,
    "half": functools.partial(sabotage.cut, share=0.5),
    "spoilt": sabotage.spoil,
    "missing": os.unlink,
}
CASES = [
    pytest.param(file, how, marks=[pytest.mark.slow] * (how in ("half", "spoilt") or file.endswith("zarr.json")))
    for file in DAMAGED
    for how in HOW
    # Only what is stored in chunks has checksums, and metadata that are missing are just written again.
    if (how != "spoilt" or "/c." in file) and (how != "missing" or not file.endswith("json"))
]


@pytest.mark.parametrize(("pattern", "how"), CASES)
def test_a_damaged_file_of_the_scratch_is_named_and_its_piece_computed_again(
    image_path: Path, folder: Path, undisturbed: Undisturbed, pattern: str, how: str
) -> None:
    until, n, stage, n_again = DAMAGED[pattern]
    scene = Scene(image_path, folder, stage != "flows")
    scene.run_until(until, n)
    n_pieces, store = undisturbed(scene).report.computed[stage], DiskStore(scene.scratch)
    marked = store.done("flows")
    file = scene.scratch_file(pattern)
    HOW[how](file)
    says = rf"{file.relative_to(scene.scratch)} of the scratch .* is damaged or missing .*; run the same command again"
    with pytest.raises(ScratchError, match=says):
        scene.run()
    n_marked = n_pieces - n_again
    if stage == "flows":
        # Masks are begun while flows are computed: not all of these are done.
        n_marked = len(store.done(stage))
        assert len(marked - store.done(stage)) == n_again
    found = scene.run()
    assert (found.report.kept[stage], found.report.computed[stage]) == (n_marked, n_pieces - n_marked)
    check(scene, found, undisturbed(scene))


def test_labels_that_are_damaged_before_their_pyramid_is_made_are_published_again(
    pictures: npt.NDArray[np.uint16], folder: Path
) -> None:
    scene = Scene(folder / "out.ome.zarr", folder, True)
    # Of so many rows level 2 is one file, and made from level 1 when two tasks have written it.
    rows = np.resize(pictures.reshape(-1, pictures.shape[-1]), (2100, pictures.shape[-1]))
    write_image(scene.image, rows, axes="yx", n_levels=3)
    scene.run_until("publish", 2)
    labels = scene.output / "labels" / "cells"
    expected = zarr.open_array(labels / "0", mode="r")[:]
    sabotage.cut(labels / "1" / "c" / "1" / "0")
    with pytest.raises(OutputError, match=rf"chunk c/1/0 of {labels}/1 is damaged .*; delete {labels}, then run"):
        scene.run()
    shutil.rmtree(labels)
    found = scene.run()
    assert found.report.computed["masks"] == found.report.computed["stitch"] == 0
    assert found.report.computed["publish"] == 3
    for level in range(3):
        shown = zarr.open_array(labels / str(level), mode="r")[:]
        assert np.array_equal(shown, expected[:: 2**level, :: 2**level])


def test_what_killed_writers_left_is_swept(image_path: Path, folder: Path, undisturbed: Undisturbed) -> None:
    scene = Scene(image_path, folder, True)
    scene.run_until("publish")
    for place in (scene.scratch / ".drafts", scene.output / "labels" / "cells" / "0" / ".drafts"):
        place.mkdir(exist_ok=True)
        (place / "0123.partial").write_bytes(b"torn")
    found = scene.run()
    assert sum(found.report.computed.values()) == 1
    check(scene, found, undisturbed(scene))


def test_a_store_that_stays_away_is_told_after_a_while(
    image_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Undisturbed
) -> None:
    scene = Scene(image_path, folder, True)
    monkeypatch.setattr("tiledseg.waiting.PATIENCE_S", 0.3)

    def listen(at: str, n_done: int, _: int) -> None:
        if (at, n_done) == ("masks", 4):
            image_path.rename(away)

    away, since = image_path.with_name("away"), time.monotonic()
    with pytest.raises(ImageError, match=r"cannot be reached: .*also after 0\.3 s; see that its disk or server"):
        scene.run(progress=listen)
    assert time.monotonic() - since < 60
    away.rename(image_path)
    found = scene.run()
    assert found.report.kept["masks"] >= 4
    check(scene, found, undisturbed(scene))
