"""Labels out and in: read back by us, and judged by three independent validators."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import dask.array as da
import jsonschema
import numpy as np
import ome_zarr_models
import pytest
import referencing
import tifffile
import yaozarrs
import zarr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from referencing.jsonschema import DRAFT202012

from tiledseg.errors import ImageError, OutputError, SettingsError
from tiledseg.images import open_image
from tiledseg.omezarr import (
    LevelZero,
    create_labels,
    finish_labels,
    groups,
    labels_exist,
    level_array,
    open_labels,
    plan_labels,
    remove_labels,
    write_image,
)

labels_module = importlib.import_module("tiledseg.omezarr.labels")

RNG = np.random.default_rng(11)
DATA = os.environ.get("TILEDSEG_DATA")
VERSIONS = pytest.mark.parametrize("version", ["0.4", "0.5"])


def noise(*shape, dtype="uint16"):
    return RNG.integers(0, 250, shape).astype(dtype)


def fill(plan, labels):
    for level in range(plan.n_levels):
        step = 2**level
        level_array(plan, level)[...] = labels[..., ::step, ::step]


def publish(plan, labels, **attributes):
    create_labels(plan, attributes=attributes)
    fill(plan, labels)
    finish_labels(plan)


def ome_of(folder: Path):
    if (folder / "zarr.json").exists():
        return json.loads((folder / "zarr.json").read_text())["attributes"]["ome"]
    return json.loads((folder / ".zattrs").read_text())


def validate(path: Path, version: str):
    """Three validators; the labels group of 0.4 has no version for yaozarrs to go by."""
    if version == "0.5" or path.name != "labels":
        yaozarrs.validate_zarr_store(str(path))
    ome_zarr_models.open_ome_zarr(str(path), version=version)
    if path.parent.name == "labels":
        document = json.loads((path / ".zattrs").read_text()) if version == "0.4" else {"ome": ome_of(path)}
        for kind in ("label", "strict_image"):
            schema_of(kind, version).validate(document)


def schema_of(kind: str, version: str):
    """A schema of the specification, as ngff-zarr has it."""
    folder = Path(importlib.util.find_spec("ngff_zarr").origin).parent / "spec" / version / "schemas"
    documents = [json.loads(file.read_text()) for file in folder.glob("*.schema")]
    registry = referencing.Registry().with_contents(
        [(document["$id"], document) for document in documents], default_specification=DRAFT202012
    )
    chosen = json.loads((folder / f"{kind}.schema").read_text())
    return jsonschema.Draft202012Validator(chosen, registry=registry)


@pytest.fixture
def image_of(tmp_path):
    def make(axes="yx", shape=(70, 51), version="0.5", chunk=16, **options):
        write_image(tmp_path / "a.ome.zarr", noise(*shape), axes=axes, version=version, chunk=chunk, **options)
        return open_image(tmp_path / "a.ome.zarr")

    return make


# ---- validity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "shard"), [("0.4", False), ("0.5", False), ("0.5", True)])
@pytest.mark.parametrize(
    ("axes", "shape"),
    [("yx", (70, 51)), ("cyx", (2, 70, 51)), ("zyx", (3, 70, 51)), ("tczyx", (2, 2, 3, 70, 51))],
)
@pytest.mark.parametrize("inside", [True, False])
def test_labels_are_valid(tmp_path, image_of, monkeypatch, version, axes, shape, inside, shard):
    monkeypatch.setattr(labels_module, "_CHUNK", 16)
    monkeypatch.setitem(groups._CHUNK_VOLUME, "y", 16)
    monkeypatch.setitem(groups._CHUNK_VOLUME, "x", 16)
    monkeypatch.setattr(groups, "_SHARD_PIXELS", 32 * 32 * 3)
    spacing = (0.5,) * (2 + ("z" in axes))
    image = image_of(axes, shape, version, spacing_um=spacing)
    plan = plan_labels(image, None if inside else tmp_path / "out.zarr", "cells", version, shard)
    labels = noise(*plan.shape, dtype="uint32")
    publish(plan, labels, tiledseg={"run": "1"})
    assert (level_array(plan, 0).shards is not None) == shard
    for path in (plan.path, plan.root / "labels", tmp_path / "a.ome.zarr"):
        validate(path, version)
    back = open_image(plan.path)
    assert (back.axes, back.dtype, back.spacing_um()) == (axes.replace("c", ""), np.dtype("u4"), spacing)
    assert back.writable_group is None
    for level in range(plan.n_levels):
        step = 2**level
        pixels = back.read(level, tuple(slice(None) for _ in back.axes))
        np.testing.assert_array_equal(pixels, labels[..., ::step, ::step])
        assert back.levels[level].scale[-2:] == (step, step)
        assert back.levels[level].offset[-2:] == (0.0, 0.0)
    source = ome_of(plan.path)["image-label"].get("source")
    assert source == {"image": "../../" if inside else "../../../a.ome.zarr"}
    assert (plan.path / source["image"]).resolve() == (tmp_path / "a.ome.zarr").resolve()
    assert "colors" not in ome_of(plan.path)["image-label"]


@VERSIONS
def test_storage(image_of, version):
    plan = plan_labels(image_of(version=version), None, "cells", None)
    create_labels(plan, attributes={})
    array = level_array(plan, 0)
    assert (array.dtype, array.fill_value) == (np.dtype("u4"), 0)
    meta = json.loads((plan.path / "0" / ("zarr.json" if version == "0.5" else ".zarray")).read_text())
    if version == "0.5":
        assert meta["codecs"][-1] == {"name": "zstd", "configuration": {"level": 1, "checksum": True}}
        assert meta["dimension_names"] == ["y", "x"]
    else:
        assert (meta["dimension_separator"], meta["compressor"]["id"], meta["compressor"]["shuffle"]) == (
            "/",
            "blosc",
            0,
        )
    array[:8, :8] = 5
    array[30:, 30:] = 0
    assert not (plan.root / ".zmetadata").exists()


def test_a_schema_refuses_labels_called_by_strings():
    document = {"ome": {"version": "0.5", "image-label": {"colors": [{"label-value": "1"}]}}}
    assert not schema_of("label", "0.5").is_valid(document)


def test_shards(tmp_path):
    large = open_image(da.zeros((40, 3, 5000, 2049), chunks=1000), axes="zcyx")
    plan = plan_labels(large, tmp_path / "out.zarr", "cells", None, shard=True)
    assert (plan.chunks, plan.shards) == ((32, 256, 256), (64, 512, 512))
    assert plan.level_shards(0) == (64, 512, 512)
    assert (plan.level_chunks(4), plan.level_shards(4)) == ((32, 256, 129), (64, 512, 129))
    slide = open_image(da.zeros((100_000, 90_000), chunks=10_000))
    sharded, plain = (plan_labels(slide, tmp_path / "out.zarr", "cells", None, shard) for shard in (True, False))
    assert sharded.shards == (4096, 4096)
    assert plain.shards is None
    assert (plain.n_files, sharded.n_files) == (11532, 754)
    assert [sharded.level_shards(k) for k in (5, 6, 7)] == [(4096, 3072), (2048, 2048), None]
    series = open_image(da.zeros((1000, 200, 300), chunks=100), axes="tyx")
    assert plan_labels(series, tmp_path / "out.zarr", "cells", None, shard=True).shards == (256, 200, 300)


def test_shards_want_a_version_that_has_them(image_of, tmp_path):
    image = image_of(version="0.4")
    with pytest.raises(SettingsError, match=r"OME-Zarr 0\.4, in which .*a\.ome\.zarr is written, has no shards; leave"):
        plan_labels(image, None, "cells", None, shard=True)
    with pytest.raises(SettingsError, match=r"out\.zarr is written, has no shards"):
        plan_labels(image, tmp_path / "out.zarr", "cells", "0.4", shard=True)
    assert plan_labels(image, tmp_path / "out.zarr", "cells", None, shard=True).shards is not None


def test_labels_left_in_other_shards_are_refused(image_of, monkeypatch):
    monkeypatch.setattr(labels_module, "_CHUNK", 16)
    image = image_of()
    create_labels(plan_labels(image, None, "cells", None), attributes={})
    with pytest.raises(OutputError, match=r"cells/0 is left from another run"):
        create_labels(plan_labels(image, None, "cells", None, shard=True), attributes={})


# ---- the plan ------------------------------------------------------------------------------------


def test_levels_follow_the_image_inside_and_the_size_outside(tmp_path, image_of):
    image = image_of(chunk=16)
    inside = plan_labels(image, None, "cells", None)
    assert inside.in_image
    assert inside.n_levels == len(image.levels) == 4
    outside = plan_labels(image, tmp_path / "out.zarr", "cells", None)
    assert not outside.in_image
    assert outside.n_levels == 1
    assert outside.chunks == (70, 51)
    large = open_image(da.zeros((40, 3, 5000, 2049), chunks=1000), axes="zcyx")
    plan = plan_labels(large, tmp_path / "out.zarr", "cells", None)
    assert (plan.axes, plan.shape, plan.chunks) == ("zyx", (40, 5000, 2049), (32, 256, 256))
    assert [plan.level_shape(k) for k in range(plan.n_levels)] == [
        (40, 5000, 2049), (40, 2500, 1025), (40, 1250, 513), (40, 625, 257), (40, 313, 129), (40, 157, 65),
    ]  # fmt: skip
    assert plan.level_chunks(5) == (32, 157, 65)
    thick = plan_labels(open_image(da.zeros((300, 700, 600)), axes="zyx"), tmp_path / "out.zarr", "cells", None)
    assert [thick.level_shape(k) for k in range(thick.n_levels)] == [(300, 700, 600), (150, 350, 300), (75, 175, 150)]


def test_labels_of_thick_planes_have_the_levels_of_their_image(tmp_path):
    planes = da.zeros((300, 700, 600), dtype="u1", chunks=256)
    write_image(tmp_path / "a.zarr", planes, axes="zyx", spacing_um=(2.0, 0.5, 0.5), n_levels=4, chunk=256)
    image = open_image(tmp_path / "a.zarr")
    plan = plan_labels(image, None, "cells", None)
    shapes = [(300, 700, 600), (300, 350, 300), (300, 175, 150), (150, 88, 75)]
    assert [plan.level_shape(k) for k in range(plan.n_levels)] == shapes
    assert [level.shape for level in image.levels] == shapes
    create_labels(plan, attributes={})
    finish_labels(plan)
    scales = [level.scale for level in open_image(tmp_path / "a.zarr/labels/cells").levels]
    assert scales == [level.scale for level in image.levels]


def test_output_that_is_the_image_itself(image_of, tmp_path):
    image = image_of()
    assert plan_labels(image, tmp_path / "x/../a.ome.zarr", "cells", None).in_image


def test_version(tmp_path, image_of):
    image = image_of(version="0.4")
    assert plan_labels(image, None, "cells", None).version == "0.4"
    assert plan_labels(image, tmp_path / "new.zarr", "cells", None).version == "0.5"
    with pytest.raises(SettingsError, match=r"a\.ome\.zarr is OME-Zarr 0\.4, not 0\.5; leave out the version"):
        plan_labels(image, None, "cells", "0.5")
    with pytest.raises(SettingsError, match=r"version '0\.3' cannot be written"):
        plan_labels(image, None, "cells", "0.3")
    zarr.create_group(tmp_path / "two.zarr", zarr_format=2)
    assert plan_labels(image, tmp_path / "two.zarr", "cells", None).version == "0.4"


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a b", "zellen\n", "ä", "zarr.json", "../x"])
def test_bad_names(image_of, name):
    with pytest.raises(SettingsError, match=r"labels name .* is not allowed"):
        plan_labels(image_of(), None, name, None)


def test_places_that_cannot_hold_labels(tmp_path, image_of):
    array = open_image(noise(9, 9))
    with pytest.raises(OutputError, match=r"numpy array is no OME-Zarr image that can hold labels; say where with -o"):
        plan_labels(array, None, "cells", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="full exists and is neither empty nor a Zarr group"):
        plan_labels(array, tmp_path / "full", "cells", None)
    with pytest.raises(OutputError, match=r"thesis\.txt is a file"):
        plan_labels(array, tmp_path / "full/thesis.txt", "cells", None)
    with pytest.raises(OutputError, match=r"thesis\.txt is a file, so .*out\.zarr cannot be made"):
        plan_labels(array, tmp_path / "full/thesis.txt/out.zarr", "cells", None)
    image_of()
    with pytest.raises(OutputError, match=r"a\.ome\.zarr/0 is no readable Zarr group"):
        plan_labels(array, tmp_path / "a.ome.zarr/0", "cells", None)
    (tmp_path / "empty").mkdir()
    assert plan_labels(array, tmp_path / "empty", "cells", None).version == "0.5"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="cannot be written to"):
        plan_labels(open_image(noise(9, 9)), tmp_path / "locked/out.zarr", "cells", None)


def test_unknown_spacing_is_pixels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise(20, 20))
    plan = plan_labels(open_image(tmp_path / "a.tif"), tmp_path / "out.zarr", "cells", None)
    publish(plan, noise(20, 20))
    entry = ome_of(plan.path)["multiscales"][0]
    assert entry["axes"] == [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    assert entry["datasets"][0]["coordinateTransformations"][0] == {"type": "scale", "scale": [1.0, 1.0]}
    validate(plan.path, "0.5")


# ---- life of a label image -----------------------------------------------------------------------


@VERSIONS
def test_listed_only_when_finished(image_of, version):
    plan = plan_labels(image_of(version=version), None, "cells", None)
    assert not labels_exist(plan)
    create_labels(plan, attributes={"tiledseg": {"run": "1"}})
    assert labels_exist(plan)
    assert not (plan.root / "labels/zarr.json").exists()
    assert not (plan.root / "labels/.zgroup").exists()
    assert "multiscales" not in dict(zarr.open_group(plan.path).attrs).get("ome", {})
    validate(plan.root, version)
    fill(plan, noise(*plan.shape))
    finish_labels(plan)
    first = {path: path.read_bytes() for path in plan.root.rglob("*") if path.is_file()}
    finish_labels(plan)
    assert {path: path.read_bytes() for path in plan.root.rglob("*") if path.is_file()} == first
    assert ome_of(plan.root / "labels")["labels"] == ["cells"]
    assert dict(zarr.open_group(plan.path).attrs)["tiledseg"] == {"run": "1"}


@VERSIONS
def test_other_labels_and_attributes_stay(image_of, version):
    image = image_of(version=version)
    before = json.loads(json.dumps(ome_of(image.writable_group)))
    plans = [plan_labels(image, None, name, None) for name in ("cells", "nuclei")]
    for plan in plans:
        publish(plan, noise(*plan.shape))
    labels = plans[0].root / "labels"
    zarr.open_group(labels).attrs["mine"] = 1
    assert ome_of(labels)["labels"] == ["cells", "nuclei"]
    remove_labels(plans[0])
    assert ome_of(labels)["labels"] == ["nuclei"]
    assert dict(zarr.open_group(labels).attrs)["mine"] == 1
    assert not plans[0].path.exists()
    assert not labels_exist(plans[0])
    assert labels_exist(plans[1])
    remove_labels(plans[0])
    assert ome_of(image.writable_group) == before
    validate(image.writable_group, version)
    remove_labels(plans[1])
    assert not labels.exists()
    validate(image.writable_group, version)


def test_resume_keeps_what_matches(image_of):
    plan = plan_labels(image_of(), None, "cells", None)
    create_labels(plan, attributes={"tiledseg": {"run": "1"}})
    level_array(plan, 0)[:5, :5] = 7
    shutil.rmtree(plan.path / "1")
    create_labels(plan, attributes={"tiledseg": {"run": "2"}})
    assert (level_array(plan, 0)[:5, :5] == 7).all()
    assert level_array(plan, 1).shape == plan.level_shape(1)
    assert zarr.open_group(plan.path).attrs["tiledseg"] == {"run": "2"}


def test_what_does_not_match_is_refused(image_of):
    plan = plan_labels(image_of(), None, "cells", None)
    create_labels(plan, attributes={})
    shutil.rmtree(plan.path / "0")
    zarr.create_array(plan.path / "0", shape=(3, 3), dtype="u1")
    with pytest.raises(OutputError, match=r"cells/0 is left from another run \(shape \(3, 3\).*--name"):
        create_labels(plan, attributes={})


def test_anything_in_the_way_exists(image_of):
    plan = plan_labels(image_of(), None, "cells", None)
    plan.path.mkdir(parents=True)
    assert not labels_exist(plan)
    (plan.path / "thesis.txt").write_text("precious")
    assert labels_exist(plan)


def test_leftovers_of_killed_writers_are_swept(image_of):
    plan = plan_labels(image_of(), None, "cells", None)
    create_labels(plan, attributes={})
    (plan.path / "0/.drafts").mkdir(exist_ok=True)
    (plan.path / "0/.drafts/f00.partial").write_bytes(b"torn")
    (plan.path / "f00.partial").write_bytes(b"torn")
    image_chunk = plan.root / "0/c/0/9.f00.partial"
    image_chunk.write_bytes(b"of someone else")
    finish_labels(plan)
    assert list(plan.root.rglob("*.partial")) == [image_chunk]
    assert not (plan.path / "0/.drafts").exists()


def test_steps_out_of_order(image_of):
    plan = plan_labels(image_of(), None, "cells", None)
    with pytest.raises(OutputError, match="cells is missing; start the run again"):
        finish_labels(plan)
    with pytest.raises(OutputError, match="cells/0 cannot be opened"):
        level_array(plan, 0)
    remove_labels(plan)


def test_unreadable_listing(image_of):
    plan = plan_labels(image_of(), None, "cells", None)
    create_labels(plan, attributes={})
    zarr.create_group(plan.root / "labels").attrs["ome"] = {"labels": "cells"}
    with pytest.raises(OutputError, match="lists its labels as 'cells'; correct its metadata"):
        finish_labels(plan)


def test_labels_beside_labels_of_another_tool(image_of):
    image = image_of(version="0.5")
    group = zarr.create_group(image.writable_group / "labels")
    group.attrs["ome"] = {"labels": ["theirs"], "version": "0.5"}
    plan = plan_labels(image, None, "cells", None)
    publish(plan, noise(*plan.shape))
    assert ome_of(plan.root / "labels") == {"labels": ["theirs", "cells"], "version": "0.5"}


def write_part(plan, rows):
    array = level_array(plan, 0)
    array[rows] = np.full((rows.stop - rows.start, *plan.shape[1:]), rows.start + 1)


def test_processes_write_their_own_chunks(tmp_path):
    image = open_image(np.zeros((1500, 40), "u1"))
    plan = plan_labels(image, tmp_path / "out.zarr", "cells", None)
    create_labels(plan, attributes={})
    context = multiprocessing.get_context("spawn")
    parts = [slice(0, 1024), slice(1024, 1500)]
    workers = [context.Process(target=write_part, args=(plan, part)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    values = level_array(plan, 0)[:, 0]
    assert (values[:1024] == 1).all()
    assert (values[1024:] == 1025).all()


# ---- labels in -----------------------------------------------------------------------------------


@VERSIONS
@pytest.mark.parametrize("inside", [True, False])
def test_the_only_labels_of_a_container_are_opened(tmp_path, image_of, version, inside):
    image = image_of(version=version)
    plan = plan_labels(image, None if inside else tmp_path / "out.zarr", "cells", version)
    labels = noise(*plan.shape, dtype="uint32")
    publish(plan, labels)
    for path in (plan.root, str(plan.root), plan.path, plan.path / "0"):
        found = open_labels(path)
        assert (found.shape, found.dtype) == (plan.shape, np.dtype("u4"))
        np.testing.assert_array_equal(found[:, :], labels)


def test_one_of_several_labels_must_be_named(image_of):
    image = image_of()
    plans = [plan_labels(image, None, name, None) for name in ("cells", "nuclei")]
    labels = [noise(*plan.shape, dtype="uint32") for plan in plans]
    for plan, one in zip(plans, labels, strict=True):
        publish(plan, one)
    root = plans[0].root
    with pytest.raises(ImageError) as caught:
        open_labels(root)
    assert str(caught.value) == f"{root} holds labels cells, nuclei; give one, as in {root}/labels/cells."
    np.testing.assert_array_equal(open_labels(f"{root}/labels/cells")[:, :], labels[0])
    np.testing.assert_array_equal(open_labels(f"{root}/labels/nuclei")[:, :], labels[1])


def test_labels_that_are_not_finished_do_not_count(image_of):
    image = image_of()
    plans = [plan_labels(image, None, name, None) for name in ("cells", "nuclei")]
    publish(plans[0], np.full(plans[0].shape, 7, "u4"))
    create_labels(plans[1], attributes={})
    assert (open_labels(image.writable_group)[:, :] == 7).all()


def test_labels_in_a_plain_array_and_a_tiff(tmp_path):
    labels = noise(30, 21, dtype="uint32")
    zarr.create_array(tmp_path / "a.zarr", data=labels, chunks=(16, 16))
    tifffile.imwrite(tmp_path / "a.tif", labels)
    for name in ("a.zarr", "a.tif"):
        found = open_labels(tmp_path / name)
        assert (found.shape, found.dtype) == ((30, 21), np.dtype("u4"))
        np.testing.assert_array_equal(found[3:20, :], labels[3:20])
    assert open_labels(tmp_path / "a.zarr").chunks == (16, 16)


def test_no_labels_there(tmp_path):
    with pytest.raises(ImageError, match=r"none\.zarr does not exist; check the path"):
        open_labels(tmp_path / "none.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageError, match="folder is a folder but no Zarr"):
        open_labels(tmp_path / "folder")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_level_zero_equals_slicing(data):
    array = np.arange(3 * 7 * 9, dtype="u4").reshape(3, 7, 9)
    level = LevelZero(open_image(array, axes="zyx"))
    bounds = st.none() | st.integers(-12, 12)
    wanted = []
    for _ in range(data.draw(st.integers(1, 3))):
        start, stop = data.draw(bounds), data.draw(bounds)
        wanted.append(slice(start, stop))
    low_high = [part.indices(n)[:2] for part, n in zip(wanted, array.shape, strict=False)]
    assume(all(low <= high for low, high in low_high))
    region = wanted[0] if len(wanted) == 1 else tuple(wanted)
    np.testing.assert_array_equal(level[region], array[region])


def test_level_zero_is_full_size(image_of):
    image = image_of(chunk=16)
    level = LevelZero(image)
    assert len(image.levels) == 4
    assert (level.shape, level.dtype, level.chunks) == ((70, 51), np.dtype("u2"), (16, 16))
    np.testing.assert_array_equal(level[10:], image.read(0, (slice(10, 70), slice(0, 51))))


@pytest.mark.skipif(DATA is None, reason="needs TILEDSEG_DATA")
@pytest.mark.data
def test_labels_in_real_images(tmp_path):
    samples = sorted((Path(str(DATA)) / "ome_zarr_samples").rglob("*_dataset_v?.ome.zarr"))
    n_done = 0
    for i, sample in enumerate(samples):
        if open_image(sample).writable_group != sample:
            continue
        path = tmp_path / f"{i}.ome.zarr"
        shutil.copytree(sample, path)
        image = open_image(path)
        plan = plan_labels(image, None, "cells", None)
        publish(plan, noise(*plan.shape))
        validate(plan.path, plan.version)
        validate(path, plan.version)
        n_done += 1
    assert n_done > 10
