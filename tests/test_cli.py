"""The command line: every kind of bad input is one sentence and exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from tiledseg import clients
from tiledseg.bars import Bars
from tiledseg.cli import main
from tiledseg.omezarr import write_image

from .conftest import Slide


@pytest.fixture
def image_path(slide: Slide, tmp_path: Path) -> Path:
    path = tmp_path / "slide.ome.zarr"
    write_image(path, slide[0], axes="yx", spacing_um=(0.5, 0.5), chunk=256)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; its one sentence."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("tiledseg:")]
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].endswith(".")
    return lines[0]


def test_missing_and_wrong_inputs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    np_arrays = {
        "complex": np.zeros((9, 9), complex),
        "bool": np.zeros((9, 9), bool),
        "empty": np.zeros((0, 9)),
    }
    for name, array in np_arrays.items():
        zarr.create_array(tmp_path / f"{name}.zarr", shape=array.shape, dtype=array.dtype, chunks=(9, 9))
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out.zarr"
    assert "nowhere" in refused(capsys, "segment", tmp_path / "nowhere.zarr", "-o", out)
    assert "folder" in refused(capsys, "segment", tmp_path / "folder", "-o", out)
    assert "text.txt" in refused(capsys, "segment", tmp_path / "text.txt", "-o", out)
    assert "complex" in refused(capsys, "segment", tmp_path / "complex.zarr", "-o", out)
    assert "bool" in refused(capsys, "segment", tmp_path / "bool.zarr", "-o", out)
    assert "empty" in refused(capsys, "segment", tmp_path / "empty.zarr", "-o", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_settings(
    capsys: pytest.CaptureFixture[str], image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "CONNECT_TIMEOUT", "1s")
    before = sorted(tmp_path.rglob("*"))

    def text(*flags: object) -> str:
        return refused(capsys, "segment", image_path, *flags)

    assert "channel" in text("--channel", "GFP")
    for diameter in ("0", "-5", "wide", "nan"):
        assert "diameter" in text(f"--diameter={diameter}")
    assert "scale the image" in text("--diameter", "100000")
    assert "unknown model 'cyto9'; known are tiledseg-nuclei" in text("--model", "cyto9")
    assert "smaller than the halo" in text("--block", "50", "--halo", "60")
    assert "no GPU" in text("--device", "cuda")
    assert "no Dask scheduler answers at 127.0.0.1:1 " in text("--scheduler", "127.0.0.1:1")
    assert "scheduler file nowhere.json does not exist" in text("--scheduler", "nowhere.json")
    assert "workers must be at least 1" in text("--workers", "0")
    assert "name" in text("--name", "a/b")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tiff_needs_an_output(capsys: pytest.CaptureFixture[str], slide: Slide, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "slide.tif", slide[0], tile=(128, 128))
    assert "-o" in refused(capsys, "segment", tmp_path / "slide.tif")


def test_an_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str], image_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(capsys, "segment", image_path, "-o", tmp_path / "file" / "out.zarr", "--diameter", "24")
    assert not (tmp_path / "file.cells.tiledseg").exists()


def test_labels_of_that_name_exist(capsys: pytest.CaptureFixture[str], image_path: Path, slide: Slide) -> None:
    write_image(image_path / "labels" / "cells", slide[1], axes="yx")
    assert "choose another --name" in refused(capsys, "segment", image_path, "--diameter", "24")
    assert np.array_equal(zarr.open_array(image_path / "labels" / "cells" / "0", mode="r")[:], slide[1])


IN_SMALL_FILES = """
import resource, sys
from tiledseg.cli import main

if main([*sys.argv[1:], "--name", "compiled"]) != 0:  # compiled functions are kept in files that the limit would stop
    sys.exit(99)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_300_000, 1_300_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_said_and_nothing_is_lost(image_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands for a full disk: the write fails in the middle of the run."""
    arguments = ["segment", str(image_path), "--diameter", "24", "--block", "256"]
    full = subprocess.run([sys.executable, "-c", IN_SMALL_FILES, *arguments], capture_output=True, text=True)
    assert full.returncode == 2, full.stderr
    assert "run the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"]["survey"] > 0


def test_segment_compare_and_info(capsys: pytest.CaptureFixture[str], image_path: Path, slide: Slide) -> None:
    truth = image_path.parent / "truth.tif"
    tifffile.imwrite(truth, slide[1])
    assert main(["info", str(image_path)]) == 0
    text = capsys.readouterr().out
    assert "axes         yx, shape (700, 610), uint16" in text
    assert "0.5 x 0.5 µm" in text

    assert main(["segment", str(image_path), "--diameter", "24", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not (image_path / "labels").exists()

    assert main(["segment", str(image_path), "--diameter", "12um", "--block", "256", "--workers", "1"]) == 0
    captured = capsys.readouterr()
    for word in (
        "objects",
        "diameter     24.00 px, as given",
        "blocks       9",
        "cut by halo  0",
        "peak memory",
        "seconds",
    ):
        assert word in captured.out
    for stage in ("survey", "flows", "masks", "stitch", "publish"):
        assert stage in captured.err

    assert main(["compare", str(image_path), str(truth), "--seams", "256", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["overall"]["ap"][0] > 0.9
    assert found["n_cut"] == 0
    assert planned["n_tiles"] > 0

    assert main(["compare", str(image_path), str(truth), "--exact"]) == 1
    assert "pixels differ" in capsys.readouterr().out
    assert main(["compare", str(truth), str(truth), "--exact"]) == 0
    assert "bit-identical" in capsys.readouterr().out


def test_diameter(capsys: pytest.CaptureFixture[str], image_path: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["diameter", str(image_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["value"] == pytest.approx(24, rel=0.1)
    assert sorted(tmp_path.rglob("*")) == before


def test_help_lists_every_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "tiledseg.cli", "--help"], capture_output=True, text=True, check=True)
    for command in ("segment", "info", "diameter", "compare", "demo"):
        assert command in shown.stdout


WITH_A_LAST_WORD = """
import atexit, sys
from tiledseg.cli import command_line

atexit.register(print, "last word")
sys.argv[1:] = {arguments}
command_line()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["models"], 0, "tiledseg-nuclei"),
        (["info", "nowhere.zarr"], 2, ""),
        (["segment"], 2, ""),
        (["--help"], 0, "usage"),
    ],
)
def test_the_command_ends_with_its_code_when_all_is_said(arguments: list[str], code: int, shown: str) -> None:
    script = WITH_A_LAST_WORD.format(arguments=arguments)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == code
    assert shown in ended.stdout
    assert ended.stdout.endswith("last word\n")
    assert (ended.stderr == "") == (code == 0)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "tiledseg.cli", "info", str(tmp_path / "nowhere"), "--debug"]
    shown = subprocess.run(arguments, capture_output=True, text=True, env=os.environ)
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr


def test_stages_at_work_at_once_have_a_bar_each(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    for stage, done in (("survey", 1), ("flows", 1), ("masks", 1), ("flows", 2), ("masks", 2), ("stitch", 0)):
        bars(stage, done, 1 if stage == "survey" else 2)
        shown = list(bars._bars)
        if stage == "masks" and done == 1:
            assert shown == ["flows", "masks"]
    assert shown == ["stitch"]
    bars.close()
    said = capsys.readouterr().err
    assert all(f"{stage:>8}: 100%" in said for stage in ("survey", "flows", "masks"))


def test_a_stage_that_begins_anew_with_more_pieces_shows_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    for done, total in ((0, 4), (4, 4), (0, 9), (9, 9)):
        bars("diameter", done, total)
    bars.close()
    said = capsys.readouterr().err
    assert said.rstrip().rpartition("\r")[2].startswith("diameter: 100%")
    assert "| 9/9 [" in said
