"""Drives the form in a real window of napari, for tests/test_napari_widget.py: run it by xvfb-run, with a screen.

    python tests/napari_form.py FOLDER

Everything is done by clicks and keys. Prints as JSON what was seen after each; writes ``window.png`` into the folder.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import napari
import numpy as np
from napari.components import ViewerModel
from napari.layers import Image, Labels
from napari.layers._source import layer_source
from npe2 import PluginManager, PluginManifest
from qtpy.QtCore import Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication, QWidget

import tiledseg
from tiledseg.errors import TiledsegError
from tiledseg.napari.choices import GREY, IN_3D, THIS_PLANE, Choices, diameter_of_shapes_layer, region_of
from tiledseg.napari.layers import fitted, placement
from tiledseg.napari.target import open_target
from tiledseg.napari.work import estimated
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide
from tiledseg.volumes import label_volume, render_volume

TIMEOUT_S = 120
MANIFEST = Path(tiledseg.__file__).parent / "napari" / "napari.yaml"
SETTINGS: dict[str, Any] = {"diameter": 24.0, "cellprob_threshold": 0.5, "flow_threshold": 0.6, "min_size": 30}


def wait(until: Callable[[], bool]) -> int:
    """Let the window live until something is so; how often it was drawn or told something meanwhile."""
    end, turns = time.monotonic() + TIMEOUT_S, 0
    while not until():
        if time.monotonic() > end:
            raise TimeoutError("the window did not come to rest")
        QApplication.processEvents()
        time.sleep(0.02)
        turns += 1
    return turns


def click(button: QWidget) -> None:
    """Press and release the left button of the mouse."""
    QTest.mouseClick(button, Qt.MouseButton.LeftButton)


def write(field: QWidget, text: str) -> None:
    """Replace the text of a field by typing."""
    field.setFocus()
    field.selectAll()
    QTest.keyClicks(field, text)
    QTest.keyClick(field, Qt.Key.Key_Return)


def run(form: Any, button: QWidget) -> int:
    """Click a button that begins something, and wait for its end."""
    click(button)
    return wait(form.run_whole.isEnabled)


def seen(viewer: Any, form: Any) -> dict[str, Any]:
    """What the window shows."""
    labels = [layer for layer in viewer.layers if isinstance(layer, napari.layers.Labels)]
    return {
        "message": form.message.text(),
        "labels": [layer.name for layer in labels],
        "scale": [list(map(float, layer.scale)) for layer in labels],
        "translate": [list(map(float, layer.translate)) for layer in labels],
        "units": [[str(unit) for unit in layer.units] for layer in labels],
        "shape": [list(layer.level_shapes[0] if layer.multiscale else layer.data.shape) for layer in labels],
        "n_levels": [len(layer.data) if layer.multiscale else 1 for layer in labels],
    }


def is_equal(layer: Any, image: Any, **settings: Any) -> bool:
    """Whether a labels layer holds what `tiledseg.segment` finds."""
    labels = tiledseg.segment(image, **settings).labels.compute()
    shown = np.asarray(layer.data[0] if layer.multiscale else layer.data)
    return bool(labels.any()) and bool(np.array_equal(shown, labels))


def plane(viewer: Any, form: Any, folder: Path) -> dict[str, Any]:
    """A picture in memory: both buttons, both ways to a diameter, cancelling, and what is refused."""
    image = synthetic_slide((256, 240), diameter=24.0, seed=3)[0]
    found: dict[str, Any] = {"nothing": (click(form.run_whole), form.message.text())[1]}
    layer = viewer.add_image(image, name="slide", scale=(0.5, 0.5), translate=(10, 20), units="um")
    viewer.reset_view()
    found["turns"] = run(form, form.from_image)
    found["from image"] = [form.diameter.value(), tiledseg.estimate_diameter(image).value]
    shapes = viewer.add_shapes(name="drawn")
    # In its own pixels, which are twice as large as those of the picture.
    shapes.add_ellipses([[12, 12], [6, 6]])
    shapes.add_ellipses([[25, 12], [5, 5]])
    viewer.layers.selection.active = layer
    click(form.from_shapes)
    found["from shapes"] = [form.diameter.value(), form.message.text()]
    for field, value in (
        (form.diameter, SETTINGS["diameter"]),
        (form.probability, SETTINGS["cellprob_threshold"]),
        (form.match, SETTINGS["flow_threshold"]),
        (form.min_size, SETTINGS["min_size"]),
    ):
        write(field, str(value))
    run(form, form.run_whole)
    found["whole"] = {**seen(viewer, form), "equal": is_equal(viewer.layers["slide cells"], image, **SETTINGS)}
    napari.current_viewer().window.screenshot(path=folder / "window.png", canvas_only=False, flash=False)
    viewer.scene.camera.center, viewer.scene.camera.zoom = (10 + 70, 20 + 60), 12
    wait(lambda: bool(layer.corner_pixels[0].any()))
    run(form, form.run_visible)
    state = seen(viewer, form)
    start = [round((t - t0) / 0.5) for t, t0 in zip(state["translate"][0], (10, 20), strict=True)]
    region = ",".join(f"{a}={i}:{i + n}" for a, i, n in zip("yx", start, state["shape"][0], strict=True))
    found["visible"] = {
        **state,
        "equal": is_equal(viewer.layers["slide cells"], image, region=region, **SETTINGS),
        "start": start,
        "napari": layer.corner_pixels.tolist(),
    }
    click(form.run_whole)
    found["cancel was possible"] = form.cancel.isEnabled()
    click(form.cancel)
    wait(form.run_whole.isEnabled)
    found["cancelled"] = seen(viewer, form)
    write(form.model.lineEdit(), "no-such-model")
    run(form, form.run_whole)
    found["refused"] = form.message.text()
    write(form.model.lineEdit(), "tiledseg-nuclei")
    viewer.scene.camera.center = (5000, 5000)
    click(form.run_visible)
    found["outside"] = form.message.text()
    return found


def volume(viewer: Any, form: Any, folder: Path) -> dict[str, Any]:  # noqa: ARG001
    """A volume over time whose axes napari does not know."""
    planes = np.stack([synthetic_slide((80, 72), diameter=20.0, seed=seed)[0] for seed in (5, 5, 6, 6)])
    movie = planes.reshape(2, 2, 80, 72)
    viewer.add_image(movie, name="movie", scale=(1, 2, 1, 1))
    viewer.reset_view()
    found: dict[str, Any] = {"unnamed": form.message.text(), "asks": form.axes.isVisible()}
    write(form.axes, "tzyx")
    write(form.diameter, "20")
    form.volume.setFocus()
    QTest.keyClicks(form.volume, "planes")
    found["fields"] = [form.volume.currentText(), form.volume.isVisible(), form.stitch.isVisible()]
    run(form, form.run_whole)
    layer = viewer.layers["movie cells"]
    found["joined"] = {
        **seen(viewer, form),
        "equal": is_equal(layer, movie, axes="tzyx", stitch_threshold=0.25, diameter=20),
    }
    QTest.keyClicks(form.volume, "this")
    viewer.dims.set_point((0, 1), (1, 2))
    viewer.scene.camera.zoom = viewer.scene.camera.zoom / 2
    run(form, form.run_visible)
    found["plane"] = {
        **seen(viewer, form),
        "equal": is_equal(layer, movie, axes="tzyx", region="t=1,z=1", diameter=20),
    }
    return found


def stored(viewer: Any, form: Any, folder: Path) -> dict[str, Any]:
    """One channel of an OME-Zarr on disk."""
    path = folder / "two.ome.zarr"
    pixels = np.stack([synthetic_slide((600, 320), diameter=24.0, seed=seed)[0] for seed in (1, 2)])
    write_image(path, pixels, axes="cyx", spacing_um=(0.5, 0.5))
    with layer_source(path=str(path)):
        viewer.add_image([pixels[1], pixels[1, ::2, ::2]], name="1", scale=(0.5, 0.5), units="um", multiscale=True)
    viewer.reset_view()
    found: dict[str, Any] = {"output": form.output.text(), "channel": form.channel.currentText()}
    write(form.diameter, "24")
    run(form, form.run_whole)
    layer = viewer.layers["1 cells"]
    found["whole"] = {**seen(viewer, form), "equal": is_equal(layer, pixels[1], diameter=24)}
    write(form.diameter, "30")
    run(form, form.run_whole)
    found["other settings"] = form.message.text()
    write(form.probability, "1")
    click(form.restart)
    run(form, form.run_whole)
    found["again"] = {
        **seen(viewer, form),
        "equal": is_equal(viewer.layers["1 cells"], pixels[1], diameter=30, cellprob_threshold=1),
    }
    write(form.diameter, "20")
    assert form.restart.isChecked()
    click(form.run_whole)
    wait(lambda: form.progress.value() > 0)
    click(form.cancel)
    wait(form.run_whole.isEnabled)
    found["cancelled"] = form.message.text()
    click(form.restart)
    run(form, form.run_whole)
    layer = viewer.layers["1 cells"]
    found["after that"] = is_equal(layer, pixels[1], diameter=20, cellprob_threshold=1)
    viewer.dims.ndisplay = 3
    click(form.run_visible)
    found["in 3D"] = form.message.text()
    return found


def deep(viewer: Any, form: Any, folder: Path) -> dict[str, Any]:  # noqa: ARG001
    """A volume of thick planes, in three dimensions."""
    pixels = render_volume(label_volume((8, 40, 36), spacing=20.0, seed=4, anisotropy=2.0), seed=4, anisotropy=2.0)
    viewer.add_image(pixels, name="deep", scale=(2, 1, 1), axis_labels=("z", "y", "x"))
    viewer.reset_view()
    write(form.diameter, "20")
    form.volume.setFocus()
    QTest.keyClicks(form.volume, "3D")
    found: dict[str, Any] = {"fields": [form.volume.currentText(), form.match.isVisible(), form.stitch.isVisible()]}
    run(form, form.run_whole)
    how: dict[str, Any] = {"axes": "zyx", "do_3d": True, "anisotropy": 2.0, "diameter": 20}
    return {**found, **seen(viewer, form), "equal": is_equal(viewer.layers["deep cells"], pixels, **how)}


def places() -> dict[str, Any]:
    """Where labels of a part go, of layers that are not simply scaled."""
    pixels = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    turned = Image(pixels[0, 0], rotate=30, scale=(2, 3), translate=(7, 8), shear=[0.2])
    part = Labels(np.ones((2, 2), int), **placement(turned, "yx", "yx", {"y": 1, "x": 2}))
    corners = [[0, 0], [1, 1], [1, 0]]
    at = [[list(part.data_to_world(c)), list(turned.data_to_world(np.add(c, (1, 2))))] for c in corners]
    numpy_labels, axes = fitted(pixels[:, 0], "zcyx", 3)
    lazy_labels, _ = fitted(dask.array.from_array(pixels[:, 0]), "zcyx", 3)
    first, first_axes = fitted(pixels[0], "czyx", 2)
    return {
        "turned": np.array(at).tolist(),
        "spread": [
            axes,
            bool((numpy_labels == pixels[:, :1]).all()),
            bool((lazy_labels == numpy_labels).all().compute()),
        ],
        "channel first": [first_axes, bool((first == pixels[0]).all())],
    }


def refusals() -> list[str]:
    """What is refused before anything runs."""
    viewer = ViewerModel()
    image = viewer.add_image(np.zeros((4, 8, 8)), name="image")
    colours = viewer.add_image(np.zeros((8, 8, 3), np.uint8), name="colours", rgb=True)
    shapes = viewer.add_shapes(name="shapes")
    pixels = dask.array.zeros((2**15, 2**15), chunks=2**12)
    # Of a pyramid napari reads the level that it shows.
    large = viewer.add_image([pixels, pixels[::64, ::64]], name="large", multiscale=True, contrast_limits=(0, 1))
    messages = []
    for refused in (
        lambda: open_target(image, "zy"),
        lambda: open_target(colours, "cy"),
        lambda: region_of(open_target(image, "zyx"), THIS_PLANE, {"z": 4}, None),
        lambda: region_of(open_target(large), THIS_PLANE, {}, {"y": (0, 2**15), "x": (0, 2**15)}),
        lambda: diameter_of_shapes_layer(shapes, image),
        lambda: estimated(lambda *_: None, open_target(viewer.add_image(np.zeros((64, 64)))), {}),
    ):
        try:
            refused()
        except TiledsegError as error:
            messages.append(str(error))
    return messages


def settings_of_volume() -> list[Any]:
    """What 3D is run with."""
    layer = Image(np.zeros((4, 8, 8)), scale=(3, 2, 2), axis_labels=("z", "y", "x"))
    choices = Choices(
        model="cyto3",
        channel=GREY,
        nuclear_channel=1,
        diameter=0,
        volume=IN_3D,
        stitch_threshold=0.3,
        resample=False,
        flow_threshold=0.7,
        cellprob_threshold=1,
        min_size=5,
    )
    target = open_target(layer)
    flat = dataclasses.replace(choices, volume=THIS_PLANE, channel=None, nuclear_channel=None).settings(target)
    return [choices.settings(target), flat, region_of(target, THIS_PLANE, {"z": 2}, {"y": (1, 5), "x": (0, 8)})]


def main(folder: Path) -> dict[str, Any]:
    """Go through all of it, each part in a window of its own."""
    plugins = PluginManager.instance()
    if "tiledseg" not in plugins:
        plugins.register(PluginManifest.from_file(MANIFEST))
    plugins.get_manifest("tiledseg").validate_imports()
    parts = {"plane": plane, "volume": volume, "stored": stored, "deep": deep}
    found = {"places": places(), "refusals": refusals(), "settings": settings_of_volume()}
    for name, part in parts.items():
        viewer = napari.Viewer()
        viewer.window.resize(1500, 1000)
        _, form = viewer.window.add_plugin_dock_widget("tiledseg", "Segment cells")
        wait(form.isVisible)
        try:
            found[name] = part(viewer, form, folder)
        finally:
            viewer.close()
    return found


if __name__ == "__main__":
    faulthandler.enable()
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))) + "\n")
