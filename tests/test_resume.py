"""Nothing lost: commands are really killed, and what they had done is kept; other faults are in test_faults.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import tiledseg
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide
from tiledseg.store import DiskStore
from tiledseg.volumes import label_volume, render_volume

SETTINGS: dict[str, Any] = {"diameter": 12.0, "block": 128}
IN_3D: dict[str, Any] = {"diameter": 20.0, "block": 40, "do_3d": True}
STAGES = ["flows.journal", "masks-*/masks.journal", "masks-*/seams.journal", "masks-*/publish-levels-0.journal"]


@pytest.fixture(scope="module")
def image_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image, _ = synthetic_slide((760, 1000), diameter=12.0, seed=1)
    path = tmp_path_factory.mktemp("resume") / "slide.ome.zarr"
    write_image(path, image, axes="yx", chunk=128)
    return path


@pytest.fixture(scope="module")
def volume_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = render_volume(label_volume((36, 56, 60), spacing=20.0, seed=1), seed=1)
    path = tmp_path_factory.mktemp("resume") / "volume.ome.zarr"
    write_image(path, image, axes="zyx", spacing_um=(1.0, 1.0, 1.0), chunk=32)
    return path


def command(image: Path, output: Path, settings: dict[str, Any]) -> list[str]:
    given = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items()]
    flags = [flag if value is True else f"{flag}={value}" for flag, value in given]
    return [
        sys.executable,
        "-m",
        "tiledseg.cli",
        "segment",
        str(image),
        "-o",
        str(output),
        "--json",
        *flags,
    ]


def journal_lines(scratch: Path, pattern: str) -> int:
    return sum(path.read_text().count(".") for path in scratch.glob(pattern))


def run_until(journal: str, image: Path, output: Path, settings: dict[str, Any]) -> bool:
    """Start the command, kill it with its journal's first line; False if it ended before."""
    scratch = output.parent / f"{output.name}.cells.tiledseg"
    with subprocess.Popen(
        command(image, output, settings), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None:
            if journal_lines(scratch, journal) > 0:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.002)
        assert process.returncode == 0, process.stderr.read().decode()  # type: ignore[union-attr]
    return False


@pytest.mark.parametrize(
    ("name", "settings", "stages"),
    [
        pytest.param("image_path", SETTINGS, STAGES[:1], id="2d"),
        pytest.param("image_path", SETTINGS, STAGES, id="2d, in every stage", marks=pytest.mark.slow),
        pytest.param("volume_path", IN_3D, STAGES, id="3d, in every stage", marks=pytest.mark.slow),
    ],
)
def test_a_killed_command_goes_on_where_it_was(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, settings: dict[str, Any], stages: list[str]
) -> None:
    image, output = request.getfixturevalue(name), tmp_path / "out.ome.zarr"
    killed = [journal for journal in stages if run_until(journal, image, output, settings)]
    assert "flows.journal" in killed
    assert not (output / "labels" / "zarr.json").exists() or len(killed) < len(stages)
    ended = subprocess.run(command(image, output, settings), capture_output=True, check=True)
    report = json.loads(ended.stdout)
    assert report["kept"]["flows"] > 0
    reference = tiledseg.segment(image, tmp_path / "reference.ome.zarr", **settings)
    labels = zarr.open_array(output / "labels" / "cells" / "0", mode="r")[:]
    assert np.array_equal(labels, reference.labels.compute())
    for stage, kept in report["kept"].items():
        total = reference.report.computed[stage] if stage not in ("publish",) else None
        assert total is None or kept + report["computed"][stage] == total, stage


def test_a_torn_line_of_a_journal_is_not_counted(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.mark("flows", [3, 141])
    with (tmp_path / "flows.journal").open("a") as journal:
        journal.write("\n5")
    assert store.done("flows") == {3, 141}
    store.mark("flows", [59])
    assert store.done("flows") == {3, 141, 59}


def test_documents_are_there_completely_or_not_at_all(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    assert store.read_json("a/b.json") is None
    store.write_json("a/b.json", {"x": 1})
    (tmp_path / "a" / "b.json.1.partial").write_text('{"x"')
    assert store.read_json("a/b.json") == {"x": 1}
    store.remove("a/b")
    assert store.read_json("a/b.json") is None


@pytest.mark.parametrize("name", ["", ".", "..", "../beside", "a/../../beside"])
def test_nothing_outside_the_scratch_is_ever_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / "beside").mkdir()
    store = DiskStore(tmp_path / "scratch")
    store.write_json("run.json", {})
    with pytest.raises(ValueError, match="names nothing inside the scratch"):
        store.remove(name)
    store.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["beside"]
