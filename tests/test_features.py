"""The table against scikit-image on the whole array: areas, boxes, centroids and intensities, shapes on request."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import regionprops_table
from skimage.morphology import convex_hull_image

import tiledseg
from tiledseg import features, publish
from tiledseg.frames import Extent
from tiledseg.hulls import convex_volume

from .results import Labels, as_drawn, drawn_labels, published, small_regions

SHAPE = (150, 170)
IN_VOLUMES = [
    "area_convex",
    "axis_major_length",
    "axis_minor_length",
    "equivalent_diameter_area",
    "euler_number",
    "extent",
    "feret_diameter_max",
    "solidity",
]
IN_PLANES = [*IN_VOLUMES, "eccentricity", "orientation", "perimeter"]
INTENSITIES = {name: f"intensity_{name}" for name in ("mean", "std", "min", "max")}


def noise(shape: tuple[int, ...], seed: int = 1) -> npt.NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, 60_000, shape).astype(np.uint16)


def check(found: tiledseg.Segmentation, image: npt.NDArray[Any], names: list[str]) -> None:
    """The table is what scikit-image says of the published labels and an image of shape (c, *spatial)."""
    labels = found.labels.compute()
    axes = "zyx"[-labels.ndim :]
    wanted = ["label", "area", "bbox", "centroid", *INTENSITIES.values(), *names]
    expected = regionprops_table(labels, np.moveaxis(image, 0, -1), properties=wanted)
    table = {name: column.to_numpy() for name, column in zip(found.table.column_names, found.table, strict=True)}
    assert len(table["label"]) == len(expected["label"]) > 10
    exact = {"label": "label", "area" if labels.ndim == 2 else "volume": "area"}
    for i, axis in enumerate(axes):
        exact |= {f"centroid_{axis}": f"centroid-{i}"}
        exact |= {f"bbox_{axis}_start": f"bbox-{i}", f"bbox_{axis}_stop": f"bbox-{labels.ndim + i}"}
    for name, theirs in exact.items():
        off = 1e-14 if name.startswith("centroid") else 0  # they add in another order
        np.testing.assert_allclose(table[name], expected[theirs], rtol=off, err_msg=name)
    for c in range(len(image)):
        channel = "drawn" if c == 0 else f"c{c - 1}"
        for name, theirs in INTENSITIES.items():
            np.testing.assert_allclose(table[f"{name}_{channel}"], expected[f"{theirs}-{c}"], rtol=1e-6, atol=1e-6)
    for name in names:
        np.testing.assert_allclose(table[name], expected[name], rtol=1e-12, atol=1e-12, err_msg=name)


def without_flat(volume: Labels) -> Labels:
    """Only objects that extend in all directions: of others scikit-image has no convex hull."""
    for label in np.unique(volume[volume > 0]):
        if np.linalg.matrix_rank(np.cov(np.argwhere(volume == label).T, bias=True)) < 3:
            volume[volume == label] = 0
    return volume


@pytest.fixture(scope="module")
def picture() -> Labels:
    return drawn_labels(SHAPE)


@pytest.mark.parametrize(("region", "shard"), [(32, False), (64, True), (2048, False)])
def test_table_and_shapes_are_those_of_scikit_image_whatever_the_regions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Labels, region: int, shard: bool
) -> None:
    small_regions(monkeypatch, region)
    others = (noise(SHAPE), np.full(SHAPE, 7, np.uint16))
    found = published(tmp_path, picture, "yx", others=others, spacing_um=(0.5, 0.5), shard=shard, features=True)
    check(found, np.stack([picture.astype(np.uint16), *others]), IN_PLANES)
    table = found.table.to_pandas()
    assert np.array_equal(table.area_um2, table.area * 0.25)
    for name in ("axis_major_length", "feret_diameter_max", "perimeter", "equivalent_diameter_area"):
        np.testing.assert_allclose(table[f"{name}_um"], table[name] * 0.5)
    assert {"mean_drawn", "std_c1", "min_c0", "max_c1"} < set(table)
    assert (table.std_c1 == 0).all()
    assert {str(table[name].dtype) for name in ("min_c0", "max_c1")} == {"uint16"}


def test_shapes_in_volumes_with_planes_that_are_thick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_regions(monkeypatch, 16)
    volume = without_flat(drawn_labels((12, 50, 60), seed=2))
    spacing = (2.0, 0.5, 0.5)
    wishes: dict[str, Any] = {"do_3d": True, "features": True}
    found = published(tmp_path, volume, "zyx", others=(noise(volume.shape),), spacing_um=spacing, **wishes)
    check(found, np.stack([volume.astype(np.uint16), noise(volume.shape)]), IN_VOLUMES)
    wanted = ["axis_major_length", "axis_minor_length", "equivalent_diameter_area", "feret_diameter_max"]
    expected = regionprops_table(found.labels.compute(), properties=wanted, spacing=spacing)
    for name in wanted:
        np.testing.assert_allclose(found.table[f"{name}_um"].to_numpy(), expected[name], rtol=1e-12, atol=1e-12)
    assert "perimeter" not in found.table.column_names


@pytest.mark.parametrize("axes", ["tyx", "zyx", "tzyx"])
def test_shapes_frame_by_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axes: str) -> None:
    small_regions(monkeypatch, 32)
    frames = drawn_labels((2, 40, 50), seed=3)
    frames = frames if axes != "tzyx" else np.stack([frames, frames[:, ::-1]])
    wishes: dict[str, Any] = {"stitch_threshold": 0} if "z" in axes else {}
    found = published(tmp_path, frames, axes, features=True, **wishes)
    labels, table = found.labels.compute(), found.table.to_pandas()
    for at in np.ndindex(labels.shape[:-2]):
        expected = regionprops_table(labels[at], properties=["label", "area", *IN_PLANES])
        mine = table[np.logical_and.reduce([table[axis] == i for axis, i in zip(axes, at, strict=False)])]
        for name, values in expected.items():
            np.testing.assert_allclose(mine[name], values, rtol=1e-12, atol=1e-12, err_msg=name)
    assert not [name for name in table if name.endswith("_um")]


def test_values_that_are_not_finite_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_regions(monkeypatch, 32)
    picture = drawn_labels((60, 70), seed=4)
    other = (1e6 + noise(picture.shape) / 60_000).astype(np.float32)
    other[::3] = np.nan
    other[picture == picture.max()] = np.inf
    table = published(tmp_path, picture, "yx", others=(other,)).table.to_pandas()
    labels = tiledseg.segment(picture, segmenter=as_drawn, halo=0).labels.compute()
    for row in table.itertuples():
        values = other[labels == row.label].astype(np.float64)
        values = values[np.isfinite(values)]
        if not values.size:
            assert np.isnan([row.mean_c0, row.std_c0, row.min_c0, row.max_c0]).all()
            continue
        expected = [values.mean(), values.std(), values.min(), values.max()]
        np.testing.assert_allclose([row.mean_c0, row.std_c0, row.min_c0, row.max_c0], expected, rtol=1e-6, atol=1e-6)
    assert np.isnan(table.mean_c0).any()


def test_without_objects_there_is_a_table_with_all_columns(tmp_path: Path) -> None:
    empty = np.zeros((40, 50), np.uint32)
    found = published(tmp_path, empty, "yx", others=(noise((40, 50)),), features=True, csv=True, polygons="geojson")
    assert found.table.num_rows == 0
    assert {"eccentricity", "mean_c0", "bbox_y_start"} < set(found.table.column_names)


def test_shapes_of_labels_in_memory(picture: Labels) -> None:
    found = tiledseg.segment(picture, segmenter=as_drawn, halo=0, block=4096, features=True)
    expected = regionprops_table(found.labels.compute(), properties=["label", *IN_PLANES])
    for name, values in expected.items():
        np.testing.assert_allclose(found.table[name].to_numpy(), values, rtol=1e-12, atol=1e-12, err_msg=name)


def test_shapes_can_be_asked_for_later_and_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Labels
) -> None:
    small_regions(monkeypatch, 64)
    calls: list[int] = []
    measure = publish.describe_region

    def counted(position: int, job: Any) -> dict[str, Any]:
        calls.append(position)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(position, job)

    first = published(tmp_path, picture, "yx")
    assert "solidity" not in first.table.column_names
    chunks = {file: file.stat().st_mtime_ns for file in (tmp_path / "out.ome.zarr/labels").rglob("c/*/*")}
    monkeypatch.setattr(publish, "describe_region", counted)
    with pytest.raises(KeyboardInterrupt):
        published(tmp_path, picture, "yx", features=True)
    n_before = len(calls)
    second = published(tmp_path, picture, "yx", features=True)
    assert "solidity" in second.table.column_names
    assert len(set(calls)) == 9
    assert len(calls) < n_before + 9
    published(tmp_path, picture, "yx", features=True)
    assert len(calls) <= n_before + 9
    assert {file: file.stat().st_mtime_ns for file in chunks} == chunks
    assert "solidity" not in published(tmp_path, picture, "yx").table.column_names


def test_an_object_too_large_to_look_at_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_regions(monkeypatch, 16)
    monkeypatch.setattr(publish, "LARGEST_BOX", 1000)
    labels = np.zeros((70, 70), np.uint32)
    labels[1:60, 1:60], labels[64:68, 3:9] = 1, 2
    caplog.set_level(logging.WARNING, "tiledseg")
    table = published(tmp_path, labels, "yx", features=True).table.to_pandas()
    assert "1 objects are too large to measure their shape: NaN in the table." in caplog.text
    assert np.isnan(table.solidity[0])
    assert table.solidity[1] == 1


def test_a_flat_object_of_a_volume_has_no_hull() -> None:
    names = features.feature_names(Extent("zyx", "zyx", "zyx"), (2, 1, 1))
    values = dict(zip(names, features.shape_features(np.ones((1, 4, 5), bool), (2, 1, 1)), strict=True))
    lacking = {"area_convex", "feret_diameter_max", "solidity", "feret_diameter_max_um"}
    assert {name for name, value in values.items() if np.isnan(value)} == lacking
    assert values["extent"] == 1


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_convex_hulls_of_volumes_are_those_of_scikit_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(2, 14, 3)) < rng.choice([0.05, 0.4, 1])
    mask[0, 0, 0] = mask[-1, 0, 0] = mask[0, -1, 0] = mask[0, 0, -1] = True
    np.testing.assert_array_equal(convex_volume(mask), convex_hull_image(mask))


def test_names_match_the_values() -> None:
    mask = np.ones((3, 5), bool)

    for spacing in (None, (0.5, 0.5), (1.0, 0.5)):
        names = features.feature_names(Extent("yx", "yx", "yx"), spacing)
        assert len(names) == len(features.shape_features(mask, spacing))
        assert ("perimeter_um" in names) == (spacing == (0.5, 0.5))
