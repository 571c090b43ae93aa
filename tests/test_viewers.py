"""Results in real viewers, judged by their pixels: neuroglancer in Chromium, napari in a window, zarrita in Node."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr

import tiledseg
from tiledseg.images import open_image
from tiledseg.omezarr import write_image
from tiledseg.viewing import View, open_scene, scene_of
from tiledseg.viewing.state import state_of

Pixels = npt.NDArray[np.integer[Any]]
Box = dict[str, tuple[int, int]]

BRIGHT, CELL = 1000, 7
"""Pixel values: of what shines, and of the cell, which is too dim to be seen but by its label."""
SHAPE = {"y": 301, "x": 403}
SHINES: Box = {"z": (3, 17), "y": (20, 60), "x": (30, 90)}
CELLS: Box = {"z": (8, 20), "y": (200, 280), "x": (300, 390)}
SHIFT = {"z": 0.0, "y": 30.0, "x": -12.5}
SPACING = {"z": 1.0, "y": 0.5, "x": 0.5}
PATIENCE_S = 20
WRITTEN_OVER = ".neuroglancer-display-dimensions-widget, .neuroglancer-icon, .neuroglancer-rendered-data-panel button"
PLACES = """[...document.querySelectorAll('.neuroglancer-rendered-data-panel')].map(element => {
    const box = element.getBoundingClientRect(); return [box.x, box.y, box.width, box.height] })"""
CLOSE = 1.5
"""Pixels of the screen by which an edge may be off: half one of blending, and one of a coarser level."""


@dataclass
class Result:
    """Labels, and the image they were made from."""

    path: Path
    axes: str
    image: Path | None = None


def dim(pixels: Pixels) -> npt.NDArray[np.uint32]:
    """A segmenter that finds one cell."""
    return (pixels == CELL).astype(np.uint32)


def picture(axes: str) -> npt.NDArray[np.uint16]:
    """A dark picture in which something shines in one corner, with a cell in the other."""
    pixels = np.zeros([SHAPE.get(axis, 24) for axis in axes], np.uint16)
    for box, value in ((SHINES, BRIGHT), (CELLS, CELL)):
        pixels[tuple(slice(*box[axis]) for axis in axes)] = value
    return pixels


def write(path: Path, axes: str = "yx", version: str = "0.5", shift: dict[str, float] | None = None) -> Path:
    """That picture, with a pyramid of odd sizes, at a place in the world."""
    spacing = [SPACING[axis] for axis in axes]
    write_image(path, picture(axes), axes=axes, spacing_um=spacing, version=version, n_levels=3, chunk=128)
    file = path / ("zarr.json" if version == "0.5" else ".zattrs")
    document = json.loads(file.read_text())
    attributes = document["attributes"]["ome"] if version == "0.5" else document
    for dataset in attributes["multiscales"][0]["datasets"]:
        place = dataset["coordinateTransformations"][1]["translation"]
        place[:] = [old + (shift or {}).get(axis, 0.0) for old, axis in zip(place, axes, strict=True)]
    file.write_text(json.dumps(document))
    return path


def shard(folder: Path) -> None:
    """Store labels anew, 16 chunks to a file."""
    for level in sorted(path for path in folder.iterdir() if path.name.isdigit()):
        pixels = zarr.open_array(level, mode="r")[:]
        shutil.rmtree(level)
        zarr.create_array(
            level,
            data=pixels,
            chunks=(32, 32),
            shards=(128, 128),
            dimension_names="yx",
            compressors=zarr.codecs.ZstdCodec(),
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Pictures as they are stored, with labels as segmentation leaves them."""
    folder = tmp_path_factory.mktemp("results")
    run = functools.partial(tiledseg.segment, segmenter=dim, halo=8, do_3d=True)
    made = {}
    for name, version in (("0.4", "0.4"), ("0.5", "0.5"), ("sharded", "0.5")):
        made[name] = Result(write(folder / f"{name}.ome.zarr", "yx", version), "yx")
        run(made[name].path, do_3d=False)
    shard(made["sharded"].path / "labels" / "cells")
    made["moved"] = Result(write(folder / "moved.ome.zarr", "yx", shift=SHIFT), "yx")
    run(made["moved"].path, do_3d=False)
    made["region"] = Result(folder / "region.ome.zarr", "yx", write(folder / "whole.ome.zarr", "yx", shift=SHIFT))
    run(made["region"].image, made["region"].path, do_3d=False, region="y=101:,x=151:")
    made["volume"] = Result(write(folder / "volume.ome.zarr", "zyx", shift=SHIFT), "zyx")
    run(made["volume"].path)
    tifffile.imwrite(folder / "image.tif", picture("yx"))
    made["tiff"] = Result(folder / "tiff.ome.zarr", "yx", folder / "image.tif")
    run(made["tiff"].image, made["tiff"].path, do_3d=False)
    return made


# neuroglancer


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of Chromium that reaches nothing but this machine."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("neuroglancer", reason="neuroglancer is not installed")
    if chromium is None:
        pytest.skip("there is no Chromium")
    options = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=[*options, "--ignore-gpu-blocklist", "--disable-dev-shm-usage"]
        )
        opened = browser.new_page(viewport={"width": 900, "height": 700})
        elsewhere: list[str] = []

        def only_here(route: Any) -> None:
            if route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
                route.continue_()
            else:
                elsewhere.append(route.request.url)
                route.abort()

        opened.route("**/*", only_here)
        yield opened
        browser.close()
    assert elsewhere == []


@dataclass
class Panel:
    """What one panel of neuroglancer shows: its pixels, and the middle of the panel in them."""

    pixels: Pixels
    middle: tuple[float, float]


def panels_of(page: Any) -> list[Panel]:
    """What the panels of a page show now, in rows."""
    from PIL import Image

    pixels = np.asarray(Image.open(BytesIO(page.screenshot())).convert("RGB")).astype(int)
    panels = []
    for x, y, width, height in sorted(page.evaluate(PLACES), key=lambda box: (box[1], box[0])):
        inside = pixels[math.ceil(y) + 1 : int(y + height) - 1, math.ceil(x) + 1 : int(x + width) - 1]
        panels.append(Panel(inside, (y + height / 2 - math.ceil(y) - 1, x + width / 2 - math.ceil(x) - 1)))
    return panels


def check_page(page: Any, url: str, check: Callable[[list[Panel]], None]) -> None:
    """Open a page, and check what it shows until that is so; it is drawn piece by piece."""
    page.goto(url)
    page.wait_for_function("window.viewer !== undefined")
    page.evaluate("window.viewer.showScaleBar.value = false")
    page.add_style_tag(content=f"{WRITTEN_OVER} {{ display: none !important }}")
    end = time.monotonic() + PATIENCE_S
    while True:
        time.sleep(0.2)
        if not page.evaluate("window.viewer.isReady()") and time.monotonic() < end:
            continue
        try:
            check(panels_of(page))
        except AssertionError:
            if time.monotonic() > end:
                raise
            continue
        return


def extent(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and one-past-last row and column of what is true."""
    assert mask.any(), "there is nothing of it on the screen"
    return [(int(at.min()), int(at.max()) + 1) for at in np.nonzero(mask)]


def shining(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """Where the image shines, without label."""
    return np.asarray(pixels[..., :3].min(axis=-1) > 128)


def labelled(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """Where there is a label over the dark: what is not grey."""
    colours = pixels[..., :3]
    return np.asarray(colours.max(axis=-1) - colours.min(axis=-1) > 20)


def check_panel(panel: Panel, axes: str, state: dict[str, Any], zoom: float, origin: dict[str, float]) -> None:
    """What shines and the cell lie where they must, and nothing else is there."""
    order = list(state["dimensions"])
    looked_at = dict(zip(order, state["position"], strict=True))
    for box, mask in ((SHINES, shining(panel.pixels)), (CELLS, labelled(panel.pixels))):
        for axis, middle, found in zip(axes, panel.middle, extent(mask), strict=True):
            # The position counts pixels from the world's origin, and whole numbers are their centres.
            unit = min(SPACING["y"], SPACING["x"]) if origin else 1.0
            step = SPACING[axis] if origin else 1.0
            expected = [
                middle + (origin.get(axis, 0.0) + (at - 0.5) * step - looked_at[axis] * step) / unit / zoom
                for at in box[axis]
            ]
            assert found == pytest.approx(expected, abs=CLOSE), (axis, box)


class _Files(SimpleHTTPRequestHandler):
    """Files as a web server gives them: in parts if asked for, to pages of other sites as well."""

    protocol_version = "HTTP/1.1"

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "*")
        self.send_header("Access-Control-Expose-Headers", "Content-Range,Content-Length")
        super().end_headers()

    def do_OPTIONS(self) -> None:
        self.send_response(204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if part is None or not file.is_file():
            super().do_GET()
            return
        content = file.read_bytes()
        first = int(part[1]) if part[1] else max(0, len(content) - int(part[2]))
        last = min(int(part[2]), len(content) - 1) if part[1] and part[2] else len(content) - 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Nothing: a browser that hangs up is no news."""


@contextlib.contextmanager
def served_files(folder: Path) -> Iterator[str]:
    """A folder on a web server."""
    with _Quiet(("127.0.0.1", 0), functools.partial(_Files, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["0.4", "0.5", "sharded"])
def test_neuroglancer_reads_the_files_themselves(page: Any, results: dict[str, Result], name: str) -> None:
    """Without our server in between: image and labels as they are stored, by neuroglancer's own reading of metadata."""
    result = results[name]
    with View(open_scene(result.path)) as view, served_files(result.path.parent) as address:
        state = state_of(view.scene, "")
        kind = "zarr2" if name == "0.4" else "zarr3"
        places = {"image": result.path.name, "segmentation": f"{result.path.name}/labels/cells"}
        for layer in state["layers"]:
            layer["source"] = f"{address}/{places[layer['type']]}/|{kind}:"
        zoom, origin = state["crossSectionScale"], {"y": 0.0, "x": 0.0}

        def check(panels: list[Panel]) -> None:
            assert len(panels) == 1
            check_panel(panels[0], "yx", state, zoom, origin)

        check_page(page, f"{view.url}v/1/#!{quote(json.dumps(state))}", check)


@pytest.mark.parametrize(
    ("name", "zoom"),
    [
        pytest.param("moved", 1.0, marks=pytest.mark.slow),
        ("moved", 4.3),
        ("region", 1.0),
        ("tiff", 1.0),
        pytest.param("0.4", 1.0, marks=pytest.mark.slow),
        ("sharded", 2.2),
    ],
)
def test_view_shows_image_and_labels_where_they_are(
    page: Any, results: dict[str, Result], name: str, zoom: float
) -> None:
    """From near, and from so far that coarser levels of odd sizes are shown."""
    result = results[name]
    with View(open_scene(result.path)) as view:
        state = state_of(view.scene, f"{view.url}data")
        zoom *= state["crossSectionScale"] if zoom == 1 else 1
        state["crossSectionScale"] = zoom
        # All of the image is looked at, also where only a part has labels.
        origin = SHIFT if name in ("moved", "region") else {"y": 0.0, "x": 0.0}
        if name == "region":
            state["crossSectionScale"] = zoom = 1.0
            state["position"] = [201 + SHIFT["x"] / 0.5, 150 + SHIFT["y"] / 0.5]
        origin = {} if name == "tiff" else origin
        url = f"{view.url}v/1/#!{quote(json.dumps(state))}"
        check_page(page, url, lambda panels: check_panel(panels[0], "yx", state, zoom, origin))


def test_the_address_leads_to_the_page_and_a_volume_shows_in_three_planes(
    page: Any, results: dict[str, Result]
) -> None:
    with View(open_scene(results["volume"].path)) as view:
        state = state_of(view.scene, "")

        def check(panels: list[Panel]) -> None:
            assert len(panels) == 4
            check_panel(panels[0], "yx", state, state["crossSectionScale"], SHIFT)
            assert labelled(panels[2].pixels).any()  # the planes in space

        check_page(page, view.url, check)
        assert "/v/1/#!" in page.url
        assert page.title().startswith("volume.ome.zarr")


def test_the_planes_of_a_volume_lie_where_they_must(page: Any, results: dict[str, Result]) -> None:
    with View(open_scene(results["volume"].path)) as view:
        state = state_of(view.scene, f"{view.url}data")
        # A plane of constant y cuts what shines or the cell, not both.
        for box, mask in ((SHINES, shining), (CELLS, labelled)):
            place = dict(zip(state["dimensions"], state["position"], strict=True))
            place["y"] = sum(box["y"]) / 2 + SHIFT["y"] / SPACING["y"]
            state["position"] = list(place.values())

            def check(panels: list[Panel], box: Box = box, mask: Any = mask, at: Any = place) -> None:
                middles, found = panels[1].middle, extent(mask(panels[1].pixels))
                for axis, middle, edges in zip("zx", middles, found, strict=True):
                    steps = SPACING[axis] / SPACING["x"] / state["crossSectionScale"]
                    starts = [SHIFT[axis] / SPACING[axis] + edge - 0.5 - at[axis] for edge in box[axis]]
                    assert edges == pytest.approx([middle + start * steps for start in starts], abs=CLOSE)

            check_page(page, f"{view.url}v/1/#!{quote(json.dumps(state))}", check)


def test_times_are_shown_one_by_one(page: Any) -> None:
    """Of arrays in memory: at first the first time."""
    labels = np.zeros((3, *picture("yx").shape), np.uint16)
    for time_point, box in enumerate((SHINES, CELLS)):
        labels[time_point, slice(*box["y"]), slice(*box["x"])] = 1
    with View(scene_of("series", None, [("cells", open_image(labels, axes="tyx"))])) as view:
        state = state_of(view.scene, f"{view.url}data")
        for time_point, box in enumerate((SHINES, CELLS)):
            state["position"][list(state["dimensions"]).index("t")] += time_point

            def check(panels: list[Panel], box: Box = box) -> None:
                middle, place = panels[0].middle[0], state["position"][1]
                rows, _ = extent(labelled(panels[0].pixels))
                starts = [middle + (edge - 0.5 - place) / state["crossSectionScale"] for edge in box["y"]]
                assert rows == pytest.approx(starts, abs=CLOSE)

            check_page(page, f"{view.url}v/1/#!{quote(json.dumps(state))}", check)


# napari


def napari_expected(axis: str, at: int, length: int, case: dict[str, Any], last: str) -> float:
    """Pixel of the canvas at which a pixel of the image begins."""
    world = SHIFT[axis] + (at - 0.5) * SPACING[axis]
    return length / 2 + (world - case["center"][last.index(axis) + 1]) * case["zoom"]


def test_napari_shows_labels_over_the_image(results: dict[str, Result], tmp_path: Path) -> None:
    pytest.importorskip("napari", reason="napari is not installed")
    if shutil.which("xvfb-run") is None:
        pytest.skip("there is no xvfb-run")
    cases = []
    for name, zoom in (("moved", 3.0), ("moved", 0.5), ("volume", 3.0)):
        center = [0.0, 75.0 + SHIFT["y"], 100.0 + SHIFT["x"]]
        picture_of = str(tmp_path / f"{len(cases)}.png")
        cases.append({"out": str(results[name].path), "center": center, "zoom": zoom, "png": picture_of})
        if name == "volume":
            cases[-1]["z"] = 11.0
    command = ["xvfb-run", "-a", "-s", "-screen 0 1280x1024x24", sys.executable]
    window = Path(__file__).with_name("napari_window.py")
    with subprocess.Popen(
        [*command, str(window), *map(json.dumps, cases)],
        env={**os.environ, "HOME": str(tmp_path), "QT_QPA_PLATFORM": "xcb"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, complaints = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # xvfb-run, the screen and the window
            raise
    assert process.returncode == 0, complaints[-2000:]
    told = json.loads(said.splitlines()[-1])
    from PIL import Image

    for case, found in zip(cases, told, strict=True):
        image, labels = found
        assert (image["kind"], labels["kind"], labels["name"]) == ("Image", "Labels", "cells")
        assert image["visible"]
        assert labels["visible"]
        assert image["lazy"] == labels["lazy"] == "dask.array.core"
        assert set(labels["units"]) == {"micrometer"}
        pixels = np.asarray(Image.open(case["png"]).convert("RGB")).astype(int)
        for box, mask in ((SHINES, shining(pixels)), (CELLS, labelled(pixels))):
            for axis, length, edges in zip("yx", pixels.shape, extent(mask), strict=False):
                expected = [napari_expected(axis, at, length, case, "yx") for at in box[axis]]
                assert edges == pytest.approx(expected, abs=CLOSE + 0.5), (case, axis)
    assert told[0][1]["level"] == 0
    assert told[1][1]["level"] > 0


# zarrita


@pytest.fixture(scope="module")
def zarrita(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Reads arrays with zarrita, in Node."""
    where = os.environ.get("TILEDSEG_ZARRITA")
    if shutil.which("node") is None or not where:
        pytest.skip("there is no Node, or TILEDSEG_ZARRITA names no folder that `npm install zarrita` was run in")
    folder = tmp_path_factory.mktemp("node")
    (folder / "node_modules").symlink_to(Path(where).resolve() / "node_modules")
    script = shutil.copy(Path(__file__).with_name("zarrita_read.mjs"), folder)

    def read(*places: object) -> list[dict[str, Any]]:
        ended = subprocess.run(["node", script, *map(str, places)], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr[-2000:]
        facts: list[dict[str, Any]] = json.loads(ended.stdout)
        return facts

    return read


def test_zarrita_reads_the_labels(zarrita: Any, results: dict[str, Result]) -> None:
    names = ["0.4", "0.5", "sharded", "moved", "volume"]
    found = zarrita(*(results[name].path / "labels" / "cells" / "0" for name in names))
    for name, facts in zip(names, found, strict=True):
        axes = results[name].axes
        assert facts["dtype"] == "uint32"
        assert facts["max"] == 1
        assert facts["box"] == [list(CELLS[axis]) for axis in axes]
        assert facts["sum"] == math.prod(CELLS[axis][1] - CELLS[axis][0] for axis in axes)


def test_zarrita_reads_what_view_serves(zarrita: Any, results: dict[str, Result]) -> None:
    with View(open_scene(results["tiff"].path)) as view:
        image, labels = zarrita(f"{view.url}data/0/0", f"{view.url}data/1/0")
    assert image["sum"] == int(picture("yx").sum())
    assert labels["box"] == [list(CELLS[axis]) for axis in "yx"]
