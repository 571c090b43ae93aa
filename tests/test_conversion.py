"""Conversion: what is written has the pixels of the source, is valid, and survives being killed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import ome_zarr_models
import pytest
import tifffile
import yaozarrs
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import tiledseg
from tiledseg import conversion
from tiledseg.cli import main
from tiledseg.cli.parser import make_parser
from tiledseg.config import ConvertConfig
from tiledseg.errors import ImageError, OutputError, SettingsError
from tiledseg.images import open_image
from tiledseg.lock import locked
from tiledseg.omezarr import shrink, write_image
from tiledseg.pieces import Pieces, calibrated, pieces_of_level, pieces_of_source, plan_of

from .conftest import Slide
from .test_formats import noise, one_of_each, whole, write_svs

ALL: Any = ("slide", "hdf5", "n5", "folder", "strip", "tiled", "pyramid", "ome_zarr", "zarr")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, npt.NDArray[Any]]]:
    """An image in every format, and its pixels in the order of axes."""
    folder = tmp_path_factory.mktemp("sources")
    found = one_of_each(folder)
    picture, volume = noise(90, 130), noise(2, 5, 70, 90)
    tifffile.imwrite(folder / "strip.tif", noise(90, 130), compression="zlib", rowsperstrip=90)
    tifffile.imwrite(folder / "tiled.tif", noise(90, 130, 3, dtype="uint8"), tile=(32, 48), photometric="rgb")
    about = {"axes": "CZYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}
    about |= {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm", "PhysicalSizeZUnit": "µm"}
    about["Channel"] = {"Name": ["dapi", "gfp"]}
    with tifffile.TiffWriter(folder / "pyramid.ome.tif", ome=True) as tiff:
        tiff.write(volume, subifds=1, tile=(32, 32), metadata=about)
        tiff.write(volume[..., ::2, ::2], subfiletype=1, tile=(32, 32))
    write_image(folder / "image.ome.zarr", volume, axes="czyx", spacing_um=(2.0, 0.5, 0.25), channels=["dapi", "gfp"])
    zarr.create_array(folder / "bare.zarr", data=picture, chunks=(32, 32))
    found["strip"] = folder / "strip.tif", tifffile.imread(folder / "strip.tif")
    found["tiled"] = folder / "tiled.tif", np.moveaxis(tifffile.imread(folder / "tiled.tif"), -1, 0)
    found["pyramid"] = folder / "pyramid.ome.tif", volume
    found["ome_zarr"] = folder / "image.ome.zarr", volume
    found["zarr"] = folder / "bare.zarr", picture
    return found


def mean_of(pixels: npt.NDArray[Any], axes: str, halved: str) -> npt.NDArray[Any]:
    """Means of two along some axes, the last counted twice at an odd end, half to even: written down plainly."""
    total = pixels.astype(np.float64)
    for at, axis in enumerate(axes):
        if axis in halved and total.shape[at] > 1:
            total = np.concatenate([total, total.take([-1], at)], at) if total.shape[at] % 2 else total
            total = total.take(range(0, total.shape[at], 2), at) + total.take(range(1, total.shape[at], 2), at)
            total = total / 2
    return np.rint(total).astype(pixels.dtype)


@pytest.mark.parametrize("version", ["0.4", "0.5", "sharded"])
@pytest.mark.parametrize("name", ALL)
def test_what_is_written_is_the_same_and_valid(
    sources: dict[str, tuple[Path, npt.NDArray[Any]]], tmp_path: Path, name: str, version: str
) -> None:
    path, pixels = sources[name]
    before = open_image(path)
    how = {"ome_version": "0.5", "shard": 64} if version == "sharded" else {"ome_version": version}
    done = tiledseg.convert(path, tmp_path / "out.ome.zarr", chunk=32, **how)
    yaozarrs.validate_zarr_store(str(done.path))
    ome_zarr_models.open_ome_zarr(str(done.path), version=how["ome_version"])
    after = done.image
    assert (after.axes, after.shape, after.dtype) == (before.axes, pixels.shape, pixels.dtype)
    assert (after.channels, after.spacing_um()) == (before.channels, before.spacing_um())
    np.testing.assert_array_equal(whole(after), pixels)
    for level in range(1, len(after.levels)):
        halved = "yx"  # planes are few
        np.testing.assert_array_equal(whole(after, level), mean_of(whole(after, level - 1), after.axes, halved))
        everything = tuple(slice(0, n) for n in after.levels[level].shape)
        assert after.missing_chunks(level, everything) == []
    assert max(after.levels[-1].shape[-2:]) <= 32
    array = zarr.open_array(done.path / "0", mode="r")
    assert array.chunks[-2:] == (32, 32)
    assert array.shards == (None if version != "sharded" else (*array.shards[:-2], 64, 64))
    assert not list(done.path.rglob("*.partial"))
    assert [child.name for child in tmp_path.iterdir()] == ["out.ome.zarr"]


def test_pixel_sizes_units_and_positions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.zarr"
    write_image(path, noise(40, 30), axes="yx", spacing_um=(0.5, 0.25))
    attributes = json.loads((path / "zarr.json").read_text())
    (entry,) = attributes["attributes"]["ome"]["multiscales"]
    entry["axes"][0]["unit"] = entry["axes"][1]["unit"] = "nanometer"
    entry["datasets"][0]["coordinateTransformations"][1]["translation"] = [100.0, -7.5]
    (path / "zarr.json").write_text(json.dumps(attributes))
    after = tiledseg.convert(path, tmp_path / "b.ome.zarr", chunk=16).image
    assert (after.spacing, after.units) == ((0.5, 0.25), ("nanometer", "nanometer"))
    assert after.translation == (100.0, -7.5)
    assert [level.offset for level in after.levels] == [(0.0, 0.0), (0.5, 0.5), (1.5, 1.5)]


def test_a_pixel_size_that_is_given_replaces_that_of_the_file(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(5, 20, 30), metadata={"axes": "ZYX"})
    after = tiledseg.convert(tmp_path / "a.tif", tmp_path / "a.zarr", pixel_size="z=2,y=0.5,x=0.25").image
    assert after.spacing_um() == (2.0, 0.5, 0.25)
    tifffile.imwrite(tmp_path / "b.tif", noise(20, 30))
    assert tiledseg.convert(tmp_path / "b.tif", tmp_path / "b.zarr", pixel_size=0.3).image.spacing_um() == (0.3, 0.3)


@pytest.mark.parametrize(
    ("sizes", "factors"),
    [
        (None, [(1, 1, 1), (2, 2, 2), (4, 4, 4)]),
        ((1.0, 1.0, 1.0), [(1, 1, 1), (2, 2, 2), (4, 4, 4)]),
        ((2.0, 1.0, 1.0), [(1, 1, 1), (1, 2, 2), (2, 4, 4)]),
        ((9.0, 1.0, 1.0), [(1, 1, 1), (1, 2, 2), (1, 4, 4)]),
    ],
)
def test_thick_planes_are_halved_when_pixels_are_as_wide(
    tmp_path: Path, sizes: tuple[float, ...] | None, factors: list[tuple[int, ...]]
) -> None:
    volume = noise(200, 40, 30, dtype="uint8")
    given_sizes = None if sizes is None else ",".join(f"{a}={n}" for a, n in zip("zyx", sizes, strict=True))
    after = tiledseg.convert(volume, tmp_path / "a.zarr", axes="zyx", chunk=16, pixel_size=given_sizes).image
    assert [level.scale for level in after.levels] == [tuple(map(float, of)) for of in factors]
    for level in (1, 2):
        halved = "".join(a for a, b, c in zip("zyx", factors[level], factors[level - 1], strict=True) if b > c)
        np.testing.assert_array_equal(whole(after, level), mean_of(whole(after, level - 1), "zyx", halved))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_means_of_integers_are_exact(data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
    steps = data.draw(st.tuples(*[st.sampled_from([1, 2])] * 3))
    info = np.iinfo(dtype)
    values = st.one_of(st.integers(info.min, info.max), st.sampled_from([info.min, info.max, info.max - 1]))
    pixels = np.array(data.draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape))), dtype)
    pixels = pixels.reshape(shape)
    smaller = tuple(-(-n // step) for n, step in zip(shape, steps, strict=True))
    found = shrink(pixels, smaller, shape)
    assert (found.shape, found.dtype) == (smaller, dtype)
    steps = tuple(-(-n // m) for n, m in zip(shape, smaller, strict=True))
    for at in np.ndindex(smaller):
        places = product(*[[min(i * s + k, n - 1) for k in range(s)] for i, s, n in zip(at, steps, shape, strict=True)])
        box = [int(pixels[place]) for place in places]
        assert int(found[at]) == round(Fraction(sum(box), len(box)))  # half to even, as numpy's rint


def test_means_of_real_numbers_and_labels() -> None:
    pixels = np.array([[1.0, 2.0, 5.0], [3.0, np.nan, 7.0]], np.float32)
    np.testing.assert_array_equal(shrink(pixels, (1, 2), (2, 3)), np.array([[np.nan, 6.0]], np.float32))
    labels = np.array([[1, 2, 5], [3, 4, 7], [8, 9, 6]], np.uint32)
    np.testing.assert_array_equal(shrink(labels, (2, 2), (3, 3), "nearest"), [[1, 5], [8, 6]])


def test_labels_are_not_averaged(tmp_path: Path) -> None:
    labels = np.repeat(np.repeat(noise(9, 9, dtype="uint32"), 7, 0), 7, 1)
    after = tiledseg.convert(labels, tmp_path / "a.zarr", chunk=16, downsample="nearest").image
    for level in range(1, len(after.levels)):
        np.testing.assert_array_equal(whole(after, level), labels[:: 2**level, :: 2**level])
        assert after.levels[level].offset == (0.0, 0.0)


# ---- pieces --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pieces_are_whole_files_and_cover_all(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 90), st.integers(1, 5000), st.integers(1, 5000)))
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    chunk = data.draw(st.sampled_from([None, 16, 100, 1024]))
    shard = data.draw(st.sampled_from([None, 1600])) if chunk in (16, 100) else None
    array = da.zeros(shape, chunks=chunks, dtype="u2")
    image, config = open_image(array, axes="czyx"), ConvertConfig(chunk=chunk, shard=shard)
    plan = plan_of(image, Path("out.zarr"), config)
    for level in range(plan.n_levels):
        pieces = pieces_of_source(image, plan) if level == 0 else pieces_of_level(plan, level)
        files = plan.level_files(level)
        assert pieces.shape == plan.level_shape(level)
        assert all(side % file == 0 for side, file in zip(pieces.sides, files, strict=True))
        assert all(file % of == 0 for file, of in zip(files, plan.level_chunks(level), strict=True))
        seen = sum(math.prod(part.stop - part.start for part in pieces[i]) for i in {0, len(pieces) - 1})
        assert 0 < seen <= 2 * math.prod(pieces.shape)
    assert len({str(pieces[i]) for i in range(min(len(pieces), 50))}) == min(len(pieces), 50)


def n_decoded(pieces: Pieces, chunks: tuple[int, ...]) -> int:
    """How many chunks are read by all pieces together."""
    total = 0
    for i in range(len(pieces)):
        parts = zip(pieces[i], chunks, strict=True)
        total += math.prod(-(-part.stop // n) - part.start // n for part, n in parts)
    return total


@pytest.mark.parametrize(
    ("shape", "chunks", "wanted"),
    [
        ((3, 5000, 7000), (3, 256, 256), (1, 1024, 1024)),  # tiles of colours
        ((3, 5000, 7000), (3, 5000, 7000), (1, 1024, 1024)),  # one strip
        ((3, 5000, 70000), (3, 64, 70000), (1, 256, 1024)),  # wide strips
        ((50, 2048, 2048), (1, 2048, 2048), (16, 256, 256)),  # planes
        ((50, 4100, 4100), (1, 4100, 4100), (2, 256, 256)),  # large planes
        ((64, 500, 500), (64, 100, 100), (32, 256, 256)),
    ],
)
def test_what_is_compressed_together_is_read_once(
    shape: tuple[int, ...], chunks: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    axes = "cyx" if shape[0] == 3 else "zyx"
    image = open_image(da.zeros(shape, chunks=chunks, dtype="u1"), axes=axes)
    plan = plan_of(image, Path("out.zarr"), ConvertConfig())
    pieces = pieces_of_source(image, plan)
    assert n_decoded(pieces, chunks) == math.prod(-(-n // m) for n, m in zip(shape, chunks, strict=True))
    assert plan.chunks == wanted
    largest = math.prod(pieces.sides)
    assert largest <= 2**26 or largest < 2 * math.prod(chunks)


def test_planes_in_one_strip_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = noise(5, 300, 2100, dtype="uint8")
    tifffile.imwrite(tmp_path / "a.tif", array, compression="zlib", rowsperstrip=300, metadata={"axes": "ZYX"})
    decoded = []
    decode = tifffile.TIFF.DECOMPRESSORS[8]
    counting = {8: lambda *of, **how: decoded.append(1) or decode(*of, **how)}
    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", counting)
    done = tiledseg.convert(tmp_path / "a.tif", tmp_path / "a.zarr")
    assert len(decoded) == 5
    np.testing.assert_array_equal(whole(done.image), array)


# ---- arrays in memory, clusters, segmentation ----------------------------------------------------


def test_numpy_and_dask_arrays(tmp_path: Path) -> None:
    array = noise(2, 90, 130)
    for name, source in {"numpy": array, "dask": da.from_array(array, chunks=(1, 40, 50))}.items():
        done = tiledseg.convert(source, tmp_path / f"{name}.zarr", axes="cyx", chunk=32)
        np.testing.assert_array_equal(whole(done.image), array)
        assert done.n_kept == 0 < done.n_pieces


def test_workers_of_a_cluster_write_the_same(client: Any, tmp_path: Path) -> None:
    write_svs(tmp_path / "a.svs", noise(1500, 2100, 3, dtype="uint8"))
    here = tiledseg.convert(tmp_path / "a.svs", tmp_path / "here.zarr", chunk=256).image
    there = tiledseg.convert(tmp_path / "a.svs", tmp_path / "there.zarr", chunk=256, client=client).image
    for level in range(len(here.levels)):
        np.testing.assert_array_equal(whole(here, level), whole(there, level))
    with pytest.raises(SettingsError, match="the numpy array is in this process, which converts it; leave out client"):
        tiledseg.convert(noise(9, 9), tmp_path / "array.zarr", client=client)


def test_a_converted_image_is_segmented_as_the_original(slide: Slide, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", slide[0], tile=(128, 128))
    tiledseg.convert(tmp_path / "a.tif", tmp_path / "a.ome.zarr", chunk=100)
    labels = [
        tiledseg.segment(tmp_path / name, tmp_path / f"{name}.labels.zarr", diameter=24.0).labels.compute()
        for name in ("a.tif", "a.ome.zarr")
    ]
    assert labels[0].max() > 100
    np.testing.assert_array_equal(*labels)


# ---- what viewers show ---------------------------------------------------------------------------


def windows_of(path: Any) -> list[dict[str, float]]:
    ome = json.loads((Path(path) / "zarr.json").read_text())["attributes"]["ome"]
    return [channel["window"] for channel in ome["omero"]["channels"]]


def test_viewers_are_told_the_range_of_the_values(tmp_path: Path) -> None:
    array = RNG.normal(1000, 100, (2, 300, 300)).astype("u2")
    array[1] *= 3
    first, second = windows_of(tiledseg.convert(array, tmp_path / "a.zarr", axes="cyx", chunk=32).path)
    assert (first["min"], first["max"]) == (0, 65535)
    for window, times in ((first, 1), (second, 3)):
        assert window["start"] == pytest.approx(times * 691, rel=0.1)
        assert window["end"] == pytest.approx(times * 1309, rel=0.1)
    reals = RNG.normal(0, 1, (300, 300)).astype("f4")
    reals[:50] = np.nan
    (window,) = windows_of(tiledseg.convert(reals, tmp_path / "b.zarr").path)
    assert window["min"] < window["start"] < -2 < 2 < window["end"] < window["max"]
    (window,) = windows_of(tiledseg.convert(np.full((9, 9), np.nan, "f4"), tmp_path / "c.zarr").path)
    assert (window["start"], window["end"]) == (0, 1)
    (window,) = windows_of(tiledseg.convert(np.full((9, 9), 7, "u1"), tmp_path / "d.zarr").path)
    assert (window["start"], window["end"]) == (7, 8)
    write_svs(tmp_path / "a.svs", noise(300, 300, 3, dtype="uint8"))
    path = tiledseg.convert(tmp_path / "a.svs", tmp_path / "e.zarr").path
    assert windows_of(path) == [{"min": 0, "max": 255, "start": 0, "end": 255}] * 3
    channels = json.loads((Path(str(path)) / "zarr.json").read_text())["attributes"]["ome"]["omero"]["channels"]
    assert [channel["color"] for channel in channels] == ["FF0000", "00FF00", "0000FF"]


RNG = np.random.default_rng(11)


# ---- interruptions -------------------------------------------------------------------------------

KILLED = """
import os, sys, tiledseg
from tiledseg.store import DiskStore
mark, left = DiskStore.mark, [int(sys.argv[3])]
def mark_and_die(self, stage, pieces):
    mark(self, stage, pieces)
    left[0] -= 1
    if left[0] < 1:
        os._exit(9)
DiskStore.mark = mark_and_die
tiledseg.convert(sys.argv[1], sys.argv[2], chunk=256)
"""


def killed(source: Path, out: Path, n_marks: int) -> None:
    """Convert in a process that dies after so many pieces."""
    assert subprocess.run([sys.executable, "-c", KILLED, source, out, str(n_marks)]).returncode == 9


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, npt.NDArray[Any]]:
    array = noise(4100, 4200)
    tifffile.imwrite(tmp_path / "large.tif", array, tile=(256, 256))
    return tmp_path / "large.tif", array


def test_a_conversion_that_was_killed_goes_on(large: tuple[Path, npt.NDArray[Any]], tmp_path: Path) -> None:
    path, array = large
    out = tmp_path / "out.ome.zarr"
    for n_marks in (3, 2):
        killed(path, out, n_marks)
        assert (tmp_path / "out.ome.zarr.unfinished").is_dir()
        with pytest.raises(ImageError, match="is a folder but no Zarr"):
            open_image(out)
    with pytest.raises(OutputError, match=r"is an unfinished conversion of .*large\.tif, or of this image with other"):
        tiledseg.convert(path, out, chunk=128)
    with locked(tmp_path / "out.ome.zarr.unfinished"), pytest.raises(OutputError, match="another run works in"):
        tiledseg.convert(path, out, chunk=256)
    done = tiledseg.convert(path, out, chunk=256)
    assert done.n_kept == 5
    np.testing.assert_array_equal(whole(done.image), array)
    np.testing.assert_array_equal(whole(done.image, 1), mean_of(array, "yx", "yx"))
    assert not (tmp_path / "out.ome.zarr.unfinished").exists()


def test_what_cannot_be_continued_begins_again(large: tuple[Path, npt.NDArray[Any]], tmp_path: Path) -> None:
    path, array = large
    out = tmp_path / "out.ome.zarr"
    killed(path, out, 3)
    zarr.open_array(out / "0", mode="r")
    (out / "1" / "zarr.json").unlink()  # somebody tidied up
    done = tiledseg.convert(path, out, chunk=256)
    assert done.n_kept == 0
    np.testing.assert_array_equal(whole(done.image), array)


def test_a_changed_file_is_not_continued(large: tuple[Path, npt.NDArray[Any]], tmp_path: Path) -> None:
    path, array = large
    out = tmp_path / "out.ome.zarr"
    killed(path, out, 3)
    tifffile.imwrite(path, array + 1, tile=(256, 256))
    with pytest.raises(OutputError, match="is an unfinished conversion of"):
        tiledseg.convert(path, out, chunk=256)
    done = tiledseg.convert(path, out, chunk=256, overwrite=True)
    assert done.n_kept == 0
    np.testing.assert_array_equal(whole(done.image), array + 1)


def test_an_array_that_was_interrupted_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = noise(300, 300)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "finish_image", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tiledseg.convert(array, tmp_path / "a.zarr")
    done = tiledseg.convert(array + 1, tmp_path / "a.zarr")
    assert done.n_kept == 0
    np.testing.assert_array_equal(whole(done.image), array + 1)


# ---- refusals ------------------------------------------------------------------------------------


def test_what_is_there_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    array = noise(40, 30)
    tiledseg.convert(array, tmp_path / "a.zarr")
    with pytest.raises(OutputError, match=r"a\.zarr exists already; choose another place, or add --overwrite"):
        tiledseg.convert(array, tmp_path / "a.zarr")
    done = tiledseg.convert(array + 1, tmp_path / "a.zarr", overwrite=True)
    np.testing.assert_array_equal(whole(done.image), array + 1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="home is no Zarr, so it is not replaced; delete it yourself"):
        tiledseg.convert(array, tmp_path / "home", overwrite=True)
    with pytest.raises(OutputError, match=r"thesis\.tex is a file, so"):
        tiledseg.convert(array, tmp_path / "home" / "thesis.tex" / "a.zarr")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    assert sorted(child.name for child in tmp_path.iterdir()) == ["a.zarr", "home"]


def test_an_image_is_not_written_into_itself(tmp_path: Path) -> None:
    write_image(tmp_path / "a.zarr", noise(40, 30), axes="yx")
    tifffile.imwrite(tmp_path / "b.tif", noise(40, 30))
    for source, out in (("a.zarr", "a.zarr"), ("a.zarr/0", "a.zarr"), ("a.zarr", "a.zarr/labels/x"), ("b.tif", ".")):
        with pytest.raises(OutputError, match="lie in each other; choose another place for the output"):
            tiledseg.convert(tmp_path / source, tmp_path / out, overwrite=True)
    assert open_image(tmp_path / "a.zarr").shape == (40, 30)


def test_missing_chunks_are_refused_unless_told_otherwise(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a.zarr", shape=(64, 64), chunks=(32, 32), dtype="u2", fill_value=7)
    array[:32] = 1
    with pytest.raises(ImageError, match=r"chunk c/1/0 of .*a\.zarr is missing .*add --missing-chunks fill"):
        tiledseg.convert(tmp_path / "a.zarr", tmp_path / "b.zarr")
    done = tiledseg.convert(tmp_path / "a.zarr", tmp_path / "c.zarr", missing_chunks="fill")
    np.testing.assert_array_equal(whole(done.image), array[:])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ome_version", "0.3", "ome_version must be 0.4 or 0.5"),
        ("chunk", 8, "chunk must be at least 16"),
        ("shard", "wide", "shard must be a whole number"),
        ("downsample", "max", "downsample must be mean or nearest"),
        ("missing_chunks", "skip", "missing_chunks must be"),
        ("pixel_size", "z=1,1", "pixel_size 'z=1,1' cannot be read"),
        ("pixel_size", "q=1", "pixel_size 'q=1' cannot be read"),
        ("pixel_size", "y=0", "pixel_size must be more than 0"),
        ("pixel_size", "y=wide", "pixel_size must be a number"),
        ("chunks", 64, r"unknown setting 'chunks'; did you mean 'chunk'\?"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path: Path, name: str, value: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        tiledseg.convert(noise(40, 30), tmp_path / "a.zarr", **{name: value})
    assert not list(tmp_path.iterdir())


def test_settings_that_do_not_fit_each_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"OME-Zarr 0\.4 has no shards; leave out --shard, or write 0\.5"):
        tiledseg.convert(noise(40, 30), tmp_path / "a.zarr", ome_version="0.4", shard=64)
    with pytest.raises(SettingsError, match=r"shard 40 is no multiple of the chunk 16"):
        tiledseg.convert(noise(90, 90), tmp_path / "a.zarr", chunk=16, shard=40)
    image = open_image(noise(40, 30))
    with pytest.raises(SettingsError, match="give one number, or one per axis of y, x"):
        calibrated(image, ConvertConfig(pixel_size="z=1"))


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_has_the_settings_of_python() -> None:
    options = vars(make_parser().parse_args(["convert", "a", "b"]))
    given = vars(
        make_parser().parse_args(
            ["convert", "a", "b", "--ome-version", "0.4", "--chunk", "64", "--shard", "128", "--pixel-size", "1"]
        )
    )
    assert not set(options) & set(ConvertConfig.__dataclass_fields__)
    assert {name for name in given if name in ConvertConfig.__dataclass_fields__} == {
        "ome_version", "chunk", "shard", "pixel_size"
    }  # fmt: skip


def test_the_command_says_what_was_written(
    sources: dict[str, tuple[Path, npt.NDArray[Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, pixels = sources["pyramid"]
    out = tmp_path / "out.ome.zarr"
    assert main(["convert", str(path), str(out), "--chunk", "32", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] == str(out)
    assert (facts["image"]["axes"], facts["image"]["shape"]) == ("czyx", list(pixels.shape))
    assert facts["peak_memory"] > 0
    assert main(["convert", str(path), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(path), str(out), "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert "channels     dapi, gfp" in text
    assert "pixel size   2 x 0.5 x 0.25 µm" in text
