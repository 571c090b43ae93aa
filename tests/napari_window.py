"""Shows results in a real window of napari, for tests/test_viewers.py: run it by xvfb-run, with a screen.

    python tests/napari_window.py JSON...

Each JSON names the ``out`` to show, the ``center`` of what is looked at (z, y, x in the world), the ``zoom`` in pixels
of the screen, the ``png`` to write, and maybe the plane ``z``, also in the world.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import napari
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QApplication

from tiledseg.viewing import open_scene
from tiledseg.viewing.napari_layers import add_scene, show


def wait(seconds: float) -> None:
    """Let the window draw."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.02)


def shoot(viewer: napari.Viewer, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Take a picture of what is looked at; says what layers there are."""
    viewer.camera.center, viewer.camera.zoom = case["center"], case["zoom"]
    if "z" in case:
        viewer.dims.set_point(0, case["z"])
    viewer.canvas.overlays.scale_bar.visible = False
    wait(1.0)
    viewer.screenshot(path=case["png"], canvas_only=True, flash=False)
    return [
        {
            "kind": type(layer).__name__,
            "name": layer.name,
            "visible": layer.visible,
            "units": [str(unit) for unit in layer.units],
            "level": int(layer.data_level) if layer.multiscale else 0,
            "lazy": type(layer.data[0] if layer.multiscale else layer.data).__module__,
        }
        for layer in viewer.layers
    ]


def main(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Open the first as the command does, the others in the same window."""
    found = []

    def look() -> None:
        viewer = napari.current_viewer()
        try:
            for number, case in enumerate(cases):
                if number:
                    viewer.layers.clear()
                    add_scene(viewer, open_scene(case["out"]))
                found.append(shoot(viewer, case))
        finally:
            viewer.close()

    napari.qt.get_qapp()
    QTimer.singleShot(1500, look)
    show(open_scene(cases[0]["out"]))
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main([json.loads(text) for text in sys.argv[1:]])) + "\n")
