"""The benchmarks at toy size: they run to their end, and say so when a target is missed."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import one another as they do when started by name."""
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def _torch_threads() -> Iterator[None]:
    """The masks benchmark sets torch's threads, as it sets ours."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def script(name: str) -> Any:
    return importlib.import_module(name)


def run(name: str, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code of a benchmark at toy size and what it saved."""
    code = script(name).main(["--toy", "--save", str(tmp_path / "saved.json"), *arguments])
    return code, json.loads((tmp_path / "saved.json").read_text())


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "needs_size", "toy", "code"),
    [
        (31.0, 30.0, True, True, False, 0),
        (29.0, 30.0, True, True, False, 1),
        (29.0, 30.0, True, True, True, 0),
        (1.0, 0.0, False, False, True, 1),
        (0.0, 0.0, False, False, True, 0),
        (float("nan"), 1.5, False, True, False, 1),
    ],
)
def test_a_missed_target_is_exit_code_1(
    value: float,
    limit: float,
    at_least: bool,
    needs_size: bool,
    toy: bool,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = script("report")
    target = report.Target("figure", value, limit, at_least, needs_size)
    assert report.finish([target], [], toy=toy) == code
    assert ("MISSED" in capsys.readouterr().out) == bool(code)


def test_memory_is_watched_process_by_process(tmp_path: Path) -> None:
    process = script("process")
    child = "import time; kept = bytearray(300 << 20); time.sleep(0.5)"
    parent = f"import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', {child!r}])"
    measured = process.run_measured([sys.executable, "-c", parent], tmp_path, cores=1)
    assert (measured.code, measured.log.strip()) == (0, "begun")
    assert measured.child_peaks[0] > 300 << 20 > measured.root_peak > 0
    assert measured.total_peak >= measured.together_peak > 300 << 20
    assert measured.seconds > 0.5


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    process = script("process")
    measured = process.run_measured(
        [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, cores=1, timeout_s=1
    )
    assert measured.code == 124
    assert measured.seconds < 30


def test_slides_are_written_piece_by_piece(tmp_path: Path) -> None:
    images = script("images")
    whole, _ = synthetic_slide((300, 200), diameter=images.DIAMETER)
    write_image(tmp_path / "lazy.ome.zarr", images.LazySlide((300, 200)), axes="yx", chunk=128)
    assert np.array_equal(zarr.open_array(tmp_path / "lazy.ome.zarr" / "0", mode="r")[:], whole)
    write_image(tmp_path / "long.ome.zarr", images.RepeatedSlide(whole, (700, 450)), axes="yx", chunk=128)
    repeated = zarr.open_array(tmp_path / "long.ome.zarr" / "0", mode="r")[:]
    assert np.array_equal(repeated, np.tile(whole, (3, 3))[:700, :450])


@pytest.mark.usefixtures("_torch_threads")
def test_masks(tmp_path: Path) -> None:
    pytest.importorskip("cellpose.dynamics")
    code, saved = run("masks", tmp_path, "--only", "synthetic", "--threads", "1")
    (row,) = saved["rows"]
    assert code == 0
    assert row["ratio"] == row["Cellpose s"] / row["tiledseg s"]
    assert row["AP tiledseg"][2] >= row["AP Cellpose"][2] > 0.9
    assert {target["limit"] for target in saved["targets"]} == {30.0, row["AP Cellpose"][2]}


@pytest.mark.slow
@pytest.mark.usefixtures("_torch_threads")
def test_volume(tmp_path: Path) -> None:
    pytest.importorskip("cellpose.dynamics")
    code, saved = run("volume", tmp_path, "--threads", "1")
    row, *tiles = saved["rows"]
    assert code == 0
    assert row["ratio"] == row["Cellpose s"] / row["tiledseg s"]
    assert row["AP tiledseg"][2] >= row["AP Cellpose"][2] > 0.9
    assert tiles[-1]["ratio"] <= 0.45


@pytest.mark.slow
def test_volume_in_blocks(tmp_path: Path) -> None:
    code, saved = run("volume_blocks", tmp_path, "--blocks", "70")
    whole, parts = saved["rows"]
    assert code == 0
    assert (whole["blocks"], parts["blocks"]) == (1, 8)
    assert whole["objects"] == parts["objects"] > 20
    assert parts["differ"] == parts["unlike"] == parts["cut"] == 0


def test_masks_on_a_real_image(data: Path) -> None:
    masks, images = script("masks"), script("images")
    assert (data / "mosaic_fluo").is_dir()
    example = images.mosaic(300)
    unit_flows, cellprob, niter = masks.network_flows(example)
    assert niter == round(200 * images.MOSAIC_DIAMETER / 17)
    labels = masks.our_masks(2)(unit_flows, cellprob, niter)
    assert labels.shape == example.truth.shape
    assert labels.max() > 0.7 * np.unique(example.truth).size


@pytest.mark.slow
def test_peers_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, saved = run("peers", tmp_path, "--images", "synthetic", "--cellpose-python", str(shutil.which("false")))
    assert code == 0
    ours, halved, untiled, contrib, patchworks = saved["rows"]
    for row in (ours, halved):
        assert row["AP"][0] > 0.9
        assert row["cut"] == 0
    assert ours["n at seams"] > 10
    assert ours["GiB"] >= ours["GiB at once"] > 0.1
    for row in (untiled, contrib):
        assert row["note"] == "failed (1): it printed nothing"
    assert patchworks["note"] == "no environment given"
    assert "no environment given" in capsys.readouterr().out


@pytest.mark.slow
def test_whole(tmp_path: Path) -> None:
    code, saved = run("whole", tmp_path, "--size", "400", "--beside", "0")
    (row,) = saved["rows"]
    assert code == 0
    assert row["tiles"] == 4
    assert row["ratio"] == row["whole s"] / row["network s"]
    assert row["objects"] > 50


@pytest.mark.slow
@pytest.mark.usefixtures("_torch_threads")
def test_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: with one narrow layer of cpsam, and nothing that is judged but the outputs."""
    from cellpose import vit

    monkeypatch.setattr(vit, "sam_model_registry", vit.sam_model_registry)  # the script changes it
    code, saved = run("gpu", tmp_path, "--device", "cpu", "--size", "200")
    rates, runs = saved["rows"][:8], saved["rows"][8:]
    assert code == 0
    assert [row["network"] for row in rates] == ["cpsam"] * 4 + ["unet"] * 4
    assert rates[0]["x Cellpose"] == 1
    assert all(row["tiles/s"] > 0 and row["of matrices"] > 0 for row in rates)
    nuclei, cpsam, contrib = runs
    assert nuclei["note"] != cpsam["note"] == "0 objects"
    assert 0 < cpsam["busy"] <= 1
    assert contrib["note"] == "no environment given"
    assert [target["is_met"] for target in saved["targets"]] == [True, True]


@pytest.mark.slow
def test_scale(tmp_path: Path) -> None:
    code, saved = run("scale", tmp_path, "--max", "512")
    (row,) = saved["rows"]
    assert code == 0
    assert (row["blocks"], row["objects"] > 0) == (4, True)
    assert row["worker MiB"] > 100
    assert row["client MiB"] > 100


def test_tasks(tmp_path: Path) -> None:
    code, saved = run("tasks", tmp_path, "--tasks", "50")
    (row,) = saved["rows"]
    assert code == 0
    assert row["tasks"] == 50
    assert 20 < row["scheduler MiB"] < 1000
    assert 20 < row["client MiB"] < 1000


def test_scale_judges_the_largest_beside_the_smallest() -> None:
    scale = script("scale")
    first = {"size": "4096²", "worker MiB": 900.0, "client MiB": 800.0, "foreseen MiB": 1100.0, "objects": 10}
    for worker, client, n_missed in ((980.0, 990.0, 0), (1000.0, 990.0, 1), (1000.0, 1001.0, 2), (1101.0, 1001.0, 3)):
        last = {**first, "size": "8192²", "worker MiB": worker, "client MiB": client, "objects": 40}
        assert sum(not target.is_met for target in scale.targets_of([first, last])) == n_missed


@pytest.mark.slow
def test_convert(tmp_path: Path) -> None:
    code, saved = run("convert", tmp_path)
    assert code == 0
    assert [row["image"] for row in saved["rows"]] == ["svs", "tif"]
    for row in saved["rows"]:
        assert row["differ"] == 0
        assert row["speed"] == row["copy s"] / row["convert s"]
        assert 0.05 < row["GiB"] <= row["sum GiB"]


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script("files").main(["--folder", str(tmp_path), "--blocks", "1"])
    said = capsys.readouterr().out
    assert [line.split("  ")[0] for line in said.splitlines()[1:4]] == ["block of 25 chunks", "small array", "mark"]
    assert list(tmp_path.iterdir()) == []


def test_edges(tmp_path: Path) -> None:
    code, saved = run("edges", tmp_path)
    assert code == 0
    by_share = {(row["block"], row["cut"]): row for row in saved["rows"]}
    assert by_share[256, 1.0]["found"] == by_share[256, 1.0]["lines"] == 6
    assert by_share[256, 0.0]["found"] == 0
    assert {row["elsewhere"] for row in saved["rows"]} == {0}
