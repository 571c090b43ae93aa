"""The report: its figures are true and add up over calls, its page is safe to open, and it holds no secrets."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image

import tiledseg
from tiledseg import ledger
from tiledseg.cli import main
from tiledseg.grid import BlockGrid
from tiledseg.omezarr import write_image
from tiledseg.page import page_of
from tiledseg.pictures import heat_map
from tiledseg.stitch import PICTURE, merge_blocks
from tiledseg.store import MemoryStore

from .conftest import Slide

BLOCK = 160
SECRET = "S3cr3t"
NAME = f"<script>alert(1)</script> & https://me:{SECRET}@host/a?t={SECRET}"
SETTINGS: dict[str, Any] = {"diameter": 24.0, "block": BLOCK, "channel": NAME}


@pytest.fixture(scope="module")
def image_path(slide: Slide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = slide[0].copy()
    image[:, 400:] = image[0, 0]
    path = tmp_path_factory.mktemp("report") / "slide&<b>.ome.zarr"
    write_image(path, image[None], axes="cyx", spacing_um=(0.5, 0.5), chunk=256, channels=[NAME])
    return path


@pytest.fixture(scope="module")
def found(image_path: Path) -> tiledseg.Segmentation:
    return tiledseg.segment(image_path, image_path.parent / "out.ome.zarr", **SETTINGS)


class Page(HTMLParser):
    """What a browser would see of a page; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_files_tell_what_the_report_tells(found: tiledseg.Segmentation) -> None:
    folder = found.table_path.parent
    assert found.report_path == folder / "report.html"
    written = json.loads((folder / "report.json").read_text())
    assert written.pop("labels") == str(found.path)
    assert written.pop("table") == str(found.table_path)
    assert written == json.loads(json.dumps(found.report.as_dict()))
    shown = read_page(found.report_path).text
    for word in (f"{found.report.n_objects:,}", found.report.model["sha256"], "flow_threshold", "numpy", "network"):
        assert word in shown
    assert sorted(path.name for path in folder.iterdir()) == [
        "report.html",
        "report.json",
        "table.parquet",
        "zarr.json",
    ]


def test_figures_fit_together(found: tiledseg.Segmentation) -> None:
    report = found.report
    assert set(report.seconds) == {"survey", "flows", "masks", "stitch", "publish"}
    assert report.wall_seconds >= sum(report.seconds.values())
    assert report.tiles_per_second == pytest.approx(report.n_tiles / report.seconds["flows"])
    assert report.pixels_per_second["masks"] == pytest.approx(700 * 610 / report.seconds["masks"])
    assert report.pixels_per_second["all"] < report.pixels_per_second["flows"]
    assert {"network", "scale", "read", "blend", "write", "dynamics", "match", "measure"} <= set(report.cpu_seconds)
    assert 0 < report.busy["cpu"] <= 1
    assert report.bytes_read > 0
    assert report.bytes_written > found.table_path.stat().st_size
    assert sum(report.peaks.values()) == report.peak_memory
    assert (report.retries, report.quarantined, report.n_calls) == (0, (), 1)
    assert report.block == (BLOCK, BLOCK)
    assert report.whole_run.n_tiles == report.n_tiles > 0


def test_the_page_runs_nothing_and_loads_nothing(found: tiledseg.Segmentation) -> None:
    page = read_page(found.report_path)
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "section", "div", "span", "p", "b"),
        *("h1", "h2", "table", "tr", "th", "td", "img"),
    }
    for _, attributes in page.tags:
        assert set(attributes) <= {"lang", "charset", "http-equiv", "name", "content", "class", "style", "alt", "src"}
    assert [a["src"][:22] for _, a in page.tags if "src" in a] == ["data:image/png;base64,"]
    assert "url(" not in found.report_path.read_text()
    # Names are there to be read, as they are.
    assert "<script>alert(1)</script>" in page.text
    assert "slide&<b>.ome.zarr" in page.text


def test_the_picture_shows_the_objects_of_each_block(found: tiledseg.Segmentation) -> None:
    labels = found.labels.compute()
    counts = np.array(
        [
            [np.count_nonzero(np.unique(labels[y : y + BLOCK, x : x + BLOCK])) for x in range(0, 610, BLOCK)]
            for y in range(0, 700, BLOCK)
        ]
    )
    shown = {"fewest": int(counts.min()), "most": int(counts.max()), "blocks": [5, 4], "together": [1, 1]}
    assert found.report.per_block == shown
    assert counts.min() == 0
    data = re.search(r"base64,([^\"]*)", found.report_path.read_text())[1]
    assert base64.b64decode(data) == heat_map(counts)


def test_a_heat_map_is_brighter_where_there_is_more() -> None:
    with Image.open(io.BytesIO(heat_map(np.array([[0, 1, 50, 100]])))) as picture:
        assert picture.size == (4, 1)
        pixels = np.asarray(picture.convert("RGBA")).astype(int)[0]
    assert (pixels[:, 3] == [70, 255, 255, 255]).all()
    brightness = pixels[1:, :3] @ [299, 587, 114]
    assert (np.diff(brightness) > 0).all()


def test_many_blocks_share_an_element_of_the_picture() -> None:
    """Two planes of 600 x 3 blocks of one pixel's side: a picture of 200 x 3, whatever the number of blocks."""
    store, grid = MemoryStore(), BlockGrid((2, 600, 3), (1, 1, 1), (0, 0, 0))
    for number in range(grid.n_blocks):
        objects = np.full(number % 4, number)
        store.save(f"m/objects/{number}", np.concatenate([[0, 0], objects]))
        store.save(f"m/pairs/{number}", np.zeros((0, 3), np.int64))
        store.save(f"m/agreement/{number}", np.zeros(5))
    facts = merge_blocks(store, "m", grid)
    expected = (np.arange(grid.n_blocks) % 4).reshape(2, 200, 3, 3).sum(axis=(0, 2))
    np.testing.assert_array_equal(store.load(f"m/{PICTURE}"), expected)
    assert facts["per_block"] == {"fewest": 0, "most": 3, "blocks": [2, 600, 3], "together": [2, 3, 1]}
    assert facts["n_objects"] == expected.sum()


def test_nothing_that_gives_access_is_written(found: tiledseg.Segmentation) -> None:
    """The channel's name stands for an address: it is a setting, part of the run's record, and in the report."""
    written = [path for path in Path(found.report.scratch).rglob("*") if path.is_file()]
    written += [found.report_path, found.report_path.with_name("report.json")]
    assert {"run.json", "masks.json", "survey.json", "totals.json"} <= {path.name for path in written}
    assert [path.name for path in written if SECRET.encode() in path.read_bytes()] == []
    assert "https://host/a" in found.report.as_dict()["parameters"]["channel"]


def test_an_interrupted_run_and_one_with_other_settings_add_up(
    image_path: Path, tmp_path: Path, found: tiledseg.Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "SAVE_EVERY_S", 0.0)
    output, scratch = tmp_path / "out.ome.zarr", tmp_path / "out.ome.zarr.cells.tiledseg"
    seen: list[dict[str, Any]] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if (scratch / "totals.json").exists():
            seen.append(json.loads((scratch / "totals.json").read_text())["work"])
        if stage == "masks" and done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiledseg.segment(image_path, output, progress=interrupt, **SETTINGS)
    # What a killed process has left, for it saves as it goes.
    assert seen[-1]["n_tiles"] == found.report.n_tiles
    n_masks = seen[-1]["computed"]["masks"]
    second = tiledseg.segment(image_path, output, **SETTINGS).report
    assert (second.n_calls, second.n_tiles, second.tiles_per_second, second.busy) == (2, 0, None, {})
    assert "all" not in second.pixels_per_second
    assert second.kept["masks"] >= n_masks > 0
    assert second.whole_run.n_tiles == found.report.n_tiles
    assert second.whole_run.computed["masks"] >= second.n_blocks
    assert second.whole_run.seconds["flows"] > second.seconds["flows"]
    assert second.whole_run.cpu_seconds["network"] > 0
    assert "network" not in second.cpu_seconds
    assert second.whole_run.bytes_read > second.bytes_read
    third = tiledseg.segment(image_path, output, **{**SETTINGS, "min_size": 100})
    assert third.report.n_calls == 3
    for stage, seconds in third.report.seconds.items():
        expected = second.whole_run.seconds[stage] + seconds
        assert third.report.whole_run.seconds[stage] == pytest.approx(expected)
    assert "all 3 calls" in read_page(third.report_path).text
    nothing_to_do = tiledseg.segment(image_path, output, **{**SETTINGS, "min_size": 100}).report
    assert sum(nothing_to_do.computed.values()) == 0
    assert nothing_to_do.whole_run.bytes_read is not None


def test_workers_report_as_this_process_does(
    image_path: Path, tmp_path: Path, found: tiledseg.Segmentation, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        there = tiledseg.segment(image_path, tmp_path / "out.ome.zarr", client=client, **SETTINGS).report
    assert f"Dask shows what it does at {client.dashboard_link}" in caplog.text
    assert set(there.cpu_seconds) == set(found.report.cpu_seconds)
    assert there.n_tiles == found.report.n_tiles
    assert len(there.peaks) >= 2
    assert 0 < there.busy["cpu"] <= 1


def test_the_command_line_names_the_report_and_says_no_secrets(
    image_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.ome.zarr"
    assert main(["segment", str(image_path), "-o", str(output), "--diameter", "24"]) == 0
    assert f"report       {output}/tables/cells/report.html" in capsys.readouterr().out
    assert main(["segment", f"https://me:{SECRET}@127.0.0.1:9/a.zarr?token={SECRET}", "-o", str(output)]) == 2
    said = capsys.readouterr()
    assert "127.0.0.1" in said.err
    assert SECRET not in said.err + said.out


def test_a_function_and_labels_in_memory_have_a_report_too(image_path: Path, tmp_path: Path) -> None:
    def nuclei(pixels: Any) -> Any:
        from scipy import ndimage

        return ndimage.label(pixels > 1500)[0]

    image = zarr.open_array(image_path / "0", mode="r")[0]
    in_memory = tiledseg.segment(image, segmenter=nuclei, halo=60, block=BLOCK)
    assert in_memory.report_path is None
    assert in_memory.report.cpu_seconds["function"] > 0
    on_disk = tiledseg.segment(image, tmp_path / "out.ome.zarr", segmenter=nuclei, halo=60, block=BLOCK)
    assert on_disk.report.n_objects == in_memory.report.n_objects
    assert on_disk.report.per_block == in_memory.report.per_block
    shown = read_page(on_disk.report_path).text
    assert "nuclei" in shown
    assert "SHA-256" not in shown


def test_the_page_names_what_was_set_aside_and_busy_gpus(found: tiledseg.Segmentation) -> None:
    facts = {"labels": "labels", "table": "table", **found.report.as_dict()}
    assert "could not be computed" not in Page(page_of(facts, None)).text
    facts.update(
        quarantined=["masks block (1, <2>)", "flows chunk (0, 4)"],
        busy={"NVIDIA <H100>": 0.934},
        bytes_read=None,
        peaks={str(i): 2**20 for i in range(200)},
        per_block=None,
    )
    shown = Page(page_of(facts, None)).text
    assert "could not be computed then: masks block (1, <2>); flows chunk (0, 4)" in shown
    assert "NVIDIA <H100> busy\n93%" in shown
    assert "not known on this system" in shown
    assert "184, see report.json" in shown
    assert "an earlier version stitched the blocks" in shown


def test_what_one_call_does_not_know_is_not_known_of_all(found: tiledseg.Segmentation) -> None:
    work = found.report.whole_run
    unknown = dataclasses.replace(work, bytes_read=None)
    both = work.plus(unknown)
    assert both.bytes_read is None
    assert both.n_tiles == 2 * work.n_tiles
    assert math.isclose(both.seconds["flows"], 2 * work.seconds["flows"])
    assert ledger.Work.from_json(json.loads(json.dumps(dataclasses.asdict(both)))) == both
