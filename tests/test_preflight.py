"""What a run needs is told before it starts, and one that cannot fit is refused with its numbers."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr

import tiledseg
from tiledseg import cluster, preflight
from tiledseg.cli import main
from tiledseg.cluster import Crew
from tiledseg.config import Settings
from tiledseg.errors import OutputError, SettingsError
from tiledseg.images import open_image
from tiledseg.inputs import Input
from tiledseg.networks.models import find_model
from tiledseg.omezarr import write_image
from tiledseg.pipeline import preview
from tiledseg.preflight import MIB, Needs, Preflight
from tiledseg.runs import place_of
from tiledseg.segmenters import Segmenter
from tiledseg.slides import synthetic_slide

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


def large(path: Path, shape: tuple[int, ...] = (100_000, 80_000), chunks: tuple[int, ...] = (1024, 1024)) -> Path:
    """An image of which nothing but the metadata is written."""
    zarr.create_array(path, shape=shape, chunks=chunks, dtype="uint16", dimension_names=list("cyx"[-len(shape) :]))
    return path


def huge_volume(path: Path) -> Path:
    """The metadata of 4096 planes of 4096 x 4096 pixels."""
    zarr.create_array(path, shape=(4096,) * 3, chunks=(128,) * 3, dtype="uint16", dimension_names=list("zyx"))
    return path


def flight(path: Path, crew: Crew, labeller: Any = None, **settings: Any) -> Preflight:
    image, chosen = open_image(path), Settings.of(**settings)
    place = place_of(image, path.parent / "out.zarr", None, chosen)
    labeller = labeller or find_model(chosen.flows.model)
    n_inputs = image.n_channels if getattr(labeller, "takes_all_channels", False) else 1
    inputs = tuple(Input((i,)) for i in range(n_inputs))
    return Preflight(image, inputs, chosen, labeller, place, crew)


def test_counts_are_those_of_a_hand(tmp_path: Path) -> None:
    needs = flight(large(tmp_path / "a.zarr"), Crew(4, 2), diameter=34).needs(34.0)
    assert needs.halo == 68
    assert needs.n_blocks == 49 * 40
    assert needs.working_shape == (50_000, 40_000)
    n_tiles = -(-(50_000 + 16 - 224) // 200) + 1, -(-(40_000 + 16 - 224) // 200) + 1
    assert n_tiles == (250, 200)
    assert needs.n_tiles == 250 * 200
    flows = 2 * 3 * 63 * 50 * (3 * 200 + 224) ** 2
    labels = 4 * 49 * 40 * (2048 + 2 * 68) ** 2
    assert flows < needs.scratch_bytes - labels // 10 < 1.2 * flows
    assert flows + labels < needs.scratch_bytes_max < 1.05 * (flows + labels)
    assert needs.output_bytes > 0.1 * 4 * 100_000 * 80_000 * (1 + 1 / 4 + 1 / 16)
    assert needs.memory_bytes == preflight.PROCESS_BYTES + 4 * needs.worker_bytes
    assert needs.worker_bytes == needs.process_bytes + 2 * max(needs.task_bytes.values())


def test_counts_of_a_volume_are_those_of_a_hand(tmp_path: Path) -> None:
    path = huge_volume(tmp_path / "a.zarr")
    needs = flight(path, Crew(1, 1), do_3d=True, anisotropy=2.0).needs(34.0)
    assert needs.halo == 68
    assert needs.n_blocks == 16**3
    assert needs.working_shape == (4096, 2048, 2048)
    along = -(-(2048 + 16 - 224) // 200) + 1
    across = -(-(4096 + 16 - 224) // 200) + 1
    assert needs.n_tiles == 4096 * along**2 + 2 * 2048 * across * along
    assert needs.n_pixels == (4096 + 2 * 34 * 15) * (4096 + 2 * 68 * 15) ** 2
    flows = 2 * 3 * needs.n_tiles * 200**2
    assert flows < needs.scratch_bytes < 2 * flows
    by_planes = flight(path, Crew(1, 1), stitch_threshold=0.25).needs(34.0)
    assert by_planes.working_shape == (2048, 2048)
    assert by_planes.n_tiles == 4096 * along**2
    assert by_planes.n_blocks == 128 * 4**2


def test_memory_of_a_volume_is_that_of_a_block(tmp_path: Path) -> None:
    crew = Crew(1, 1)
    path = huge_volume(tmp_path / "a.zarr")
    small = tmp_path / "b.zarr"
    zarr.create_array(small, shape=(1200,) * 3, chunks=(128,) * 3, dtype="uint16", dimension_names=list("zyx"))
    tasks = [flight(volume, crew, do_3d=True).needs(17.0).task_bytes for volume in (small, path)]
    assert {**tasks[0], "stitch": 0} == {**tasks[1], "stitch": 0}
    assert max(tasks[1].values()) < 5 * GIB
    assert tasks[1]["flows"] < GIB / 2
    halved = flight(path, crew, do_3d=True, block=128).needs(17.0).task_bytes
    assert halved["masks"] < tasks[1]["masks"] / 2


def test_blocks_left_to_us_fit_the_machine_and_hold_the_halo(tmp_path: Path) -> None:
    path = huge_volume(tmp_path / "a.zarr")
    sides = []
    for machine in (64 * GIB, 6 * GIB, 4 * GIB):
        settled = flight(path, Crew(1, 1, machine_bytes=machine, in_process=True), do_3d=True).settled(17.0)
        sides.append(settled.settings.masks.block)
        assert settled.needs(17.0).memory_bytes <= machine
    assert sides[0] == 256
    assert 256 >= sides[0] > sides[-1] >= 64
    wide = flight(path, Crew(1, 1), do_3d=True).settled(200.0).settings.masks.block
    assert wide == 400
    given = flight(path, Crew(1, 1, machine_bytes=GIB), do_3d=True, block=200).settled(17.0)
    assert given.settings.masks.block == 200


def test_the_time_of_a_run_is_foretold_from_a_measured_rate(tmp_path: Path) -> None:
    plans = []
    for side in (20_000, 40_000):
        path = large(tmp_path / f"{side}.zarr", (side, side))
        plans.append(preview(path, tmp_path / "out.zarr", diameter=17.0, measure=True))
    assert plans[0]["seconds"].keys() == {"flows", "masks"}
    for stage, seconds in plans[0]["seconds"].items():
        assert 2 < plans[1]["seconds"][stage] / seconds < 8
    assert 0.001 < plans[0]["seconds"]["flows"] / plans[0]["n_tiles"] < 1
    assert preview(path, tmp_path / "out.zarr", diameter=17.0)["seconds"] == {}


def test_memory_grows_with_the_block_and_not_with_the_image(tmp_path: Path) -> None:
    small, wide = (large(tmp_path / f"{n}.zarr", (n, n)) for n in (10_000, 100_000))
    crew = Crew(1, 2)
    tasks = [flight(path, crew).needs(30.0).task_bytes for path in (small, wide)]
    assert {**tasks[0], "stitch": 0} == {**tasks[1], "stitch": 0}
    blocks = [flight(wide, crew, block=block).needs(30.0).task_bytes["masks"] for block in (1024, 2048, 4096)]
    assert blocks[0] < blocks[1] < blocks[2] < 4 * blocks[1]


def test_chunks_are_read_whole(tmp_path: Path) -> None:
    shape = (20_000, 20_000)
    fine = flight(large(tmp_path / "fine.zarr", shape), Crew(1, 1)).needs(30.0).task_bytes
    coarse = flight(large(tmp_path / "coarse.zarr", shape, shape), Crew(1, 1)).needs(30.0).task_bytes
    whole = 2 * 20_000 * 20_000
    for stage in ("survey", "flows", "publish"):
        assert fine[stage] < whole < 2 * whole < coarse[stage]
    assert fine["masks"] == coarse["masks"]
    tifffile.imwrite(tmp_path / "strip.tif", np.zeros((3000, 3000), np.uint16), rowsperstrip=3000)
    strip = flight(tmp_path / "strip.tif", Crew(1, 1)).needs(30.0).task_bytes
    tifffile.imwrite(tmp_path / "tiles.tif", np.zeros((3000, 3000), np.uint16), tile=(256, 256))
    assert strip["flows"] - flight(tmp_path / "tiles.tif", Crew(1, 1)).needs(30.0).task_bytes["flows"] > 15 * MIB


def test_a_large_network_counts_with_its_weights_and_its_forward_pass(tmp_path: Path) -> None:
    small = find_model("tiledseg-nuclei")
    weights = tmp_path / "cpsam"
    with weights.open("wb") as file:
        file.truncate(GIB)
    transformer = dataclasses.replace(small, path=weights, architecture="cpsam", tile=256, stride=208)
    wider = dataclasses.replace(transformer, architecture="cpdino", tile=384, stride=320)
    path = large(tmp_path / "a.zarr")
    needs = [flight(path, Crew(1, 1), model, diameter=30).needs(30.0) for model in (small, transformer, wider)]
    more = needs[1].process_bytes - needs[0].process_bytes
    assert 2 * GIB < more < 3 * GIB
    flows = [need.task_bytes["flows"] for need in needs]
    assert flows[0] < flows[1] - 30 * 2**20 < flows[2] - 100 * 2**20


def test_a_function_needs_no_network(tmp_path: Path) -> None:
    path = large(tmp_path / "a.zarr", (3, 9000, 9000), (1, 1024, 1024))
    one, all_channels = (
        flight(path, Crew(1, 1), Segmenter.of(len, takes_all), halo=50).needs(None) for takes_all in (False, True)
    )
    assert (one.n_tiles, one.working_shape, one.halo, one.n_blocks) == (0, (), 50, 25)
    assert set(one.task_bytes) == {"masks", "stitch", "publish"}
    assert all_channels.task_bytes["masks"] > one.task_bytes["masks"]


RUN = """
import json, sys, tiledseg
if __name__ == "__main__":
    image, output, workers, block, settings = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
    plan = tiledseg.pipeline.preview(image, output, workers=workers, block=block, **settings)
    found = tiledseg.segment(image, output, workers=workers, block=block, **settings)
    print(json.dumps([plan, found.report.as_dict()]))
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image, _ = synthetic_slide((1100, 1000), diameter=12.0, seed=1)
    path = tmp_path_factory.mktemp("dense") / "slide.ome.zarr"
    write_image(path, image, axes="yx", chunk=256)
    return path


@pytest.fixture(scope="module")
def coloured(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense slide as three channels that differ."""
    picture = np.asarray(open_image(dense).read(0, np.s_[:, :]))
    path = tmp_path_factory.mktemp("coloured") / "slide.ome.zarr"
    write_image(path, np.stack([picture, picture[::-1], 60000 - picture]), axes="cyx", chunk=256)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    image, _ = synthetic_slide((300, 320), diameter=12.0, seed=1)
    write_image(tmp_path / "in" / "small.ome.zarr", image, axes="yx", chunk=256)
    return tmp_path / "in" / "small.ome.zarr"


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("slide_name", "workers", "block", "settings"),
    [
        ("dense", None, 1024, {"diameter": 12.0}),
        pytest.param("dense", 2, 512, {"diameter": 12.0, "resample": False}, marks=pytest.mark.slow),
        pytest.param(
            "coloured",
            None,
            1024,
            {"diameter": 12.0, "stain": "hematoxylin", "normalize": "local"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["here", "two", "colours"],
)
def test_what_is_measured_is_at_most_what_was_projected(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    slide_name: str,
    workers: int | None,
    block: int,
    settings: dict[str, Any],
) -> None:
    (tmp_path / "run.py").write_text("import tiledseg.pipeline\n" + RUN)
    arguments = [
        str(request.getfixturevalue(slide_name)),
        str(tmp_path / "out.zarr"),
        *map(json.dumps, (workers, block, settings)),
    ]
    ended = subprocess.run([sys.executable, tmp_path / "run.py", *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    plan, report = json.loads(ended.stdout)
    assert plan["refused"] is None
    assert plan["n_blocks"] == report["n_blocks"]
    assert report["peak_memory"] <= plan["memory_bytes"] <= 2.5 * report["peak_memory"]
    assert plan["n_workers"] == (workers or 1)
    assert plan["n_tiles"] == report["n_tiles"] + report["n_skipped_tiles"]
    scratch = tmp_path / "out.zarr.cells.tiledseg"
    assert folder_bytes(scratch) <= plan["scratch_bytes"] <= 4 * folder_bytes(scratch)
    assert folder_bytes(tmp_path / "out.zarr") <= plan["output_bytes"]


def test_the_diameter_is_assumed_then_known(small: Path, tmp_path: Path) -> None:
    plan = preview(small, tmp_path / "out.zarr")
    assert (plan["diameter"], plan["diameter_source"], plan["halo"]) == (17.0, "assumed", 34)
    found = tiledseg.segment(small, tmp_path / "out.zarr").report
    assert found.diameter is not None
    plan = preview(small, tmp_path / "out.zarr")
    assert (plan["diameter"], plan["diameter_source"]) == (found.diameter.value, "estimated")
    assert plan["n_tiles"] == found.n_tiles + found.n_skipped_tiles
    plan = preview(small, tmp_path / "other.zarr", diameter=20)
    assert (plan["diameter"], plan["diameter_source"], plan["halo"]) == (20.0, "given", 40)


def test_a_worker_without_enough_memory_is_refused(tmp_path: Path) -> None:
    path = large(tmp_path / "a.zarr")
    with pytest.raises(SettingsError) as caught:
        flight(path, Crew(8, 4, worker_limit=3 * GIB), block=4096).check(60.0)
    text = str(caught.value)
    assert text.startswith("a worker of 4 threads needs ")
    assert "GiB, worker limit 3.0 GiB (stage masks, block 4096 with halo 120: " in text
    assert text.endswith("; lower --block to 1024.")
    flight(path, Crew(8, 4, worker_limit=3 * GIB), block=1024).check(60.0)
    with pytest.raises(SettingsError, match="worker limit"):
        flight(path, Crew(8, 4, worker_limit=3 * GIB), block=2048).check(60.0)


def test_a_machine_without_enough_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "n_cores", lambda: 8)
    path = large(tmp_path / "a.zarr")
    with pytest.raises(SettingsError) as caught:
        flight(path, Crew(8, 1, machine_bytes=23 * GIB // 2)).check(30.0)
    assert "8 workers of 1 threads need " in str(caught.value)
    assert ", this machine has 11.5 GiB (stage masks, block 2048 with halo 60: " in str(caught.value)
    assert str(caught.value).endswith("; lower --block to 1024 or give --workers 7.")
    flight(path, Crew(8, 1, machine_bytes=23 * GIB // 2), block=1024).check(30.0)
    flight(path, Crew(7, 1, machine_bytes=23 * GIB // 2)).check(30.0)
    with pytest.raises(SettingsError, match=r"this process of 2 threads needs .*use a machine or workers with more"):
        flight(path, Crew(1, 2, machine_bytes=GIB // 2, in_process=True)).check(30.0)


def test_chunks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = large(tmp_path / "a.zarr", (40_000, 40_000), (40_000, 40_000))
    with pytest.raises(SettingsError, match=r"store the image in smaller chunks: those of shape \(40000, 40000\)"):
        flight(path, Crew(1, 2, worker_limit=8 * GIB)).check(30.0)


def test_before_the_survey_only_what_is_certain_is_refused(tmp_path: Path) -> None:
    path = large(tmp_path / "a.zarr")
    before = flight(path, Crew(1, 1, worker_limit=3 * GIB))
    before.check(None)
    with pytest.raises(SettingsError, match="worker limit"):
        before.check(800.0)
    with pytest.raises(SettingsError, match="worker limit"):
        flight(path, Crew(1, 1, worker_limit=3 * GIB), block=8192).check(None)
    assert isinstance(before.needs(None), Needs)


def test_a_disk_without_enough_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = large(tmp_path / "a.zarr")
    plan = flight(path, Crew(1, 1))
    needs = plan.needs(30.0)
    free = needs.scratch_bytes + needs.output_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    plan.check(30.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free - 1))
    with pytest.raises(OutputError) as caught:
        plan.check(30.0)
    assert str(caught.value).startswith("the scratch and the labels may take ")
    assert f", {tmp_path} has " in str(caught.value)
    assert str(caught.value).endswith(" GiB free; free some space or choose another disk (--scratch, -o).")
    journal = tmp_path / "out.zarr.cells.tiledseg" / "flows.journal"
    journal.parent.mkdir()
    journal.touch()
    plan.check(30.0)  # a run that goes on


def test_nothing_is_written_by_a_run_that_is_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "machine_memory", lambda: GIB // 2)
    with pytest.raises(SettingsError, match=r"this process of .* this machine has 512 MiB"):
        tiledseg.segment(dense, tmp_path / "out.zarr", diameter=12.0)
    assert list(tmp_path.iterdir()) == []
    arguments = ["segment", str(dense), "-o", str(tmp_path / "out.zarr"), "--diameter", "12", "--dry-run"]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert "this machine has 512 MiB" in shown.err
    assert "segment      would refuse: this process" in shown.out
    assert main([*arguments, "--json"]) == 2
    assert "this machine has 512 MiB" in json.loads(capsys.readouterr().out)["refused"]
    assert main(["info", str(dense)]) == 0
    assert "would refuse: this process" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_after_the_survey_it_is_asked_again(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = open_image(small)
    place = place_of(image, tmp_path / "out.zarr", None, Settings())
    crew = Crew(1, cluster.n_cores(), in_process=True)
    at_least = Preflight(image, (Input((0,)),), Settings(), find_model("tiledseg-nuclei"), place, crew).needs(None)
    free = at_least.scratch_bytes + at_least.output_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    with pytest.raises(OutputError, match="the scratch and the labels may take"):
        tiledseg.segment(small, tmp_path / "out.zarr")
    scratch = tmp_path / "out.zarr.cells.tiledseg"
    assert (scratch / "survey.json").exists(), "what the survey found is kept"
    assert not (scratch / "flows.zarr").exists()
    monkeypatch.undo()
    assert tiledseg.segment(small, tmp_path / "out.zarr").report.computed["survey"] == 0


def test_info_and_dry_run_tell_what_is_needed(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(dense)]) == 0
    text = capsys.readouterr().out
    for words in (
        "  diameter     17 px, assumed",
        "  blocks       1, halo 34 px",
        "  memory       at most ",
        "(up to ",
    ):
        assert words in text
    out = tmp_path / "out.zarr"
    flags = ["--diameter", "24", "--block", "256", "--workers", "2", "--dry-run"]
    assert main(["segment", str(dense), "-o", str(out), *flags]) == 0
    text = capsys.readouterr().out
    assert "  blocks       20, halo 48 px\n" in text
    assert "  tiles        16 on a working grid of (779, 708)\n" in text
    assert f"in all (2 x {max(1, cluster.n_cores() // 2)} threads)\n" in text
    assert main(["segment", str(dense), "-o", str(out), *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["n_blocks"], plan["n_tiles"], plan["n_workers"], plan["refused"]) == (20, 16, 2, None)
    assert list(tmp_path.iterdir()) == []


def test_the_crew_of_a_cluster(client: Any, dense: Path, tmp_path: Path) -> None:
    plan = preview(dense, tmp_path / "out.zarr", client=client, diameter=12.0)
    assert (plan["n_workers"], plan["n_threads"]) == (2, 1)
    plan = preview(dense, tmp_path / "out.zarr", scheduler=client.scheduler.address, diameter=12.0)
    assert (plan["n_workers"], plan["n_threads"]) == (2, 1)
    crew = cluster.DaskExecutor(client).crew
    assert crew == Crew(2, 1, worker_limit=None, machine_bytes=cluster.machine_memory())

    class Limited:
        """A client whose workers are elsewhere and have limits."""

        def scheduler_info(self, n_workers: int) -> Any:
            assert n_workers == -1
            worker = {"nthreads": 3, "memory_limit": 5 * GIB, "host": "10.0.0.7"}
            return {"workers": {"a": worker, "b": {**worker, "memory_limit": 4 * GIB, "nthreads": 2}}}

    assert cluster.DaskExecutor(Limited()).crew == Crew(2, 3, worker_limit=4 * GIB)


def test_an_array_in_memory_counts_what_stays_there() -> None:
    image = open_image(np.broadcast_to(np.uint16(1), (10_000, 10_000)))
    chosen = Settings.of(diameter=17)
    place = place_of(image, None, None, chosen)
    crew = Crew(1, 2, machine_bytes=2 * GIB, in_process=True)
    plan = Preflight(image, (Input((0,)),), chosen, find_model("tiledseg-nuclei"), place, crew)
    needs = plan.needs(17.0)
    assert (needs.scratch_bytes, needs.output_bytes) == (0, 0)
    assert needs.process_bytes > (2 * 3 + 4 + 4) * 10_000**2
    with pytest.raises(SettingsError, match=r"give an output \(-o\), so that what is in between lies on a disk"):
        plan.check(17.0)


def test_sizes_are_readable() -> None:
    sizes: npt.NDArray[np.int64] = np.array([1, 20 * MIB, GIB + GIB // 2])
    assert [preflight.size_text(n) for n in sizes.tolist()] == ["1 MiB", "20 MiB", "1.5 GiB"]
