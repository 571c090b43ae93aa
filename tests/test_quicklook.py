"""Pictures of regions at levels: their pixels, outlines, scale bars, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

import tiledseg
from tiledseg import looks
from tiledseg.canvas import data_uri, stretched
from tiledseg.errors import ImageError, OutputError, SettingsError
from tiledseg.omezarr import write_image

LABELS = np.zeros((500, 600), np.uint32)
LABELS[100:200, 100:200] = 1
LABELS[300:400, 200:500] = 70_000


@pytest.fixture
def grey():
    """Pixels that tell where they are."""
    return (np.arange(500)[:, None] + 2 * np.arange(600)).astype(np.uint16)


def shown_as(plane, contrast=(1.0, 99.7)):
    """Grey pixels as a picture has them."""
    return np.rint(255 * stretched(plane, contrast)).astype(np.uint8)


def is_grey(pixels):
    return (pixels == pixels[..., :1]).all(axis=-1)


def test_pixels_are_those_of_the_region(grey):
    picture = tiledseg.show(grey, contrast=(0, 100))
    np.testing.assert_array_equal(picture.pixels[..., 0], np.rint(255 * (grey / grey.max())))
    assert is_grey(picture.pixels).all()
    part = tiledseg.show(grey, "y=20:420,x=50:550")
    np.testing.assert_array_equal(part.pixels[..., 1], shown_as(grey[20:420, 50:550]))
    assert repr(part) == "<Picture 500 x 400: numpy array, y 20:420, x 50:550, level 0>"


def test_small_regions_are_enlarged_and_large_ones_thinned_out(grey):
    small = tiledseg.show(grey, "y=0:60,x=0:90").pixels
    np.testing.assert_array_equal(small[..., 0], shown_as(grey[:60, :90]).repeat(5, axis=0).repeat(5, axis=1))
    thin = tiledseg.show(grey, max_side=200).pixels
    assert thin.shape[:2] == (167, 200)
    np.testing.assert_array_equal(thin[..., 0], shown_as(grey[1::3, 1::3]))


def test_outlines_are_inside_objects(grey):
    picture = tiledseg.show(grey, labels=LABELS).pixels
    expected = np.zeros(LABELS.shape, bool)
    for box in (np.s_[100:200, 100:200], np.s_[300:400, 200:500]):
        expected[box] = True
        inner = tuple(slice(part.start + 1, part.stop - 1) for part in box)
        expected[inner] = False
    np.testing.assert_array_equal(~is_grey(picture), expected)
    assert is_grey(tiledseg.show(grey, labels=LABELS, outlines=False).pixels).all()


@pytest.fixture
def pyramid(tmp_path):
    """An OME-Zarr of two levels, each with values of its own, and labels in it that agree."""
    group = zarr.open_group(tmp_path / "a.ome.zarr", mode="w", zarr_format=3)
    labels = group.create_group("labels/cells")
    datasets = []
    for i, factor in enumerate((1, 4)):
        pixels = np.arange(800 // factor * 640 // factor, dtype=np.uint32).reshape(800 // factor, -1)
        group.create_array(str(i), data=(pixels % 4000 + i).astype(np.uint16), chunks=(64, 64))
        marked = np.zeros(pixels.shape, np.uint32)
        marked[100 // factor : 300 // factor, 200 // factor : 400 // factor] = 5
        labels.create_array(str(i), data=marked, chunks=(64, 64))
        centre = [
            {"type": "scale", "scale": [0.5 * factor] * 2},
            {"type": "translation", "translation": [0.25 * (factor - 1)] * 2},
        ]
        datasets.append({"path": str(i), "coordinateTransformations": centre})
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    group.attrs["ome"] = ome
    group["labels"].attrs["ome"] = {"version": "0.5", "labels": ["cells"]}
    labels.attrs["ome"] = {**ome, "image-label": {}}
    return tmp_path / "a.ome.zarr"


def test_a_level_is_shown_as_it_is_stored(pyramid):
    coarse = zarr.open_array(pyramid / "1")[:]
    picture = tiledseg.show(pyramid, "y=400:800", level=1, outlines=False).pixels
    times = 480 // 160
    expected = shown_as(coarse[100:200]).repeat(times, axis=0).repeat(times, axis=1)
    np.testing.assert_array_equal(picture[:200, :, 0], expected[:200])


def test_the_level_is_chosen_for_the_picture(pyramid):
    assert "level 0" in tiledseg.show(pyramid).caption
    assert "level 1" in tiledseg.show(pyramid, max_side=200).caption
    assert "level 0" in tiledseg.show(pyramid, "y=0:100,x=0:100", max_side=200).caption


@pytest.mark.parametrize("max_side", [800, 200])
def test_labels_of_an_ome_zarr_are_outlined_at_every_level(pyramid, max_side):
    """The box 100:300 x 200:400 is where it belongs, whatever the level."""
    picture = tiledseg.show(pyramid, max_side=max_side)
    step = 800 / picture.pixels.shape[0]
    rows, columns = np.nonzero(~is_grey(picture.pixels))
    assert rows.min() * step == pytest.approx(100, abs=step)
    assert (rows.max() + 1) * step == pytest.approx(300, abs=step)
    assert columns.min() * step == pytest.approx(200, abs=step)
    assert (columns.max() + 1) * step == pytest.approx(400, abs=step)
    named = tiledseg.show(pyramid, max_side=max_side, labels="cells")
    np.testing.assert_array_equal(named.pixels, picture.pixels)


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (["../../b"], r"names the labels '\.\./\.\./b', which are not inside it; refused"),
        (["..", 7, ""], r"lists its labels as \['\.\.', 7, ''\]; correct its metadata"),
    ],
)
def test_names_of_labels_that_lead_elsewhere_are_refused(pyramid, listed, said):
    zarr.open_group(pyramid / "labels", mode="a").attrs["ome"] = {"version": "0.5", "labels": listed}
    with pytest.raises(ImageError, match=said):
        tiledseg.show(pyramid)


def test_a_scale_bar_has_the_length_it_says(tmp_path):
    write_image(tmp_path / "a.ome.zarr", np.zeros((300, 500), np.uint16), axes="yx", spacing_um=(0.5, 0.5))
    picture = tiledseg.show(tmp_path / "a.ome.zarr", max_side=500).pixels
    bar = (picture[-14:-11] == 255).all(axis=(0, 2))
    assert bar.sum() == 50 / 0.5 + 1  # 50 um, ends included
    plain = tiledseg.show(np.zeros((300, 500), np.uint16)).pixels
    assert (plain == 0).all()


def test_channels_have_colours():
    two = np.zeros((2, 480, 480), np.uint16)
    two[0, :240] = 900
    two[1, :, :240] = 900
    mixed = tiledseg.show(two, axes="cyx").pixels
    assert mixed[10, 400].tolist() == [255, 0, 255]
    assert mixed[400, 10].tolist() == [0, 255, 0]
    assert mixed[10, 10].tolist() == [255, 255, 255]
    assert mixed[400, 400].tolist() == [0, 0, 0]
    one = tiledseg.show(two, axes="cyx", channels=1).pixels
    assert is_grey(one).all()
    assert one[400, 10, 0] == 255
    assert "channel 1" in tiledseg.show(two, axes="cyx", channels="1").caption


def test_three_channels_of_bytes_are_colours_as_they_are():
    rgb = np.random.default_rng(0).integers(50, 200, (480, 480, 3), np.uint8)
    np.testing.assert_array_equal(tiledseg.show(rgb, axes="yxc").pixels, rgb)
    stretched_too = tiledseg.show(rgb.astype(np.uint16), axes="yxc", channels="rgb", contrast=(0, 100)).pixels
    assert stretched_too.min() == 0
    assert stretched_too.max() == 255


def test_of_many_channels_the_first_is_shown():
    many = np.zeros((40, 480, 480), np.uint16)
    many[0, :200] = 5
    assert is_grey(tiledseg.show(many, axes="cyx").pixels).all()
    assert tiledseg.show(many, axes="cyx").pixels[0, 0, 0] == 255


def test_planes_and_time_points_are_chosen_or_projected():
    series = np.zeros((3, 4, 480, 480), np.uint16)
    for t in range(3):
        for z in range(4):
            series[t, z, z * 20 : z * 20 + 10, t * 20 : t * 20 + 10] = 100
    plane = tiledseg.show(series, axes="tzyx", t=1, z=2, contrast=(0, 100)).pixels[..., 0]
    np.testing.assert_array_equal(plane, np.where(series[1, 2], 255, 0))
    projected = tiledseg.show(series, "z=1:3", axes="tzyx", t="max", z="max", contrast=(0, 100))
    np.testing.assert_array_equal(projected.pixels[..., 0], np.where(series[:, 1:3].max(axis=(0, 1)), 255, 0))
    assert "t largest of 0:3, z largest of 1:3" in projected.caption
    by_region = tiledseg.show(series, "t=1,z=2", axes="tzyx", contrast=(0, 100)).pixels[..., 0]
    np.testing.assert_array_equal(by_region, plane)
    marked = (series > 0).astype(np.uint8)
    outlined = tiledseg.show(series, axes="tzyx", t=1, z=2, labels=marked).pixels
    assert (~is_grey(outlined)).sum() == 36


def test_a_picture_is_saved_as_png_exactly_and_as_jpeg(grey, tmp_path):
    picture = tiledseg.show(grey, labels=LABELS)
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture.pixels)
    picture.save(tmp_path / "a.JPG")
    assert np.asarray(Image.open(tmp_path / "a.JPG")).shape == picture.pixels.shape
    with pytest.raises(SettingsError, match=r"a\.tif names no kind of picture; end it in \.png or \.jpg"):
        picture.save(tmp_path / "a.tif")
    with pytest.raises(OutputError, match=r"cannot write picture .*: No such file"):
        picture.save(tmp_path / "nowhere" / "a.png")


def test_a_notebook_keeps_the_smaller_file(grey):
    smooth = tiledseg.show(grey)
    assert smooth._repr_jpeg_() is None
    assert Image.open(io.BytesIO(smooth._repr_png_())).size == (600, 500)
    noisy = tiledseg.show(np.random.default_rng(0).integers(0, 9000, (700, 700), np.uint16))
    assert noisy._repr_png_() is None
    assert len(noisy._repr_jpeg_()) < len(noisy.png)
    assert data_uri(noisy).startswith("data:image/jpeg;base64,")


def test_what_is_not_finite_or_constant_is_black():
    image = np.full((480, 480), np.nan, np.float32)
    assert (tiledseg.show(image).pixels == 0).all()
    assert (tiledseg.show(np.full((480, 480), 7, np.uint8)).pixels == 0).all()


VOLUME = np.zeros((4, 50, 60), np.uint16)


@pytest.mark.parametrize(
    ("source", "options", "kind", "text"),
    [
        (VOLUME, {"axes": "zyx"}, SettingsError, "has 4 positions along z; say which to show, e.g. z=2, or z='max'"),
        (VOLUME, {"axes": "zyx", "z": 4}, ImageError, "has no z=4 there; give 0 to 3"),
        (VOLUME, {"axes": "zyx", "z": "mean"}, SettingsError, "z is 'mean'; give a number, or 'max'"),
        (VOLUME[0], {"z": 1}, SettingsError, "has axes 'yx' and no z; leave z out"),
        (VOLUME[0], {"level": 1}, ImageError, "has levels 0 to 0 and no level 1"),
        (VOLUME[0], {"region": "y=0:51"}, ImageError, "has no region y=0:51, its axis 'y' has length 50"),
        (VOLUME[0], {"contrast": (5, 5)}, SettingsError, r"contrast \(5, 5\) must be two percentiles"),
        (VOLUME[0], {"max_side": 8}, SettingsError, "max_side is 8; give 16 pixels or more"),
        (VOLUME[0], {"channels": "rgb"}, SettingsError, "has 1 channels, too few for red, green and blue"),
        (VOLUME[0], {"channels": [0] * 7}, SettingsError, "7 channels cannot be told apart by colours; give 1 to 6"),
        (VOLUME[0], {"channels": "DAPI"}, ImageError, "has no channel 'DAPI'"),
        (VOLUME[0], {"labels": VOLUME[0][:9]}, ImageError, "are no labels of numpy array, which has"),
        (VOLUME[0], {"labels": VOLUME[0].astype(float)}, ImageError, r"\(float64\) are no labels"),
    ],
)
def test_what_cannot_be_shown_is_said(source, options, kind, text):
    with pytest.raises(kind, match=text):
        tiledseg.show(source, **options)


def test_a_region_that_is_too_large_for_a_quick_look_is_refused(tmp_path):
    zarr.create_array(tmp_path / "huge.zarr", shape=(100_000, 100_000), chunks=(512, 512), dtype="uint16")
    image = tiledseg.open_image(tmp_path / "huge.zarr", axes="yx")
    with pytest.raises(ImageError, match=r"are too many for a quick look; give a region of at most 8,192 x 8,192\."):
        tiledseg.show(image)
    assert tiledseg.show(image, "y=0:1000,x=0:1000").pixels.shape == (1000, 1000, 3)


def test_labels_without_levels_are_refused_where_reading_them_takes_long(pyramid):
    """Of a slide that has a coarse level, but whose labels have none."""
    import json

    side = 40_000
    for name in ("0", "labels/cells/0"):
        path = pyramid / name / "zarr.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "shape": [side, side]}))
    for name in ("", "labels/cells/"):
        path = pyramid / f"{name}zarr.json"
        document = json.loads(path.read_text())
        levels = document["attributes"]["ome"]["multiscales"][0]["datasets"]
        levels[1]["coordinateTransformations"] = [{"type": "scale", "scale": [side / 200 * 0.5, side / 160 * 0.5]}]
        if name:
            del levels[1]
        path.write_text(json.dumps(document))
    with pytest.raises(ImageError, match=r"pixels of level 0 of .*cells are too many for a quick look"):
        tiledseg.show(pyramid, max_side=100)
    assert "level 1" in tiledseg.show(pyramid, max_side=100, outlines=False).caption
    page = tiledseg.open_image(pyramid)._repr_html_()
    assert "data:image" in page


def test_projections_of_many_planes_are_read_chunk_by_chunk(tmp_path):
    stack = np.random.default_rng(0).integers(0, 9999, (70, 48, 60), np.uint16)
    stored = zarr.create_array(tmp_path / "a.zarr", data=stack, chunks=(16, 48, 60))
    picture = tiledseg.show(stored, "z=3:70", axes="zyx", z="max", contrast=(0, 100)).pixels[::8, ::8, 0]
    np.testing.assert_array_equal(picture, shown_as(stack[3:].max(axis=0), (0, 100)))
    deep = zarr.create_array(tmp_path / "b.zarr", shape=(9000, 600, 600), chunks=(16, 256, 256), dtype="uint16")
    with pytest.raises(ImageError, match=r"at most 8,192 x 8,192 and 536,870,912 in all\."):
        tiledseg.show(deep, axes="zyx", z="max")
    assert tiledseg.show(deep, axes="zyx", z=np.int64(4)).pixels.shape == (600, 600, 3)


def test_a_result_in_a_container_of_its_own_shows_the_image_it_is_of(slide, tmp_path):
    tifffile.imwrite(tmp_path / "image.tif", slide[0][:200, :200])
    tiledseg.segment(tmp_path / "image.tif", tmp_path / "out.ome.zarr", axes="yx", diameter=24)
    found = looks.look_at(str(tmp_path / "out.ome.zarr"))
    assert found.image.name.endswith("image.tif")
    assert found.labels is not None
    assert tiledseg.show(tmp_path / "out.ome.zarr", "y=:100,x=:100").pixels.shape[:2] >= (100, 100)
    (tmp_path / "image.tif").unlink()
    with pytest.raises(ImageError, match="holds labels alone, and their image is not found; give the image"):
        looks.look_at(tmp_path / "out.ome.zarr")
