"""The synthetic slide: the same pixels however it is made, and labels that keep their promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tiledseg import slides
from tiledseg.errors import SettingsError
from tiledseg.slides import synthetic_slide, synthetic_slide_block

SHAPE = (310, 420)


@pytest.fixture(scope="module")
def slide():
    return synthetic_slide(SHAPE, seed=3)


@pytest.fixture(scope="module")
def large():
    return synthetic_slide((1100, 1500), seed=1)


def touching(labels):
    """Labels that have a 4-neighbour of another label."""
    found = set()
    for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        meets = (a != b) & (a > 0) & (b > 0)
        found |= set(a[meets].tolist()) | set(b[meets].tolist())
    return found


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_block_holds_the_pixels_of_the_whole(slide, data):
    image, labels = slide
    region = tuple(
        slice(*sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True)))) for n in SHAPE
    )
    block_image, block_labels = synthetic_slide_block(SHAPE, region, seed=3)
    np.testing.assert_array_equal(block_image, image[region])
    np.testing.assert_array_equal(block_labels, labels[region])


def test_uneven_light_changes_the_picture_alone_and_is_the_same_in_a_block(slide):
    image, labels = synthetic_slide(SHAPE, seed=3, illumination=5.0)
    np.testing.assert_array_equal(labels, slide[1])
    corner = np.s_[:60, :60]
    light = 0.2 + 0.8 * (30 / SHAPE[0] + 30 / SHAPE[1]) / 2
    assert image[corner].mean() == pytest.approx(light * slide[0][corner].mean(), rel=0.1)
    assert image[-20:, -20:].mean() == pytest.approx(slide[0][-20:, -20:].mean(), rel=0.1)
    region = (slice(40, 290), slice(100, 333))
    np.testing.assert_array_equal(synthetic_slide_block(SHAPE, region, seed=3, illumination=5.0)[0], image[region])


@pytest.mark.parametrize("diameter", [9.0, 24.0, 61.5])
def test_pieces_leave_no_trace(monkeypatch, diameter):
    whole = synthetic_slide(SHAPE, seed=5, diameter=diameter)
    slides._numbering.cache_clear()
    monkeypatch.setattr(slides, "PIECE", 97)
    in_pieces = synthetic_slide(SHAPE, seed=5, diameter=diameter)
    slides._numbering.cache_clear()
    np.testing.assert_array_equal(in_pieces[0], whole[0])
    np.testing.assert_array_equal(in_pieces[1], whole[1])


def test_labels_are_gap_free_in_raster_order_and_connected(large):
    image, labels = large
    assert (image.dtype, labels.dtype, image.shape, labels.shape) == (
        np.uint16,
        np.uint32,
        (1100, 1500),
        (1100, 1500),
    )
    ids, first = np.unique(labels, return_index=True)
    np.testing.assert_array_equal(ids, np.arange(ids.size))
    assert (np.diff(first[1:]) > 0).all()
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        assert ndimage.label(labels[box] == label)[1] == 1


def test_crumbs_are_removed(monkeypatch):
    # Nuclei this near to each other do cut crumbs off; at the usual distance hardly any ever do.
    monkeypatch.setattr(slides, "CLOSEST", 0.25)
    slides._numbering.cache_clear()
    labels = synthetic_slide((600, 600), diameter=6.0, density=1.0, dim_fraction=0.0)[1]
    slides._numbering.cache_clear()
    np.testing.assert_array_equal(np.unique(labels), np.arange(labels.max() + 1))
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        assert ndimage.label(labels[box] == label)[1] == 1


def test_nuclei_are_crowded_and_of_the_size_asked_for(large):
    _, labels = large
    n = int(labels.max())
    # 14 000 on 4096 x 4096 is 1 380 here; tissue is uneven, so allow a third.
    assert 920 < n < 1840
    assert len(touching(labels)) > 0.5 * n
    diameters = 2 * np.sqrt(np.bincount(labels.reshape(-1))[1:] / np.pi)
    assert np.median(diameters) == pytest.approx(24, rel=0.06)
    assert 0.08 < diameters.std() / diameters.mean() < 0.17
    # Emptier areas: some disc of five diameters across holds no nucleus.
    assert ndimage.distance_transform_edt(labels == 0).max() > 60


def test_nuclei_stand_out_unevenly(large):
    image, labels = large
    background = np.median(image[ndimage.distance_transform_edt(labels == 0) > 6])
    means = ndimage.mean(image, labels, np.arange(1, labels.max() + 1)) - background
    low, high = np.percentile(means, [15, 95])
    assert low > 0.8 * background
    assert 1.7 < high / low < 3
    eroded = ndimage.mean(image, labels * (ndimage.minimum_filter(labels, 5) == labels))
    assert eroded > 3 * background


def test_touching_nuclei_have_a_dark_rim(large):
    image, labels = large
    padded = ndimage.maximum_filter(labels, 3) != ndimage.minimum_filter(labels, 3)
    has_background = ndimage.minimum_filter(labels, 5) == 0
    is_between = padded & ~has_background
    is_inside = ndimage.minimum_filter(labels, 7) == ndimage.maximum_filter(labels, 7)
    assert image[is_between].mean() < 0.8 * image[is_inside & (labels > 0)].mean()


def test_settings_change_the_slide(slide):
    image, labels = slide
    again = synthetic_slide(SHAPE, seed=3)
    np.testing.assert_array_equal(again[0], image)
    assert not np.array_equal(synthetic_slide(SHAPE, seed=4)[1], labels)
    assert synthetic_slide(SHAPE, seed=3, density=0.2)[1].max() < 0.6 * labels.max()
    dim_image, dim_labels = synthetic_slide(SHAPE, seed=3, dim_fraction=1.0)
    np.testing.assert_array_equal(dim_labels, labels)
    assert dim_image[labels > 0].mean() < 0.6 * image[labels > 0].mean()
    assert synthetic_slide(SHAPE, seed=3, density=1.0)[1].max() >= labels.max()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 5)])
def test_tiny_slides(shape):
    image, labels = synthetic_slide(shape)
    assert image.shape == labels.shape == shape
    np.testing.assert_array_equal(np.unique(labels[labels > 0]), np.arange(1, labels.max() + 1))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"diameter": 2.0}, "diameter of the slide is 2.0; give 6 to 1000 pixels"),
        ({"density": 0.0}, "density of the slide is 0.0; give a part above 0"),
        ({"seed": -1}, "seed of the slide is -1; give an integer"),
        ({"dim_fraction": 1.5}, "dim_fraction of the slide is 1.5; give a part from 0 to 1"),
        ({"illumination": 0.5}, "illumination of the slide is 0.5; give a ratio from 1"),
        ({"shape": (0, 10)}, r"shape of the slide is \(0, 10\); give two lengths"),
        ({"shape": (3, 4, 5)}, r"shape of the slide is \(3, 4, 5\); give two lengths"),
    ],
)
def test_settings_out_of_range_are_refused(options, text):
    with pytest.raises(SettingsError, match=text):
        synthetic_slide(**{"shape": (20, 20)} | options)


@pytest.mark.parametrize("region", [np.s_[5:5, 0:3], np.s_[0:10:2, 0:3], np.s_[30:40, 0:3]])
def test_a_region_without_pixels_is_refused(region):
    with pytest.raises(SettingsError, match=r"holds no pixels of a slide of \(20, 20\)"):
        synthetic_slide_block((20, 20), region)
