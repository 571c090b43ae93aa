"""Inputs beside Zarr and TIFF: slides, HDF5, N5, many TIFFs as one; real files and hostile ones."""

from __future__ import annotations

import json
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from tiledseg.cli import main
from tiledseg.errors import ImageError
from tiledseg.images import Image, open_image

RNG = np.random.default_rng(5)


def noise(*shape: int, dtype: str = "uint16") -> npt.NDArray[Any]:
    return RNG.integers(0, 250, shape).astype(dtype)


def whole(image: Image, level: int = 0) -> npt.NDArray[Any]:
    return image.read(level, tuple(slice(0, n) for n in image.levels[level].shape))


def write_svs(path: Path, pixels: npt.NDArray[np.uint8], about: str = "|AppMag = 20|MPP = 0.499") -> None:
    """A slide as Aperio's scanners write it: tiled levels, without a loss here."""
    height, width = pixels.shape[:2]
    text = f"Aperio Image Library v11.2.1\r\n{width}x{height} [0,0 {width}x{height}] (256x256){about}"
    how: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb", "metadata": None, "software": False}
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 4):
            tiff.write(pixels[::step, ::step], compression="deflate", description=text, **how)


# ---- slides --------------------------------------------------------------------------------------


def test_a_slide_has_colours_levels_and_a_pixel_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = noise(700, 1000, 3, dtype="uint8")
    write_svs(tmp_path / "a.svs", pixels)
    caplog.set_level("INFO")
    image = open_image(tmp_path / "a.svs")
    assert "alpha is left out; where nothing was scanned the slide is #FFFFFF" in caplog.text
    assert (image.axes, image.shape, image.dtype) == ("cyx", (3, 700, 1000), np.uint8)
    assert image.channels == ("red", "green", "blue")
    assert image.spacing_um() == (0.499, 0.499)
    assert [level.shape for level in image.levels] == [(3, 700, 1000), (3, 175, 250)]
    assert [level.chunks for level in image.levels] == [(3, 256, 256), (3, 175, 250)]
    assert (image.levels[1].scale, image.levels[1].offset) == ((4.0, 4.0), (1.5, 1.5))
    np.testing.assert_array_equal(whole(image), np.moveaxis(pixels, -1, 0))
    np.testing.assert_array_equal(whole(image, 1), np.moveaxis(pixels[::4, ::4], -1, 0))
    region = (slice(1, 2), slice(250, 300), slice(3, 903))
    np.testing.assert_array_equal(image.read(0, region), pixels[None, 250:300, 3:903, 1])
    assert image.read(0, (slice(0, 3), slice(5, 5), slice(0, 9))).shape == (3, 0, 9)


def test_what_was_not_scanned_is_background(tmp_path: Path) -> None:
    pixels = noise(512, 512, 3, dtype="uint8")
    write_svs(tmp_path / "a.svs", pixels)
    with tifffile.TiffFile(tmp_path / "a.svs", mode="r+b") as tiff:
        counts = tiff.pages[0].tags["TileByteCounts"]
        counts.overwrite((0, *counts.value[1:]))
    read = whole(open_image(tmp_path / "a.svs"))
    assert (read[:, :256, :256] == 255).all()
    np.testing.assert_array_equal(read[:, :, 256:], np.moveaxis(pixels, -1, 0)[:, :, 256:])


@pytest.mark.parametrize("about", ["", "|MPP = nan", "|MPP = -1", "|MPP = wide"])
def test_a_slide_without_a_usable_pixel_size(tmp_path: Path, about: str) -> None:
    write_svs(tmp_path / "a.svs", noise(300, 300, 3, dtype="uint8"), about)
    assert open_image(tmp_path / "a.svs").spacing_um() is None


def test_slides_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"nonsense" * 100)
    with pytest.raises(ImageError, match=r"a\.svs is no slide that OpenSlide reads \(.+\); save it as OME-TIFF"):
        open_image(tmp_path / "a.svs")
    write_svs(tmp_path / "b.svs", noise(300, 300, 3, dtype="uint8"))
    with pytest.raises(ImageError, match="is a slide, whose axes are 'yxc', not 'cyx'; leave out axes"):
        open_image(tmp_path / "b.svs", axes="cyx")


def test_a_damaged_slide_names_the_region(tmp_path: Path) -> None:
    write_svs(tmp_path / "a.svs", noise(512, 512, 3, dtype="uint8"))
    with tifffile.TiffFile(tmp_path / "a.svs") as tiff:
        offset = tiff.pages[0].dataoffsets[0]
    with (tmp_path / "a.svs").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 200)
    with pytest.raises(ImageError, match=r"a\.svs cannot be read \(.+\) for region c 0:3, y 0:512, x 0:512; restore"):
        whole(open_image(tmp_path / "a.svs"))


# ---- HDF5 ----------------------------------------------------------------------------------------


@pytest.fixture
def hdf5(tmp_path: Path) -> Any:
    """An empty file, open for writing."""
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        yield file


def test_the_only_dataset_of_a_file_is_taken(hdf5: Any, tmp_path: Path) -> None:
    array = noise(3, 40, 50)
    dataset = hdf5.create_dataset("deep/raw", data=array, chunks=(1, 16, 16), compression="gzip")
    hdf5["table"] = np.arange(9)
    dataset.attrs["element_size_um"] = [2.0, 0.5, 0.25]
    hdf5.close()
    image = open_image(tmp_path / "a.h5", axes="zyx")
    assert (image.axes, image.shape, image.levels[0].chunks) == ("zyx", (3, 40, 50), (1, 16, 16))
    assert image.spacing_um() == (2.0, 0.5, 0.25)
    np.testing.assert_array_equal(whole(image), array)
    np.testing.assert_array_equal(image.read(0, (slice(1, 2), slice(9, 30), slice(0, 7))), array[1:2, 9:30, :7])
    with pytest.raises(ImageError, match=r"3 dimensions of lengths \(3, 40, 50\) and does not name them; give axes"):
        open_image(tmp_path / "a.h5/deep/raw")


def test_which_of_several_datasets_is_asked_for(hdf5: Any, tmp_path: Path) -> None:
    arrays = {"a": noise(20, 30), "b/c": noise(2, 20, 30, dtype="float32")}
    for name, array in arrays.items():
        hdf5[name] = array
    hdf5.close()
    with pytest.raises(ImageError, match=r"a\.h5 holds 2 images \(/a, /b/c\); give one, as in .*/a\.h5/a\."):
        open_image(tmp_path / "a.h5")
    np.testing.assert_array_equal(whole(open_image(tmp_path / "a.h5/a")), arrays["a"])
    np.testing.assert_array_equal(whole(open_image(tmp_path / "a.h5/b/c", axes="cyx")), arrays["b/c"])
    with pytest.raises(ImageError, match=r"a\.h5 holds no /b/d; it holds /a, /b/c\."):
        open_image(tmp_path / "a.h5/b/d")
    with pytest.raises(ImageError, match=r"holds no /a/d"):
        open_image(tmp_path / "a.h5/a/d")
    with pytest.raises(ImageError, match=r"/b of .*a\.h5 is a group; give one of its datasets \(/b/c\)\."):
        open_image(tmp_path / "a.h5/b")


def test_axes_that_a_file_names(hdf5: Any, tmp_path: Path) -> None:
    labelled = hdf5.create_dataset("labelled", data=noise(20, 30, 3))
    for dimension, letter in zip(labelled.dims, "yxc", strict=True):
        dimension.label = letter
    tagged = hdf5.create_dataset("tagged", data=noise(4, 20, 30))
    tagged.attrs["axistags"] = json.dumps({"axes": [{"key": "t"}, {"key": "y"}, {"key": "x"}]})
    for name, tags in {
        "odd": '{"axes": [{"key": "q"}, {"key": "y"}, {"key": "x"}]}',
        "bad": "{",
        "list": "[1]",
    }.items():
        hdf5.create_dataset(name, data=noise(4, 20, 30)).attrs["axistags"] = tags
    hdf5.close()
    assert open_image(tmp_path / "a.h5/labelled").axes == "cyx"
    assert open_image(tmp_path / "a.h5/labelled").shape == (3, 20, 30)
    assert open_image(tmp_path / "a.h5/tagged").axes == "tyx"
    for name in ("odd", "bad", "list"):
        with pytest.raises(ImageError, match="does not name them"):
            open_image(tmp_path / "a.h5" / name)


def test_a_file_does_not_lead_to_others(hdf5: Any, tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["raw"] = noise(9, 9)
    hdf5["away"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/raw")
    hdf5["real"] = noise(9, 9)
    hdf5["soft"] = h5py.SoftLink("/real")
    hdf5.create_dataset("stored", shape=(9, 9), dtype="u1", external=[(str(tmp_path / "secret.h5"), 0, 81)])
    layout = h5py.VirtualLayout(shape=(9, 9), dtype="u2")
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "raw", shape=(9, 9))
    hdf5.create_virtual_dataset("virtual", layout)
    hdf5.close()
    for name in ("away", "soft"):
        with pytest.raises(ImageError, match=rf"/{name} of .* is a link; give the path of the dataset itself"):
            open_image(tmp_path / "a.h5" / name)
    for name in ("stored", "virtual"):
        with pytest.raises(ImageError, match=rf"/{name} of .* takes its pixels from other files; give those"):
            open_image(tmp_path / "a.h5" / name)


def test_damaged_and_empty_files(hdf5: Any, tmp_path: Path) -> None:
    hdf5["raw"] = np.arange(9)
    hdf5.create_dataset("complex", data=np.zeros((9, 9), complex))
    hdf5.close()
    with pytest.raises(ImageError, match="holds no array of two dimensions or more"):
        open_image(tmp_path / "a.h5")
    with pytest.raises(ImageError, match="dtype complex128; only integers"):
        open_image(tmp_path / "a.h5/complex")
    content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "b.h5").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.h5").write_text("no HDF5")
    for name in ("b", "c"):
        with pytest.raises(ImageError, match=rf"{name}\.h5 is not readable as HDF5 \(.+\); restore the file"):
            open_image(tmp_path / f"{name}.h5")


def test_a_damaged_chunk_of_hdf5_names_the_region(hdf5: Any, tmp_path: Path) -> None:
    dataset = hdf5.create_dataset("raw", data=noise(64, 64), chunks=(32, 32), compression="gzip")
    place = dataset.id.get_chunk_info(0).byte_offset
    hdf5.close()
    with (tmp_path / "a.h5").open("r+b") as file:
        file.seek(place)
        file.write(b"\0" * 64)
    with pytest.raises(ImageError, match=r"a\.h5 cannot be read \(.+\) for region y 0:64, x 0:64; restore"):
        whole(open_image(tmp_path / "a.h5"))


# ---- N5 ------------------------------------------------------------------------------------------


def write_n5(path: Path, array: npt.NDArray[Any], attributes: dict[str, Any] | None = None) -> None:
    """A dataset, as tensorstore writes it, with some attributes more."""
    import tensorstore

    metadata = {
        "dimensions": list(array.shape[::-1]),
        "blockSize": [min(n, 16) for n in array.shape[::-1]],
        "dataType": str(array.dtype),
        "compression": {"type": "gzip"},
    }
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata, "create": True}
    tensorstore.open(spec).result().T[...] = array
    file = path / "attributes.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(attributes or {})}))


def test_a_dataset_of_n5(tmp_path: Path) -> None:
    array = noise(5, 30, 41)
    size = {"pixelResolution": {"dimensions": [250, 500, 2000], "unit": "nm"}, "axes": ["x", "y", "z"]}
    write_n5(tmp_path / "a.n5/deep/raw", array, size)
    for path in (tmp_path / "a.n5", tmp_path / "a.n5/deep/raw"):
        image = open_image(path)
        assert (image.axes, image.shape, image.levels[0].chunks) == ("zyx", (5, 30, 41), (5, 16, 16))
        assert image.spacing_um() == (2.0, 0.5, 0.25)
        np.testing.assert_array_equal(whole(image), array)
        np.testing.assert_array_equal(image.read(0, (slice(1, 2), slice(9, 30), slice(0, 7))), array[1:2, 9:30, :7])


def test_which_dataset_of_n5_is_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        write_n5(tmp_path / "a.n5" / name, noise(20, 30))
    with pytest.raises(ImageError, match=r"a\.n5 holds 2 images \(a, b/c\); give one, as in .*/a\.n5/a\."):
        open_image(tmp_path / "a.n5")
    assert open_image(tmp_path / "a.n5/b/c").shape == (20, 30)
    (tmp_path / "empty.n5").mkdir()
    with pytest.raises(ImageError, match=r"empty\.n5 is a folder of N5 without datasets"):
        open_image(tmp_path / "empty.n5")
    write_n5(tmp_path / "bare", noise(2, 20, 30))
    with pytest.raises(ImageError, match=r"bare has 3 dimensions of lengths \(2, 20, 30\) and does not name them"):
        open_image(tmp_path / "bare")


def test_levels_of_n5(tmp_path: Path) -> None:
    arrays = [noise(40, 60), noise(20, 30), noise(10, 15)]
    sizes = {"resolution": [0.5, 0.5], "units": ["um", "um"], "axes": ["x", "y"]}
    for i, array in enumerate(arrays):
        write_n5(tmp_path / f"a.n5/s{i}", array, {"downsamplingFactors": [2**i, 2**i]})
    (tmp_path / "a.n5/attributes.json").write_text(json.dumps({"n5": "2.5.1", **sizes}))
    image = open_image(tmp_path / "a.n5")
    assert image.spacing_um() == (0.5, 0.5)
    assert [level.scale for level in image.levels] == [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)]
    assert [level.offset for level in image.levels] == [(0.0, 0.0), (0.5, 0.5), (1.5, 1.5)]
    for level, array in enumerate(arrays):
        np.testing.assert_array_equal(whole(image, level), array)
    write_n5(tmp_path / "b.n5/s0", noise(40, 60))
    write_n5(tmp_path / "b.n5/s1", noise(20, 30, dtype="uint8"))
    with pytest.raises(ImageError, match="levels that differ in dimensions or dtype; give one of them"):
        open_image(tmp_path / "b.n5")


def test_damaged_n5(tmp_path: Path) -> None:
    write_n5(tmp_path / "a.n5", noise(20, 30))
    (block,) = [path for path in (tmp_path / "a.n5/0").iterdir() if path.name == "0"]
    block.write_bytes(block.read_bytes()[:20])
    with pytest.raises(ImageError, match=r"a\.n5 cannot be read \(.+\) for region y 0:20, x 0:30; restore"):
        whole(open_image(tmp_path / "a.n5"))
    for name, text in {"b": "{", "c": "[]", "d": '{"dimensions": [9, -9], "blockSize": [9, 9]}'}.items():
        (tmp_path / f"{name}.n5").mkdir()
        (tmp_path / f"{name}.n5/attributes.json").write_text(text)
    for name, said in {"b": "not readable as JSON", "c": "no JSON object", "d": "not readable as N5"}.items():
        with pytest.raises(ImageError, match=said):
            open_image(tmp_path / f"{name}.n5")


# ---- many TIFFs as one ---------------------------------------------------------------------------


def test_planes_are_stacked_in_numeric_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    array = noise(12, 20, 30)
    for z, plane in enumerate(array):
        tifffile.imwrite(tmp_path / f"img_{z + 1}.tif", plane, resolution=(1e4 / 0.5, 1e4 / 0.5), resolutionunit=3)
    tifffile.imwrite(tmp_path / "img_mask.tif", array[0])
    caplog.set_level("INFO")
    image = open_image(tmp_path / "img_{z}.tif")
    assert "1 files do not fit and are left out: img_mask.tif" in caplog.text
    assert "z is 1 to 12, 12 of them" in caplog.text
    assert (image.axes, image.shape, image.spacing) == ("zyx", (12, 20, 30), (None, 0.5, 0.5))
    np.testing.assert_array_equal(whole(image), array)
    np.testing.assert_array_equal(image.read(0, (slice(8, 11), slice(5, 9), slice(0, 30))), array[8:11, 5:9])


def test_series_channels_and_colours(tmp_path: Path) -> None:
    array = noise(2, 3, 2, 20, 30)
    for t in range(2):
        (tmp_path / f"t{t}").mkdir()
        for i, name in enumerate(("dapi", "gfp", "red")):
            for z in range(2):
                tifffile.imwrite(tmp_path / f"t{t}/{name}_{z:03}.tif", array[t, i, z])
    image = open_image(tmp_path / "t{t}" / "{c}_{z}.tif")
    assert (image.axes, image.shape, image.channels) == ("tczyx", (2, 3, 2, 20, 30), ("dapi", "gfp", "red"))
    np.testing.assert_array_equal(whole(image), array)
    colours = noise(4, 20, 30, 3, dtype="uint8")
    for z, plane in enumerate(colours):
        tifffile.imwrite(tmp_path / f"rgb{z}.tif", plane, photometric="rgb")
    image = open_image(tmp_path / "rgb{z}.tif")
    assert (image.axes, image.shape) == ("czyx", (3, 4, 20, 30))
    np.testing.assert_array_equal(whole(image), np.moveaxis(colours, -1, 0))
    with pytest.raises(ImageError, match="names 'c', which the files have themselves"):
        open_image(tmp_path / "rgb{c}.tif")


def test_tiles_lie_side_by_side(tmp_path: Path) -> None:
    array = noise(2, 50, 70)
    for y in range(0, 50, 20):
        for x in range(0, 70, 32):
            for c in range(2):
                tifffile.imwrite(tmp_path / f"y{y}_x{x}_{c}.tif", array[c, y : y + 20, x : x + 32])
    image = open_image(tmp_path / "y{y}_x{x}_{c}.tif")
    assert (image.axes, image.shape, image.levels[0].chunks) == ("cyx", (2, 50, 70), (1, 20, 32))
    np.testing.assert_array_equal(whole(image), array)
    np.testing.assert_array_equal(image.read(0, (slice(1, 2), slice(19, 41), slice(30, 66))), array[1:, 19:41, 30:66])


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for z in range(5):
        tifffile.imwrite(tmp_path / f"a{z}_0.tif", noise(20, 30))
    with pytest.raises(ImageError, match="is a folder of TIFFs; say what the numbers in their names mean"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match=r"b\{z\}\.tif fits no file; check the names in"):
        open_image(tmp_path / "b{z}.tif")
    tifffile.imwrite(tmp_path / "a1_1.tif", noise(20, 30))
    with pytest.raises(ImageError, match=r"fits 6 files, but .*a0_1\.tif is missing; restore it"):
        open_image(tmp_path / "a{z}_{t}.tif")
    (tmp_path / "a1_1.tif").unlink()
    tifffile.imwrite(tmp_path / "a2_0.tif", noise(20, 31))
    with pytest.raises(ImageError, match=r"a2_0\.tif has axes 'yx', shape \(20, 31\) and dtype uint16, but 'yx', "):
        whole(open_image(tmp_path / "a{z}_0.tif"))
    tifffile.imwrite(tmp_path / "a2_0.tif", noise(20, 30))
    image = open_image(tmp_path / "a{z}_0.tif")
    (tmp_path / "a2_0.tif").unlink()
    with pytest.raises(ImageError, match=r"a2_0\.tif is missing; restore it"):
        whole(image)
    with pytest.raises(ImageError, match="z goes from 0 to 4 but 2 is missing; restore it"):
        open_image(tmp_path / "a{z}_0.tif")
    tifffile.imwrite(tmp_path / "a04_0.tif", noise(20, 30))
    with pytest.raises(ImageError, match="several files have the same number for 'z'"):
        open_image(tmp_path / "a{z}_0.tif")
    for x, width in enumerate((20, 10, 20)):
        tifffile.imwrite(tmp_path / f"x{x}.tif", noise(20, width))
    with pytest.raises(ImageError, match="tiles along x have sizes 20, 10, 20; only the last may be smaller"):
        open_image(tmp_path / "x{x}.tif")


# ---- all of them ---------------------------------------------------------------------------------


def one_of_each(folder: Path) -> dict[str, tuple[Path, npt.NDArray[Any]]]:
    """An image in every format, and its pixels."""
    import h5py

    colours, picture = noise(300, 400, 3, dtype="uint8"), noise(60, 90)
    write_svs(folder / "a.svs", colours)
    with h5py.File(folder / "a.h5", "w") as file:
        file["raw"] = picture
    write_n5(folder / "a.n5", picture)
    for i in range(3):
        tifffile.imwrite(folder / f"p{i}.tif", picture + i, compression="zlib")
    stack = np.stack([picture + i for i in range(3)])
    return {
        "slide": (folder / "a.svs", np.moveaxis(colours, -1, 0)),
        "hdf5": (folder / "a.h5/raw", picture),
        "n5": (folder / "a.n5", picture),
        "folder": (folder / "p{z}.tif", stack),
    }


def test_only_a_path_travels_to_other_processes(tmp_path: Path) -> None:
    images = {name: (open_image(path), pixels) for name, (path, pixels) in one_of_each(tmp_path).items()}
    assert max(len(pickle.dumps(image)) for image, _ in images.values()) < 3000
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for image, pixels in images.values():
            np.testing.assert_array_equal(pool.submit(whole, image).result(), pixels)


def test_a_missing_extra_is_one_sentence_with_its_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = one_of_each(tmp_path)
    extras = {"slide": ("openslide", "slides"), "hdf5": ("h5py", "hdf5"), "n5": ("tensorstore", "n5")}
    for name, (package, extra) in extras.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImageError, match=rf'needs .*; install it: pip install -e "\.\[{extra}\]"\.$'):
            open_image(places[name][0])


def test_info_and_segment_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (path, _) in one_of_each(tmp_path).items():
        if name == "folder":
            continue
        assert main(["info", str(path)]) == 0
        assert str(path) in capsys.readouterr().out
        out = tmp_path / f"{name}.ome.zarr"
        assert main(["segment", str(path), "-o", str(out), "--diameter", "17"]) == 0
        assert (out / "labels/cells/0").is_dir()


def test_real_files_that_name_no_axes_say_so(data: Path) -> None:
    with pytest.raises(ImageError, match=r"an axis 'I' of length 76 whose meaning is unknown"):
        open_image(data / "ome_tiff_samples/input_1_cellWholeIndex.tiff")
    assert open_image(data / "ome_tiff_samples/input_1_cellWholeIndex.tiff", axes="tyx").shape == (76, 1024, 1024)


def test_real_ome_zarrs_have_the_axes_sizes_and_levels_of_their_metadata(data: Path) -> None:
    """What is expected is read from the JSON files alone."""
    folders = [path for path in sorted((data / "ome_zarr_samples").rglob("*.zarr")) if path.is_dir()]
    assert len(folders) > 15
    for folder in folders:
        home = folder if "bf2raw" not in folder.name else folder / "0"
        is_v3 = (home / "zarr.json").exists()
        attributes = json.loads((home / ("zarr.json" if is_v3 else ".zattrs")).read_text())
        ome = attributes["attributes"]["ome"] if is_v3 else attributes
        (entry,) = ome["multiscales"]
        letters = [axis["name"] for axis in entry["axes"]]
        array = "zarr.json" if is_v3 else ".zarray"
        shapes = [json.loads((home / one["path"] / array).read_text())["shape"] for one in entry["datasets"]]
        scales = [one["coordinateTransformations"][0]["scale"] for one in entry["datasets"]]
        image = open_image(folder)
        assert image.axes == "".join(letters)
        assert [list(level.shape) for level in image.levels] == shapes
        assert list(image.spacing) == scales[0]
        assert image.ome_version == ("0.5" if is_v3 else "0.4")
        space = [letters.index(axis) for axis in image.spatial_axes]
        for level, scale, shape in zip(image.levels, scales, shapes, strict=True):
            true = [shapes[0][at] / shape[at] for at in space]
            said = [scale[at] / scales[0][at] for at in space]
            # One sample says of its last level another scale than its arrays have: those count.
            assert list(level.scale) == (said if "pyramid_v" not in folder.name else true)
        names = [channel["label"] for channel in ome.get("omero", {}).get("channels", [])]
        assert list(image.channels) == (names or [str(i) for i in range(image.n_channels)])


def test_a_real_ome_tiff_has_the_size_of_its_xml(data: Path) -> None:
    path = data / "ome_tiff_samples/s_1_t_1_c_1_z_1.ome.tiff"
    with tifffile.TiffFile(path) as tiff:
        text = tiff.pages[0].description
    values = {
        name: text.split(f' {name}="', 1)[1].split('"', 1)[0]
        for name in ("SizeX", "SizeY", "PhysicalSizeX", "PhysicalSizeY")
    }
    image = open_image(path)
    assert image.shape == (int(values["SizeY"]), int(values["SizeX"]))
    assert image.spacing == (float(values["PhysicalSizeY"]), float(values["PhysicalSizeX"]))
