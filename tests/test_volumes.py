"""Volumes end to end: one answer whatever the blocks, thick planes, planes stitched, parts of an image."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr

import tiledseg
from tiledseg.errors import ImageError, SettingsError
from tiledseg.grid import Lattice
from tiledseg.networks.models import find_model
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide
from tiledseg.volumes import label_volume, render_volume

from .cellpose_oracle import labels_3d, matched_share, stitched_planes

# Of torch, when Cellpose builds its sparse histogram.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.usefixtures("small_tiles"),
]

DIAMETER = 20.0
SHAPE = (28, 72, 80)

Volume = tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]


@pytest.fixture(scope="module")
def volume() -> Volume:
    """Picture and truth of touching cells."""
    truth = label_volume(SHAPE, spacing=DIAMETER, seed=2)
    return render_volume(truth, seed=2), truth


@pytest.fixture(scope="module")
def whole(volume: Volume, small_tiles: int) -> tiledseg.Segmentation:  # noqa: ARG001
    """In 3D, as one block, in this process."""
    return segmented(volume[0], block=128)


@pytest.fixture(scope="module")
def stored(
    volume: Volume,
    small_tiles: int,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """The volume on disk, and a run on it: with other mask settings its flows are kept."""
    folder = tmp_path_factory.mktemp("stored")
    tifffile.imwrite(folder / "volume.tif", volume[0])
    segmented(folder / "volume.tif", folder / "out.ome.zarr")
    return folder / "volume.tif", folder / "out.ome.zarr"


def segmented(image: Any, output: Any = None, **settings: Any) -> tiledseg.Segmentation:
    chosen = {"axes": "zyx", "diameter": DIAMETER, "do_3d": True, "anisotropy": 1.0, **settings}
    return tiledseg.segment(image, output, **{k: v for k, v in chosen.items() if v is not None})


def labels_of(image: Any, output: Any = None, **settings: Any) -> npt.NDArray[np.uint32]:
    return np.asarray(segmented(image, output, **settings).labels.compute())


def test_finds_the_cells_of_a_volume(volume: Volume, whole: tiledseg.Segmentation) -> None:
    labels = np.asarray(whole.labels)
    assert tiledseg.compare(labels, volume[1]).overall.ap[0] > 0.5
    assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1))
    first = np.unique(labels, return_index=True)[1][1:]
    assert (np.diff(first) > 0).all(), "ids are not in raster order of first pixels"


def test_every_tile_of_every_orientation_is_asked_once(whole: tiledseg.Segmentation) -> None:
    model = find_model("tiledseg-nuclei")
    shape = tuple(round(n * model.diam_mean / DIAMETER) for n in SHAPE)
    lattices = [Lattice(shape, model.tile, model.stride, thin) for thin in range(3)]
    assert whole.report.n_tiles + whole.report.n_skipped_tiles == sum(lattice.n_tiles for lattice in lattices)
    assert sum(lattice.n_tiles for lattice in lattices) == sum(shape), "the volume is smaller than a tile"


@pytest.mark.parametrize("block", [40, 57])
def test_labels_do_not_depend_on_the_block(stored: tuple[Path, Path], whole: tiledseg.Segmentation, block: int) -> None:
    found = segmented(*stored, block=block)
    assert np.array_equal(found.labels.compute(), whole.labels.compute())
    assert found.report.n_blocks > 1
    assert found.report.n_cut_by_halo == 0
    assert found.report.n_exact_pairs == found.report.n_pairs > 0


@pytest.mark.parametrize("chosen", [{"flow3d_smooth": 1.5}, {"resample": False}, {"min_size": 1500}])
def test_nor_with_other_mask_settings_for_which_flows_are_kept(
    stored: tuple[Path, Path], whole: tiledseg.Segmentation, chosen: dict[str, Any]
) -> None:
    one, parts = (segmented(*stored, block=block, **chosen) for block in (128, 45))
    assert one.report.computed["flows"] == parts.report.computed["flows"] == 0
    assert np.array_equal(one.labels.compute(), parts.labels.compute())
    assert not np.array_equal(one.labels.compute(), whole.labels.compute())
    assert parts.table["volume"].to_numpy().min() >= chosen.get("min_size", 15)


def test_labels_do_not_depend_on_who_works(
    volume: Volume, whole: tiledseg.Segmentation, tmp_path: Path, client: Any
) -> None:
    path = tmp_path / "volume.ome.zarr"
    write_image(path, volume[0], axes="zyx", spacing_um=(0.5, 0.5, 0.5), chunk=32)
    found = segmented(path, client=client, block=50, axes=None, anisotropy=None)
    assert np.array_equal(found.labels.compute(), whole.labels.compute())
    table = {
        name: column.to_numpy() for name, column in zip(found.table.column_names, found.table.columns, strict=True)
    }
    assert np.array_equal(table["volume"], np.bincount(whole.labels.compute().ravel())[1:])
    assert np.array_equal(table["volume_um3"], table["volume"] * 0.125)
    assert {"centroid_z", "centroid_z_um", "bbox_z_start", "mean_0"} <= set(table)


def test_agrees_with_cellpose_in_3d() -> None:
    image = render_volume(label_volume((40, 110, 120), spacing=DIAMETER, seed=3), seed=3)
    found = segmented(image)
    assert found.report.n_objects > 80
    assert matched_share(found.labels, labels_3d(image, found.report), 0.7) >= 0.97


def test_thick_planes(tmp_path: Path) -> None:
    truth = label_volume((10, 80, 80), spacing=DIAMETER, seed=4, anisotropy=5.0)
    image = render_volume(truth, seed=4, anisotropy=5.0)
    path = tmp_path / "volume.ome.zarr"
    write_image(path, image, axes="zyx", spacing_um=(2.5, 0.5, 0.5))
    known = labels_of(path, tmp_path / "a.ome.zarr", axes=None, anisotropy=None)
    assert tiledseg.compare(known, truth).overall.ap[0] > 0.35
    assert np.array_equal(labels_of(image, anisotropy=5.0), known)
    in_blocks = labels_of(path, tmp_path / "a.ome.zarr", axes=None, anisotropy=None, block=40)
    assert np.array_equal(in_blocks, known)
    assert tiledseg.compare(labels_of(image, anisotropy=1.0), truth).overall.ap[0] < 0.15


def test_planes_of_unknown_thickness_are_taken_as_thick_as_wide_aloud(
    volume: Volume, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tiledseg.segment(volume[0][:4], axes="zyx", do_3d=True, diameter=DIAMETER)
    assert "numpy array does not say how thick its planes are" in caplog.text


@pytest.mark.parametrize("settings", [{"do_3d": True}, {"do_3d": False, "stitch_threshold": 0.3}])
def test_a_single_plane_is_a_picture(
    volume: Volume, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    plane = volume[0][14]
    with caplog.at_level(logging.INFO):
        found = labels_of(plane[None], anisotropy=None, **settings)
    assert "has a single plane: cells are sought in two dimensions" in caplog.text
    flat = tiledseg.segment(plane, diameter=DIAMETER).labels.compute()
    assert np.array_equal(found[0], flat)


@pytest.mark.parametrize("shape", [(2, 60, 60), (60, 1, 60), (60, 60, 1), (3, 2, 200)])
def test_thin_volumes_are_segmented_all_the_same(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 1000, shape).astype(np.uint16)
    labels = labels_of(image, block=48)
    assert labels.shape == shape


def test_the_order_of_axes_on_disk_does_not_matter(volume: Volume, whole: tiledseg.Segmentation) -> None:
    turned = np.ascontiguousarray(volume[0].transpose(2, 0, 1))
    assert np.array_equal(labels_of(turned, axes="xzy"), whole.labels.compute())


def test_a_function_gets_volumes(volume: Volume) -> None:
    from scipy import ndimage

    def bright(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        assert pixels.ndim == 3
        return ndimage.label(pixels > 2000)[0]

    chosen = {"axes": "zyx", "do_3d": True, "halo": 30, "segmenter": bright}
    whole = tiledseg.segment(volume[0], block=128, **chosen)
    parts = tiledseg.segment(volume[0], block=40, **chosen)
    assert np.array_equal(whole.labels.compute(), ndimage.label(volume[0] > 2000)[0])
    assert np.array_equal(parts.labels.compute(), whole.labels.compute())


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"do_3d": None, "anisotropy": None}, ImageError, "has 28 planes; say how cells are sought in them"),
    ({"stitch_threshold": 0.2}, SettingsError, "do_3d finds cells in 3D and stitch_threshold plane by plane"),
    ({"do_3d": None, "stitch_threshold": 0.2}, SettingsError, "anisotropy counts in 3D only"),
    ({"flow_threshold": 0.8}, SettingsError, "flow_threshold does not count in 3D"),
    ({"per_time": True}, SettingsError, "per_time is for time series, and numpy array has axes 'zyx'"),
    ({"block": 36}, SettingsError, "block 36 is smaller than the halo of 40 px"),
]


@pytest.mark.parametrize(("settings", "kind", "text"), BAD)
def test_what_makes_no_sense_is_refused(
    volume: Volume, settings: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        segmented(volume[0], **settings)


# Plane by plane


def stitched(image: Any, **settings: Any) -> tiledseg.Segmentation:
    chosen = {"axes": "zyx", "diameter": DIAMETER, "stitch_threshold": 0.25, **settings}
    return tiledseg.segment(image, **chosen)


@pytest.fixture(scope="module")
def joined(volume: Volume) -> tiledseg.Segmentation:
    """Planes of the volume stitched, as one block."""
    return stitched(volume[0], block=128)


@pytest.mark.parametrize("block", [60, 71])
def test_stitched_planes_do_not_depend_on_the_block(volume: Volume, joined: tiledseg.Segmentation, block: int) -> None:
    found = stitched(volume[0], block=block)
    assert found.report.n_blocks >= 2
    assert np.array_equal(found.labels.compute(), joined.labels.compute())


def test_stitched_planes_agree_with_cellpose(volume: Volume, joined: tiledseg.Segmentation) -> None:
    alone = stitched(volume[0], stitch_threshold=0, min_size=0).labels.compute()
    assert matched_share(joined.labels, stitched_planes(alone, 0.25), 0.9) >= 0.99


@pytest.mark.slow
def test_stitched_planes_agree_with_cellpose_on_a_real_volume(data: Path) -> None:
    image = tifffile.imread(data / "plantseg_3d" / "nuclei_1135_image.tif")
    found = stitched(image, block=90)
    alone = stitched(image, stitch_threshold=0, min_size=0).labels.compute()
    assert found.report.n_objects > 40
    assert matched_share(found.labels, stitched_planes(alone, 0.25), 0.9) >= 0.99


def test_a_missing_plane_does_not_cut_cells(volume: Volume, joined: tiledseg.Segmentation) -> None:
    damaged = volume[0].copy()
    damaged[14] = damaged.min()
    bridged, cut = (stitched(damaged, stitch_gap=gap, block=64).labels.compute() for gap in (1, 0))
    before = joined.labels.compute()
    in_both = np.intersect1d(before[12], before[16])[1:]
    assert in_both.size > 5

    def still_one(labels: npt.NDArray[np.uint32]) -> int:
        pairs = [[labels[z][before[z] == label] for z in (12, 16)] for label in in_both]
        return sum(np.bincount(low).argmax() == np.bincount(high).argmax() > 0 for low, high in pairs)

    assert still_one(bridged) >= 0.9 * in_both.size
    assert still_one(cut) == 0
    assert not bridged[14].any()


def test_threshold_0_joins_no_planes_and_keeps_the_flows(volume: Volume, tmp_path: Path) -> None:
    path, output = tmp_path / "volume.tif", tmp_path / "out.ome.zarr"
    tifffile.imwrite(path, volume[0])
    alone = stitched(path, output=output, stitch_threshold=0)
    labels = alone.labels.compute()
    assert not set(np.unique(labels[10])) & set(np.unique(labels[11])) - {0}
    assert alone.table["z"].to_pylist() == sorted(alone.table["z"].to_pylist())
    again = stitched(path, output=output, stitch_threshold=0.5)
    assert again.report.computed["flows"] == 0
    assert again.report.n_objects < alone.report.n_objects


def test_size_limits_count_whole_stitched_objects(volume: Volume, joined: tiledseg.Segmentation) -> None:
    sizes = np.bincount(joined.labels.compute().ravel())[1:]
    low, high = (int(v) for v in np.percentile(sizes, [30, 80]))
    found = stitched(volume[0], min_size=low, max_size=high, block=60)
    kept = np.bincount(found.labels.compute().ravel())[1:]
    assert sorted(kept) == sorted(sizes[(sizes >= low) & (sizes <= high)])
    assert found.report.n_too_large == (sizes > high).sum()


# Parts of an image


def test_a_region_is_segmented_as_if_it_were_the_image(volume: Volume, tmp_path: Path) -> None:
    path = tmp_path / "volume.ome.zarr"
    write_image(path, volume[0], axes="zyx", spacing_um=(1.0, 1.0, 1.0), chunk=32)
    found = segmented(path, tmp_path / "a.ome.zarr", axes=None, anisotropy=None, region="z=4:22,x=20:")
    assert np.array_equal(found.labels.compute(), labels_of(np.ascontiguousarray(volume[0][4:22, :, 20:])))
    written = zarr.open_group(tmp_path / "a.ome.zarr" / "labels" / "cells", mode="r").attrs["ome"]
    transform: Any = written["multiscales"][0]["datasets"][0]["coordinateTransformations"]  # type: ignore[index,call-overload]
    assert transform[1]["translation"] == [4.0, 0.0, 20.0]
    with pytest.raises(SettingsError, match="region was 'z=4:22,x=20:' and is now"):
        segmented(path, tmp_path / "a.ome.zarr", axes=None, anisotropy=None, region="z=4:23,x=20:")


def test_a_level_is_segmented_as_if_it_were_the_image_with_sizes_in_full_pixels(tmp_path: Path) -> None:
    image = render_volume(label_volume((30, 120, 120), spacing=40.0, seed=6), seed=6)
    path, output = tmp_path / "volume.ome.zarr", tmp_path / "a.ome.zarr"
    write_image(path, image, axes="zyx", spacing_um=(0.5, 0.5, 0.5), chunk=80, n_levels=2)
    chosen = {"axes": None, "anisotropy": None, "level": 1, "diameter": 40.0, "min_size": 2000, "max_size": 20_000}
    found = segmented(path, output, **chosen)
    level = zarr.open_array(path / "1", mode="r")[:]
    same = segmented(level, diameter=20.0, min_size=500, max_size=5000, anisotropy=0.5)
    assert found.labels.shape == (30, 60, 60)
    assert found.report.n_objects > 5
    assert np.array_equal(found.labels.compute(), same.labels.compute())
    assert found.report.diameter is not None
    assert found.report.diameter.value == pytest.approx(40.0)
    written: Any = zarr.open_group(output / "labels" / "cells", mode="r").attrs["ome"]
    transform = written["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert transform[0]["scale"] == [0.5, 1.0, 1.0]
    assert transform[1]["translation"] == [0.0, 0.25, 0.25]
    # Planes are given, or taken, to be as thick as pixels of the full-size image are wide.
    again = segmented(path, tmp_path / "b.ome.zarr", **{**chosen, "anisotropy": 1.0})
    assert np.array_equal(again.labels.compute(), same.labels.compute())


@pytest.mark.parametrize("factor", [1, 3])
def test_cells_are_sought_where_the_mask_says(volume: Volume, tmp_path: Path, factor: int) -> None:
    wanted = np.zeros([-(-n // factor) for n in SHAPE], np.uint8)
    wanted[: wanted.shape[0] // 2, :, wanted.shape[2] // 3 :] = 1
    places = [((2 * np.arange(n) + 1) * m) // (2 * n) for n, m in zip(SHAPE, wanted.shape, strict=True)]
    at_pixels = wanted[np.ix_(*places)] > 0
    path = tmp_path / "mask.tif"
    tifffile.imwrite(path, wanted)
    whole = segmented(volume[0], mask=wanted)
    labels = whole.labels.compute()
    assert labels[at_pixels].any()
    assert not labels[~at_pixels].any()
    assert whole.report.n_skipped_tiles > 0
    assert np.array_equal(labels_of(volume[0], mask=wanted, block=50), labels)


def test_a_mask_counts_in_pictures_functions_and_without_resampling(volume: Volume) -> None:
    plane = volume[0][14]
    wanted = np.zeros((9, 10), np.uint8)
    wanted[:, 5:] = 1
    for chosen in ({"diameter": DIAMETER}, {"diameter": DIAMETER, "resample": False}):
        labels = tiledseg.segment(plane, mask=wanted, **chosen).labels.compute()
        assert labels[:, 42:].any()
        assert not labels[:, :38].any()
    function = tiledseg.segment(plane, mask=wanted, segmenter=lambda p: (p > 0).astype(int), halo=10)
    assert np.array_equal(function.labels.compute() > 0, np.repeat(np.repeat(wanted, 8, 0), 8, 1) > 0)


def test_only_what_the_mask_shows_counts_for_percentiles_and_diameter() -> None:
    small, large = (synthetic_slide((320, 320), diameter=d, seed=3)[0] for d in (14.0, 32.0))
    image = np.concatenate([small // 8, large], axis=1)
    wanted = np.repeat([[0, 1]], 2, axis=0).astype(np.uint8)
    for chosen in ({}, {"foreground": "off"}):
        found = tiledseg.segment(image, mask=wanted, **chosen).report
        assert found.diameter is not None
        assert found.diameter.value == pytest.approx(32.0, rel=0.15)
    assert found.percentiles is not None
    alone = tiledseg.segment(large).report
    assert alone.percentiles is not None
    np.testing.assert_allclose(
        tiledseg.segment(image, mask=wanted, diameter=32.0).report.percentiles, alone.percentiles, rtol=0.02
    )


def test_a_run_does_not_go_on_with_another_mask(volume: Volume, tmp_path: Path) -> None:
    path, output = tmp_path / "plane.tif", tmp_path / "out.ome.zarr"
    tifffile.imwrite(path, volume[0][14])
    wanted = np.ones((9, 10), np.uint8)
    tiledseg.segment(path, output, mask=wanted, diameter=DIAMETER)
    wanted[0] = 0
    with pytest.raises(SettingsError, match="mask was"):
        tiledseg.segment(path, output, mask=wanted, diameter=DIAMETER)
