"""Series over time: one survey for all time points or one for each, labels of their own in each, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tiledseg
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide
from tiledseg.volumes import label_volume, render_volume

DIAMETER = 24.0

Series = npt.NDArray[np.uint16]


@pytest.fixture(scope="module")
def series() -> Series:
    """Three pictures, shape (t, y, x)."""
    return np.stack([synthetic_slide((200, 230), diameter=DIAMETER, seed=seed)[0] for seed in range(3)])


def segmented(image: Any, output: Any = None, **settings: Any) -> tiledseg.Segmentation:
    return tiledseg.segment(image, output, **{"axes": "tyx", "diameter": DIAMETER, **settings})


def from_one(labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same labels without gaps, in the same order."""
    return np.unique(np.append(0, labels), return_inverse=True)[1][1:].reshape(labels.shape)


def test_time_points_have_labels_of_their_own_in_order(series: Series) -> None:
    found = segmented(series)
    labels = found.labels.compute()
    assert labels.shape == series.shape
    assert np.array_equal(np.unique(labels), np.arange(found.report.n_objects + 1))
    lowest, highest = zip(*((frame[frame > 0].min(), frame.max()) for frame in labels), strict=True)
    assert lowest == (1, *(value + 1 for value in highest[:-1]))
    times = found.table["t"].to_numpy()
    assert np.array_equal(times, [t for t, frame in enumerate(labels) for _ in np.unique(frame[frame > 0])])
    assert "centroid_t" not in found.table.column_names


def test_all_time_points_are_normalised_and_scaled_alike(series: Series) -> None:
    fading = (series // np.array([1, 4, 16], np.uint16)[:, None, None]).astype(np.uint16)
    found = segmented(fading, diameter="auto")
    assert found.report.percentiles is not None
    assert found.report.per_time == ()
    low, high = found.report.percentiles[0]
    assert low < np.percentile(fading[0], 99) / 2 < high
    assert found.report.diameter is not None
    assert found.report.diameter.value == pytest.approx(DIAMETER, rel=0.15)


def test_per_time_every_point_is_as_if_it_were_alone(series: Series) -> None:
    large = synthetic_slide((200, 230), diameter=1.6 * DIAMETER, seed=5)[0]
    growing = np.stack([series[0] // 8, large])
    found = segmented(growing, diameter="auto", per_time=True)
    labels = found.labels.compute()
    assert len(found.report.per_time) == 2
    assert found.report.percentiles is None
    for frame, image, moment in zip(labels, growing, found.report.per_time, strict=True):
        alone = tiledseg.segment(image)
        assert np.array_equal(from_one(frame), alone.labels.compute())
        assert alone.report.diameter == moment.diameter
        assert alone.report.percentiles == moment.percentiles
    assert found.report.diameter == max((m.diameter for m in found.report.per_time), key=lambda d: d.value)


@pytest.mark.parametrize("settings", [{}, {"per_time": True}, {"normalize": "local"}])
def test_labels_do_not_depend_on_blocks_and_workers(
    series: Series, tmp_path: Path, client: Any, settings: dict[str, Any]
) -> None:
    path = tmp_path / "series.ome.zarr"
    write_image(path, series, axes="tyx", chunk=128)
    whole = segmented(series, block=512, **settings)
    parts = segmented(path, client=client, block=64, axes=None, **settings)
    assert parts.report.n_blocks == 3 * 4 * 4
    assert np.array_equal(parts.labels.compute(), whole.labels.compute())
    assert parts.report.n_exact_pairs == parts.report.n_pairs > 0


def test_a_dark_time_point_is_no_trouble(series: Series) -> None:
    dark = series.copy()
    dark[1] = 300
    found = segmented(dark)
    labels = found.labels.compute()
    assert not labels[1].any()
    assert labels[0].any()
    assert labels[2].any()
    assert found.report.n_skipped_tiles > 0
    alone = segmented(dark, per_time=True).labels.compute()
    assert not alone[1].any()
    assert alone[0].any()


@pytest.mark.parametrize(
    "how", [pytest.param({"do_3d": True, "anisotropy": 1.0}, marks=pytest.mark.slow), {"stitch_threshold": 0.25}]
)
def test_volumes_over_time(tmp_path: Path, how: dict[str, Any]) -> None:
    frames = [render_volume(label_volume((10, 60, 60), spacing=20.0, seed=seed), seed=seed) for seed in range(2)]
    image = np.stack(frames)[:, None]
    path = tmp_path / "series.ome.zarr"
    write_image(path, image, axes="tczyx", chunk=32)
    chosen = {"axes": "tczyx", "diameter": 20.0, **how}
    whole = segmented(image, block=128, **chosen)
    labels = whole.labels.compute()
    assert labels.shape == (2, 10, 60, 60)
    assert not set(np.unique(labels[0])) & set(np.unique(labels[1])) - {0}
    parts = segmented(path, tmp_path / "out.ome.zarr", block=60, **{**chosen, "axes": None})
    assert np.array_equal(parts.labels.compute(), labels)
    assert {"t", "centroid_z", "volume"} <= set(parts.table.column_names)


def test_a_time_point_of_a_series_can_be_chosen(series: Series) -> None:
    one = segmented(series, region="t=1").labels.compute()
    assert np.array_equal(one[0], segmented(series[1:2]).labels.compute()[0])
