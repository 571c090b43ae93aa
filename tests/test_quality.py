"""Checks of finished labels: seams are found where they are and nowhere else, figures are true, the page is safe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
import tifffile
import zarr

import tiledseg
from tiledseg.cli import main
from tiledseg.cluster import connect
from tiledseg.errors import ImageError, OutputError, SettingsError
from tiledseg.omezarr import write_image
from tiledseg.quality import Quality
from tiledseg.quality.edges import Edge, EdgeJudge, count_edges, period_of
from tiledseg.quality.regions import look_at, n_regions, region_sides
from tiledseg.quality.sizes import Sizes, count_sizes
from tiledseg.quality.subject import open_subject
from tiledseg.slides import synthetic_slide

from .test_report import Page

Labels = npt.NDArray[Any]


def cut_at_blocks(labels: Labels, block: int, share: float = 1.0) -> Labels:
    """What unstitched blocks make of true labels: each part a label of its own, of a share of the cells."""
    is_cut = np.random.default_rng(0).random(int(labels.max()) + 1) < share
    number = np.zeros(labels.shape, np.int64)
    for axis, n in enumerate(labels.shape):
        at = np.arange(n) // block
        number = number * (int(at[-1]) + 1) + at.reshape([-1 if i == axis else 1 for i in range(labels.ndim)])
    parts = np.where((labels > 0) & is_cut[labels], labels + (number + 1) * (int(labels.max()) + 1), labels)
    return np.unique(parts, return_inverse=True)[1].reshape(labels.shape).astype(np.uint32)


def judged(labels: Labels) -> list[Edge]:
    """What is found in labels 1..n."""
    judge = EdgeJudge(labels.shape)
    whole = tuple(slice(0, n) for n in labels.shape)
    judge.add(count_edges(labels.astype(np.int32), int(labels.max()), whole, (0,) * labels.ndim, judge.sides))
    return judge.found()


def lines(edges: list[Edge]) -> set[tuple[int, int]]:
    return {(edge.axis, edge.position) for edge in edges}


def grid_lines(shape: tuple[int, ...], block: int) -> set[tuple[int, int]]:
    return {(axis, at) for axis, n in enumerate(shape) for at in range(block, n, block)}


def balls(side: int = 96, pitch: int = 16) -> Labels:
    """A volume of round cells at places off any grid."""
    rng = np.random.default_rng(1)
    labels = np.zeros((side,) * 3, np.uint32)
    corners = np.stack(np.meshgrid(*[np.arange(pitch // 2, side, pitch)] * 3, indexing="ij"), -1).reshape(-1, 3)
    at = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1)
    for i, corner in enumerate(corners, 1):
        centre, radius = corner + rng.uniform(-8, 8, 3), rng.uniform(5.5, 7.5)
        box = tuple(slice(max(0, int(c) - 9), int(c) + 10) for c in centre)
        labels[box][(((at[box] - centre) ** 2).sum(-1) < radius**2) & (labels[box] == 0)] = i
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.uint32)


@pytest.fixture(scope="module")
def truth() -> Labels:
    return synthetic_slide((1024, 1024), diameter=20.0, seed=11)[1]


def test_there_are_no_seams_in_the_truth(truth: Labels) -> None:
    assert judged(truth) == []
    assert judged(balls()) == []


@pytest.mark.parametrize("block", [128, 200, 256])
def test_every_border_of_unstitched_blocks_is_found_and_nothing_else(truth: Labels, block: int) -> None:
    found = judged(cut_at_blocks(truth, block))
    assert lines(found) == grid_lines(truth.shape, block)
    assert all(edge.share > 0.9 for edge in found)
    assert {period_of([edge.position for edge in found if edge.axis == axis]) for axis in (0, 1)} == {block}


@pytest.mark.parametrize(("share", "at_least"), [(0.5, 1.0), (0.3, 0.9), (0.2, 0.6)])
def test_how_weak_a_seam_is_found(truth: Labels, share: float, at_least: float) -> None:
    found = lines(judged(cut_at_blocks(truth, 256, share)))
    expected = grid_lines(truth.shape, 256)
    assert found <= expected
    assert len(found) >= at_least * len(expected)


def test_a_seam_is_found_where_it_begins_and_ends() -> None:
    labels = synthetic_slide((700, 1600), diameter=20.0, seed=2, density=1.0)[1]
    cut = labels.copy()
    below = np.zeros(labels.shape, bool)
    below[333:, 600:1000] = True
    crossing = np.intersect1d(labels[332, 600:1000], labels[333, 600:1000])
    is_part = below & np.isin(labels, crossing[crossing > 0])
    cut[is_part] += labels.max()
    found = [edge for edge in judged(np.unique(cut, return_inverse=True)[1].reshape(cut.shape)) if edge.axis == 0]
    assert {edge.position for edge in found} == {333}
    along = [edge.region[1] for edge in found]
    assert min(part.start for part in along) >= 400
    assert max(part.stop for part in along) <= 1200


def test_labels_on_a_coarser_grid_have_no_seams(truth: Labels) -> None:
    for step in (2, 4, 8):
        coarse = truth[::step, ::step].repeat(step, axis=0).repeat(step, axis=1)
        assert judged(np.unique(coarse, return_inverse=True)[1].reshape(coarse.shape)) == [], step


@pytest.mark.parametrize("block", [32, 40])
def test_planes_between_blocks_of_a_volume_are_found(block: int) -> None:
    labels = balls()
    assert lines(judged(cut_at_blocks(labels, block))) == grid_lines(labels.shape, block)


def test_a_period_needs_three_lines_and_one_step() -> None:
    assert period_of([256, 512]) is None
    assert period_of([256, 512, 768]) == 256
    assert period_of([519, 520, 1040, 1560, 2080, 2600]) == 520
    assert period_of([400, 520, 800, 1040, 1200, 1560, 1600, 2000]) == 400
    assert period_of([17, 102, 333]) is None
    assert period_of([40, 520, 1080, 2000]) is None


def test_real_fields_put_side_by_side_show_their_borders(data: Path) -> None:
    labels = tifffile.imread(data / "mosaic_fluo" / "labels.tif")
    found = judged(labels)
    # The truth is cut there: see the data set's README.
    assert lines(found) == {(0, at) for at in range(520, 4680, 520)} | {(1, at) for at in range(696, 4176, 696)}


def test_real_truth_within_fields_has_no_seams(data: Path) -> None:
    from tiledseg.pictures import read_png

    for path in sorted((data / "dsb2018" / "labels").glob("*.png"))[::8]:
        values = read_png(path, is_indexed=True)
        labels = np.unique(values, return_inverse=True)[1].reshape(values.shape)
        assert judged(labels) == [], path
    for name in ("plantseg_3d/nuclei_1135_labels.tif", "qcanet_3d/8_cell_stage_labels.tif"):
        values = tifffile.imread(data / name)
        labels = np.unique(values, return_inverse=True)[1].reshape(values.shape)
        assert judged(labels) == [], name
        assert judged(cut_at_blocks(labels, 32))


@pytest.mark.parametrize(("rows", "columns"), [(150, 170), (333, 480), (500, 97)])
def test_counts_of_regions_add_up_to_those_of_the_whole(rows: int, columns: int) -> None:
    labels = cut_at_blocks(synthetic_slide((500, 480), diameter=20.0, seed=4)[1], 128)
    shape, n = labels.shape, int(labels.max())
    whole, parts, sizes = EdgeJudge(shape), EdgeJudge(shape), Sizes(shape)
    everything = tuple(slice(0, m) for m in shape)
    whole.add(count_edges(labels.astype(np.int32), n, everything, (0, 0), whole.sides))
    for top in range(0, shape[0], rows):
        for left in range(0, shape[1], columns):
            region = (slice(top, min(top + rows, shape[0])), slice(left, min(left + columns, shape[1])))
            padded = tuple(slice(max(0, p.start - 64), min(m, p.stop + 64)) for p, m in zip(region, shape, strict=True))
            origin = tuple(p.start for p in padded)
            core = tuple(slice(p.start - o, p.stop - o) for p, o in zip(region, origin, strict=True))
            parts.add(count_edges(labels[padded].astype(np.int32), n, core, origin, parts.sides))
            ids = np.arange(1, n + 1)
            sizes.add(count_sizes(np.ascontiguousarray(labels[region]).astype(np.int32), ids, region, shape))
    sizes.close()
    assert lines(parts.found()) == lines(whole.found())
    assert [(e.n_straight, e.n_crossing) for e in parts.found()] == [
        (e.n_straight, e.n_crossing) for e in whole.found()
    ]
    areas = np.bincount(labels.reshape(-1))[1:]
    assert (sizes.n_objects, sizes.n_pixels, sizes.largest_id) == (n, areas.sum(), n)
    np.testing.assert_allclose(sizes.quantiles((0.25, 0.5, 0.75)), np.quantile(areas, (0.25, 0.5, 0.75)), rtol=0.03)
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    assert sizes.n_at_border == np.count_nonzero(border)
    assert sizes.largest()[0][1][0] == areas.max()
    assert sizes.smallest()[0][1][0] == areas.min()
    assert sizes.maps().counts.sum() == n


def test_medians_of_the_map_follow_the_sizes() -> None:
    labels = np.zeros((256, 512), np.int32)
    ids = iter(range(1, 10_000))
    for top in range(2, 250, 32):
        for left in range(2, 500, 32):
            side = 6 if left < 256 else 12
            labels[top : top + side, left : left + side] = next(ids)
    n = int(labels.max())
    sizes = Sizes(labels.shape)
    sizes.add(count_sizes(labels, np.arange(1, n + 1), (slice(0, 256), slice(0, 512)), labels.shape))
    maps = sizes.maps()
    half = maps.medians.shape[1] // 2
    np.testing.assert_allclose(maps.medians[:, :half], 36, rtol=0.1)
    np.testing.assert_allclose(maps.medians[:, half:], 144, rtol=0.1)
    assert maps.area.sum() == labels.size


def test_regions_are_whole_chunks_of_bounded_size() -> None:
    assert region_sides((1024, 1024), (100_000, 100_000)) == (2048, 2048)
    assert region_sides((32, 256, 256), (4096, 4096, 4096)) == (128, 256, 256)
    assert region_sides((8192, 8192), (8192, 8192)) == (2048, 2048)
    assert region_sides((1, 64), (5, 64)) == (8, 64)


# A finished run, and what is said of it.


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qc") / "slide&<b>.ome.zarr"
    write_image(path, synthetic_slide((420, 460), seed=3)[0], axes="yx", spacing_um=(0.5, 0.5), chunk=128)
    tiledseg.segment(path, diameter=24.0, block=200)
    return path


@pytest.fixture(scope="module")
def found(result: Path) -> Quality:
    return tiledseg.qc(result)


def text_of(quality: Quality, name: str) -> str:
    return next(found.text for found in quality.findings if found.name == name)


def test_a_run_of_ours_has_nothing_suspicious(result: Path, found: Quality) -> None:
    assert [finding for finding in found.findings if finding.is_suspicious] == []
    assert text_of(found, "edges") == "no straight edges that look like block borders"
    assert text_of(found, "cut by halo") == "no objects: every block saw its own whole"
    assert "100.0% were seen by both" in text_of(found, "neighbours")
    assert text_of(found, "table") == "a row for each of them, with the same pixels in all"
    table = pyarrow.parquet.read_table(result / "tables" / "cells" / "table.parquet").to_pandas()
    assert found.facts["n_objects"] == len(table)
    diameters = 2 * np.sqrt(table["area_um2"] / np.pi)
    assert found.facts["sizes"]["median"] == pytest.approx(diameters.median(), rel=0.01)
    assert found.facts["sizes"]["quartiles"] == pytest.approx(list(diameters.quantile([0.25, 0.75])), rel=0.02)
    assert sum(found.facts["sizes"]["histogram"]["counts"]) == len(table)


def test_page_and_figures_lie_beside_the_table(result: Path, found: Quality) -> None:
    folder = result / "tables" / "cells"
    assert found.path == folder / "qc.html"
    assert json.loads((folder / "qc.json").read_text()) == json.loads(json.dumps(found.as_dict()))
    page = Page((folder / "qc.html").read_text(encoding="utf-8"))
    assert "slide&<b>.ome.zarr" in page.text
    assert not {tag for tag, _ in page.tags} & {"script", "b>", "iframe", "link", "object"}
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) >= 3
    assert all(str(source).startswith("data:image/png;base64,") for source in pictures)
    assert "nothing suspicious" in page.text


def test_other_labels_of_the_same_image_with_seams(result: Path, tmp_path: Path) -> None:
    labels = cut_at_blocks(synthetic_slide((420, 460), seed=3)[1], 140)
    tifffile.imwrite(tmp_path / "cut.tif", labels)
    quality = tiledseg.qc(tmp_path / "cut.tif", image=result, page=tmp_path / "page.html")
    assert "objects end in 5 straight lines" in text_of(quality, "edges")
    assert "across y at 140, 280" in text_of(quality, "edges")
    assert quality.facts["straight_edges"]["positions"] == {"y": [140, 280], "x": [140, 280, 420]}
    assert text_of(quality, "cut by halo").startswith("not known: there is no report")
    page = Page((tmp_path / "page.html").read_text())
    titles = [line for line in page.text.splitlines() if line.startswith("Straight line across")]
    assert len(titles) == 5
    assert (tmp_path / "page.json").exists()


def test_pictures_show_the_line_between_marks(result: Path) -> None:
    from tiledseg.quality.places import MARK, place_of_edge

    labels = cut_at_blocks(synthetic_slide((420, 460), seed=3)[1], 140)
    subject = open_subject(labels, image=result)
    edge = next(edge for edge in judged(labels) if edge.axis == 0)
    place = place_of_edge(subject, (), edge)
    picture = read_png_bytes(place.png)
    rows = np.flatnonzero((picture[:, 0] == MARK).all(axis=-1))
    top = int(place.text.split()[1].split(":")[0])
    assert rows.tolist() == [2 * (edge.position - top) - 1, 2 * (edge.position - top)]
    assert (picture[..., :2] > 0).any()


def read_png_bytes(png: bytes) -> npt.NDArray[Any]:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_blocks_that_disagree_and_halos_that_cut_are_told(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.zarr"
    image, labels = synthetic_slide((420, 460), seed=3)
    write_image(path, image, axes="yx", chunk=128)

    def unstitched(pixels: npt.NDArray[Any]) -> Labels:
        at = int(np.argmax([(image[y : y + 8, x : x + 8] == pixels[:8, :8]).all() for y, x in CORNERS]))
        (y, x), (h, w) = CORNERS[at], pixels.shape
        return np.unique(labels[y : y + h, x : x + w] * (pixels.shape[0] > 0), return_inverse=True)[1].reshape(h, w)

    tiledseg.segment(path, segmenter=unstitched, block=210, halo=6, name="own")
    quality = tiledseg.qc(path)
    assert quality.facts["run"]["n_cut_by_halo"] > 0
    assert "a larger --halo sees them whole" in text_of(quality, "cut by halo")
    assert "most in the blocks that begin at y " in text_of(quality, "cut by halo")
    assert "Share of the labels on borders of a block" in quality.html
    # Without the scratch the counts are known from the report, their places are not.
    import shutil

    shutil.rmtree(tmp_path / "slide.ome.zarr.own.tiledseg")
    alone = tiledseg.qc(path)
    assert alone.facts["run"]["n_cut_by_halo"] == quality.facts["run"]["n_cut_by_halo"]
    assert "the scratch of the run, which knows it block by block, is not there any more" in alone.html


CORNERS = [(y, x) for y in (0, 204) for x in (0, 204, 414)]


def test_a_scratch_of_another_run_is_not_believed(result: Path, tmp_path: Path) -> None:
    scratch = result.parent / f"{result.name}.cells.tiledseg"
    for name, content in (("run.json", {"id": "other"}), ("masks.json", {"folder": "../../etc"})):
        (tmp_path / name).write_text(json.dumps(content))
    assert "the scratch is not, or no longer, that of the run" in tiledseg.qc(result, scratch=tmp_path).html
    (tmp_path / "run.json").write_text((scratch / "run.json").read_text())
    assert "the scratch is not, or no longer, that of the run" in tiledseg.qc(result, scratch=tmp_path).html


def test_a_report_that_cannot_be_read_is_left_out(result: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.ome.zarr"
    shutil.copytree(result, copy)
    report = copy / "tables" / "cells" / "report.json"
    report.write_text("{")
    assert "not known: there is no report" in text_of(tiledseg.qc(copy), "neighbours")
    report.write_text('{"n_seam": "many", "n_cut_by_halo": -3, "scratch": 7}')
    assert text_of(tiledseg.qc(copy), "cut by halo").startswith("not known")
    (copy / "tables" / "cells" / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(OutputError, match=r"table .*table.parquet cannot be read \("):
        tiledseg.qc(copy)


def test_a_table_of_other_labels_is_told(result: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.ome.zarr"
    shutil.copytree(result, copy)
    labels = zarr.open_array(copy / "labels" / "cells" / "0", mode="r+")
    values = labels[:]
    values[values == 5] = 0
    labels[:] = values
    quality = tiledseg.qc(copy)
    assert "one is not of the other" in text_of(quality, "table")
    assert "the largest id is" in text_of(quality, "objects")


def test_tails_are_told() -> None:
    labels = np.zeros((400, 400), np.int32)
    ids = iter(range(1, 10_000))
    for top in range(3, 380, 20):
        for left in range(3, 380, 20):
            side = 14 if (top + left) % 3 else 2
            labels[top : top + side, left : left + side] = next(ids)
    quality = tiledseg.qc(labels)
    assert quality.path is None
    assert "many are tiny" in text_of(quality, "sizes")
    assert quality.facts["sizes"]["n_tiny"] == np.count_nonzero(np.bincount(labels.reshape(-1)) == 4)
    assert "One of the smallest: 4 px" in quality.html
    labels[300:390, 300:390] = labels.max() + 1
    labels[300:390, 3:290] = labels.max() + 2
    labels[3:100, 3:290] = labels.max() + 3
    assert "many are huge" in text_of(tiledseg.qc(labels), "sizes")


def test_ids_that_stand_for_several_objects_are_told() -> None:
    labels = np.zeros((3, 300, 300), np.uint16)
    for t in range(3):
        for i in range(1, 6):
            labels[t, 40 * i : 40 * i + 20, 50:70] = i
    quality = tiledseg.qc(labels[0])
    assert text_of(quality, "objects") == "5, ids 1 to N without gaps"
    (tmp := np.zeros((2048, 4096), np.uint8))[100:110, 100:110] = tmp[100:110, 3000:3010] = 1
    assert "some ids stand for several objects" in text_of(tiledseg.qc(tmp), "objects")


def test_nothing_at_all(tmp_path: Path) -> None:
    quality = tiledseg.qc(np.zeros((100, 120), np.uint8), page=tmp_path / "a.html")
    assert text_of(quality, "objects") == "none"
    assert "there are no objects" in (tmp_path / "a.html").read_text()


def test_volumes_and_series(tmp_path: Path) -> None:
    labels = balls()
    write_image(
        tmp_path / "volume.ome.zarr", cut_at_blocks(labels, 48), axes="zyx", spacing_um=(0.5, 0.5, 0.5), chunk=64
    )
    quality = tiledseg.qc(tmp_path / "volume.ome.zarr", page=tmp_path / "volume.html")
    assert quality.facts["straight_edges"]["positions"] == {"z": [48], "y": [48], "x": [48]}
    assert "Straight line across z at 48" in quality.html
    series = np.stack([cut_at_blocks(synthetic_slide((300, 300), seed=s)[1], 150 if s else 300) for s in range(2)])
    write_image(tmp_path / "series.ome.zarr", series, axes="tyx", chunk=100)
    quality = tiledseg.qc(tmp_path / "series.ome.zarr", page=tmp_path / "series.html")
    assert {edge["t"] for edge in quality.facts["straight_edges"]["edges"]} == {1}
    assert quality.facts["straight_edges"]["positions"] == {"y": [150], "x": [150]}
    assert quality.facts["n_objects"] == sum(np.unique(frame[frame > 0]).size for frame in series)


def test_planes_that_stand_alone_are_pictures(tmp_path: Path) -> None:
    path = tmp_path / "stack.ome.zarr"
    write_image(path, np.stack([synthetic_slide((200, 220), seed=s)[0] for s in range(2)]), axes="zyx", chunk=128)
    tiledseg.segment(path, diameter=24.0, stitch_threshold=0)
    subject = open_subject(path)
    assert (subject.object_axes, subject.n_frames, n_regions(subject)) == ("yx", 1, 2)
    assert [found for found in tiledseg.qc(path).findings if found.is_suspicious] == []


def test_workers_elsewhere_find_the_same(client: Any, tmp_path: Path) -> None:
    labels = cut_at_blocks(synthetic_slide((1200, 600), seed=8)[1], 300)
    stored = zarr.create_array(
        tmp_path / "cut.zarr", shape=labels.shape, chunks=(100, 100), shards=(200, 200), dtype="u4"
    )
    stored[:] = labels
    steps: list[tuple[str, int, int]] = []
    there = tiledseg.qc(
        tmp_path / "cut.zarr",
        client=client,
        image=synthetic_slide((1200, 600), seed=8)[0],
        progress=lambda *a: steps.append(a),
    )
    here = tiledseg.qc(labels)
    assert steps[-1][1] == steps[-1][2] >= 1
    assert there.facts["straight_edges"] == here.facts["straight_edges"]
    assert there.facts["sizes"] == here.facts["sizes"]
    with connect(client) as executor:
        assert look_at(open_subject(tmp_path / "cut.zarr"), executor).sizes.n_objects == here.facts["n_objects"]


def test_what_segment_returned_is_looked_over(tmp_path: Path) -> None:
    image = synthetic_slide((200, 220), seed=3)[0]
    in_memory = tiledseg.segment(image, diameter=24.0)
    stored = tiledseg.segment(image, tmp_path / "out.ome.zarr", diameter=24.0)
    assert tiledseg.qc(in_memory).facts["sizes"] == tiledseg.qc(stored).facts["sizes"]
    assert (tmp_path / "out.ome.zarr" / "tables" / "cells" / "qc.html").is_file()


# The command line.


def test_the_command_prints_a_line_per_finding(
    result: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["qc", str(result), "-o", str(tmp_path / "p.html")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "  edges        no straight edges that look like block borders" in printed
    assert printed[-1] == f"  page         {tmp_path / 'p.html'}"
    tifffile.imwrite(tmp_path / "cut.tif", cut_at_blocks(synthetic_slide((420, 460), seed=3)[1], 140))
    assert main(["qc", str(tmp_path / "cut.tif")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("! edges        objects end in 5 straight lines") for line in printed)
    assert printed[-1].endswith("not written: there is no table to lie beside, give one with -o")
    assert main(["qc", str(tmp_path / "cut.tif"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["straight_edges"]["n_lines"] == 5


def test_what_cannot_be_looked_at_is_refused(result: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds float64, no labels; give the OME-Zarr that segment wrote"):
        tiledseg.qc(np.zeros((9, 9)))
    with pytest.raises(SettingsError, match="holds values below 0 or past"):
        tiledseg.qc(np.full((9, 9), -1))
    with pytest.raises(ImageError, match=r"holds no labels 'nuclei' but cells; give one of these \(--name\)"):
        tiledseg.qc(result, name="nuclei")
    with pytest.raises(ImageError, match="holds no labels; leave out the name 'nuclei'"):
        tiledseg.qc(result / "labels" / "cells", name="nuclei")
    with pytest.raises(SettingsError, match=r"has shape \(9, 9\) \(yx\) but the labels \(420, 460\) \(yx\)"):
        tiledseg.qc(result, image=np.zeros((9, 9)))
    with pytest.raises(SettingsError, match=r"should end in \.html"):
        tiledseg.qc(result, page=tmp_path / "page.txt")
    with pytest.raises(OutputError, match="its folder does not exist; make it, or give another page"):
        tiledseg.qc(result, page=tmp_path / "nowhere" / "page.html")
    with pytest.raises(ImageError, match="does not exist"):
        tiledseg.qc(tmp_path / "nothing.zarr")


def test_of_several_labels_one_must_be_named(result: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.ome.zarr"
    shutil.copytree(result, copy)
    tiledseg.segment(copy, diameter=24.0, name="more", min_size=500)
    with pytest.raises(ImageError, match=r"holds labels cells, more; say which \(--name cells\)"):
        tiledseg.qc(copy)
    assert tiledseg.qc(copy, name="more").path == copy / "tables" / "more" / "qc.html"
    assert tiledseg.qc(copy / "labels" / "more").path == copy / "tables" / "more" / "qc.html"
