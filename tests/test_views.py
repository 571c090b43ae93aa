"""Images from one of their levels on, and cut to a region."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tiledseg.errors import ImageError, SettingsError
from tiledseg.images import Image, Level, at_level, at_region, open_image, parse_region
from tiledseg.omezarr import create_labels, finish_labels, plan_labels, write_image

RNG = np.random.default_rng(11)
SIZES = {"t": 4, "c": 2, "z": 7, "y": 101, "x": 67}
CUTS = {"t": (1, 3), "z": (2, 6), "y": (33, 90), "x": (5, 50)}
SPACING = np.array([2.0, 0.5, 0.25])
WEIGHTS = {"t": 1e9, "z": 1e6, "y": 1e3, "x": 1.0}


def noise(*shape):
    return RNG.integers(1, 250, shape).astype("uint16")


def whole(image: Image, level: int = 0):
    return image.read(level, everything(image))


def everything(image: Image):
    return tuple(slice(None) for _ in image.axes)


def cuts_of(axes: str):
    return {axis: CUTS[axis] for axis in axes if axis != "c"}


def slices_of(axes: str, cuts):
    return tuple(slice(*cuts.get(axis, (None, None))) for axis in axes)


def write(path, axes: str, version: str = "0.5", **options):
    """An OME-Zarr with three levels of odd sizes, and its pixels."""
    array = noise(*(SIZES[axis] for axis in axes))
    spacing = {"z": 2.0, "y": 0.5, "x": 0.25}
    spacing_um = [spacing[axis] for axis in axes if axis in spacing]
    write_image(path, array, axes=axes, spacing_um=spacing_um, version=version, n_levels=3, chunk=16, **options)
    return array


def write_ramp(path, factors, rounding=np.ceil):
    """An image (zyx) in which each pixel of a level tells the coordinate of its centre in pixels of level 0."""
    zarr.create_group(path)
    datasets = []
    for level, factor in enumerate(factors):
        factor = np.array(factor, float)
        shape = [max(1, int(rounding(SIZES[axis] / f))) for axis, f in zip("zyx", factor, strict=True)]
        offset = (factor - 1) / 2
        zarr.create_array(path / str(level), data=ramp(shape, factor, offset), chunks=(4, 16, 16))
        scale, shift = list(SPACING * factor), list(in_um(offset))
        transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
    multiscales = [{"axes": axes, "datasets": datasets}]
    zarr.open_group(path).attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
    return open_image(path)


def in_um(coordinates):
    """Position of pixels of level 0 of such an image."""
    return SPACING * coordinates + (10.0, 20.0, 30.0)


def ramp(shape, scale, offset):
    """A weighted sum of the coordinates of pixels."""
    values = np.zeros(shape)
    for at, axis in enumerate("zyx"):
        along = (np.arange(shape[at]) * scale[at] + offset[at]) * WEIGHTS[axis]
        values += along.reshape([-1 if i == at else 1 for i in range(3)])
    return values


def assert_levels_lie_right(image: Image, start, step=(1.0, 1.0, 1.0)):
    """Each pixel of each level tells the coordinate that scale and offset say, in an image that begins at `start`."""
    for number, level in enumerate(image.levels):
        scale = np.multiply(level.scale, step)
        offset = np.multiply(level.offset, step) + start
        np.testing.assert_allclose(whole(image, number), ramp(level.shape, scale, offset), rtol=1e-12)


PYRAMIDS = [
    [(1, 1, 1), (1, 2, 2), (1, 4, 4)],
    [(1, 1, 1), (2, 2, 2), (4, 4, 4)],
    [(1, 1, 1), (1, 3, 3), (2, 7.5, 7.5)],
]


# ---- the text of a region ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("z=0:50,y=100:2100", {"z": (0, 50), "y": (100, 2100)}),
        ("  z = 0 : 50 ,  y= 100 :2100 ", {"z": (0, 50), "y": (100, 2100)}),
        ("z=0:50 y=100:2100", {"z": (0, 50), "y": (100, 2100)}),
        ("x=:500", {"x": (None, 500)}),
        ("x=500: y=3", {"x": (500, None), "y": (3, 4)}),
        ("x=:", {"x": (None, None)}),
        ("t=3", {"t": (3, 4)}),
    ],
)
def test_a_region_is_read(text, bounds):
    assert parse_region(text, "tczyx") == bounds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "region '' cannot be read at ''; write AXIS=START:STOP in pixels from 0"),
        ("y=1:5,", "cannot be read at ''"),
        ("y", "cannot be read at 'y'"),
        ("y=", "cannot be read at 'y='"),
        ("y=1:5:2", "cannot be read at 'y=1:5:2'"),
        ("y=-5:", "cannot be read at 'y=-5:'"),
        ("y=1.5:3", "cannot be read at 'y=1.5:3'"),
        ("z=2:3,y=1-5", "cannot be read at 'y=1-5'"),
        ("y=1 5", "cannot be read at 'y=1 5'"),
        ("y=" + "9" * 5000, "cannot be read at"),
        ("y=1:5,y=3:9", "names axis 'y' twice"),
        ("w=1:5", "names axis 'w', but the image has t, z, y, x; correct --region"),
        ("zy=1:5", "names axis 'zy', but the image has"),
        ("Y=1:5", "names axis 'Y', but the image has"),
        ("c=0:1", "has no channels; choose those with --channel"),
    ],
)
def test_a_region_that_is_none(text, message):
    with pytest.raises(SettingsError, match=message):
        parse_region(text, "tczyx")


def test_a_region_of_an_axis_the_image_lacks():
    with pytest.raises(SettingsError, match="names axis 'z', but the image has y, x"):
        parse_region("z=1:5", "yx")


# ---- cutting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["yx", "cyx", "zyx", "tyx", "czyx", "tzyx", "tczyx"])
def test_a_crop_equals_slicing(tmp_path, axes, version):
    array = write(tmp_path / "a.zarr", axes, version)
    full, cuts = open_image(tmp_path / "a.zarr"), cuts_of(axes)
    image = at_region(full, cuts)
    expected = array[slices_of(axes, cuts)]
    assert image.shape == expected.shape
    assert image.position == tuple(cuts.get(axis, (0, 0))[0] for axis in axes)
    assert image.full_shape == array.shape
    assert (image.axes, image.dtype, image.channels) == (full.axes, full.dtype, full.channels)
    np.testing.assert_array_equal(whole(image), expected)
    inner = tuple(slice(1, n) for n in image.shape)
    np.testing.assert_array_equal(image.read(0, inner), expected[inner])
    for level, stored in enumerate(image.levels):
        where = tuple(slice(a, a + n) for a, n in zip(stored.start, stored.shape, strict=True))
        np.testing.assert_array_equal(whole(image, level), whole(full, level)[where])


@pytest.mark.parametrize("source", ["numpy", "zarr.zarr", "tiled.tif", "plain.tif"])
def test_crops_of_plain_arrays(tmp_path, source):
    array = noise(7, 101, 67)
    zarr.create_array(tmp_path / "zarr.zarr", data=array, chunks=(2, 16, 16), shards=(4, 32, 32))
    tifffile.imwrite(tmp_path / "tiled.tif", array, tile=(16, 16), compression="zlib")
    tifffile.imwrite(tmp_path / "plain.tif", array)
    image = at_region(open_image(array if source == "numpy" else tmp_path / source, axes="zyx"), cuts_of("zyx"))
    np.testing.assert_array_equal(whole(image), array[2:6, 33:90, 5:50])
    assert image.levels[0].chunks == open_image(array if source == "numpy" else image.name, axes="zyx").levels[0].chunks


def test_axes_on_disk_may_have_another_order(tmp_path):
    array = noise(20, 30, 3)
    tifffile.imwrite(tmp_path / "a.tif", array.astype("uint8"), photometric="rgb")
    image = at_region(open_image(tmp_path / "a.tif"), {"y": (5, 9), "x": (10, None)})
    np.testing.assert_array_equal(whole(image), array[5:9, 10:].transpose(2, 0, 1))


@pytest.mark.parametrize("bounds", [{}, {"y": (None, None)}, {"y": (0, 101), "x": (None, 67)}])
def test_a_crop_to_the_whole_is_the_image(tmp_path, bounds):
    write(tmp_path / "a.zarr", "yx")
    full = open_image(tmp_path / "a.zarr")
    assert at_region(full, bounds) == full
    assert (full.position, full.full_shape) == ((0, 0), (101, 67))


@pytest.mark.parametrize("rounding", [np.ceil, np.floor])
@pytest.mark.parametrize("factors", PYRAMIDS)
@pytest.mark.parametrize("cuts", [CUTS, {"y": (100, 101)}, {"y": (0, 1), "x": (66, 67)}, {"z": (6, 7), "x": (31, 32)}])
def test_coarser_levels_of_a_crop_lie_where_they_say(tmp_path, factors, rounding, cuts):
    full = write_ramp(tmp_path / "a.zarr", factors, rounding)
    image = at_region(full, {axis: span for axis, span in cuts.items() if axis != "t"})
    assert len(image.levels) == 3
    assert image.levels[0].offset == (0, 0, 0)
    assert_levels_lie_right(full, (0, 0, 0))
    assert_levels_lie_right(image, [cuts.get(axis, (0, 0))[0] for axis in "zyx"])


@given(st.data())
def test_a_crop_has_the_fewest_pixels_that_cover_it(data):
    n = data.draw(st.integers(1, 60))
    scale = data.draw(st.sampled_from([1.0, 1.5, 2.0, 3.0, 7.25]))
    size = data.draw(st.sampled_from([max(1, int(n / scale)), -int(-n // scale)]))
    offset = (scale - 1) / 2 + data.draw(st.sampled_from([0.0, -0.5, 0.25]))
    low = data.draw(st.integers(0, n - 1))
    high = data.draw(st.integers(low + 1, n))
    full = open_image(np.zeros((n, n), "u1"))
    level = Level("", (size, n), (1, 1), (scale, 1.0), (offset, 0.0), 1, (0, 0), (size, n))
    image = at_region(dataclasses.replace(full, levels=(full.levels[0], level)), {"y": (low, high)})
    part = image.levels[1]
    first, count = part.start[0], part.shape[0]
    edges = (np.arange(first, first + count + 1) - 0.5) * scale + offset
    assert 0 <= first < first + count <= size
    assert part.shape[1] == n
    assert part.offset[0] == pytest.approx(first * scale + offset - low)
    if (low, high) == (0, n):
        return
    assert edges[0] <= low - 0.5 or first == 0
    assert edges[-1] >= high - 0.5 or first + count == size
    assert count == 1 or (edges[1] > low - 0.5 and edges[-2] < high - 0.5)


def test_crops_of_crops_add_up(tmp_path):
    full = write_ramp(tmp_path / "a.zarr", PYRAMIDS[1])
    once = at_region(full, {"z": (3, 6), "y": (45, 70)})
    twice = at_region(at_region(full, {"z": (2, 7), "y": (20, 80)}), {"z": (1, 4), "y": (25, 50)})
    assert (twice.shape, twice.position, twice.translation) == (once.shape, once.position, once.translation)
    assert twice.levels[1:] == once.levels[1:]
    np.testing.assert_array_equal(whole(twice), whole(once))


def test_a_level_without_the_time_points_is_left_out():
    full = open_image(np.zeros((4, 8, 8), "u1"), axes="tyx")
    level = Level("", (2, 4, 4), (1, 4, 4), (2.0, 2.0), (0.5, 0.5), 1, (0, 0, 0), (2, 4, 4))
    full = dataclasses.replace(full, levels=(full.levels[0], level))
    assert len(at_region(full, {"t": (1, 3)}).levels) == 1
    assert len(at_region(full, {"y": (1, 3)}).levels) == 2


@pytest.mark.parametrize("span", [(5, 5), (9, 3), (100, 102), (101, None), (-1, 5), (None, 0)])
def test_regions_outside_and_empty(tmp_path, span):
    write(tmp_path / "a.zarr", "zyx")
    image = open_image(tmp_path / "a.zarr")
    with pytest.raises(ImageError, match=r"a\.zarr has no region y=-?\d+:\d+, its axis 'y' has length 101; give y="):
        at_region(image, {"y": span})


def test_a_crop_of_an_unknown_axis():
    image = open_image(noise(9, 9))
    with pytest.raises(SettingsError, match="names axis 'z', but the image has y, x"):
        at_region(image, {"z": (0, 1)})
    with pytest.raises(SettingsError, match="choose those with --channel"):
        at_region(image, {"c": (0, 1)})


def test_regions_are_those_of_the_crop():
    image = at_region(open_image(noise(40, 40)), {"y": (10, 30)})
    for region in ((slice(0, 21), slice(0, 40)), (slice(-1, 5), slice(0, 40))):
        with pytest.raises(ImageError, match=r"has no y -?\d+:\d+ \(length 20\)"):
            image.read(0, region)


# ---- levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["yx", "tczyx"])
def test_a_level_as_an_image(tmp_path, axes):
    write(tmp_path / "a.zarr", axes)
    full = open_image(tmp_path / "a.zarr")
    image = at_level(full, 1)
    assert (image.shape, image.full_shape) == (full.levels[1].shape,) * 2
    assert image.position == (0,) * len(axes)
    assert len(image.levels) == 2
    assert [level.scale[-2:] for level in image.levels] == [(1.0, 1.0), (2.0, 2.0)]
    assert [level.offset[-2:] for level in image.levels] == [(0.0, 0.0), (0.5, 0.5)]
    assert image.spacing[-2:] == (1.0, 0.5)
    assert image.translation[-2:] == (0.25, 0.125)
    for level in (0, 1):
        np.testing.assert_array_equal(whole(image, level), whole(full, level + 1))
    with pytest.raises(ImageError, match="levels 0 to 1 and no level 2"):
        image.read(2, everything(image))
    assert at_level(full, 0) == full
    assert at_level(image, 1) == at_level(full, 2)


@pytest.mark.parametrize("factors", PYRAMIDS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_levels_lie_where_they_say(tmp_path, factors, level):
    full = write_ramp(tmp_path / "a.zarr", factors)
    image = at_level(full, level)
    step, offset = full.levels[level].scale, full.levels[level].offset
    assert_levels_lie_right(image, offset, step)
    assert image.spacing == pytest.approx(SPACING * step)
    assert image.translation == pytest.approx(in_um(offset))


def test_a_level_of_a_tiff(tmp_path):
    array = noise(101, 64)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(array, subifds=2, tile=(16, 16), compression="zlib")
        tif.write(array[::2, ::2], subfiletype=1, tile=(16, 16), compression="zlib")
        tif.write(array[::4, ::4], subfiletype=1, tile=(16, 16), compression="zlib")
    full = open_image(tmp_path / "a.tif")
    image = at_level(full, 1)
    np.testing.assert_array_equal(whole(image), array[::2, ::2])
    np.testing.assert_array_equal(whole(image, 1), array[::4, ::4])
    cut = at_level(at_region(full, {"y": (40, 80)}), 2)
    np.testing.assert_array_equal(whole(cut), array[::4, ::4][10:20])


def test_an_unknown_spacing_is_counted_in_pixels(tmp_path):
    array = noise(40, 40)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(array, subifds=1, tile=(16, 16))
        tif.write(array[::2, ::2], subfiletype=1, tile=(16, 16))
    image = open_image(tmp_path / "a.tif")
    assert image.spacing == (None, None)
    view = at_level(at_region(image, {"y": (10, 40)}), 1)
    assert (view.spacing, view.units, view.translation) == ((2.0, 2.0), (None, None), (10.5, 0.5))
    assert view.spacing_um() is None
    assert at_level(image, 0) == image


@pytest.mark.parametrize("level", [-1, 3])
def test_no_such_level(tmp_path, level):
    write(tmp_path / "a.zarr", "zyx")
    known = r"0 \(z 7, y 101, x 67\), 1 \(z 7, y 51, x 34\), 2 \(z 7, y 26, x 17\)"
    with pytest.raises(ImageError, match=rf"a\.zarr has no level {level}; it has {known}; give one of these"):
        at_level(open_image(tmp_path / "a.zarr"), level)


# ---- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [np.ceil, np.floor])
@pytest.mark.parametrize("factors", PYRAMIDS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_of_a_crop(tmp_path, factors, rounding, level):
    full = write_ramp(tmp_path / "a.zarr", factors, rounding)
    part = at_region(full, cuts_of("zyx"))
    image = at_level(part, level)
    step = full.levels[level].scale
    start = np.array([2, 33, 5]) + part.levels[level].offset
    assert_levels_lie_right(image, start, step)
    assert image.translation == pytest.approx(in_um(start))
    assert image.full_shape == full.levels[level].shape
    where = tuple(slice(a, a + n) for a, n in zip(image.position, image.shape, strict=True))
    np.testing.assert_array_equal(whole(image), whole(full, level)[where])


def test_a_crop_of_a_level(tmp_path):
    full = write_ramp(tmp_path / "a.zarr", PYRAMIDS[1])
    image = at_region(at_level(full, 1), {"y": (7, 30)})
    assert (image.position, image.full_shape) == ((0, 7, 0), full.levels[1].shape)
    np.testing.assert_array_equal(whole(image), whole(full, 1)[:, 7:30])
    assert_levels_lie_right(image, np.array([0.5, 14.5, 0.5]), (2.0, 2.0, 2.0))


# ---- what else an image can do -------------------------------------------------------------------


def test_missing_chunks_of_views_have_their_stored_keys(tmp_path):
    write(tmp_path / "a.zarr", "zyx")
    for key in ("0/c/0/1/3", "1/c/0/2/1", "0/c/0/6/0"):
        (tmp_path / "a.zarr" / key).unlink()
    image = at_region(open_image(tmp_path / "a.zarr"), {"y": (20, 90), "x": (40, 60)})
    assert image.missing_chunks(0, everything(image)) == ["0/c/0/1/3"]
    assert image.missing_chunks(0, (slice(0, 7), slice(12, 70), slice(0, 20))) == []
    assert image.missing_chunks(1, everything(image)) == ["1/c/0/2/1"]
    assert at_level(image, 1).missing_chunks(0, everything(image)) == ["1/c/0/2/1"]
    assert (image.read(0, (slice(0, 1), slice(0, 12), slice(8, 20))) == 0).all()


def test_corrupt_chunks_of_views_are_named(tmp_path):
    write(tmp_path / "a.zarr", "yx")
    (tmp_path / "a.zarr/0/c/2/1").write_bytes(b"")
    (tmp_path / "a.zarr/1/c/1/1").write_bytes(b"abc")
    image = at_region(open_image(tmp_path / "a.zarr"), {"y": (20, 60)})
    with pytest.raises(ImageError, match=r"chunk c/2/1 of .*a\.zarr/0 cannot be read .* y 5:40, x 0:67"):
        image.read(0, (slice(5, 40), slice(0, 67)))
    np.testing.assert_array_equal(image.read(0, (slice(0, 12), slice(0, 67))).shape, (12, 67))
    with pytest.raises(ImageError, match=r"chunk c/1/1 of .*a\.zarr/1 cannot be read .* y 0:20, x 0:34"):
        whole(at_level(image, 1))


def test_views_travel_as_a_path(tmp_path):
    array = write(tmp_path / "a.zarr", "yx")
    view = at_level(at_region(open_image(tmp_path / "a.zarr"), {"y": (20, 60)}), 1)
    sent = pickle.dumps(view)
    assert len(sent) < 3000
    np.testing.assert_array_equal(whole(pickle.loads(sent)), whole(view))
    memory = at_region(open_image(array), {"y": (20, 60)})
    assert not memory.is_shippable
    with pytest.raises(ImageError, match="cannot be sent to other processes"):
        pickle.dumps(memory)


def test_a_view_is_described_as_json(tmp_path):
    write(tmp_path / "a.zarr", "cyx")
    view = at_level(at_region(open_image(tmp_path / "a.zarr"), {"y": (20, 60)}), 1)
    told = json.loads(json.dumps(view.describe()))
    assert (told["shape"], told["position"], told["full_shape"]) == ([2, 20, 34], [0, 10, 0], [2, 51, 34])
    assert told["levels"][0] == {
        "path": "1", "shape": [2, 20, 34], "chunks": [1, 16, 16], "scale": [1.0, 1.0], "offset": [0.0, 0.0],
    }  # fmt: skip


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("inside", [True, False])
def test_labels_of_a_view_lie_over_the_image(tmp_path, version, inside):
    write(tmp_path / "a.zarr", "tczyx", version)
    view = at_level(
        at_region(open_image(tmp_path / "a.zarr"), {"t": (1, 3), "z": (3, 7), "y": (20, 60), "x": (9, 21)}), 1
    )
    plan = plan_labels(view, None if inside else tmp_path / "out.zarr", "cells", version)
    assert (plan.axes, plan.shape, plan.in_image) == ("tzyx", (2, 4, 20, 7), inside)
    create_labels(plan, attributes={})
    finish_labels(plan)
    labels = open_image(plan.path)
    assert labels.shape == plan.shape
    assert labels.spacing == (1.0, 2.0, 1.0, 0.5)
    # Pixel 10 of level 1 along y lies between pixels 20 and 21 of level 0, pixel 4 along x between 8 and 9.
    assert labels.translation == (1.0, 6.0, 20.5 * 0.5, 8.5 * 0.25)
