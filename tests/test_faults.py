"""Nothing lost: every fault is really produced in the midst of a run, which then gives the same bits.

Recomputed are at most the pieces that were in flight.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tiledseg
from tiledseg.errors import TiledsegError
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide

from . import sabotage
from .sabotage import Deed, Saboteur

N_FRAMES = 8
SHAPE = (96, 180)
SETTINGS: dict[str, Any] = {"diameter": 8.0, "block": 100}
WINDOW = 6
"""Pieces in flight: three for each thread of two workers."""


def above(pixels: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Connected parts above a threshold."""
    from scipy.ndimage import gaussian_filter, label

    labels: npt.NDArray[np.int32] = label(gaussian_filter(pixels.astype(float), 1) > 700)[0]
    return labels


@dataclass(frozen=True)
class Scene:
    """A series of pictures on disk, and a place for what is made of it."""

    image: Path
    folder: Path
    by_function: bool

    @property
    def output(self) -> Path:
        return self.folder / "out.ome.zarr"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch" / "out.ome.zarr.cells.tiledseg"

    @property
    def log(self) -> Path:
        return self.folder / "begun.txt"

    @property
    def settings(self) -> dict[str, Any]:
        return {**SETTINGS, "segmenter": above} if self.by_function else SETTINGS

    def run(self, **where: Any) -> tiledseg.Segmentation:
        """Segment, or go on with it."""
        return tiledseg.segment(self.image, self.output, scratch=self.folder / "scratch", **where, **self.settings)

    def scratch_file(self, pattern: str) -> Path:
        """The first file of the scratch of such a name that holds something."""
        return next(path for path in sorted(self.scratch.glob(pattern)) if path.stat().st_size)


@pytest.fixture(scope="module")
def pictures() -> npt.NDArray[np.uint16]:
    image, _ = synthetic_slide((N_FRAMES * SHAPE[0], SHAPE[1]), diameter=8.0, seed=1)
    return image.reshape(N_FRAMES, *SHAPE)


@pytest.fixture(scope="module")
def undisturbed(pictures: npt.NDArray[np.uint16]) -> Callable[[bool], tiledseg.Segmentation]:
    """The same by the network or the function, in this process and with nothing written."""

    @functools.cache
    def run(by_function: bool) -> tiledseg.Segmentation:
        how = {"segmenter": above} if by_function else {}
        found = tiledseg.segment(pictures, axes="tyx", **SETTINGS, **how)
        assert found.report.n_objects > 100
        return found

    return run


@pytest.fixture
def image_path(pictures: npt.NDArray[np.uint16], tmp_path: Path) -> Path:
    path = tmp_path / "series" / "image.ome.zarr"
    write_image(path, pictures, axes="tyx", chunk=128)
    return path


def check(scene: Scene, found: tiledseg.Segmentation, expected: tiledseg.Segmentation) -> None:
    """The same bits, the same table, nothing left over, and no piece begun again but those in flight."""
    assert np.array_equal(found.labels.compute(), expected.labels.compute())
    assert found.table.equals(expected.table)
    assert list(scene.folder.rglob("*.partial")) == []
    n_begun = sabotage.begun(scene.log)
    for stage, n_pieces in expected.report.computed.items():
        assert found.report.kept[stage] + found.report.computed[stage] == n_pieces, stage
        n_tasks = n_pieces - (stage == "stitch")  # the merge is not counted
        assert stage == "survey" or n_tasks <= n_begun[stage] <= n_tasks + WINDOW, stage


def nothing(_: Scene) -> None:
    """The cause is gone by itself."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in the midst of a run."""

    name: str
    task: str
    deed: Callable[[Scene], Deed]
    says: str = ""
    """What the run ends with; nothing if it goes on by itself."""
    mend: Callable[[Scene], object] = nothing
    """How the cause is removed."""
    after: bool = False
    """Whether it happens once the task has stored its result."""
    number: int = 3
    """Of the task."""


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


def chunk_of(scene: Scene) -> Path:
    """A chunk of the image that is read late."""
    return scene.image / "0" / "c" / str(N_FRAMES - 1) / "0" / "0"


def spoilt(scene: Scene) -> Deed:
    (scene.folder / "kept").write_bytes(chunk_of(scene).read_bytes())
    return functools.partial(sabotage.spoil, chunk_of(scene))


def restored(scene: Scene) -> None:
    chunk_of(scene).write_bytes((scene.folder / "kept").read_bytes())


FAULTS = [
    Fault("worker killed in flows", "flows", killed),
    Fault("worker killed in a forward pass", "forward pass", killed),
    Fault("worker killed in masks", "masks", killed),
    Fault("worker killed with results stored and not yet marked", "masks", killed, after=True),
    Fault("worker killed in stitch", "stitch", killed),
    Fault("worker killed in publish", "publish", killed, number=1),
    Fault("worker frozen", "masks", frozen),
    Fault("image gone for a while", "flows", gone("image")),
    Fault("scratch gone for a while", "masks", gone("scratch")),
    Fault("output gone for a while", "publish", gone("output"), number=1),
    Fault("image chunk spoilt", "flows", spoilt, r"chunk c/7/0/0 of .*image.ome.zarr/0 cannot be read", restored),
]
BY_NETWORK = {"flows", "forward pass"}


@pytest.fixture
def sabotaged(client: Any) -> Iterator[Callable[..., None]]:
    """Has workers do a deed; afterwards they are as before."""
    names = []

    def begin(*args: Any, **how: Any) -> None:
        client.register_plugin(Saboteur(*args, **how))
        names.append(Saboteur.name)

    yield begin
    client.wait_for_workers(2, timeout=60)
    for name in names:
        client.unregister_worker_plugin(name)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_nothing_is_lost(
    fault: Fault,
    image_path: Path,
    tmp_path: Path,
    client: Any,
    sabotaged: Callable[..., None],
    undisturbed: Callable[[bool], tiledseg.Segmentation],
) -> None:
    by_function = fault.task not in BY_NETWORK
    scene = Scene(image_path, tmp_path, by_function)
    sabotaged(scene.log, fault.task, fault.deed(scene), number=fault.number, after=fault.after)
    if fault.says:
        with pytest.raises(TiledsegError, match=fault.says):
            scene.run(client=client)
        fault.mend(scene)
    found = scene.run(client=client)
    assert scene.log.with_suffix(".done").exists()
    check(scene, found, undisturbed(by_function))
