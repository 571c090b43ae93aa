"""The form in napari: a real window on a virtual screen, driven by clicks and keys in a process of its own.

The process is tests/napari_form.py; it prints what it saw, which the tests look at.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "tiledseg" / "napari" / "napari.yaml"
SCREEN = "-screen 0 1600x1100x24"

Seen = dict[str, Any]

has_napari = importlib.util.find_spec("napari") is not None


def needs_napari(test: Callable[[Seen], None]) -> Callable[[Seen], None]:
    """Of a test that looks at what was seen in the window, which takes most of a minute."""
    return pytest.mark.slow(pytest.mark.skipif(not has_napari, reason="napari is not installed")(test))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What was seen in the window."""
    if shutil.which("xvfb-run") is None:
        pytest.skip("there is no xvfb-run, and so no screen")
    folder = tmp_path_factory.mktemp("napari")
    command = ["xvfb-run", "-a", "-s", SCREEN, sys.executable, str(ROOT / "tests" / "napari_form.py"), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: Seen = json.loads(ended.stdout.splitlines()[-1])
    return found


@needs_napari
def test_without_an_image_it_says_what_to_do(seen: Seen) -> None:
    assert seen["plane"]["nothing"] == "there is no image; open one in napari, then choose it here."


@needs_napari
def test_whole_image_in_its_place(seen: Seen) -> None:
    whole = seen["plane"]["whole"]
    assert whole["equal"]
    assert whole["labels"] == ["slide cells"]
    assert (whole["scale"], whole["translate"]) == ([[0.5, 0.5]], [[10.0, 20.0]])
    assert whole["units"] == [["micrometer", "micrometer"]]
    assert whole["message"].endswith(" cells, diameter 24.0 px (given)")


@needs_napari
def test_visible_region_replaces_the_labels_in_its_place(seen: Seen) -> None:
    part = seen["plane"]["visible"]
    assert part["equal"]
    assert part["labels"] == ["slide cells"]
    assert part["shape"][0] < [200, 200], "it was not zoomed in"
    assert part["units"] == [["micrometer", "micrometer"]]
    # The extent of the canvas as napari has it, in whole pixels.
    start, stop = np.array(part["start"]), np.add(part["start"], part["shape"][0])
    assert np.abs(np.array([start, stop]) - part["napari"]).max() <= 1


@needs_napari
def test_diameter_from_the_image_and_from_shapes(seen: Seen) -> None:
    shown, estimated = seen["plane"]["from image"]
    assert shown == round(estimated, 2)
    # Circles of 12 and 10 world units, which are 24 and 20 pixels of the image.
    assert seen["plane"]["from shapes"] == [22.0, "diameter 22 px"]


@needs_napari
def test_the_window_lives_while_work_is_done(seen: Seen) -> None:
    assert seen["plane"]["turns"] > 5


@needs_napari
def test_cancel_leaves_what_was_there(seen: Seen) -> None:
    assert seen["plane"]["cancel was possible"]
    cancelled, before = seen["plane"]["cancelled"], seen["plane"]["visible"]
    assert cancelled["message"] == "cancelled"
    assert cancelled["shape"] == before["shape"]


@needs_napari
def test_errors_are_sentences(seen: Seen) -> None:
    plane, stored = seen["plane"], seen["stored"]
    assert plane["refused"].startswith("unknown model 'no-such-model'; known are tiledseg-nuclei,")
    assert plane["outside"] == (
        "layer 'slide' lies outside of what is visible; move the view over it, or run on the whole image."
    )
    assert stored["in 3D"] == (
        "in the view in 3D there is no visible region; switch napari to 2D, or run on the whole image."
    )


@needs_napari
def test_volume_over_time_asks_for_its_axes(seen: Seen) -> None:
    volume = seen["volume"]
    assert volume["asks"]
    assert volume["unnamed"] == (
        "layer 'movie' has 4 axes without names; name them in the field Axes, e.g. zyx or cyx."
    )
    assert volume["fields"] == ["planes, joined", True, True]
    assert volume["joined"]["equal"]
    assert volume["joined"]["scale"] == [[1.0, 2.0, 1.0, 1.0]]


@needs_napari
def test_single_plane_of_a_volume_lies_at_its_time_and_depth(seen: Seen) -> None:
    plane = seen["volume"]["plane"]
    assert plane["equal"]
    assert plane["labels"] == ["movie cells"]
    assert plane["shape"] == [[1, 1, 80, 72]]
    assert plane["translate"] == [[1.0, 2.0, 0.0, 0.0]]


@needs_napari
def test_image_on_disk_is_segmented_beside_it(seen: Seen) -> None:
    stored = seen["stored"]
    assert stored["output"].endswith("/two-cells.ome.zarr")
    assert stored["channel"] == "1", "the channel that the layer shows"
    whole = stored["whole"]
    assert whole["equal"]
    assert (whole["labels"], whole["scale"]) == (["1 cells"], [[0.5, 0.5]])
    assert whole["message"].endswith("/two-cells.ome.zarr/labels/cells")


@needs_napari
def test_other_settings_in_the_same_place_need_a_restart(seen: Seen) -> None:
    stored = seen["stored"]
    assert "holds a run with other settings: diameter was 24.0 and is now 30.0" in stored["other settings"]
    assert stored["again"]["equal"]
    assert stored["again"]["labels"] == ["1 cells"]


@needs_napari
def test_a_run_that_was_cancelled_midway_goes_on(seen: Seen) -> None:
    assert seen["stored"]["cancelled"] == "cancelled"
    assert seen["stored"]["after that"]


@needs_napari
def test_cells_of_a_volume_in_three_dimensions(seen: Seen) -> None:
    deep = seen["deep"]
    assert deep["fields"] == ["3D", False, False]
    assert deep["equal"]
    assert (deep["labels"], deep["scale"], deep["shape"]) == (["deep cells"], [[2.0, 1.0, 1.0]], [[8, 40, 36]])


@needs_napari
def test_labels_of_a_turned_layer_lie_on_it(seen: Seen) -> None:
    for labels, image in seen["places"]["turned"]:
        assert labels == pytest.approx(image)


@needs_napari
def test_labels_are_the_same_in_all_channels(seen: Seen) -> None:
    assert seen["places"]["spread"] == ["zcyx", True, True]
    assert seen["places"]["channel first"] == ["zyx", True]


@needs_napari
def test_what_is_refused_before_a_run(seen: Seen) -> None:
    axes, colours, slider, large, shapes, nothing = seen["refusals"]
    assert axes == "layer 'image' has 3 dimensions but axes 'zy'; give one letter per dimension."
    assert colours == "layer 'colours' has axes 'cy'; an image needs y and x."
    assert slider == "napari shows z=4, and the image has 4 along z; move the slider."
    assert large == (
        "what is visible has 1074 million pixels, too many to keep its labels in memory; zoom in, or run on the "
        "whole image."
    )
    assert shapes == "layer 'shapes' holds no shapes; draw circles or boxes round some cells."
    assert nothing == "no cells were found to estimate a diameter from; give one, or draw shapes round some."


@needs_napari
def test_settings_of_a_volume(seen: Seen) -> None:
    in_3d, flat, region = seen["settings"]
    assert in_3d == {
        "model": "cyto3",
        "channel": "grey",
        "nuclear_channel": 1,
        "diameter": "auto",
        "resample": False,
        "cellprob_threshold": 1,
        "min_size": 5,
        "do_3d": True,
        "anisotropy": 1.5,
    }
    assert (flat["flow_threshold"], "channel" in flat, "do_3d" in flat) == (0.7, False, False)
    assert region == {"y": [1, 5], "x": [0, 8], "z": [2, 3]}


def test_manifest_is_shipped_and_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["napari.manifest"] == {"tiledseg": "tiledseg.napari:napari.yaml"}
    assert "napari/napari.yaml" in project["tool"]["setuptools"]["package-data"]["tiledseg"]
    assert MANIFEST.is_file()
