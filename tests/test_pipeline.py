"""The promises, end to end with the model that ships: one answer, nothing lost, no cell skipped."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr

import tiledseg
from tiledseg.errors import ImageError, ModelError, OutputError, SettingsError
from tiledseg.omezarr import write_image

from .conftest import Slide

DIAMETER = 24.0


def labels_of(image: Any, output: Any = None, **settings: Any) -> npt.NDArray[np.uint32]:
    found = tiledseg.segment(image, output, **{"diameter": DIAMETER, **settings})
    return np.asarray(found.labels.compute())


@pytest.fixture(scope="module")
def whole(slide: Slide) -> npt.NDArray[np.uint32]:
    """Labels of the slide as one block, in this process."""
    return labels_of(slide[0], block=1024)


@pytest.fixture
def image_path(slide: Slide, tmp_path: Path) -> Path:
    path = tmp_path / "slide.ome.zarr"
    write_image(path, slide[0], axes="yx", spacing_um=(0.5, 0.5), chunk=256)
    return path


def test_finds_the_nuclei(slide: Slide, whole: npt.NDArray[np.uint32]) -> None:
    scores = tiledseg.compare(whole, slide[1])
    assert scores.overall.ap[0] > 0.9
    assert np.array_equal(np.unique(whole), np.arange(whole.max() + 1))
    first = np.unique(whole, return_index=True)[1][1:]
    assert (np.diff(first) > 0).all(), "ids are not in raster order of first pixels"


@pytest.mark.parametrize("block", [128, 137, 256, 300, 512, 609])
def test_labels_do_not_depend_on_the_block(slide: Slide, whole: npt.NDArray[np.uint32], block: int) -> None:
    assert np.array_equal(labels_of(slide[0], block=block), whole)


def test_labels_do_not_depend_on_the_block_without_resampling(slide: Slide) -> None:
    whole = labels_of(slide[0], block=1024, resample=False)
    assert whole.max() > 300
    assert np.array_equal(labels_of(slide[0], block=200, resample=False), whole)


def test_labels_do_not_depend_on_who_works(
    whole: npt.NDArray[np.uint32], image_path: Path, tmp_path: Path, client: Any
) -> None:
    assert np.array_equal(labels_of(image_path, tmp_path / "two.zarr", client=client, block=256), whole)
    assert np.array_equal(labels_of(image_path, tmp_path / "one.zarr", workers=1, block=300), whole)
    client.write_scheduler_file(tmp_path / "scheduler.json")
    for name, scheduler in (("a.zarr", client.scheduler.address), ("f.zarr", str(tmp_path / "scheduler.json"))):
        assert np.array_equal(labels_of(image_path, tmp_path / name, scheduler=scheduler, block=512), whole)
    assert client.status == "running", "a cluster that was given was closed"


def test_labels_do_not_depend_on_how_the_image_is_given(
    slide: Slide, whole: npt.NDArray[np.uint32], image_path: Path, tmp_path: Path, client: Any
) -> None:
    image = slide[0]
    tifffile.imwrite(tmp_path / "slide.tif", image, tile=(128, 128), compression="zlib")
    assert np.array_equal(labels_of(dask.array.from_array(image, chunks=200)), whole)
    assert np.array_equal(labels_of(zarr.open_array(image_path / "0", mode="r"), tmp_path / "a.zarr"), whole)
    assert np.array_equal(labels_of(tmp_path / "slide.tif", tmp_path / "b.zarr"), whole)
    assert np.array_equal(labels_of(image, tmp_path / "c.zarr", client=client), whole)
    assert np.array_equal(labels_of(image_path), whole)


def test_an_array_with_empty_parts_can_be_sent_to_workers(slide: Slide, tmp_path: Path, client: Any) -> None:
    image = np.zeros((1100, 1100), np.uint16)
    image[:700, :610] = slide[0]
    there = labels_of(image, tmp_path / "out.zarr", client=client)
    assert there.max() > 300
    assert np.array_equal(there, labels_of(image))


def test_relative_paths_mean_the_same_to_workers_elsewhere(
    whole: npt.NDArray[np.uint32], image_path: Path, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "slide.tif", zarr.open_array(image_path / "0", mode="r")[:], tile=(128, 128))
    monkeypatch.chdir(tmp_path)
    client.run(os.chdir, "/")
    for image in ("slide.ome.zarr", "slide.tif"):
        assert np.array_equal(labels_of(image, f"{image}.out.zarr", client=client, block=300), whole)
    assert np.array_equal(labels_of("slide.ome.zarr", client=client, block=300, scratch="elsewhere"), whole)
    assert (tmp_path / "elsewhere" / "slide.ome.zarr.cells.tiledseg" / "run.json").is_file()


def test_a_fixed_halo_that_cuts_cells_is_reported(slide: Slide) -> None:
    found = tiledseg.segment(slide[0], diameter=DIAMETER, block=128, halo=6)
    assert found.report.n_cut_by_halo > 0
    assert found.report.n_exact_pairs < found.report.n_pairs
    assert found.report.mean_iou < 1
    found = tiledseg.segment(slide[0], diameter=DIAMETER, block=128)
    assert found.report.n_cut_by_halo == 0
    assert found.report.n_pairs > 50
    assert found.report.n_exact_pairs == found.report.n_pairs
    assert found.report.n_seam_linked == found.report.n_seam > 50
    assert found.report.mean_iou == 1


def test_every_tile_is_computed_once_whatever_the_block(slide: Slide) -> None:
    counts = {tiledseg.segment(slide[0], diameter=DIAMETER, block=block).report.n_tiles for block in (128, 1024)}
    assert len(counts) == 1


def test_estimates_the_diameter(slide: Slide) -> None:
    found = tiledseg.estimate_diameter(slide[0])
    truth = 2 * np.sqrt(np.bincount(slide[1].ravel())[1:] / np.pi)
    assert found.source == "estimated"
    assert found.value == pytest.approx(np.median(truth), rel=0.1)
    assert found.quartiles[0] < found.value < found.quartiles[1]
    assert found.n_objects > 100
    assert tiledseg.estimate_diameter(slide[0]) == found


def test_the_same_image_at_half_the_size_has_half_the_diameter(slide: Slide) -> None:
    half = slide[0].reshape(350, 2, 305, 2).mean((1, 3)).astype(np.float32)
    ratio = tiledseg.estimate_diameter(half).value / tiledseg.estimate_diameter(slide[0]).value
    assert ratio == pytest.approx(0.5, rel=0.1)


def dim_and_bright(dim: float, noise: float) -> npt.NDArray[np.float32]:
    """Cells of brightness 3000 on the left, dim ones on the right, nothing between."""
    rng = np.random.default_rng(0)
    image = np.full((600, 2600), 100.0)
    y, x = np.mgrid[:48, :48] - 23.5
    cell = np.clip(1.2 - np.hypot(y, x) / 13, 0, 1)
    for row in range(0, 576, 48):
        for column in range(0, 336, 48):
            image[row : row + 48, column : column + 48] += 3000 * cell
    for row in range(100, 500, 96):
        for column in range(2200, 2500, 96):
            image[row : row + 48, column : column + 48] += dim * cell
    return (image + rng.normal(0, noise, image.shape)).astype(np.float32)


# The dimmest cells that the network still finds, at each noise.
@pytest.mark.parametrize(
    ("dim", "noise"),
    [
        (200.0, 0.0),
        pytest.param(200.0, 10.0, marks=pytest.mark.slow),
        pytest.param(300.0, 30.0, marks=pytest.mark.slow),
        (600.0, 100.0),
    ],
)
def test_skipping_empty_tiles_costs_no_cell(dim: float, noise: float) -> None:
    image = dim_and_bright(dim, noise)
    skipping = tiledseg.segment(image, diameter=DIAMETER, block=256)
    asking = tiledseg.segment(image, diameter=DIAMETER, block=256, foreground="off")
    assert skipping.report.n_skipped_tiles > 0
    assert skipping.report.n_skipped_blocks > 0
    assert asking.report.n_skipped_tiles == 0
    dim = asking.labels.compute()[:, 2100:]
    assert dim.max() > 0, "the network itself does not see the dim cells: the test shows nothing"
    assert np.array_equal(skipping.labels.compute(), asking.labels.compute())


def test_a_constant_image_has_no_objects(tmp_path: Path) -> None:
    write_image(tmp_path / "flat.ome.zarr", np.full((300, 200), 7, np.uint8), axes="yx")
    found = tiledseg.segment(tmp_path / "flat.ome.zarr")
    assert found.report.n_objects == 0
    assert not found.labels.compute().any()
    assert found.table.num_rows == 0
    assert found.report.diameter.source == "default"


def test_pixels_that_are_not_finite_are_background_and_counted(slide: Slide) -> None:
    image = slide[0].astype(np.float32)
    image[:100, :100] = np.nan
    image[300, 300] = np.inf
    found = tiledseg.segment(image, diameter=DIAMETER)
    assert found.report.n_nonfinite == 10_001
    labels = found.labels.compute()
    assert not labels[10:90, 10:90].any()
    assert labels.max() > 300
    means = found.table["mean_0"].to_numpy()
    assert np.isfinite(means).all()


def test_the_table_measures_the_labels(image_path: Path) -> None:
    from skimage.measure import regionprops

    found = tiledseg.segment(image_path, diameter=DIAMETER, block=200)
    labels, table = found.labels.compute(), found.table.to_pydict()
    image = zarr.open_array(image_path / "0", mode="r")[:]
    props = regionprops(labels, intensity_image=image)
    assert table["label"] == [p.label for p in props]
    assert table["area"] == [p.area for p in props]
    np.testing.assert_allclose(np.column_stack([table["centroid_y"], table["centroid_x"]]), [p.centroid for p in props])
    np.testing.assert_allclose(table["centroid_y_um"], np.array(table["centroid_y"]) * 0.5)
    np.testing.assert_allclose(table["area_um2"], np.array(table["area"]) * 0.25)
    boxes = [table[f"bbox_{axis}_{edge}"] for edge in ("start", "stop") for axis in "yx"]
    assert [tuple(box) for box in zip(*boxes, strict=True)] == [p.bbox for p in props]
    np.testing.assert_allclose(table["mean_0"], [p.intensity_mean for p in props], rtol=1e-6)


def test_the_table_does_not_depend_on_the_block(slide: Slide) -> None:
    image = slide[0].astype(np.float32) / 7
    tables = [tiledseg.segment(image, diameter=DIAMETER, block=block).table for block in (128, 1024)]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_output_is_valid_ome_zarr(slide: Slide, tmp_path: Path, version: str) -> None:
    import yaozarrs
    from ome_zarr_models import open_ome_zarr

    inside, outside = tmp_path / "in.ome.zarr", tmp_path / "out.ome.zarr"
    write_image(inside, np.stack([slide[0], slide[0]]), axes="cyx", spacing_um=(0.5, 0.5), version=version)
    labels = labels_of(inside)
    assert np.array_equal(labels_of(inside, outside, ome_zarr=version), labels)
    for root in (inside, outside):
        yaozarrs.validate_zarr_store(root / "labels" / "cells")
        # A tables group lies beside the labels: it must not disturb either validator.
        for name in ("table.parquet", "report.json", "report.html"):
            assert (root / "tables" / "cells" / name).is_file()
        group = open_ome_zarr(zarr.open_group(root / "labels" / "cells", mode="r"))
        assert type(group).__name__ == "ImageLabel"
        stored = zarr.open_array(root / "labels" / "cells" / "0", mode="r")
        assert np.array_equal(stored[:], labels)
        assert stored.metadata.zarr_format == (2 if version == "0.4" else 3)
    yaozarrs.validate_zarr_store(inside)
    if version == "0.5":  # the labels group of 0.4 has no version for yaozarrs to go by
        yaozarrs.validate_zarr_store(inside / "labels")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.filterwarnings("ignore:Consolidated metadata:UserWarning")
def test_a_copy_of_all_metadata_tells_of_the_labels(slide: Slide, tmp_path: Path, version: str) -> None:
    path = tmp_path / "image.ome.zarr"
    write_image(path, slide[0][:200, :200], axes="yx", version=version)
    zarr.consolidate_metadata(path)
    labels = labels_of(path)
    seen = zarr.open_consolidated(path)
    assert np.array_equal(seen["labels/cells/0"][:], labels)
    plain = tmp_path / "plain.ome.zarr"
    write_image(plain, slide[0][:200, :200], axes="yx", version=version)
    labels_of(plain)
    with pytest.raises(ValueError, match=r"onsolidated|zmetadata"):
        zarr.open_consolidated(plain)


def test_axes_of_length_one_are_carried_along(slide: Slide, whole: npt.NDArray[np.uint32], tmp_path: Path) -> None:
    write_image(tmp_path / "five.ome.zarr", slide[0][None, None, None], axes="tczyx", spacing_um=(2.0, 0.5, 0.5))
    labels = labels_of(tmp_path / "five.ome.zarr")
    assert labels.shape == (1, 1, 700, 610)
    assert np.array_equal(labels[0, 0], whole)


def test_the_channel_is_chosen_by_name_or_index(slide: Slide, whole: npt.NDArray[np.uint32], tmp_path: Path) -> None:
    image = np.stack([np.zeros_like(slide[0]), slide[0]])
    write_image(tmp_path / "two.ome.zarr", image, axes="cyx", channels=["empty", "DAPI"])
    assert np.array_equal(labels_of(tmp_path / "two.ome.zarr", channel="DAPI", name="a"), whole)
    assert np.array_equal(labels_of(tmp_path / "two.ome.zarr", channel=1, name="b"), whole)
    assert not labels_of(tmp_path / "two.ome.zarr", name="c").any()
    with pytest.raises(ImageError, match="DAPI"):
        labels_of(tmp_path / "two.ome.zarr", channel="GFP", name="d")


def test_a_finished_run_is_not_done_again(image_path: Path) -> None:
    first = tiledseg.segment(image_path, diameter=DIAMETER, block=256)
    again = tiledseg.segment(image_path, diameter=DIAMETER, block=256)
    assert sum(again.report.computed.values()) == 0
    assert again.report.n_objects == first.report.n_objects
    assert np.array_equal(again.labels.compute(), first.labels.compute())


def test_changed_mask_settings_keep_the_flows(image_path: Path, slide: Slide) -> None:
    tiledseg.segment(image_path, diameter=DIAMETER)
    other = tiledseg.segment(image_path, diameter=DIAMETER, cellprob_threshold=2.0, min_size=100)
    assert other.report.computed["flows"] == 0
    assert other.report.computed["masks"] > 0
    fresh = labels_of(slide[0], cellprob_threshold=2.0, min_size=100)
    assert np.array_equal(other.labels.compute(), fresh)
    assert other.report.n_objects == fresh.max()


def test_other_changed_settings_are_refused_by_name(image_path: Path) -> None:
    tiledseg.segment(image_path, diameter=DIAMETER)
    with pytest.raises(SettingsError, match=r"diameter was 24\.0 and is now 30\.0; use the same again, or --restart"):
        tiledseg.segment(image_path, diameter=30.0)
    redone = tiledseg.segment(image_path, diameter=30.0, restart=True)
    assert redone.report.computed["flows"] > 0
    assert redone.report.diameter.value == 30.0


def test_another_image_at_the_same_place_is_refused(image_path: Path, slide: Slide) -> None:
    tiledseg.segment(image_path, diameter=DIAMETER)
    zarr.open_array(image_path / "0", mode="r+")[:] = slide[0][::-1]
    with pytest.raises(SettingsError, match=r"image was '.*' and is now '.*'"):
        tiledseg.segment(image_path, diameter=DIAMETER)


def test_labels_that_are_not_ours_are_never_touched(image_path: Path) -> None:
    tiledseg.segment(image_path, diameter=DIAMETER)
    scratch = image_path.parent / "slide.ome.zarr.cells.tiledseg"
    scratch.rename(scratch.with_name("gone"))
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"labels 'cells' exist already at .*; choose another --name"):
            tiledseg.segment(image_path, diameter=DIAMETER, restart=restart)
    assert not scratch.exists()
    tiledseg.segment(image_path, diameter=DIAMETER, name="other")


def test_labels_deleted_by_hand_are_published_again(image_path: Path) -> None:
    import shutil

    first = labels_of(image_path)
    shutil.rmtree(image_path / "labels" / "cells")
    again = tiledseg.segment(image_path, diameter=DIAMETER)
    assert again.report.computed["masks"] == 0
    assert np.array_equal(again.labels.compute(), first)


def test_a_chunk_that_is_missing_stops_the_run_unless_told_otherwise(image_path: Path, tmp_path: Path) -> None:
    (image_path / "0" / "c" / "1" / "0").unlink()
    with pytest.raises(ImageError, match=r"chunk 0/c/1/0 of .* is missing .*--missing-chunks fill"):
        tiledseg.segment(image_path, diameter=DIAMETER)
    assert [p.name for p in tmp_path.iterdir()] == ["slide.ome.zarr"]
    assert not (image_path / "labels").exists()
    found = tiledseg.segment(image_path, diameter=DIAMETER, missing_chunks="fill")
    assert not found.labels.compute()[300:500, 10:240].any()


def test_a_corrupt_chunk_stops_the_run_and_is_named(image_path: Path) -> None:
    chunk = image_path / "0" / "c" / "1" / "1"
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(ImageError, match=r"chunk c/1/1 of .*slide.ome.zarr/0"):
        tiledseg.segment(image_path, diameter=DIAMETER)
    assert not (image_path / "labels").exists()


def test_bad_input_is_refused_before_anything_is_written(image_path: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError, match=r"unknown model 'cyto9'; known are tiledseg-nuclei"):
        tiledseg.segment(image_path, model="cyto9")
    with pytest.raises(SettingsError, match="diameter 10000 px would scale"):
        tiledseg.segment(image_path, diameter=10_000)
    with pytest.raises(SettingsError, match="block 32 is smaller than the halo of 48 px"):
        tiledseg.segment(image_path, diameter=DIAMETER, block=32)
    with pytest.raises(ImageError, match="has 3 planes; say how cells are sought in them: --do-3d, or"):
        tiledseg.segment(np.zeros((3, 50, 50), np.uint8), axes="zyx")
    with pytest.raises(SettingsError, match="either a client or a scheduler"):
        tiledseg.segment(image_path, client=object(), workers=2)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "image",
    [
        np.ones((1, 1), np.uint8),
        np.arange(300, dtype=np.int16).reshape(1, 300) - 150,
        np.arange(300.0).reshape(300, 1),
        np.full((50, 50), np.nan),
        np.where(np.eye(60) > 0, 1e300, 1.0),
        np.arange(8100, dtype=">u2").reshape(90, 90),
        np.arange(8100, dtype=np.uint64).reshape(90, 90) << 40,
        np.linspace(0, 1, 10_000).astype(np.float16).reshape(100, 100),
    ],
    ids=["1x1", "1x300", "300x1", "nan", "huge", "big-endian", "uint64", "float16"],
)
@pytest.mark.parametrize("settings", [{}, {"diameter": 10.0, "block": 64}], ids=["auto", "given"])
def test_odd_images_are_segmented_all_the_same(image: npt.NDArray[Any], settings: dict[str, Any]) -> None:
    found = tiledseg.segment(image, **settings)
    labels = found.labels.compute()
    assert labels.shape == image.shape
    assert labels.max() == found.report.n_objects == found.table.num_rows
    assert found.report.n_nonfinite == np.count_nonzero(~(np.abs(image.astype(np.float64)) < 1e39))


def test_torch_gets_its_threads_back(slide: Slide) -> None:
    import torch

    before = torch.get_num_threads()
    tiledseg.segment(slide[0][:100, :100], diameter=DIAMETER)
    assert torch.get_num_threads() == before


def test_one_cell_on_a_black_image_is_found() -> None:
    image = np.zeros((600, 600), np.uint16)
    y, x = np.mgrid[:40, :40] - 19.5
    image[280:320, 280:320] = np.clip(1.2 - np.hypot(y, x) / 13, 0, 1) * 3000
    assert tiledseg.segment(image, diameter=DIAMETER).report.n_objects == 1


def test_percentiles_that_are_equal_are_replaced_aloud(caplog: pytest.LogCaptureFixture) -> None:
    image = np.zeros((600, 600), np.uint16)
    image[290:293, 290:293] = 3000
    with caplog.at_level(logging.WARNING):
        found = tiledseg.segment(image, diameter=DIAMETER)
    assert "percentiles 1 and 99" in caplog.text
    assert found.report.percentiles == ((0.0, 3000.0),)


def test_the_report_is_json(slide: Slide) -> None:
    import json

    report = tiledseg.segment(slide[0], diameter=DIAMETER).report
    again = json.loads(json.dumps(report.as_dict()))
    assert set(again) == {field.name for field in dataclasses.fields(report)}
    assert set(report.seconds) >= {"survey", "flows", "masks", "stitch", "publish"}
    assert report.peak_memory > 0
