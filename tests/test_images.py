"""Opening and reading inputs, with real files; damaged and hostile ones too."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import dask.array as da
import numcodecs
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from tiledseg.errors import ImageError, RemoteError
from tiledseg.images import Image, channel_index, open_image
from tiledseg.omezarr import write_image

RNG = np.random.default_rng(7)
DATA = os.environ.get("TILEDSEG_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="needs TILEDSEG_DATA")

MICRO = {"type": "space", "unit": "micrometer"}
V2 = {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}}


def noise(*shape, dtype="uint16"):
    return RNG.integers(0, 250, shape).astype(dtype)


def whole(image: Image, level: int = 0):
    return image.read(level, tuple(slice(0, n) for n in image.levels[level].shape))


def everything(image: Image):
    return tuple(slice(None) for _ in image.axes)


def make_ome(path, arrays, axes, datasets=None, version="0.5", extra=None, multi=None):
    """An OME-Zarr image by hand, so that any metadata can be written."""
    group = zarr.create_group(path, zarr_format=2 if version == "0.4" else 3)
    for i, array in enumerate(arrays):
        zarr.create_array(
            path / str(i),
            data=array,
            chunks=tuple(min(n, 16) for n in array.shape),
            **(V2 if version == "0.4" else {}),
        )
    if datasets is None:
        datasets = [
            {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": [2.0**i] * len(axes)}]}
            for i in range(len(arrays))
        ]
    kinds = {"t": {"type": "time"}, "c": {"type": "channel"}}
    entry = {
        "axes": [{"name": a, **kinds.get(a, MICRO)} for a in axes],
        "datasets": datasets,
        **(multi or {}),
    }
    ome = {"multiscales": [entry], **(extra or {})}
    if version == "0.4":
        entry["version"] = "0.4"
        group.attrs.update(ome)
    else:
        group.attrs["ome"] = {"version": version, **ome}
    return path


def scaled(path, scale, translation=None):
    listed = [{"type": "scale", "scale": scale}]
    if translation is not None:
        listed.append({"type": "translation", "translation": translation})
    return {"path": path, "coordinateTransformations": listed}


# ---- OME-Zarr ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["yx", "zyx", "cyx", "tyx", "tcyx", "czyx", "tzyx", "tczyx"])
def test_all_axes(tmp_path, version, axes):
    sizes = {"t": 2, "c": 3, "z": 4, "y": 40, "x": 33}
    array = noise(*(sizes[a] for a in axes))
    spacing = [0.5] * len(axes.replace("t", "").replace("c", ""))
    write_image(tmp_path / "a.ome.zarr", array, axes=axes, spacing_um=spacing, version=version, chunk=16)
    image = open_image(tmp_path / "a.ome.zarr")
    assert (image.axes, image.shape, image.dtype) == (axes, array.shape, array.dtype)
    assert image.spacing_um() == tuple(spacing)
    assert image.spatial_shape == tuple(sizes[a] for a in image.spatial_axes)
    assert image.n_channels == (3 if "c" in axes else 1)
    assert (image.zarr_format, image.ome_version) == ({"0.4": 2, "0.5": 3}[version], version)
    assert image.writable_group == tmp_path / "a.ome.zarr"
    assert [level.shape[-2:] for level in image.levels] == [(40, 33), (20, 17), (10, 9)]
    assert image.levels[1].scale[-2:] == (2.0, 2.0)
    assert image.levels[2].offset[-2:] == (1.5, 1.5)
    np.testing.assert_array_equal(whole(image), array)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_read_equals_slicing(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "sliced.zarr"
    array = np.arange(3 * 37 * 41, dtype="int32").reshape(3, 37, 41)
    if not path.exists():
        zarr.create_array(path, data=array, chunks=(1, 16, 16), shards=(1, 32, 32), dimension_names=["c", "y", "x"])
    image = open_image(path)
    region = []
    for n in array.shape:
        start = data.draw(st.integers(0, n))
        region.append(slice(start, data.draw(st.integers(start, n))))
    np.testing.assert_array_equal(image.read(0, tuple(region)), array[tuple(region)])


def test_level_geometry(tmp_path):
    arrays = [noise(100, 101), noise(50, 50), noise(25, 25), noise(25, 25)]
    datasets = [
        scaled("0", [0.5, 0.5], [10.0, 20.0]),
        scaled("1", [1.0, 1.0], [10.25, 20.25]),
        scaled("2", [2.0, 2.0]),
        {"path": "3"},
    ]
    outer = {"coordinateTransformations": [{"type": "scale", "scale": [2.0, 2.0]}]}
    image = open_image(make_ome(tmp_path / "a.zarr", arrays, "yx", datasets, multi=outer))
    assert image.spacing == (1.0, 1.0)
    assert image.translation == (20.0, 40.0)
    assert [level.scale for level in image.levels] == [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0), (4.0, 4.0)]
    assert [level.offset for level in image.levels] == [(0.0, 0.0), (0.5, 0.5), (1.5, 1.5), (1.5, 1.5)]


def test_scale_that_contradicts_the_shapes(tmp_path, caplog):
    datasets = [scaled("0", [1.0, 1.0]), scaled("1", [1.0, 2.0])]
    path = make_ome(tmp_path / "a.zarr", [noise(80, 80), noise(40, 40)], "yx", datasets)
    image = open_image(path)
    assert image.levels[1].scale == (2.0, 2.0)
    assert image.levels[1].offset == (0.5, 0.5)
    assert "scale 1 on y contradicts lengths 80 and 40; using 2" in caplog.text


def test_short_axes_do_not_contradict(tmp_path, caplog):
    datasets = [scaled("0", [1.0, 1.0, 1.0]), scaled("1", [2.0, 2.0, 2.0])]
    path = make_ome(tmp_path / "a.zarr", [noise(1, 31, 30), noise(1, 16, 15)], "zyx", datasets)
    assert open_image(path).levels[1].scale == (2.0, 2.0, 2.0)
    assert not caplog.text


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        ("nanometer", 1e-3),
        ("millimeter", 1e3),
        ("µm", 1.0),
        ("angstrom", 1e-4),
        ("m", 1e6),
        ("pixel", None),
        ("cubit", None),
    ],
)
def test_spacing_um(tmp_path, unit, factor):
    multi = {"axes": [{"name": a, "type": "space", "unit": unit} for a in "yx"]}
    image = open_image(make_ome(tmp_path / "a.zarr", [noise(9, 9)], "yx", [scaled("0", [2.0, 3.0])], multi=multi))
    assert image.spacing_um() == (None if factor is None else pytest.approx((2 * factor, 3 * factor)))


def test_zero_spacing_is_unknown(tmp_path, caplog):
    image = open_image(make_ome(tmp_path / "a.zarr", [noise(9, 9)], "yx", [scaled("0", [0.0, 3.0])]))
    assert image.spacing == (None, 3.0)
    assert image.spacing_um() is None
    assert "pixel size of zero or less" in caplog.text


def test_channels(tmp_path):
    omero = {"omero": {"channels": [{"label": "dapi"}, {"label": "1"}, {"label": "gfp"}, {"label": "gfp"}, {}]}}
    image = open_image(make_ome(tmp_path / "a.zarr", [noise(6, 9, 9)], "cyx", extra=omero))
    assert image.channels == ("dapi", "1", "gfp", "gfp", "4", "5")
    assert channel_index(image, None) == 0
    assert channel_index(image, "dapi") == 0
    assert channel_index(image, "2") == channel_index(image, 2) == 2
    assert channel_index(image, "1") == 1
    for wrong in ("GFPX", 6, -1, "6", "²"):
        with pytest.raises(ImageError, match=r"no channel .*; it has 0 'dapi', 1, 2 'gfp'"):
            channel_index(image, wrong)
    with pytest.raises(ImageError, match="several channels 'gfp'; give an index"):
        channel_index(image, "gfp")


def test_a_name_that_is_a_number_wins(tmp_path):
    omero = {"omero": {"channels": [{"label": "1"}, {"label": "0"}]}}
    image = open_image(make_ome(tmp_path / "a.zarr", [noise(2, 9, 9)], "cyx", extra=omero))
    assert (channel_index(image, "0"), channel_index(image, 0)) == (1, 0)


@pytest.mark.parametrize("omero", ["text", {"channels": 5}, {"channels": [3]}, {"channels": [{"label": 7}]}, []])
def test_strange_omero_is_ignored(tmp_path, omero):
    image = open_image(make_ome(tmp_path / "a.zarr", [noise(2, 9, 9)], "cyx", extra={"omero": omero}))
    assert image.channels == ("0", "1")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_paths_inside(tmp_path, version):
    root = tmp_path / "a.zarr"
    array = noise(2, 40, 40)
    write_image(root, array, axes="cyx", spacing_um=(0.5, 0.5), version=version, chunk=16)
    inner = open_image(root / "1")
    assert (inner.axes, inner.shape, inner.spacing_um()) == ("cyx", (2, 20, 20), (1.0, 1.0))
    assert inner.translation == (0.0, 0.25, 0.25)
    assert inner.writable_group is None
    np.testing.assert_array_equal(whole(inner), whole(open_image(root), 1))
    np.testing.assert_array_equal(whole(open_image(zarr.open_array(root / "0", mode="r"))), array)
    shutil.copytree(root, root / "labels" / "cells")
    assert open_image(root / "labels" / "cells").shape == (2, 40, 40)


def test_bioformats2raw_container(tmp_path, caplog):
    root = tmp_path / "c.zarr"
    zarr.create_group(root).attrs["ome"] = {"version": "0.5", "bioformats2raw.layout": 3}
    for name, size in (("0", 20), ("1", 30)):
        write_image(root / name, noise(size, size), axes="yx")
    assert open_image(root).shape == (20, 20)
    assert f"holds 2 images; using the first, others are {root}/1" in caplog.text
    zarr.create_group(root / "OME").attrs["ome"] = {"series": ["1", "0"]}
    assert open_image(root).shape == (30, 30)
    assert open_image(root / "0").writable_group == root / "0"
    (root / "OME" / "zarr.json").write_text(
        json.dumps({"node_type": "group", "attributes": {"ome": {"series": ["../x"]}}})
    )
    with pytest.raises(ImageError, match=r"names the path '\.\./x', which is not inside it"):
        open_image(root)


def entry(datasets, axes=("y", "x")):
    return {"multiscales": [{"axes": axes, "datasets": datasets}]}


@pytest.mark.parametrize(
    ("ome", "message"),
    [
        ({"multiscales": []}, "multiscales is no list"),
        ({"multiscales": {"0": 1}}, "multiscales is no list"),
        ({"multiscales": ["x"]}, "multiscales is no list of objects"),
        (entry([]), "lists no datasets"),
        (entry([5]), "a dataset is no object"),
        (entry([{"path": "0"}], None), "it lists no axes"),
        (entry([{"path": "0"}], [{"type": "space"}]), "an axis has no name"),
        (entry([{"path": "0"}], ["lat", "lon"]), "must be one of t, c, z, y, x"),
        (entry([{"path": "0"}], ["z", "y", "x"]), "2 dimensions for 3 axes"),
        (entry([{"path": "7"}]), "names the array '7', which is missing"),
        (entry([{"path": "../a.zarr/0"}]), "is not inside it; refused"),
        (entry([{"path": "/etc"}]), "is not inside it; refused"),
        (entry([{"path": ""}]), "is not inside it; refused"),
        (entry([{"path": 3}]), "which is none"),
        (entry([scaled("0", [1, "a"])]), "coordinate transformation"),
        (entry([scaled("0", [1])]), "coordinate transformation"),
        ({"plate": {}}, r"is a plate of wells, not an image; give the path of one inside it \(0\)"),
        ({"labels": ["cells"]}, "is a list of labels, not an image"),
        ({}, r"is a Zarr group but no OME-Zarr image; give one of its arrays \(0\)"),
    ],
)
def test_bad_metadata(tmp_path, ome, message):
    path = make_ome(tmp_path / "a.zarr", [noise(9, 9)], "yx")
    zarr.open_group(path).attrs["ome"] = ome
    with pytest.raises(ImageError, match=message) as caught:
        open_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"node_type": "cat"}', b"\xff\x00", b"[" * 100_000])
def test_bad_json(tmp_path, content):
    path = make_ome(tmp_path / "a.zarr", [noise(9, 9)], "yx")
    (path / "zarr.json").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.zarr/zarr\.json .*; restore it"):
        open_image(path)


@pytest.mark.parametrize("key", ["shape", "data_type", "codecs", "chunk_grid"])
# Newer zarr also warns of some of these.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "value", [None, "x", [], [-3, 1], {"name": "regular", "configuration": {"chunk_shape": [0, 0]}}]
)
def test_bad_array_metadata(tmp_path, key, value):
    zarr.create_array(tmp_path / "a.zarr", data=noise(9, 9))
    meta = json.loads((tmp_path / "a.zarr/zarr.json").read_text())
    (tmp_path / "a.zarr/zarr.json").write_text(json.dumps({**meta, key: value}))
    with pytest.raises(ImageError):
        whole(open_image(tmp_path / "a.zarr"))


def test_pickle_codec_is_refused(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=noise(9, 9), **V2)
    meta = json.loads((tmp_path / "a.zarr/.zarray").read_text())
    (tmp_path / "a.zarr/.zarray").write_text(json.dumps({**meta, "filters": [{"id": "pickle"}]}))
    with pytest.raises(ImageError, match="pickle codec, which can run code"):
        open_image(tmp_path / "a.zarr")


# ---- plain arrays --------------------------------------------------------------------------------


def test_axes_of_plain_arrays(tmp_path):
    zarr.create_array(tmp_path / "named.zarr", data=noise(9, 8, 7), dimension_names=["Y", "X", "C"])
    image = open_image(tmp_path / "named.zarr")
    assert (image.axes, image.shape) == ("cyx", (7, 9, 8))
    zarr.create_array(tmp_path / "x.zarr", data=noise(9, 8, 7), attributes={"_ARRAY_DIMENSIONS": list("zyx")}, **V2)
    assert open_image(tmp_path / "x.zarr").axes == "zyx"
    zarr.create_array(tmp_path / "three.zarr", data=noise(3, 8, 7), dimension_names=["a", "y", "x"])
    with pytest.raises(ImageError, match=r"3 dimensions of lengths \(3, 8, 7\) and does not name them; give axes"):
        open_image(tmp_path / "three.zarr")
    assert open_image(tmp_path / "three.zarr", axes="cyx").axes == "cyx"
    with pytest.raises(ImageError, match="has 3 dimensions but axes 'yx'"):
        open_image(tmp_path / "three.zarr", axes="yx")
    zarr.create_array(tmp_path / "two.zarr", data=noise(8, 7))
    assert open_image(tmp_path / "two.zarr").axes == "yx"


@given(axes=st.permutations("tczyx"), n=st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_any_order_is_read_in_canonical_order(axes, n):
    kept = "".join(a for a in axes if a in "tczyx"[5 - n :])
    sizes = dict(zip("tczyx", (2, 3, 4, 5, 6), strict=True))
    array = np.arange(np.prod([sizes[a] for a in kept])).reshape([sizes[a] for a in kept])
    image = open_image(array, axes=kept)
    order = [kept.index(a) for a in image.axes]
    assert image.axes == "tczyx"[5 - n :]
    np.testing.assert_array_equal(whole(image), array.transpose(order))
    assert whole(image).flags.c_contiguous


@pytest.mark.parametrize("dtype", ["complex64", "bool", "O", "U3", "M8[s]", [("a", "u1"), ("b", "f4")]])
def test_refused_dtypes(dtype):
    with pytest.raises(ImageError, match=r"the numpy array has dtype .*; only integers and real numbers"):
        open_image(np.zeros((4, 4), dtype))


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", ">u2", ">f4"])
def test_accepted_dtypes(tmp_path, dtype):
    array = noise(9, 9).astype(dtype)
    zarr.create_array(tmp_path / "a.zarr", data=array, zarr_format=2)
    for image in (open_image(array), open_image(tmp_path / "a.zarr")):
        assert image.dtype.isnative
        assert whole(image).dtype == np.dtype(dtype).newbyteorder("=")
        np.testing.assert_array_equal(whole(image), array)


def test_empty_images(tmp_path):
    for array in (np.zeros((0, 4)), da.zeros((4, 0))):
        with pytest.raises(ImageError, match="is empty"):
            open_image(array)
    zarr.create_array(tmp_path / "a.zarr", shape=(4, 0), dtype="u1", chunks=(4, 4))
    with pytest.raises(ImageError, match=r"a\.zarr is empty"):
        open_image(tmp_path / "a.zarr")


def test_dask_is_computed_region_by_region():
    touched = []

    def make(block_info=None):
        touched.append(block_info[None]["chunk-location"])
        return np.full((16, 16), len(touched), "u2")

    lazy = da.map_blocks(make, chunks=((16,) * 4, (16,) * 4), dtype="u2", meta=np.empty((0, 0), "u2"))
    image = open_image(lazy)
    touched.clear()
    assert image.read(0, (slice(20, 30), slice(33, 40))).shape == (10, 7)
    assert touched == [(1, 2)]
    assert image.levels[0].chunks == (16, 16)
    with pytest.raises(ImageError, match="unknown shape"):
        open_image(lazy[lazy > 0])


def test_memory_does_not_travel_and_paths_do(tmp_path):
    assert not open_image(noise(4, 4)).is_shippable
    with pytest.raises(ImageError, match="cannot be sent to other processes"):
        pickle.dumps(open_image(noise(4, 4)))
    array = noise(64, 64)
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(16, 16))
    tifffile.imwrite(tmp_path / "a.tif", array, tile=(16, 16), compression="zlib")
    images = [open_image(tmp_path / name) for name in ("a.zarr", "a.tif")]
    whole(images[1])
    assert all(image.is_shippable for image in images)
    assert all(len(pickle.dumps(image)) < 3000 for image in images)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for pixels in pool.map(whole, images):
            np.testing.assert_array_equal(pixels, array)


def test_memory_store_is_held():
    array = zarr.create_array(zarr.storage.MemoryStore(), data=noise(9, 9))
    image = open_image(array)
    np.testing.assert_array_equal(whole(image), array[:])
    assert image.missing_chunks(0, everything(image)) == []


@pytest.mark.parametrize("region", [(slice(0, 4),), (slice(0, 5), slice(0, 4)), (slice(-1, 4), slice(0, 4)),
                                    (slice(0, 4, 2), slice(0, 4)), (slice(3, 2), slice(0, 4))])  # fmt: skip
def test_bad_regions(region):
    with pytest.raises(ImageError):
        open_image(noise(4, 4)).read(0, region)


def test_bad_level():
    with pytest.raises(ImageError, match="levels 0 to 0 and no level 1"):
        open_image(noise(4, 4)).read(1, (slice(0, 1), slice(0, 1)))


def test_nothing_to_open(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.zarr does not exist"):
        open_image(tmp_path / "nowhere.zarr")
    with pytest.raises(ImageError, match="is a folder but no Zarr"):
        open_image(tmp_path)
    (tmp_path / "a.tif").write_bytes(b"no tiff at all")
    with pytest.raises(ImageError, match="not a readable TIFF"):
        open_image(tmp_path / "a.tif")
    (tmp_path / "b.tif").write_bytes(b"")
    with pytest.raises(ImageError, match="not a readable TIFF"):
        open_image(tmp_path / "b.tif")
    with pytest.raises(RemoteError, match="only s3://, http:// and https:// can; copy it to a local disk"):
        open_image("gs://bucket/a.zarr")
    with pytest.raises(ImageError, match="a list is no image"):
        open_image([[1]])


def test_axes_that_contradict_metadata(tmp_path):
    write_image(tmp_path / "a.zarr", noise(4, 9, 9), axes="zyx")
    assert open_image(tmp_path / "a.zarr", axes="zyx").axes == "zyx"
    with pytest.raises(ImageError, match="has axes 'zyx' in its metadata, not 'cyx'; leave out axes"):
        open_image(tmp_path / "a.zarr", axes="cyx")


def test_an_image_written_anew_is_read_anew(tmp_path):
    for value in (1, 2):
        shutil.rmtree(tmp_path / "a.zarr", ignore_errors=True)
        write_image(tmp_path / "a.zarr", np.full((9 * value, 9), value), axes="yx")
        tifffile.imwrite(tmp_path / "a.tif", np.full((64 * value, 64), value, "u2"), tile=(16, 16))
        for name in ("a.zarr", "a.tif"):
            assert (whole(open_image(tmp_path / name)) == value).all()


def test_describe_is_json(tmp_path):
    write_image(
        tmp_path / "a.zarr",
        noise(2, 40, 40),
        axes="cyx",
        spacing_um=(0.5, 0.5),
        channels=["a", "b"],
        chunk=32,
    )
    told = json.loads(json.dumps(open_image(tmp_path / "a.zarr").describe()))
    assert told["shape"] == [2, 40, 40]
    assert told["spacing_um"] == [0.5, 0.5]
    assert told["channels"] == ["a", "b"]
    assert told["levels"][1] == {
        "path": "1", "shape": [2, 20, 20], "chunks": [1, 20, 20], "scale": [2.0, 2.0], "offset": [0.5, 0.5],
    }  # fmt: skip


# ---- missing and corrupt chunks ------------------------------------------------------------------

CODECS = {
    "v3 zstd": {"compressors": [ZstdCodec(level=1, checksum=True)]},
    "v3 none": {"compressors": None},
    "v3 gzip": {"compressors": [GzipCodec()]},
    "v3 blosc": {"compressors": [BloscCodec()]},
    "v3 crc": {"compressors": [Crc32cCodec()]},
    "v3 shard": {"compressors": [ZstdCodec(level=1, checksum=True)], "shards": (32, 32)},
    "v2 blosc": {**V2, "compressors": numcodecs.Blosc("zstd", 1, shuffle=0)},
    "v2 zlib": {**V2, "compressors": numcodecs.Zlib()},
    "v2 bz2": {**V2, "compressors": numcodecs.BZ2()},
    "v2 lzma": {"zarr_format": 2, "compressors": numcodecs.LZMA()},
    "v2 lz4": {**V2, "compressors": numcodecs.LZ4()},
}


def stored(path: Path):
    return sorted(f for f in path.rglob("*") if f.is_file() and f.name not in ("zarr.json", ".zarray", ".zattrs"))


@pytest.mark.parametrize("damage", ["cut", "half", "empty"])
@pytest.mark.parametrize("kind", CODECS)
def test_cut_chunks_are_named(tmp_path, kind, damage):
    array = noise(64, 64)
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(16, 16), **CODECS[kind])
    image = open_image(tmp_path / "a.zarr")
    chunk = stored(tmp_path / "a.zarr")[-1]
    whole_bytes = chunk.read_bytes()
    chunk.write_bytes({"cut": whole_bytes[:-5], "half": whole_bytes[: len(whole_bytes) // 2], "empty": b""}[damage])
    key = chunk.relative_to(tmp_path / "a.zarr").as_posix()
    with pytest.raises(ImageError, match=rf"chunk {re.escape(key)} of .*a\.zarr cannot be read .* y 40:64, x 0:64"):
        image.read(0, (slice(40, 64), slice(0, 64)))
    np.testing.assert_array_equal(image.read(0, (slice(0, 32), slice(0, 64))), array[:32])


@pytest.mark.parametrize("kind", ["v3 zstd", "v3 gzip", "v3 crc", "v3 shard", "v2 zlib", "v2 bz2", "v2 lzma"])
def test_flipped_bits_are_named(tmp_path, kind):
    zarr.create_array(tmp_path / "a.zarr", data=noise(64, 64), chunks=(16, 16), **CODECS[kind])
    chunk = stored(tmp_path / "a.zarr")[0]
    damaged = bytearray(chunk.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    chunk.write_bytes(damaged)
    image = open_image(tmp_path / "a.zarr")
    with pytest.raises(ImageError, match=f"chunk {re.escape(chunk.relative_to(tmp_path / 'a.zarr').as_posix())} of"):
        whole(image)


def test_corrupt_chunk_of_an_image_is_named_with_its_level(tmp_path):
    write_image(tmp_path / "a.zarr", noise(64, 64), axes="yx", chunk=16)
    (tmp_path / "a.zarr/1/c/1/0").write_bytes(b"")
    (tmp_path / "a.zarr/1/c/1/1").write_bytes(b"abc")
    image = open_image(tmp_path / "a.zarr")
    with pytest.raises(ImageError, match=r"chunk 1/0 of|chunk c/1/0 of .*a\.zarr/1 cannot be read"):
        whole(image, 1)
    with pytest.raises(ImageError, match=r"chunk c/1/1 of .*a\.zarr/1 cannot be read \(Zstd.*restore the file"):
        image.read(1, (slice(16, 32), slice(16, 32)))


@pytest.mark.parametrize("kind", ["v3 zstd", "v3 shard", "v2 blosc", "v2 lzma"])
def test_missing_chunks(tmp_path, kind):
    zarr.create_array(tmp_path / "a.zarr", data=noise(64, 64) + 1, chunks=(16, 16), **CODECS[kind])
    image = open_image(tmp_path / "a.zarr")
    assert image.missing_chunks(0, everything(image)) == []
    gone = stored(tmp_path / "a.zarr")[0]
    gone.unlink()
    key = gone.relative_to(tmp_path / "a.zarr").as_posix()
    assert image.missing_chunks(0, everything(image)) == [key]
    assert image.missing_chunks(0, (slice(32, 64), slice(0, 64))) == []
    assert (image.read(0, (slice(0, 16), slice(0, 16))) == 0).all()


def test_missing_chunks_of_an_image_name_the_level(tmp_path):
    write_image(tmp_path / "a.zarr", noise(64, 64), axes="yx", chunk=16)
    (tmp_path / "a.zarr/1/c/0/1").unlink()
    image = open_image(tmp_path / "a.zarr")
    assert image.missing_chunks(1, everything(image)) == ["1/c/0/1"]


def test_nan_is_left_alone():
    array = np.array([[np.nan, 1.0], [np.inf, 2.0]], "f4")
    np.testing.assert_array_equal(whole(open_image(array)), array)


# ---- TIFF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (16, 16)},
        {"tile": (32, 16), "compression": "zlib"},
        {"tile": (16, 16), "compression": "lzw"},
        {"rowsperstrip": 8},
        {"rowsperstrip": 8, "compression": "zlib"},
        {"byteorder": ">"},
        {"byteorder": ">", "tile": (16, 16)},
        {"bigtiff": True},
    ],
)
def test_tiff_layouts(tmp_path, options):
    array = noise(70, 50)
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    image = open_image(tmp_path / "a.tif")
    assert (image.axes, image.shape, image.dtype) == ("yx", (70, 50), np.dtype("u2"))
    assert image.dtype.isnative
    assert image.writable_group is None
    np.testing.assert_array_equal(image.read(0, (slice(5, 60), slice(7, 50))), array[5:60, 7:])


def test_tiff_reads_only_the_tiles_it_needs(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise(128, 128), tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        last = tif.pages[0].dataoffsets[-1]
    with (tmp_path / "a.tif").open("r+b") as file:
        file.seek(last)
        file.write(b"\0" * 20)
    image = open_image(tmp_path / "a.tif")
    assert image.levels[0].chunks == (16, 16)
    image.read(0, (slice(0, 112), slice(0, 128)))
    with pytest.raises(ImageError, match=r"chunk (c/)?7[./]7 of .*a\.tif cannot be read .*; restore the file"):
        whole(image)


@pytest.mark.parametrize("options", [{"tile": (16, 16)}, {"tile": (16, 16), "compression": "lzw"}, {"rowsperstrip": 8}])
def test_truncated_tiff(tmp_path, options):
    tifffile.imwrite(tmp_path / "a.tif", noise(128, 128), **options)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        end = tif.pages[0].dataoffsets[-1]
    os.truncate(tmp_path / "a.tif", end + 3)
    with pytest.raises(ImageError):
        whole(open_image(tmp_path / "a.tif"))


def test_one_strip_warns_if_compressed(tmp_path, caplog):
    tifffile.imwrite(tmp_path / "a.tif", noise(64, 64), compression="zlib", rowsperstrip=64)
    array = whole(open_image(tmp_path / "a.tif"))
    assert (
        caplog.text.count(
            "is compressed as one strip, so any window reads a whole plane; tiledseg convert reads each once"
        )
        == 1
    )
    caplog.clear()
    tifffile.imwrite(tmp_path / "b.tif", array, rowsperstrip=64)
    np.testing.assert_array_equal(whole(open_image(tmp_path / "b.tif")), array)
    assert not caplog.text


def test_rgb_tiff(tmp_path):
    array = noise(40, 30, 3, dtype="uint8")
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", tile=(16, 16))
    image = open_image(tmp_path / "a.tif")
    assert (image.axes, image.shape, image.n_channels) == ("cyx", (3, 40, 30), 3)
    np.testing.assert_array_equal(
        image.read(0, (slice(1, 3), slice(3, 33), slice(2, 9))), array[3:33, 2:9, 1:].transpose(2, 0, 1)
    )


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_imagej_tiff(tmp_path, compression):
    array = noise(5, 2, 40, 30)
    tifffile.imwrite(
        tmp_path / "a.tif", array, imagej=True, resolution=(4.0, 2.0), compression=compression,
        metadata={"axes": "ZCYX", "spacing": 2000.0, "unit": "um"},
    )  # fmt: skip
    image = open_image(tmp_path / "a.tif")
    assert (image.axes, image.shape) == ("czyx", (2, 5, 40, 30))
    assert image.spacing_um() == (2000.0, 0.5, 0.25)
    np.testing.assert_array_equal(whole(image), array.transpose(1, 0, 2, 3))


@pytest.mark.parametrize(("unit", "expected"), [("CENTIMETER", (2.0, 2.0)), ("INCH", None), ("NONE", None)])
def test_resolution_tag(tmp_path, unit, expected):
    tifffile.imwrite(tmp_path / "a.tif", noise(20, 20), resolution=(5000, 5000), resolutionunit=unit)
    assert open_image(tmp_path / "a.tif").spacing_um() == expected


def write_pyramid(path, array, **metadata):
    options = {"tile": (16, 16), "compression": "zlib"}
    with tifffile.TiffWriter(path) as tif:
        tif.write(array, subifds=1, metadata=metadata, **options)
        tif.write(array[..., ::2, ::2], subfiletype=1, **options)


def test_ome_tiff_pyramid(tmp_path):
    array = noise(2, 101, 64)
    write_pyramid(
        tmp_path / "a.ome.tif", array, axes="CYX", PhysicalSizeX=0.5, PhysicalSizeXUnit="µm",
        PhysicalSizeY=500, PhysicalSizeYUnit="nm", Channel={"Name": ["dapi", "gfp"]},
    )  # fmt: skip
    image = open_image(tmp_path / "a.ome.tif")
    assert image.channels == ("dapi", "gfp")
    assert image.spacing_um() == (0.5, 0.5)
    assert [level.scale for level in image.levels] == [(1.0, 1.0), (2.0, 2.0)]
    assert image.levels[1].offset == (0.5, 0.5)
    np.testing.assert_array_equal(whole(image), array)
    np.testing.assert_array_equal(whole(image, 1), array[:, ::2, ::2])


def test_unknown_tiff_axes(tmp_path):
    array = noise(3, 20, 20)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for plane in array:
            tif.write(plane, metadata=None, contiguous=False)
    with pytest.raises(ImageError, match=r"axis 'I' of length 3 whose meaning is unknown .* give axes"):
        open_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(whole(open_image(tmp_path / "a.tif", axes="zyx")), array)


def test_tiff_axis_of_length_one_is_dropped(tmp_path):
    array = noise(1, 20, 20)
    tifffile.imwrite(tmp_path / "a.tif", array, metadata={"axes": "QYX"}, ome=True)
    with tifffile.TiffFile(tmp_path / "a.tif", _multifile=False) as tif:
        assert tif.series[0].ndim == 2  # squeezed by tifffile already
    image = open_image(tmp_path / "a.tif")
    assert image.axes == "yx"
    np.testing.assert_array_equal(whole(image), array[0])


# ---- real files ----------------------------------------------------------------------------------


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "axes", "shape"),
    [
        ("mosaic_fluo/image.tif", "yx", (4680, 4176)),
        ("multichannel/hela-cells.tif", "cyx", (3, 512, 672)),
        ("multichannel/BBBC022_IXMtest_A02_s9.tif", "cyx", (3, 395, 695)),
        ("ome_tiff_samples/s_1_t_1_c_1_z_1.ome.tiff", "yx", (325, 475)),
    ],
)
def test_real_tiffs(name, axes, shape):
    path = Path(str(DATA)) / name
    image = open_image(path)
    assert (image.axes, image.shape) == (axes, shape)
    expected = tifffile.imread(path)
    if expected.shape != shape:
        expected = np.moveaxis(expected, -1, 0)
    np.testing.assert_array_equal(
        image.read(0, tuple(slice(0, min(n, 200)) for n in shape)),
        expected[tuple(slice(0, 200) for _ in shape)],
    )


@needs_data
@pytest.mark.data
def test_real_ome_zarrs(caplog):
    caplog.set_level(logging.ERROR)
    paths = sorted((Path(str(DATA)) / "ome_zarr_samples").rglob("*.ome.zarr"))
    assert len(paths) > 10
    for path in paths:
        image = open_image(path)
        for level in range(len(image.levels)):
            array = zarr.open_array(Path(image.source.folder) / image.levels[level].path, mode="r")
            np.testing.assert_array_equal(whole(image, level), array[:])
            assert image.missing_chunks(level, everything(image)) == []


@needs_data
@pytest.mark.data
def test_a_czi_that_is_no_slide():
    with pytest.raises(ImageError, match=r"\.czi is no slide that OpenSlide reads \(.*\); save it as OME-TIFF"):
        open_image(Path(str(DATA)) / "ome_tiff_samples/s_1_t_1_c_1_z_1.czi")


def test_an_open_image_is_given_back():
    image = open_image(np.zeros((4, 5), np.uint8))
    assert open_image(image) is image
    with pytest.raises(ImageError, match="numpy array is open already, with axes 'yx'; leave the axes out"):
        open_image(image, axes="yx")
