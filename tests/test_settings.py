"""Settings do what their help says, on slides with known truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tiledseg
from tiledseg.errors import SettingsError
from tiledseg.slides import synthetic_slide

from .conftest import Slide

DIAMETER = 24.0


def labels_of(image: Any, **settings: Any) -> Any:
    """Labels at full size."""
    return tiledseg.segment(image, **{"diameter": DIAMETER, **settings}).labels.compute()


@pytest.fixture(scope="module")
def dim() -> Any:
    """A slide on which cells are hardly brighter than the noise, so that thresholds matter."""
    image, _ = synthetic_slide((300, 280), diameter=DIAMETER, seed=9)
    noise = np.random.default_rng(9).normal(0, 1.2 * image.std(), image.shape)
    return np.clip(image + noise, 0, 65535).astype(np.uint16)


def test_a_lower_cellprob_threshold_finds_more_and_larger_objects(dim: Any) -> None:
    low, default, high = (labels_of(dim, cellprob_threshold=value, flow_threshold=0.0) for value in (-2.0, 0.0, 2.0))
    assert (low > 0).sum() > (default > 0).sum() > (high > 0).sum()
    assert low.max() >= default.max() >= high.max()
    assert low.max() > high.max()


def test_a_higher_flow_threshold_keeps_at_least_as_many(dim: Any) -> None:
    strict, default, loose, off = (labels_of(dim, flow_threshold=value).max() for value in (0.1, 0.4, 1.0, 0.0))
    assert strict < default <= loose <= off
    assert strict < off


def test_min_size_drops_what_is_smaller(slide: Slide) -> None:
    default = labels_of(slide[0])
    sizes = np.bincount(default.ravel())[1:]
    limit = int(np.median(sizes))
    kept = np.bincount(labels_of(slide[0], min_size=limit).ravel())[1:]
    assert sorted(kept) == sorted(sizes[sizes >= limit])


def test_more_overlap_takes_more_tiles(slide: Slide) -> None:
    few, many = (tiledseg.segment(slide[0], diameter=DIAMETER, tile_overlap=value) for value in (0.1, 0.4))
    assert many.report.n_tiles > few.report.n_tiles
    assert tiledseg.compare(many.labels, slide[1]).overall.ap[0] > 0.97


def test_augmenting_asks_mirrored_tiles_and_does_not_depend_on_blocks(slide: Slide) -> None:
    image, truth = slide
    plain = tiledseg.segment(image, diameter=DIAMETER)
    whole, blocks = (tiledseg.segment(image, diameter=DIAMETER, augment=True, block=size) for size in (2048, 200))
    assert whole.report.n_tiles > plain.report.n_tiles
    assert not np.array_equal(whole.labels.compute(), plain.labels.compute())
    assert np.array_equal(whole.labels.compute(), blocks.labels.compute())
    # Were flows not turned with their tile, particles of neighbouring tiles would run apart.
    assert (
        tiledseg.compare(whole.labels, truth).overall.ap[1]
        >= tiledseg.compare(plain.labels, truth).overall.ap[1] - 0.01
    )


@pytest.mark.parametrize("value", [0.0, 0.5, "much"])
def test_an_overlap_that_tiles_cannot_have_is_refused(slide: Slide, value: object) -> None:
    with pytest.raises(SettingsError, match="tile_overlap must be"):
        tiledseg.segment(slide[0], tile_overlap=value)
