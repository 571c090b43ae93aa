"""Overview pictures, read back from the file."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tiledseg.errors import OutputError, SettingsError
from tiledseg.pictures import ON_DARK, ON_LIGHT, overview


def read(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def is_grey(picture):
    return (picture == picture[..., :1]).all(axis=-1)


def two_squares():
    labels = np.zeros((30, 40), np.uint32)
    labels[5:15, 5:15] = 70_000
    labels[5:15, 15:25] = 2
    return labels


def test_outline_is_drawn_inside_each_object(tmp_path):
    labels = two_squares()
    image = np.zeros(labels.shape, np.uint16)
    overview(image, labels, tmp_path / "picture.png", max_side=40)
    picture = read(tmp_path / "picture.png")
    expected = np.zeros(labels.shape, bool)
    for left in (5, 15):
        expected[5:15, left : left + 10] = True
        expected[6:14, left + 1 : left + 9] = False
    np.testing.assert_array_equal(~is_grey(picture), expected)
    assert tuple(picture[5, 5]) != tuple(picture[5, 20])
    assert {tuple(picture[5, 5]), tuple(picture[5, 20])} <= set(map(tuple, ON_DARK.tolist()))


@pytest.mark.parametrize("width", [5, 6, 7])
def test_neighbours_have_different_colours(tmp_path, width):
    # For each palette length up to 7, some width puts labels side by side that are equal modulo it.
    ids = 1 + np.arange(width * 7).reshape(7, width)
    labels = np.kron(ids, np.ones((8, 8), int))
    overview(np.zeros(labels.shape), labels, tmp_path / "picture.png", max_side=56)
    colours = read(tmp_path / "picture.png")[::8, ::8].astype(int)
    for one, other in (
        (colours[1:], colours[:-1]),
        (colours[:, 1:], colours[:, :-1]),
        (colours[1:, 1:], colours[:-1, :-1]),
        (colours[1:, :-1], colours[:-1, 1:]),
    ):
        assert (one != other).any(axis=-1).all()


def test_an_object_cut_by_the_picture_has_no_line_there(tmp_path):
    labels = np.full((10, 10), 3)
    overview(np.zeros((10, 10)), labels, tmp_path / "picture.png")
    assert is_grey(read(tmp_path / "picture.png")).all()


def test_large_images_are_reduced_by_a_whole_number(tmp_path):
    image = np.arange(100 * 150).reshape(100, 150)
    overview(image, np.zeros(image.shape, int), tmp_path / "a.png", max_side=60, low=0, high=image.max())
    picture = read(tmp_path / "a.png")
    assert picture.shape == (34, 50, 3)
    np.testing.assert_array_equal(picture[..., 0], np.rint(255 * (image[::3, ::3] / image.max())))


def test_a_window_is_shown_at_full_size_and_a_small_one_doubled(tmp_path):
    image = np.arange(100 * 150).reshape(100, 150)
    labels = np.zeros(image.shape, int)
    window = np.s_[10:30, 40:70]
    overview(image, labels, tmp_path / "a.png", max_side=59, low=0, high=image.max(), window=window)
    plain = read(tmp_path / "a.png")
    np.testing.assert_array_equal(plain[..., 0], np.rint(255 * (image[window] / image.max())))
    overview(image, labels, tmp_path / "a.png", max_side=60, low=0, high=image.max(), window=window)
    np.testing.assert_array_equal(read(tmp_path / "a.png"), plain.repeat(2, axis=0).repeat(2, axis=1))


def test_contrast_follows_the_percentiles_shown(tmp_path):
    image = np.linspace(500, 900, 10_000).reshape(100, 100)
    image[0, 0] = np.nan
    image[0, 1] = 1e6
    overview(image, np.zeros(image.shape, int), tmp_path / "a.png", max_side=100)
    picture = read(tmp_path / "a.png")[..., 0]
    assert picture[0, 0] == picture[0, 5] == 0
    assert picture[0, 1] == picture[-1, -1] == 255
    assert picture[50, 0] == pytest.approx(127, abs=3)
    overview(np.full((9, 9), 7), np.zeros((9, 9), int), tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == 0).all()


def test_rgb_is_shown_as_it_is_with_dark_outlines_on_light(tmp_path):
    labels = two_squares()
    image = np.full((30, 40, 3), (240, 200, 230), np.uint8)
    overview(image, labels, tmp_path / "a.png", max_side=40)
    picture = read(tmp_path / "a.png")
    np.testing.assert_array_equal(picture[10, 10], (240, 200, 230))
    np.testing.assert_array_equal(picture[20, 30], (240, 200, 230))
    assert tuple(picture[5, 5]) in set(map(tuple, ON_LIGHT.tolist()))


def test_zarr_and_dask_give_the_picture_of_numpy(tmp_path):
    import dask.array as da
    import zarr

    rng = np.random.default_rng(0)
    image = rng.integers(0, 4000, (210, 330), np.uint16)
    labels = np.kron(rng.integers(0, 4, (21, 33)), np.ones((10, 10), int)).astype(np.uint32)
    stored = zarr.create_array(tmp_path / "labels.zarr", shape=labels.shape, chunks=(64, 50), dtype="uint32")
    stored[:] = labels
    window = np.s_[7:-1, 3:301]
    overview(image, labels, tmp_path / "a.png", max_side=110, window=window)
    overview(da.from_array(image, chunks=100), stored, tmp_path / "b.png", max_side=110, window=window)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert read(tmp_path / "a.png").shape == (68, 100, 3)


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "nowhere" / "a.png"
    image = np.zeros((5, 5))
    with pytest.raises(OutputError, match=f"cannot write picture {path}: No such file"):
        overview(image, image.astype(int), path)
    with pytest.raises(OutputError, match="cannot write picture"):
        overview(image, image.astype(int), tmp_path)


@pytest.mark.parametrize(
    ("shape", "options", "text"),
    [
        ((4, 5, 2), {}, r"image has shape \(4, 5, 2\); give \(y, x\), or"),
        ((4, 6), {}, r"labels have shape \(4, 5\) but the image \(4, 6\)"),
        ((4, 5), {"max_side": 0}, "max_side is 0"),
        ((4, 5), {"window": np.s_[2:2, :]}, r"holds no pixels of an image of \(4, 5\)"),
        ((4, 5), {"window": np.s_[::2, :]}, "or skips some; give two slices without steps"),
        ((4, 5), {"low": 9.0, "high": 9.0}, "low is 9.0 and high is 9.0; give a low below high"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, shape, options, text):
    with pytest.raises(SettingsError, match=text):
        overview(np.zeros(shape), np.zeros((4, 5), int), tmp_path / "a.png", **options)
    assert not (tmp_path / "a.png").exists()
