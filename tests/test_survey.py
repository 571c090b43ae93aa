"""What holds for the whole image: percentiles, foreground, the diameter's windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiledseg
from tiledseg.foreground import foreground_map
from tiledseg.omezarr import write_image
from tiledseg.survey import process_block

from .conftest import Slide


def statistics_of(image: np.ndarray) -> np.ndarray:
    return process_block(image.astype(np.float32), tuple(slice(0, n) for n in image.shape))


def test_percentiles_are_those_of_the_whole_image_whatever_the_block(slide: Slide) -> None:
    image = slide[0][:256, :256]
    for block in (64, 256):
        report = tiledseg.segment(image, diameter=24.0, block=block).report
        assert report.percentiles[0] == pytest.approx(tuple(np.percentile(image, [1, 99])))


@pytest.mark.parametrize("foreground", ["auto", "off"])
def test_empty_parts_of_a_slide_do_not_count(slide: Slide, foreground: str) -> None:
    """A slide with cells on one percent of it: by all its pixels both percentiles are background."""
    image = np.random.default_rng(0).poisson(150, (2600, 2600)).astype(np.uint16)
    image[1000:1260, 1500:1760] = slide[0][:260, :260]
    alone = tiledseg.segment(slide[0][:260, :260], diameter=24.0)
    among = tiledseg.segment(image, diameter=24.0, foreground=foreground)
    assert among.report.percentiles[0][1] == pytest.approx(alone.report.percentiles[0][1], rel=0.2)
    assert (among.report.n_skipped_tiles > 50) == (foreground == "auto")
    found = among.labels.compute()[1000:1260, 1500:1760]
    assert tiledseg.compare(found, alone.labels.compute()).overall.ap[0] > 0.9
    assert among.report.n_objects == pytest.approx(alone.report.n_objects, abs=5)


def test_percentiles_of_a_large_image_are_sampled_evenly() -> None:
    image = np.add.outer(np.arange(3000.0), np.arange(2500.0)).astype(np.float32)
    found = tiledseg.segment(image, diameter=400.0).report
    assert found.percentiles[0] == pytest.approx(tuple(np.percentile(image, [1, 99])), rel=1e-2)


@given(st.floats(0.1, 1000), st.floats(-500, 500), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_white_noise_is_background_and_its_level_is_measured(noise: float, offset: float, seed: int) -> None:
    image = np.random.default_rng(seed).normal(offset, noise, (512, 384))
    statistics = statistics_of(image)
    assert statistics.shape == (3, 8, 6)
    assert statistics[2].mean() == pytest.approx(noise, rel=0.1)
    # Noise alone passes now and then; each time it does, nine cells of the map are lost to it.
    assert foreground_map(statistics, contrast=1.0e-6, reach=(1, 1)).mean() <= 9 / 48


@given(st.floats(1.5, 50), st.integers(8, 500), st.integers(8, 370), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_a_cell_in_noise_is_foreground_with_its_surroundings(contrast: float, y: int, x: int, seed: int) -> None:
    image = np.random.default_rng(seed).normal(100, 1.0, (512, 384))
    rows, columns = np.ogrid[:512, :384]
    image[np.hypot(rows - y, columns - x) < 6] += contrast
    found = foreground_map(statistics_of(image), contrast=1.0, reach=(1, 1))
    cell = (min(y, 511) // 64, min(x, 383) // 64)
    assert found[max(0, cell[0] - 1) : cell[0] + 2, max(0, cell[1] - 1) : cell[1] + 2].all()


def test_a_pyramid_changes_neither_percentiles_nor_foreground(slide: Slide, tmp_path: Path) -> None:
    write_image(tmp_path / "one.ome.zarr", slide[0], axes="yx", n_levels=1)
    write_image(tmp_path / "three.ome.zarr", slide[0], axes="yx", n_levels=3)
    one, three = (
        tiledseg.segment(tmp_path / name, tmp_path / f"out-{name}", diameter=24.0)
        for name in ("one.ome.zarr", "three.ome.zarr")
    )
    assert one.report.percentiles == three.report.percentiles
    assert np.array_equal(one.labels.compute(), three.labels.compute())


def test_cells_much_larger_than_the_network_wants_are_read_from_a_coarse_level(slide: Slide, tmp_path: Path) -> None:
    """Without the level, means over whole pixels take its place: nearly the same cells."""
    large = np.kron(slide[0][:320, :320], np.ones((4, 4), np.uint16))
    write_image(tmp_path / "large.ome.zarr", large, axes="yx", n_levels=3)
    with_pyramid = tiledseg.segment(tmp_path / "large.ome.zarr", diameter=96.0).labels.compute()
    without = tiledseg.segment(large, diameter=96.0).labels.compute()
    small = tiledseg.segment(slide[0][:320, :320], diameter=24.0).labels.compute()
    assert small.max() > 80
    for labels in (with_pyramid, without):
        score = tiledseg.compare(labels, np.kron(small, np.ones((4, 4), np.uint32))).overall
        assert score.ap[1] > 0.97


def test_few_objects_make_the_diameter_a_guess_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    image = np.random.default_rng(0).normal(100, 1, (400, 400)).astype(np.float32)
    y, x = np.mgrid[:48, :48] - 23.5
    image[170:218, 170:218] += 1000 * np.clip(1.2 - np.hypot(y, x) / 13, 0, 1)
    found = tiledseg.estimate_diameter(image)
    assert found.source == "default"
    assert "give --diameter" in caplog.text


@pytest.mark.parametrize("side", [250, 400, 560])
def test_the_windows_of_a_small_image_see_each_of_its_cells_once(slide: Slide, side: int) -> None:
    image = slide[0][:side, :side]
    found = tiledseg.estimate_diameter(image)
    n_cells = tiledseg.segment(image, diameter=found.value).report.n_objects
    assert found.n_objects <= n_cells
    # Those that one window cuts another sees whole, but for cells whose middles lie just beyond.
    assert found.n_objects >= 0.85 * n_cells
