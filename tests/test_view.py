"""Looking at results: what is opened together, where it lies, the pieces a viewer is given, the server's manners."""

from __future__ import annotations

import dataclasses
import html
import http.client
import importlib.util
import itertools
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

import tiledseg
from tiledseg.errors import ImageError, SettingsError
from tiledseg.images import open_image
from tiledseg.omezarr import write_image
from tiledseg.viewing import Scene, View, browser, open_scene, pieces, scene_of
from tiledseg.viewing.browser import can_open_browser
from tiledseg.viewing.contrast import channels_of
from tiledseg.viewing.pieces import Pieces, Stored
from tiledseg.viewing.state import state_of

from .servers import serving

Pixels = npt.NDArray[Any]


def noise(shape: tuple[int, ...], dtype: str = "uint16") -> Pixels:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def bright(block: Pixels) -> npt.NDArray[np.uint32]:
    """A segmenter."""
    from scipy.ndimage import label

    return np.asarray(label(block > 500)[0], np.uint32)


def spots(shape: tuple[int, ...] = (90, 120)) -> npt.NDArray[np.uint16]:
    picture = np.zeros(shape, np.uint16)
    picture[..., 10:20, 30:40] = 1000
    picture[..., 50:70, 80:100] = 2000
    return picture


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OME-Zarr with labels in it, not to be changed."""
    path = tmp_path_factory.mktemp("segmented") / "spots.ome.zarr"
    write_image(path, spots(), axes="yx", spacing_um=(0.5, 0.5), n_levels=2)
    tiledseg.segment(path, segmenter=bright, halo=8)
    return path


@pytest.fixture
def result(segmented: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(segmented, tmp_path / segmented.name))


def stored_files(source: Pieces, folder: Path) -> Path:
    """All files that a viewer could ask for, as files."""
    levels = range(len(source.shapes))
    names = ["zarr.json", *(f"{level}/zarr.json" for level in levels)]
    for level in levels:
        counts = [-(-n // side) for n, side in zip(source.shapes[level], source.chunks[level], strict=True)]
        names += [f"{level}/c/{'/'.join(map(str, at))}" for at in itertools.product(*map(range, counts))]
    for name in names:
        content = source.file(name)
        assert content is not None
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# pieces


@pytest.mark.parametrize(
    ("axes", "shape", "dtype"),
    [
        ("yx", (301, 403), "uint16"),
        ("cyx", (3, 130, 90), "uint8"),
        ("zyx", (9, 65, 70), "float64"),
        ("tczyx", (2, 2, 3, 40, 50), "int16"),
    ],
)
def test_pieces_are_an_ome_zarr_of_the_same_pixels_at_the_same_place(
    tmp_path: Path, axes: str, shape: tuple[int, ...], dtype: str
) -> None:
    pixels = noise(shape, dtype)
    space = [axis for axis in axes if axis in "zyx"]
    write_image(tmp_path / "a.ome.zarr", pixels, axes=axes, spacing_um=[0.3] * len(space), n_levels=2, chunk=64)
    image = open_image(tmp_path / "a.ome.zarr")
    scene = scene_of("a", image, [])
    assert scene.picture is not None
    stored = Stored(image)
    for channel in range(image.n_channels):
        served = Pieces(stored, scene.picture.placement, channel, is_labels=False)
        again = open_image(stored_files(served, tmp_path / f"served{channel}"))
        assert again.axes == axes.replace("c", "")
        assert again.spacing_um() == pytest.approx(image.spacing_um())
        assert [level.offset for level in again.levels] == [level.offset for level in image.levels]
        assert [level.scale for level in again.levels] == [level.scale for level in image.levels]
        for number, level in enumerate(image.levels):
            expected = image.read(number, tuple(slice(0, n) for n in level.shape))
            if "c" in axes:
                expected = expected.take(channel, axes.index("c"))
            found = again.read(number, tuple(slice(0, n) for n in again.levels[number].shape))
            np.testing.assert_array_equal(found, expected.astype(found.dtype))


def test_pieces_of_a_tiff_in_colours_are_read_once_for_all_channels_also_of_a_region(tmp_path: Path) -> None:
    pixels = noise((256, 320, 3), "uint8")
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(128, 128), photometric="rgb", compression="zlib")
    image = tiledseg.images.at_region(open_image(tmp_path / "a.tif"), {"y": (30, 230), "x": (50, 320)})
    scene = scene_of("a", image, [])
    assert scene.picture is not None
    reads, read = [], image.read
    object.__setattr__(image, "read", lambda *of: reads.append(of) or read(*of))
    stored = Stored(image)
    for channel in range(3):
        served = Pieces(stored, scene.picture.placement, channel, is_labels=False)
        again = open_image(stored_files(served, tmp_path / str(channel)))
        np.testing.assert_array_equal(again.read(0, np.s_[0:200, 0:270]), pixels[30:230, 50:, channel])
    assert len(reads) == len(set(map(str, reads)))
    assert sum(math.prod(part.stop - part.start for part in region) for _, region in reads) <= 4 * 200 * 270 * 3


def test_pieces_are_neither_many_nor_large() -> None:
    for shape, chunks, expected in (
        ((20_000, 20_000), (16, 20_000), (64, 1250)),
        ((100, 4096, 4096), (1, 4096, 4096), (1, 1024, 2048)),
        ((4000, 4000), (64, 64), (256, 256)),
    ):
        sides = pieces._sides("zyx"[-len(shape) :], chunks, shape)
        assert math.prod(sides) <= pieces.LARGEST
        assert math.prod(sides) >= pieces.SMALLEST
        assert sides == expected


def test_a_name_that_is_none_of_a_piece_is_nothing(result: Path) -> None:
    image = open_image(result)
    scene = scene_of("a", image, [])
    assert scene.picture is not None
    served = Pieces(Stored(image), scene.picture.placement, None, is_labels=False)
    for name in ("", "/", "0", "2/zarr.json", "0/c/0", "0/c/0/0/0", "0/c/9/0", "0/c/-1/0", "9/c/0/0", "0/c/0/../0"):
        assert served.file(name) is None, name


def test_an_image_stored_in_too_large_pieces_is_to_be_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "MOST_BYTES", 2**16)
    tifffile.imwrite(tmp_path / "a.tif", noise((300, 300)), compression="zlib", rowsperstrip=300)
    image = open_image(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="each read whole for any part of it; make an OME-Zarr of it first"):
        Stored(image)
    Stored(open_image(noise((300, 300))))  # any part of what is in memory is at hand


# scenes


def test_the_image_of_labels_is_the_one_around_them_or_the_one_in_the_report(
    tmp_path: Path, result: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tiledseg")
    inside = open_scene(result)
    assert inside.describe() == {"image": str(result), "channels": ["0"], "labels": ["cells"]}
    assert open_scene(result / "labels" / "cells").describe() == inside.describe()
    tifffile.imwrite(tmp_path / "spots.tif", spots())
    out = tmp_path / "out.ome.zarr"
    tiledseg.segment(tmp_path / "spots.tif", out, segmenter=bright, halo=8)
    assert open_scene(out).describe()["image"] == str(tmp_path / "spots.tif")
    assert "as the report of the run says" in caplog.text
    (tmp_path / "spots.tif").rename(tmp_path / "moved.tif")
    assert open_scene(out).picture is None
    assert f"to lay them over the image, add --image {tmp_path / 'spots.tif'}" in caplog.text
    assert open_scene(out, tmp_path / "moved.tif").describe()["image"] == str(tmp_path / "moved.tif")
    (out / "tables" / "cells" / "report.json").write_text("[]")
    assert open_scene(out).picture is None
    assert "the report of labels 'cells' cannot be read" in caplog.text


def test_labels_of_any_file_lie_over_an_image(tmp_path: Path, result: Path, caplog: pytest.LogCaptureFixture) -> None:
    tifffile.imwrite(tmp_path / "labels.tif", bright(spots()))
    scene = open_scene(tmp_path / "labels.tif", result)
    assert scene.describe() == {"image": str(result), "channels": ["0"], "labels": ["labels.tif"]}
    # One has a pixel size and the other has none: pixel by pixel.
    assert "laid over each other pixel by pixel" in caplog.text
    assert [layer.placement.step for layer in scene.layers] == [(1.0, 1.0), (1.0, 1.0)]


def test_several_labels_are_layers_of_which_the_first_are_shown(result: Path) -> None:
    tiledseg.segment(result, segmenter=bright, halo=8, name="again")
    assert [(one.name, one.is_shown) for one in open_scene(result).overlays] == [("cells", True), ("again", False)]
    assert [one.name for one in open_scene(result, name="again").overlays] == ["again"]
    with pytest.raises(ImageError, match=r"has no labels 'nuclei'; it has cells, again \(--name\)"):
        open_scene(result, name="nuclei")


def test_what_cannot_be_shown_is_said(tmp_path: Path, result: Path) -> None:
    with pytest.raises(ImageError, match="nothing does not exist"):
        open_scene(tmp_path / "nothing")
    with pytest.raises(SettingsError, match="a int is no result; give the path of one"):
        open_scene(3)
    write_image(tmp_path / "c.ome.zarr", noise((2, 40, 40)), axes="cyx")
    with pytest.raises(ImageError, match=r"give the labels first and the image with --image"):
        open_scene(tmp_path / "c.ome.zarr", result)
    listing = result / "labels" / "zarr.json"
    document = json.loads(listing.read_text())
    for bad, why in ((["../../secret"], "which are not inside it; refused"), (3, "correct its metadata")):
        document["attributes"]["ome"]["labels"] = bad
        listing.write_text(json.dumps(document))
        with pytest.raises(ImageError, match=why):
            open_scene(result)


def test_an_image_without_labels_is_shown_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tiledseg")
    tifffile.imwrite(tmp_path / "a.tif", spots())
    assert open_scene(tmp_path / "a.tif").describe() == {
        "image": str(tmp_path / "a.tif"),
        "channels": ["0"],
        "labels": [],
    }
    assert "holds no labels: the image is shown alone" in caplog.text


def test_labels_of_the_first_image_of_a_container_are_found(tmp_path: Path, result: Path) -> None:
    container = tmp_path / "container.zarr"
    container.mkdir()
    document = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"bioformats2raw.layout": 3}}}
    (container / "zarr.json").write_text(json.dumps(document))
    result.rename(container / "0")
    assert open_scene(container).describe()["labels"] == ["cells"]


# contrast


def test_contrast_is_that_of_the_file_unless_it_says_nothing(tmp_path: Path) -> None:
    pixels = np.zeros((2, 64, 64), np.uint16)
    pixels[0, :32], pixels[1, :, :8] = 900, 300
    write_image(tmp_path / "a.ome.zarr", pixels, axes="cyx", channels=["DAPI", "GFP"])
    first, second = channels_of(open_image(tmp_path / "a.ome.zarr"))
    assert (first.window, first.color, first.name) == ((0.0, 900.0), "0000FF", "DAPI")
    assert (second.window, second.color) == ((0.0, 300.0), "00FF00")
    file = tmp_path / "a.ome.zarr" / "zarr.json"
    document = json.loads(file.read_text())
    listed = document["attributes"]["ome"]["omero"]["channels"]
    listed[0].update(color="#ff8000", window={"start": 10, "end": 40}, active=False)
    listed[1].update(color="red); evil(", window={"start": "1", "end": None})
    file.write_text(json.dumps(document))
    first, second = channels_of(open_image(tmp_path / "a.ome.zarr"))
    assert (first.window, first.color, first.is_shown) == ((10.0, 40.0), "FF8000", False)
    assert (second.window, second.color, second.is_shown) == ((0.0, 300.0), "00FF00", True)


def test_contrast_of_colours_of_floats_with_gaps_and_of_one_value() -> None:
    rgb = channels_of(open_image(noise((40, 40, 3), "uint8"), axes="yxc"))
    assert [(one.color, one.window) for one in rgb] == [
        (color, (0.0, 255.0)) for color in ("FF0000", "00FF00", "0000FF")
    ]
    gaps = np.linspace(0, 1, 1600).reshape(40, 40)
    gaps[0, 0], gaps[0, 1] = np.nan, np.inf
    (channel,) = channels_of(open_image(gaps))
    assert channel.color == "FFFFFF"
    assert channel.window == pytest.approx((0.01, 0.998), abs=0.01)
    assert channels_of(open_image(np.full((9, 9), 7)))[0].window == (7.0, 8.0)
    assert channels_of(open_image(np.full((9, 9), np.nan)))[0].window == (0.0, 1.0)


def test_the_state_has_contrast_that_the_type_can_hold_and_names_that_differ() -> None:
    image = dataclasses.replace(open_image(noise((2, 40, 40), "uint8"), axes="cyx"), channels=("a", "a"))
    flat = dataclasses.replace(image, source=open_image(np.full((2, 40, 40), 255, np.uint8), axes="cyx").source)
    labels = open_image(bright(spots((40, 110))))
    state = state_of(scene_of("t", flat, [("a", labels)]), "D")
    assert [layer["name"] for layer in state["layers"]] == ["a", "a 2", "a 3"]
    assert [layer["source"] for layer in state["layers"]] == [f"D/{i}/|zarr3:" for i in range(3)]
    assert state["layers"][0]["shaderControls"]["contrast"] == {"range": [254, 255], "window": [254, 255]}
    json.dumps(state)
    assert (state["layout"], state["position"]) == ("xy", [54.5, 19.5])


def test_of_a_volume_over_time_the_first_time_and_a_plane_that_is_there_are_looked_at() -> None:
    labels = open_image(np.ones((3, 10, 40, 40), np.uint16), axes="tzyx")
    state = state_of(scene_of("t", None, [("cells", labels)]), "D")
    assert dict(zip(state["dimensions"], state["position"], strict=True)) == {"x": 19.5, "y": 19.5, "z": 4, "t": 0}
    assert state["layout"] == "4panel"


# server


@pytest.fixture
def view(result: Path) -> Iterator[View]:
    pytest.importorskip("neuroglancer", reason="neuroglancer is not installed")
    with tiledseg.view(result) as made:
        yield made


def ask(view: View, path: str, method: str = "GET", host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    """A request, its path as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", view.port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"127.0.0.1:{view.port}" if host is None else host)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def below(view: View) -> str:
    """The secret part of its address, as a path."""
    return "/" + view.url.split("/", 3)[3]


def test_the_address_leads_to_a_page_with_a_state(view: View) -> None:
    status, _, headers = ask(view, below(view))
    page, _, state = headers["Location"].partition("#!")
    assert status == 302
    assert page == f"{view.url}v/1/"
    assert json.loads(unquote(state)) == json.loads(json.dumps(state_of(view.scene, f"{view.url}data")))
    status, body, headers = ask(view, below(view) + "v/1/")
    assert (status, headers["Content-Type"]) == (200, "text/html")
    assert b"main." in body
    # Through a forwarded port the page and its data have the address that the browser knows.
    assert ask(view, below(view), host="localhost:9000")[2]["Location"].startswith("http://localhost:9000/")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost:80@evil"])
def test_another_host_is_refused(view: View, host: str) -> None:
    status, body, _ = ask(view, below(view) + "data/0/zarr.json", host=host)
    assert (status, body) == (403, b"only this machine is served, by the name 127.0.0.1 or localhost\n")


def test_without_the_secret_there_is_nothing(view: View) -> None:
    for path in ("/", "/data/0/zarr.json", "/wrong/data/0/zarr.json", "/v/1/", "//", below(view)[:-2] + "/"):
        assert ask(view, path)[0] == 404, path


@pytest.mark.parametrize(
    "path",
    [
        "v/1/../../../pyproject.toml",
        "v/1/..%2f..%2f__init__.py",
        "v/1/__init__.py",
        "v/1//etc/passwd",
        "v/1/index.html/..",
        "data/0/../0/zarr.json",
        "data/0/../../../../etc/passwd",
        "data/9/zarr.json",
        "data/0//etc/passwd",
        "data/0/%2e%2e/zarr.json",
        "data/0/.zattrs",
        "data",
        "events",
    ],
)
def test_nothing_but_the_page_and_the_pieces_is_served(view: View, path: str) -> None:
    assert ask(view, below(view) + path)[0] == 404


def test_it_only_reads_and_lets_no_other_site_read(view: View) -> None:
    path = below(view) + "data/0/zarr.json"
    status, body, headers = ask(view, path)
    assert status == 200
    assert json.loads(body)["attributes"]["ome"]["version"] == "0.5"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Access-Control-Allow-Origin" not in headers
    head = ask(view, path, "HEAD")
    assert head[:2] == (200, b"")
    assert head[2]["Content-Length"] == str(len(body))
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        assert ask(view, path, method)[0] == 501


def test_it_listens_on_loopback_only_and_on_the_port_that_was_asked_for(result: Path) -> None:
    with tiledseg.view(result) as first:
        assert first._server.server_address[0] == "127.0.0.1"
        with pytest.raises(SettingsError, match=rf"port {first.port} cannot be used .*; give another, or none"):
            tiledseg.view(result, port=first.port)
        port = first.port
    with socket.socket() as trial:
        assert trial.connect_ex(("127.0.0.1", port)) != 0
    with tiledseg.view(result, port=port) as again:
        assert again.port == port
        first.close()
    with pytest.raises(SettingsError, match="port 99999 cannot be used"):
        tiledseg.view(result, port=99999)


def test_events_are_held_open_until_the_view_is_closed(view: View) -> None:
    answer = urllib.request.urlopen(f"{view.url}events/1", timeout=20)
    assert answer.headers["Content-Type"] == "text/event-stream"
    view.close()
    assert answer.read() == b""


def test_a_damaged_piece_is_said_once(view: View, result: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = next(path for path in (result / "0" / "c").rglob("*") if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-9])
    for _ in range(2):
        status, body, _ = ask(view, below(view) + "data/0/0/c/0/0")
        assert status == 500
        assert b"cannot be read" in body
    assert caplog.text.count("cannot be read") == 1


# from Python, the command line and elsewhere


def test_a_result_shows_itself_in_jupyter(tmp_path: Path) -> None:
    pytest.importorskip("neuroglancer", reason="neuroglancer is not installed")
    in_memory = tiledseg.segment(np.stack([spots(), spots()]), axes="cyx", segmenter=bright, halo=8)
    stored = tiledseg.segment(spots(), tmp_path / "<b>.ome.zarr", segmenter=bright, halo=8)
    for found, name in ((in_memory, "numpy array"), (stored, "<b>.ome.zarr")):
        with found.view() as shown:
            text = shown._repr_html_()
            assert f'<iframe src="{shown.url}" title="{html.escape(name)}"' in text
            assert "<b>" not in text
            assert f"port {shown.port} is forwarded" in text
            assert shown.scene.title == name
            n_channels = 2 if found is in_memory else 1
            assert [layer.image.shape for layer in shown.scene.layers] == [found.job.image.shape, (90, 120)]
            assert ask(shown, f"{below(shown)}data/{n_channels}/0/c/0/0")[0] == 200


def test_a_result_on_a_web_server_is_shown(result: Path) -> None:
    pytest.importorskip("neuroglancer", reason="neuroglancer is not installed")
    with serving("http", result.parent) as server, tiledseg.view(f"{server.url}/{result.name}") as shown:
        assert shown.scene.describe()["labels"] == ["cells"]
        status, body, _ = ask(shown, f"{below(shown)}data/1/0/c/0/0")
    assert (status, len(body) > 10) == (200, True)


def test_what_is_missing_is_named_with_the_line_that_installs_it(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiledseg.viewing import napari_layers

    browser._client_folder.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r'needs the package neuroglancer; install it: pip install -e "\.\[view\]"'):
        tiledseg.view(result)
    monkeypatch.setitem(sys.modules, "napari", None)
    with pytest.raises(SettingsError, match=r'napari is not installed; install it: pip install -e "\.\[napari\]"'):
        napari_layers.show(Scene("", None, ()))


def test_no_browser_is_opened_over_ssh_or_without_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSH_CONNECTION", "SSH_TTY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", ":0")
    assert can_open_browser()
    monkeypatch.setenv("SSH_CONNECTION", "a b c d")
    assert not can_open_browser()
    monkeypatch.delenv("SSH_CONNECTION")
    monkeypatch.delenv("DISPLAY")
    assert not can_open_browser()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert can_open_browser()


def test_the_command_prints_the_address_and_serves_until_it_is_interrupted(result: Path) -> None:
    pytest.importorskip("neuroglancer", reason="neuroglancer is not installed")
    command = [sys.executable, "-m", "tiledseg.cli", "view", str(result)]
    environment = {key: value for key, value in os.environ.items() if "DISPLAY" not in key}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(5)]
        assert lines[0] == f"image        {result} (0)\n"
        assert lines[1] == "labels       cells\n"
        url = lines[2].split()[1]
        port = url.split(":")[2].split("/")[0]
        assert f"ssh -L {port}:127.0.0.1:{port} HOST" in lines[3]
        assert lines[4] == "end          Ctrl-C\n"
        assert process.stderr.readline() == "tiledseg: no browser can be opened here.\n"
        with urllib.request.urlopen(f"{url}data/1/0/zarr.json", timeout=20) as answer:
            assert json.load(answer)["data_type"] == "uint32"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
