"""Masks of any resolution, against a lookup pixel by pixel."""

from __future__ import annotations

import itertools
import pickle
from fractions import Fraction

import dask.array as da
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tiledseg import mask as mask_module
from tiledseg.errors import ImageError
from tiledseg.images import Image, at_level, at_region, open_image
from tiledseg.mask import Mask, open_mask
from tiledseg.omezarr import write_image

RNG = np.random.default_rng(5)
SIZES = {"t": 3, "c": 2, "z": 6, "y": 45, "x": 31}


def image_of(axes: str, **sizes: int) -> Image:
    return open_image(np.zeros([{**SIZES, **sizes}[axis] for axis in axes], "u1"), axes=axes)


def speckle(*shape, share=0.3):
    return RNG.random(shape) < share


def slow_lookup(pixels, mask_axes: str, image: Image):
    """What the mask says about every pixel of the image, one at a time and in fractions."""
    axes = image.axes.replace("c", "")
    where = [image.axes.index(axis) for axis in axes]
    found = np.zeros([image.shape[at] for at in where], bool)
    for index in itertools.product(*map(range, found.shape)):
        looked_up = [0] * len(mask_axes)
        for i, at, axis in zip(index, where, axes, strict=True):
            if axis in mask_axes:
                m = pixels.shape[mask_axes.index(axis)]
                place = (i + image.position[at] + Fraction(1, 2)) * m / image.full_shape[at]
                looked_up[mask_axes.index(axis)] = int(place)
        found[index] = pixels[tuple(looked_up)]
    return found


def everything(mask: Mask, image: Image):
    return tuple(slice(0, image.shape[image.axes.index(axis)]) for axis in mask.axes)


def regions_of(shape, n: int):
    """Some regions of an image, empty ones too."""
    ends = [np.sort(RNG.integers(0, size + 1, (n, 2)), axis=1) for size in shape]
    return [tuple(slice(int(a), int(b)) for a, b in row) for row in np.stack(ends, axis=1)]


class Reads:
    """Shapes of the regions that are read of any image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        read = Image.read

        def spied(image, level, region):
            self.shapes.append(tuple(part.stop - part.start for part in region))
            return read(image, level, region)

        monkeypatch.setattr(Image, "read", spied)


# ---- lookup --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(45, 31), (9, 6), (23, 16), (22, 15), (1, 1), (90, 62), (100, 69), (135, 93)])
def test_any_resolution(shape):
    image, pixels = image_of("yx"), speckle(*shape)
    mask, expected = open_mask(pixels, image), slow_lookup(pixels, "yx", image)
    found = mask.at(everything(mask, image))
    assert found.dtype == bool
    np.testing.assert_array_equal(found, expected)
    for region in regions_of((45, 31), 30):
        np.testing.assert_array_equal(mask.at(region), expected[region])


@pytest.mark.parametrize(
    ("axes", "mask_axes"),
    [
        (axes, mask_axes)
        for axes in ("zyx", "tyx", "tzyx", "czyx", "tczyx")
        for mask_axes in ("yx", "zyx", "tyx", "tzyx")
        if set(mask_axes) <= set(axes)
    ],
)
def test_axes_that_are_missing_hold_for_all(axes, mask_axes):
    image = image_of(axes, y=13, x=9)
    pixels = speckle(*({"t": 3, "z": 4, "y": 7, "x": 5}[axis] for axis in mask_axes))
    mask, expected = open_mask(pixels, image, axes=mask_axes), slow_lookup(pixels, mask_axes, image)
    assert mask.axes == axes.replace("c", "")
    np.testing.assert_array_equal(mask.at(everything(mask, image)), expected)
    for region in regions_of(expected.shape, 20):
        np.testing.assert_array_equal(mask.at(region), expected[region])


@given(st.data())
def test_lookup_and_touch_along_an_axis(data):
    n, m = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 80))
    low = data.draw(st.integers(0, n - 1))
    high = data.draw(st.integers(low + 1, n))
    at = data.draw(st.integers(0, m - 1))
    pixels = np.zeros((1, 1, m), bool)
    pixels[..., at] = True
    # Along z the lengths may differ freely; x is the axis to draw along.
    image = open_image(np.zeros((n, 1, 1), "u1"), axes="zyx")
    mask = open_mask(pixels.transpose(2, 0, 1), image, axes="zyx")
    region = (slice(low, high), slice(0, 1), slice(0, 1))
    looked_up = {int((p + Fraction(1, 2)) * m / n) for p in range(low, high)}
    centred = low <= (at + Fraction(1, 2)) * n / m < high
    np.testing.assert_array_equal(mask.at(region).any(), at in looked_up)
    assert mask.touches([region]) == [at in looked_up or centred]
    if m <= n:
        assert not centred or at in looked_up


@pytest.mark.parametrize("shape", [(45, 31), (9, 6), (23, 16)])
def test_touches_is_any_of_what_is_looked_up(shape):
    image = image_of("zyx")
    pixels = speckle(*shape, share=0.02)
    mask = open_mask(pixels, image)
    regions = regions_of((6, 45, 31), 100)
    expected = slow_lookup(pixels, "yx", image)
    assert mask.touches(regions) == [bool(expected[region].any()) for region in regions]
    assert mask.touches([]) == []
    assert mask.touches([(slice(0, 6), slice(5, 5), slice(0, 31))]) == [False]


def test_a_speck_in_a_fine_mask_is_touched():
    pixels = np.zeros((450, 310), bool)
    pixels[100, 100] = True
    mask = open_mask(pixels, image_of("yx"))
    row, column = slice(10, 11), slice(10, 11)
    assert not mask.at((row, column)).any()  # its centre is pixel 105
    assert mask.touches([(row, column), (slice(9, 10), column), (row, slice(9, 10))]) == [True, False, False]


# ---- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(45, 31), (9, 6), (23, 16), (90, 62)])
def test_a_mask_lies_over_the_whole_of_a_crop(shape):
    full, pixels = image_of("tczyx"), speckle(*shape)
    image = at_region(full, {"t": (1, 2), "z": (2, 6), "y": (13, 40), "x": (8, 9)})
    expected = slow_lookup(pixels, "yx", full)[1:2, 2:6, 13:40, 8:9]
    np.testing.assert_array_equal(slow_lookup(pixels, "yx", image), expected)
    mask = open_mask(pixels, image)
    np.testing.assert_array_equal(mask.at(everything(mask, image)), expected)
    for region in regions_of(expected.shape, 20):
        np.testing.assert_array_equal(mask.at(region), expected[region])
        if shape[0] <= 45:
            assert mask.touches([region]) == [bool(expected[region].any())]


def test_a_crop_in_z_and_t_of_a_mask_that_has_them():
    full, pixels = image_of("tzyx"), speckle(3, 4, 9, 6)
    image = at_region(full, {"t": (2, 3), "z": (3, 6), "x": (20, 31)})
    mask = open_mask(pixels, image)
    expected = slow_lookup(pixels, "tzyx", full)[2:3, 3:6, :, 20:]
    np.testing.assert_array_equal(mask.at(everything(mask, image)), expected)


@pytest.mark.parametrize("shape", [(101, 67), (51, 34), (26, 17), (10, 7)])
def test_a_mask_over_a_level_of_a_crop(tmp_path, shape):
    write_image(tmp_path / "a.zarr", np.zeros((101, 67), "u1"), axes="yx", n_levels=3, chunk=16)
    full, pixels = open_image(tmp_path / "a.zarr"), speckle(*shape)
    for level in (0, 1, 2):
        image = at_level(at_region(full, {"y": (33, 90), "x": (10, 50)}), level)
        mask = open_mask(pixels, image)
        found = mask.at(everything(mask, image))
        np.testing.assert_array_equal(found, slow_lookup(pixels, "yx", image))
        if full.levels[level].shape == shape:
            (y, x), (height, width) = image.position, image.shape
            np.testing.assert_array_equal(found, pixels[y : y + height, x : x + width])


# ---- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bool", "u1", "u4", "i2", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize("kind", ["numpy", "dask", "memory", "v2.zarr", "v3.zarr", "plain.tif", "tiled.tif"])
def test_every_source_and_type(tmp_path, kind, dtype):
    image, pixels = image_of("yx"), speckle(23, 16)
    values = (pixels * (-3 if dtype[0] in "if" else 1)).astype(dtype)
    path = tmp_path / kind
    if kind.endswith(".zarr"):
        zarr.create_array(path, data=values, zarr_format=int(kind[1]), chunks=(8, 8))
    elif kind == "plain.tif":
        tifffile.imwrite(path, values)
    elif kind == "tiled.tif":
        tifffile.imwrite(path, values, tile=(16, 16), compression=None if dtype == "bool" else "zlib")
    sources = {
        "numpy": lambda: values,
        "dask": lambda: da.from_array(values, chunks=8),
        "memory": lambda: zarr.create_array(zarr.storage.MemoryStore(), data=values),
    }
    mask = open_mask(sources.get(kind, lambda: path)(), image)
    np.testing.assert_array_equal(mask.at(everything(mask, image)), slow_lookup(pixels, "yx", image))


def test_bool_is_for_masks_only(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=speckle(9, 9))
    tifffile.imwrite(tmp_path / "a.tif", speckle(9, 9))
    for name in ("a.zarr", "a.tif"):
        with pytest.raises(ImageError, match=rf"{name} has dtype bool; only integers and real numbers"):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"the numpy array has dtype complex64"):
        open_mask(np.zeros((9, 9), "c8"), image_of("yx", y=9, x=9))


def test_nan_is_nothing_and_infinity_is_something():
    values = np.array([[np.nan, 0.0, 1.0], [-np.inf, -0.0, 1e-30]], "f4")
    image = open_image(np.zeros((2, 3), "u1"))
    mask = open_mask(values, image)
    expected = [[False, False, True], [True, False, True]]
    np.testing.assert_array_equal(mask.at((slice(0, 2), slice(0, 3))), expected)
    pieces = [(slice(y, y + 1), slice(x, x + 1)) for y in range(2) for x in range(3)]
    assert mask.touches(pieces) == list(itertools.chain(*expected))


def test_an_ome_zarr_with_axes_of_length_one(tmp_path):
    pixels = speckle(23, 16)
    write_image(tmp_path / "m.zarr", pixels[None, None, None].astype("u1"), axes="tczyx", n_levels=2)
    for image in (image_of("yx"), image_of("cyx"), image_of("zyx"), image_of("tczyx")):
        mask = open_mask(tmp_path / "m.zarr", image)
        np.testing.assert_array_equal(mask.at(everything(mask, image)), slow_lookup(pixels, "yx", image))


def test_dimensions_without_names_are_those_of_the_image(tmp_path):
    image, pixels = image_of("tczyx"), speckle(3, 2, 9, 6).astype("u1")
    zarr.create_array(tmp_path / "m.zarr", data=pixels)
    tifffile.imwrite(tmp_path / "m.tif", pixels)
    expected = slow_lookup(pixels, "tzyx", image)
    for source in (pixels, tmp_path / "m.zarr", tmp_path / "m.tif"):
        mask = open_mask(source, image)
        np.testing.assert_array_equal(mask.at(everything(mask, image)), expected)


def test_chunks_that_are_not_stored_are_background(tmp_path):
    pixels = speckle(45, 31)
    pixels[16:32] = False
    zarr.create_array(tmp_path / "m.zarr", data=pixels, chunks=(16, 16), config={"write_empty_chunks": False})
    mask = open_mask(tmp_path / "m.zarr", image_of("yx"))
    np.testing.assert_array_equal(mask.at((slice(0, 45), slice(0, 31))), pixels)


def test_a_path_travels(tmp_path):
    pixels = speckle(9, 6)
    zarr.create_array(tmp_path / "m.zarr", data=pixels)
    mask = open_mask(tmp_path / "m.zarr", at_region(image_of("yx"), {"y": (10, 40)}))
    sent = pickle.dumps(mask)
    assert len(sent) < 3000
    assert pickle.loads(sent) == mask
    region = (slice(0, 30), slice(0, 31))
    np.testing.assert_array_equal(pickle.loads(sent).at(region), mask.at(region))
    with pytest.raises(ImageError, match="an array in memory cannot be sent to other processes"):
        pickle.dumps(open_mask(pixels, image_of("yx")))


# ---- what is read --------------------------------------------------------------------------------


def test_only_what_is_needed_is_read():
    touched = []

    def make(block_info=None):
        touched.append(block_info[None]["chunk-location"])
        return np.ones((16, 16), bool)

    lazy = da.map_blocks(make, chunks=((16,) * 4, (16,) * 4), dtype=bool, meta=np.empty((0, 0), bool))
    mask = open_mask(lazy, image_of("yx", y=256, x=256))
    touched.clear()
    assert mask.at((slice(70, 80), slice(140, 150))).all()
    assert touched == [(1, 2)]
    touched.clear()
    assert mask.touches([(slice(70, 80), slice(140, 150)), (slice(64, 128), slice(128, 192))]) == [True, True]
    assert touched == [(1, 2)]


def test_near_regions_are_read_at_once(monkeypatch):
    mask = open_mask(speckle(100, 100), image_of("yx", y=1000, x=1000))
    reads = Reads(monkeypatch)
    regions = [(slice(y, y + 100), slice(x, x + 100)) for y in (0, 100, 200) for x in (300, 400)]
    mask.touches(regions)
    assert reads.shapes == [(30, 20)]


def test_far_regions_are_read_apart(monkeypatch):
    monkeypatch.setattr(mask_module, "FEW_PIXELS", 50)
    pixels = speckle(100, 100, share=0.5)
    mask = open_mask(pixels, image_of("yx", y=1000, x=1000))
    reads = Reads(monkeypatch)
    corners = [(slice(y, y + 20), slice(x, x + 20)) for y in (0, 20, 960, 980) for x in (0, 980)]
    found = mask.touches(corners)
    assert found == [bool(pixels[y.start // 10 : y.stop // 10, x.start // 10 : x.stop // 10].any()) for y, x in corners]
    assert sum(map(np.prod, reads.shapes)) < 200


def test_a_bounded_part_of_the_mask_is_in_memory(monkeypatch):
    image = image_of("zyx")
    pixels = speckle(12, 135, 93, share=0.0005)
    mask = open_mask(pixels, image)
    regions = regions_of((6, 45, 31), 20)
    whole = mask.at(everything(mask, image))
    touched = mask.touches(regions)
    monkeypatch.setattr(mask_module, "MOST_PIXELS", 500)
    reads = Reads(monkeypatch)
    np.testing.assert_array_equal(mask.at(everything(mask, image)), whole)
    assert mask.touches(regions) == touched
    assert max(map(np.prod, reads.shapes)) <= 500
    np.testing.assert_array_equal(whole, slow_lookup(pixels, "zyx", image))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3, 8, 32, 100, 1000])
@pytest.mark.parametrize("rounding", [np.floor, np.ceil, np.round])
@pytest.mark.parametrize("sides", [(1001, 2047), (99, 10001), (333, 334)])
def test_smaller_by_a_factor_is_accepted(factor, rounding, sides):
    smaller = [max(1, int(rounding(side / factor))) for side in sides]
    mask = open_mask(np.ones(smaller, bool), image_of("yx", y=sides[0], x=sides[1]))
    assert mask.at((slice(sides[0] - 3, sides[0]), slice(0, 5))).all()


@pytest.mark.parametrize("shape", [(31, 45), (45, 45), (9, 9), (23, 31), (90, 31), (45, 29)])
def test_a_mask_of_another_image(shape):
    message = (
        rf"the mask \(numpy array\) has {shape[0]} x {shape[1]} pixels along y and x, and numpy array has 45 x 31, "
        "which is not the same shape at any resolution; it is probably a mask of another image"
    )
    for image in (image_of("yx"), at_region(image_of("yx"), {"y": (0, shape[0] // 2)})):
        with pytest.raises(ImageError, match=message):
            open_mask(np.ones(shape, bool), image)


@pytest.mark.parametrize(
    ("axes", "mask_axes", "mask_shape", "message"),
    [
        ("cyx", "cyx", (2, 45, 31), r"the mask \(numpy array\) has 2 channels; give a mask of one"),
        ("yx", "zyx", (6, 45, 31), "has axis 'z' of length 6, which numpy array does not have; .* axes 'yx'"),
        ("czyx", "tzyx", (3, 6, 45, 31), "has axis 't' of length 3, .* axes 'zyx'"),
        ("tyx", "tyx", (2, 45, 31), "has 2 time points and numpy array has 3; give a mask with as many"),
    ],
)
def test_masks_that_do_not_fit(axes, mask_axes, mask_shape, message):
    with pytest.raises(ImageError, match=message):
        open_mask(np.ones(mask_shape, "u1"), image_of(axes), axes=mask_axes)


def test_dimensions_without_names_that_do_not_fit(tmp_path):
    zarr.create_array(tmp_path / "m.zarr", data=np.ones((6, 45, 31), "u1"))
    for source, name in ((tmp_path / "m.zarr", r".*m\.zarr"), (np.ones((6, 45, 31)), "ndarray")):
        for axes, wanted in (("yx", "yx"), ("tczyx", "tzyx")):
            with pytest.raises(ImageError, match=rf"the mask \({name}\) does not name .* each of '{wanted}' of numpy"):
                open_mask(source, image_of(axes))


def test_a_mask_that_is_not_there(tmp_path):
    with pytest.raises(ImageError, match=r"m\.zarr does not exist"):
        open_mask(tmp_path / "m.zarr", image_of("yx"))
