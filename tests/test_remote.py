"""Images and labels in remote stores: a real S3 server and a real web server, as processes on loopback."""

from __future__ import annotations

import functools
import json
import logging
import os
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import numpy.typing as npt
import pytest
import zarr

import tiledseg
from tiledseg import patience, remote_clients
from tiledseg.cli import main
from tiledseg.errors import ImageError, OutputError, RemoteError, SettingsError
from tiledseg.exports import export
from tiledseg.images import Image, open_image
from tiledseg.omezarr import open_labels, write_image
from tiledseg.remote import location
from tiledseg.zarr_stores import zarr_store

from .conftest import Slide
from .servers import Server, serving

SECRET = "c2VjcmV0/of+the/store"
BUCKET = "bucket"
SHAPE = (300, 233)


def above(pixels: npt.NDArray[Any], threshold: float = 500) -> npt.NDArray[np.int32]:
    """Connected parts above a threshold."""
    from scipy.ndimage import label

    labels: npt.NDArray[np.int32] = label(pixels > threshold)[0]
    return labels


def everything(image: Image) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in image.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, slide: Slide) -> Path:
    """What the web server shows, and what lies in the bucket."""
    root = tmp_path_factory.mktemp("remote")
    rng = np.random.default_rng(5)
    dots = rng.integers(0, 100, SHAPE).astype(np.uint16)
    for row in range(3, SHAPE[0] - 12, 26):
        for column in range(5, SHAPE[1] - 12, 26):
            dots[row : row + rng.integers(5, 12), column : column + rng.integers(5, 12)] += 2000
    for version in ("0.4", "0.5"):
        place = root / f"dots {version}.ome.zarr"
        write_image(place, dots[None], axes="cyx", spacing_um=(0.5, 0.5), version=version, chunk=64)
    write_image(root / "slide.ome.zarr", slide[0][:400, :400], axes="yx", chunk=256)
    zarr.create_array(root / "plain.zarr", data=dots, chunks=(100, 100), shards=(200, 200))
    holes = zarr.create_array(root / "holes.zarr", shape=SHAPE, chunks=(100, 100), dtype="uint16", dimension_names="yx")
    holes[:100] = dots[:100]
    container = zarr.create_group(root / "container.zarr", zarr_format=2)
    container.attrs["bioformats2raw.layout"] = 3
    write_image(root / "container.zarr" / "0", dots, axes="yx", version="0.4", chunk=64)
    for name, path in (("leaves.zarr", "../plain.zarr"), ("encoded.zarr", "%2e%2e/plain.zarr")):
        group = zarr.create_group(root / name)
        axes = [{"name": axis, "type": "space"} for axis in "yx"]
        group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": path}]}]}
    return root


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[Server]:
    with serving("http", folder) as server:
        yield server


@pytest.fixture(scope="module")
def s3(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A bucket with the same; where it is and the credentials are in the environment, and nowhere else."""
    with pytest.MonkeyPatch.context() as patch, serving("s3", tmp_path_factory.mktemp("s3")) as server:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        forget()
        bucket(server).create()
        upload(server, folder, "")
        yield server
    forget()


def forget() -> None:
    """Look for servers and credentials anew, as a new process does."""
    remote_clients.client_of.cache_clear()
    remote_clients._s3_config.cache_clear()


@functools.cache
def bucket(server: Server) -> Any:
    """The bucket, by another library than ours."""
    return boto3.resource("s3", endpoint_url=server.url, region_name="us-east-1").Bucket(BUCKET)


def upload(server: Server, source: Path, prefix: str, acl: str = "private") -> None:
    for file in sorted(source.rglob("*")):
        if file.is_file():
            bucket(server).upload_file(str(file), prefix + str(file.relative_to(source)), ExtraArgs={"ACL": acl})


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores may be away for less than a second."""
    monkeypatch.setattr(patience, "AWAY_S", 0.6)
    monkeypatch.setattr(patience, "NEVER_THERE_S", 0.5)


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("how", [{"ome_version": "0.4"}, {"shard": 128}])
def test_an_image_is_converted_into_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(2).integers(0, 9, (200, 300)).astype(np.uint16)
    out = f"s3://{BUCKET}/converted-{'-'.join(how)}.ome.zarr"
    assert tiledseg.convert(array, out, chunk=64, **how).n_pieces > 3
    image = open_image(out)
    np.testing.assert_array_equal(image.read(0, (slice(0, 200), slice(0, 300))), array)
    assert [level.shape for level in image.levels] == [(200, 300), (100, 150), (50, 75), (25, 38)]
    with pytest.raises(OutputError, match="exists already; choose another place, or add --overwrite"):
        tiledseg.convert(array, out, chunk=64, **how)
    tiledseg.convert(array + 1, out, chunk=64, overwrite=True, **how)
    np.testing.assert_array_equal(open_image(out).read(0, (slice(0, 200), slice(0, 300))), array + 1)
    assert list(tmp_path.iterdir()) == []


# Reading


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("name", ["dots 0.4.ome.zarr", "dots 0.5.ome.zarr", "dots 0.5.ome.zarr/1", "holes.zarr"])
def test_remote_images_are_those_of_the_disk(folder: Path, web: Server, name: str) -> None:
    here = open_image(folder / name)
    for address in (f"{web.url}/{name.replace(' ', '%20')}", f"s3://{BUCKET}/{name}", f"s3://{BUCKET}/{name}/"):
        there = open_image(address)
        assert there.name == address.rstrip("/")
        described = {**here.describe(), "name": there.name}
        assert there.describe() == described
        for level, one in enumerate(here.levels):
            region = tuple(slice(0, n) for n in one.shape)
            assert np.array_equal(there.read(level, region), here.read(level, region))
            assert there.missing_chunks(level, region) == here.missing_chunks(level, region)


@pytest.mark.usefixtures("s3")
def test_shards_are_read_in_parts_or_whole(folder: Path, web: Server, caplog: pytest.LogCaptureFixture) -> None:
    region = (slice(90, 110), slice(190, 210))
    expected = open_image(folder / "plain.zarr", axes="yx").read(0, region)
    assert np.array_equal(open_image(f"s3://{BUCKET}/plain.zarr").read(0, region), expected)
    assert not caplog.records
    assert np.array_equal(open_image(f"{web.url}/plain.zarr").read(0, region), expected)
    assert f"{web.url} gives no parts of files: shards are read whole" in caplog.text


@pytest.mark.usefixtures("s3")
def test_only_an_address_travels() -> None:
    image = open_image(f"s3://{BUCKET}/dots 0.5.ome.zarr")
    image.read(0, everything(image))
    shipped = pickle.dumps(image)
    assert SECRET.encode() not in shipped
    assert len(shipped) < 3000
    again = pickle.loads(shipped)
    assert np.array_equal(
        again.read(1, (slice(0, 1), slice(0, 9), slice(0, 9))), image.read(1, (slice(0, 1), slice(0, 9), slice(0, 9)))
    )
    store = zarr_store(location(f"s3://{BUCKET}/dots 0.5.ome.zarr"))
    assert SECRET.encode() not in pickle.dumps(store)
    assert pickle.loads(pickle.dumps(store)) == store


@pytest.mark.usefixtures("s3")
def test_missing_chunks_are_found_by_asking(web: Server, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"segmenter": above, "halo": 16, "block": 128, "output": tmp_path / "out.zarr"}
    for address in (f"s3://{BUCKET}/holes.zarr", f"{web.url}/holes.zarr"):
        with pytest.raises(ImageError, match=r"chunk c/1/. of .*holes\.zarr is missing \(\d in this region\)"):
            tiledseg.segment(address, **settings)
    assert tiledseg.segment(address, missing_chunks="fill", **settings).report.n_objects > 20


def test_empty_objects_are_not_taken_for_zeros(s3: Server) -> None:
    key = "dots 0.5.ome.zarr/1/c/0/1/0"
    whole = bucket(s3).Object(key).get()["Body"].read()
    bucket(s3).put_object(Key=key, Body=b"")
    image = open_image(f"s3://{BUCKET}/dots 0.5.ome.zarr")
    with pytest.raises(
        ImageError, match=r"chunk c/0/1/0 of s3://bucket/dots 0.5.ome.zarr/1 cannot be read \(the stored obj"
    ):
        image.read(1, tuple(slice(0, n) for n in image.levels[1].shape))
    bucket(s3).put_object(Key=key, Body=whole)


def test_containers_that_cannot_be_listed(folder: Path, web: Server) -> None:
    there = open_image(f"{web.url}/container.zarr")
    here = open_image(folder / "container.zarr")
    assert there.name == f"{web.url}/container.zarr/0"
    assert np.array_equal(there.read(0, everything(there)), here.read(0, everything(here)))


def test_what_is_not_there_may_be_forbidden(folder: Path, web: Server, tmp_path: Path) -> None:
    v2: dict[str, Any] = {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}}
    zarr.create_array(folder / "bare.zarr", data=np.arange(64, dtype="uint16").reshape(8, 8), **v2)
    (folder / "bare.zarr" / ".zattrs").unlink(missing_ok=True)
    (folder / ".unlisted").touch()
    try:
        for name in ("dots%200.4.ome.zarr", "dots%200.5.ome.zarr", "bare.zarr"):
            image = open_image(f"{web.url}/{name}")
            assert image.read(0, everything(image)).any()
        with pytest.raises(RemoteError, match=r"none.zarr/zarr.json cannot be read: access is forbidden"):
            open_image(f"{web.url}/none.zarr")
        with pytest.raises(RemoteError, match=r"holes.zarr/c/\d/. cannot be read: access is forbidden"):
            tiledseg.segment(f"{web.url}/holes.zarr", tmp_path / "out.zarr", segmenter=above, halo=16)
    finally:
        (folder / ".unlisted").unlink()


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("name", ["leaves.zarr", "encoded.zarr"])
def test_metadata_cannot_lead_elsewhere(web: Server, name: str) -> None:
    refusal = "is not inside it; refused" if name == "leaves.zarr" else "is missing; restore it"
    for address in (f"{web.url}/{name}", f"s3://{BUCKET}/{name}"):
        with pytest.raises(ImageError, match=refusal):
            open_image(address)


@pytest.mark.usefixtures("s3")
def test_images_are_written(tmp_path: Path) -> None:
    picture = np.arange(70 * 50, dtype="uint16").reshape(70, 50)
    for place in (f"s3://{BUCKET}/new.ome.zarr", tmp_path / "new.ome.zarr"):
        write_image(place, picture, axes="yx", spacing_um=(0.5, 0.5), chunk=32)
        with pytest.raises(OutputError, match=r"new.ome.zarr exists already; choose another path"):
            write_image(place, picture, axes="yx")
    there, here = open_image(f"s3://{BUCKET}/new.ome.zarr"), open_image(tmp_path / "new.ome.zarr")
    assert there.describe() == {**here.describe(), "name": there.name}
    assert np.array_equal(there.read(1, (slice(0, 35), slice(0, 25))), here.read(1, (slice(0, 35), slice(0, 25))))


# Errors


@pytest.mark.usefixtures("s3", "hasty")
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("{web}/none.zarr", "{web}/none.zarr is no Zarr: there is no zarr.json, .zarray or .zgroup; check the address"),
        ("s3://bucket/none.zarr", "s3://bucket/none.zarr is no Zarr: there is no zarr.json"),
        ("s3://no-such-bucket/a.zarr", "s3://no-such-bucket/a.zarr/zarr.json cannot be read: there is no such bucket"),
        ("http://127.0.0.1:9/a.zarr", "http://127.0.0.1:9/a.zarr/zarr.json cannot be read: the connection is refused"),
        (
            "http://nowhere.invalid/a.zarr",
            "http://nowhere.invalid/a.zarr/zarr.json cannot be read: its name is not known",
        ),
        ("https://127.0.0.1:{port}/a.zarr", "cannot be read: there is no connection, for 0 s; check the address"),
        ("gs://bucket/a.zarr", "gs://bucket/a.zarr cannot be opened: only s3://, http:// and https:// can"),
        (f"s3://KEY:{SECRET}@bucket/a", "the address of s3://bucket/a holds a user, a password, a query or a fragment"),
        ("{web}/a.zarr?token=SECRET", "the address of {web}/a.zarr holds a user, a password, a query or a fragment"),
        ("{web}/slide.ome.zarr", "{web}/slide.ome.zarr is no OME-Zarr image that can hold labels; say where with -o"),
    ],
)
def test_what_cannot_be_opened_is_a_sentence(
    web: Server, capsys: pytest.CaptureFixture[str], address: str, message: str
) -> None:
    address, message = (text.format(web=web.url, port=web.port) for text in (address, message))
    assert main(["segment", address]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("tiledseg: ")
    assert message in said
    assert SECRET not in said
    assert "SECRET" not in said


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "cannot be read: access is forbidden; check the credentials in the environment"),
        (401, "cannot be read: access is forbidden; check the credentials in the environment"),
        (400, "cannot be read: the server answers with status 400; check the address and what the server says."),
        (500, "cannot be read: the server answers with status 500, for 1 s; check the address and the network"),
    ],
)
def test_what_servers_refuse_is_a_sentence(
    web: Server, s3: Server, capsys: pytest.CaptureFixture[str], status: int, message: str
) -> None:
    for server, address in ((web, f"{web.url}/plain.zarr"), (s3, f"s3://{BUCKET}/plain.zarr")):
        open_image(address)
        with server.answering(status):
            assert main(["info", address]) == 2
        assert f"tiledseg: {address}/zarr.json {message}" in capsys.readouterr().err


@pytest.mark.usefixtures("hasty")
def test_a_server_that_does_not_answer(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    monkeypatch.setitem(remote_clients.OPTIONS, "read_timeout", "1s")
    remote_clients.client_of.cache_clear()
    web.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(RemoteError, match="cannot be read: there is no answer in time, for 1 s"):
            open_image(f"{web.url}/plain.zarr")
    finally:
        web.process.send_signal(signal.SIGCONT)
        remote_clients.client_of.cache_clear()


def test_settings_of_aws_that_cannot_be_used(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"{s3.url.removeprefix('http://')}/x?token={SECRET}")
        forget()
        with pytest.raises(
            RemoteError, match=r"S3 cannot be used: its endpoint is no address; check AWS_ENDPOINT_URL\."
        ):
            open_image(f"s3://{BUCKET}/a.zarr")
        patch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(RemoteError, match=r"S3 cannot be used: .*\(nobody\).*; check the settings of AWS"):
            open_image(f"s3://{BUCKET}/a.zarr")
    forget()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    remote_clients.client_of.cache_clear()
    with pytest.raises(RemoteError, match=r"needs the package obstore.store, .* pip install 'tiledseg\[remote\]'"):
        open_image("http://127.0.0.1:9/a.zarr")


def test_public_images_are_asked_for_without_credentials(
    folder: Path, s3: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upload(s3, folder / "dots 0.4.ome.zarr", "public.ome.zarr/", acl="public-read")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SKIP_SIGNATURE", "true")
        forget()
        image = open_image(f"s3://{BUCKET}/public.ome.zarr")
        assert image.read(0, everything(image)).any()
        patch.delenv("AWS_SKIP_SIGNATURE")
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        forget()
        with caplog.at_level(logging.INFO, "tiledseg"):
            assert open_image(f"s3://{BUCKET}/public.ome.zarr").shape == image.shape
        assert "no credentials for S3 are found: only public buckets can be read." in caplog.text
        with pytest.raises(RemoteError, match=r"dots 0.4.ome.zarr/.zgroup cannot be read: access is forbidden; check"):
            open_image(f"s3://{BUCKET}/dots 0.4.ome.zarr")
    forget()


# Outages


def test_a_run_waits_for_a_server_that_comes_back(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"segmenter": above, "halo": 16, "block": 100}
    with serving("http", folder) as server:
        back = threading.Timer(1.5, server.start)

        def stop_once(stage: str, done: int, total: int) -> None:  # noqa: ARG001
            if (stage, done) == ("masks", 2):
                server.stop()
                back.start()

        address = f"{server.url}/dots%200.5.ome.zarr"
        found = tiledseg.segment(address, tmp_path / "there.zarr", progress=stop_once, **settings)
        back.join()
    here = tiledseg.segment(folder / "dots 0.5.ome.zarr", tmp_path / "here.zarr", **settings)
    assert np.array_equal(found.labels.compute(), here.labels.compute())
    assert found.report.computed == here.report.computed
    said = [record.message for record in caplog.records if record.name == "tiledseg.patience"]
    assert re.fullmatch(rf"{server.url}: .* connection.*; trying again for 60 s\.", said[0])
    # What was under way when the server went may be answered in between.
    assert set(said[1::2]) == {f"{server.url} answers again."}
    assert len(said) % 2 == 0


@pytest.mark.usefixtures("hasty")
def test_a_store_that_goes_away_ends_the_run_and_the_next_goes_on(folder: Path, s3: Server, tmp_path: Path) -> None:
    upload(s3, folder / "dots 0.5.ome.zarr", "away.ome.zarr/")
    address, settings = (
        f"s3://{BUCKET}/away.ome.zarr",
        {"segmenter": above, "halo": 16, "block": 100, "scratch": tmp_path},
    )
    begun: list[str] = []

    def go_away(stage: str, done: int, total: int) -> None:  # noqa: ARG001
        if (stage, done) in (("masks", 3), ("publish", 1)) and stage not in begun:
            begun.append(stage)
            (s3.folder / ".answer").write_text("503")

    for stage in ("masks", "publish"):
        with pytest.raises(RemoteError, match=r"503, for 1 s; .* run the same command again: what is done is kept"):
            tiledseg.segment(address, progress=go_away, **settings)
        (s3.folder / ".answer").unlink()
        assert begun[-1] == stage
    found = tiledseg.segment(address, **settings)
    assert found.report.computed["masks"] == 0
    # All levels of so small an image are one piece: what was left to do are the metadata.
    assert (found.report.kept["publish"], found.report.computed["publish"]) == (1, 0)
    expected = tiledseg.segment(folder / "dots 0.5.ome.zarr", tmp_path / "here.zarr", **settings)
    assert np.array_equal(found.labels.compute(), expected.labels.compute())
    assert found.table.equals(expected.table)


# Writing


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_and_table_go_into_the_image(
    folder: Path,
    s3: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    upload(s3, folder / f"dots {version}.ome.zarr", f"in {version}.zarr/")
    address = f"s3://{BUCKET}/in {version}.zarr"
    settings: dict[str, Any] = {"segmenter": above, "halo": 16, "block": 100}
    settings |= {"features": True, "csv": True, "polygons": "geojson", "shard": version == "0.5"}
    found = tiledseg.segment(address, **settings)
    assert str(found.path) == f"{address}/labels/cells"
    assert str(found.table_path) == f"{address}/tables/cells/table.parquet"
    assert found.report.scratch == str(tmp_path / f"in {version}.zarr.cells.tiledseg")
    shutil.copytree(folder / f"dots {version}.ome.zarr", tmp_path / "here.zarr")
    here = tiledseg.segment(tmp_path / "here.zarr", **settings)
    assert found.report.n_objects > 50
    assert np.array_equal(found.labels.compute(), here.labels.compute())
    assert found.table.equals(here.table)
    for name in ("labels/cells/0", "labels/cells/1", "labels/cells", "labels", "tables", "tables/cells"):
        for file in (tmp_path / "here.zarr" / name).glob("*z*"):
            stored = bucket(s3).Object(f"in {version}.zarr/{name}/{file.name}").get()["Body"].read()
            mine, theirs = json.loads(stored), json.loads(file.read_bytes())
            for one in (mine, theirs):
                one.get("attributes", one).pop("tiledseg", None)  # the run's own id
            assert mine == theirs
    export(address, {"geojson": tmp_path / "a.geojson", "csv": tmp_path / "a.csv"})
    for kind, place in here.exports.items():
        assert str(found.exports[kind]) == f"{address}/tables/cells/{place.name}"
        stored = bucket(s3).Object(f"in {version}.zarr/tables/cells/{place.name}").get()["Body"].read()
        assert stored == place.read_bytes() == (tmp_path / f"a.{kind}").read_bytes()
    with pytest.raises(OutputError, match="exist already at s3://bucket/"):
        tiledseg.segment(address, scratch=tmp_path / "other", **settings)
    again = tiledseg.segment(address, **settings, restart=True, min_size=40)
    assert 0 < again.report.n_objects < found.report.n_objects
    assert main(["compare", f"{address}/labels/cells", str(tmp_path / "here.zarr"), "--exact"]) == 1
    assert open_labels(address).shape == SHAPE
    capsys.readouterr()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()
    assert SECRET not in json.dumps(found.report.as_dict())


@pytest.mark.usefixtures("s3")
def test_a_remote_result_is_looked_over(
    folder: Path, s3: Server, web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "slide.ome.zarr", folder / "result.ome.zarr")
    tiledseg.segment(folder / "result.ome.zarr", segmenter=above, halo=30, scratch=tmp_path)
    here = tiledseg.qc(folder / "result.ome.zarr")
    upload(s3, folder / "result.ome.zarr", "result.zarr/")
    there = tiledseg.qc(f"s3://{BUCKET}/result.zarr")
    assert str(there.path) == f"s3://{BUCKET}/result.zarr/tables/cells/qc.html"
    stored = bucket(s3).Object("result.zarr/tables/cells/qc.json").get()["Body"].read()
    assert json.loads(stored) == json.loads(json.dumps(there.as_dict()))
    of_the_disk = {name: here.facts[name] for name in ("n_objects", "sizes", "straight_edges", "n_at_image_border")}
    assert {name: there.facts[name] for name in of_the_disk} == of_the_disk
    address = f"{web.url}/result.ome.zarr"
    with pytest.raises(OutputError, match="is on a web server, which is read only; say where the page goes"):
        tiledseg.qc(address)
    seen = tiledseg.qc(address, page=tmp_path / "page.html")
    assert seen.facts["straight_edges"] == here.facts["straight_edges"]
    assert (tmp_path / "page.json").is_file()


def set_environment(values: dict[str, str | None]) -> dict[str, str | None]:
    """Change the environment of a worker, which looks for servers anew; gives what was there."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    forget()
    return before


def test_two_workers_give_the_same_bits(s3: Server, folder: Path, tmp_path: Path, client: Any) -> None:
    """Workers find the credentials themselves: nothing that is sent or written holds them."""
    settings: dict[str, Any] = {"diameter": 24.0, "block": 256}
    here = tiledseg.segment(folder / "slide.ome.zarr", tmp_path / "here.zarr", **settings)
    known = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    before = next(iter(client.run(set_environment, known).values()))
    output = f"s3://{BUCKET}/out/slide labels.zarr"
    try:
        there = tiledseg.segment(f"s3://{BUCKET}/slide.ome.zarr", output, client=client, scratch=tmp_path, **settings)
    finally:
        client.run(set_environment, before)
    assert there.report.workers == "2 workers, 2 threads"
    assert there.report.n_blocks == 4
    assert here.report.n_objects > 20
    assert np.array_equal(there.labels.compute(), here.labels.compute())
    assert there.table.equals(here.table)
    keys = {entry.key for entry in bucket(s3).objects.filter(Prefix="out/")}
    assert "out/slide labels.zarr/labels/zarr.json" in keys
    assert not any(key == "out/zarr.json" or "partial" in key or key.endswith(".tiledseg") for key in keys)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()


def test_places_that_cannot_be_written_are_refused(
    web: Server, s3: Server, folder: Path, tmp_path: Path, client: Any
) -> None:
    image = folder / "dots 0.5.ome.zarr"
    settings: dict[str, Any] = {"segmenter": above, "halo": 16}
    with pytest.raises(OutputError, match="is on a web server, which is read only; give another place with -o"):
        tiledseg.segment(image, f"{web.url}/out.zarr", **settings)
    with pytest.raises(RemoteError, match=r"s3://nobody-has-it/out.zarr cannot be read: there is no such bucket"):
        tiledseg.segment(image, "s3://nobody-has-it/out.zarr", scratch=tmp_path, **settings)
    refusal = r"there: s3://bucket/out.zarr cannot be written: access is forbidden; .* Another place: -o"
    with s3.answering(403, "PUT"), pytest.raises(OutputError, match=refusal):
        tiledseg.segment(image, f"s3://{BUCKET}/out.zarr", scratch=tmp_path, **settings)
    with pytest.raises(SettingsError, match="the scratch cannot lie at s3://bucket/scratch; give a folder"):
        tiledseg.segment(image, tmp_path / "out.zarr", scratch=f"s3://KEY:{SECRET}@bucket/scratch", **settings)
    with pytest.raises(
        SettingsError, match=r"labels go to s3://bucket/out.zarr, .* that all of them reach \(--scratch\)"
    ):
        tiledseg.segment(image, f"s3://{BUCKET}/out.zarr", client=client, **settings)
    with pytest.raises(OutputError, match="exists and is neither empty nor a Zarr group"):
        tiledseg.segment(image, f"s3://{BUCKET}", scratch=tmp_path, **settings)
