"""The diameter from shapes drawn in napari, ImageJ and QuPath, and the histogram of an estimate."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from roifile import ROI_TYPE, ImagejRoi, roiwrite

import tiledseg
from tiledseg.cli import main
from tiledseg.config import Settings
from tiledseg.errors import SettingsError
from tiledseg.shapes import diameter_of_layer, diameter_of_shapes

from .conftest import Slide

BOX = [(0.0, 0.0), (0.0, 20.0), (10.0, 20.0), (10.0, 0.0)]
"""20 x 10: as large as a circle of 14.14."""


def turned(corners: list[tuple[float, float]], angle: float) -> list[tuple[float, float]]:
    """Corners turned round the origin and moved."""
    c, s = math.cos(angle), math.sin(angle)
    return [(c * y - s * x + 100, s * y + c * x + 200) for y, x in corners]


def circle(radius: float, n: int = 90) -> list[tuple[float, float]]:
    return [
        (50 + radius * math.sin(2 * math.pi * i / n), 60 + radius * math.cos(2 * math.pi * i / n)) for i in range(n)
    ]


def napari_csv(path: Path, shapes: list[tuple[str, Any]]) -> Path:
    """As napari saves a shapes layer; vertices may have further axes in front."""
    n_axes = len(shapes[0][1][0]) if shapes else 2
    lines = [",".join(["index", "shape-type", "vertex-index", *(f"axis-{i}" for i in range(n_axes))])]
    for index, (kind, vertices) in enumerate(shapes):
        lines += [f"{index}.0,{kind},{i}.0,{','.join(str(v) for v in at)}" for i, at in enumerate(vertices)]
    path.write_text("\n".join(lines) + "\n")
    return path


def geojson(path: Path, geometries: list[dict[str, Any]], collected: bool = True) -> Path:
    """As QuPath exports annotations."""
    features = [{"type": "Feature", "properties": {"objectType": "annotation"}, "geometry": g} for g in geometries]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features} if collected else features))
    return path


def polygon(corners: list[tuple[float, float]]) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": [[[x, y] for y, x in [*corners, corners[0]]]]}


@pytest.mark.parametrize("angle", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["rectangle", "ellipse"])
def test_boxes_of_napari(tmp_path: Path, kind: str, angle: float) -> None:
    found = diameter_of_shapes(napari_csv(tmp_path / "shapes.csv", [(kind, turned(BOX, angle))]))
    assert found == (pytest.approx(math.sqrt(200)), 1)


def test_shapes_of_napari_are_averaged_and_may_lie_in_a_volume(tmp_path: Path) -> None:
    shapes = [("ellipse", [(7.0, *at) for at in BOX]), ("polygon", [(7.0, *at) for at in circle(20.0)])]
    found = diameter_of_shapes(napari_csv(tmp_path / "shapes.csv", shapes))
    assert found == (pytest.approx((math.sqrt(200) + 40) / 2, rel=1e-3), 2)
    line = napari_csv(tmp_path / "line.csv", [("line", [(0.0, 0.0), (3.0, 4.0)])])
    assert diameter_of_shapes(line) == (5.0, 1)


@pytest.mark.parametrize("collected", [True, False])
def test_shapes_of_qupath(tmp_path: Path, collected: bool) -> None:
    shapes = [polygon(turned(BOX, 0.3)), polygon(circle(15.0))]
    found = diameter_of_shapes(geojson(tmp_path / "cells.geojson", shapes, collected))
    assert found == (pytest.approx((math.sqrt(200) + 30) / 2, rel=1e-3), 2)


def test_shapes_of_imagej(tmp_path: Path) -> None:
    oval = ImagejRoi(roitype=ROI_TYPE.OVAL, left=5, right=25, top=10, bottom=30)
    box = ImagejRoi(roitype=ROI_TYPE.RECT, left=5, right=45, top=10, bottom=20)
    drawn = ImagejRoi.frompoints(np.array(circle(30.0)))
    drawn.roitype = ROI_TYPE.FREEHAND
    drawn.name = "drawn"
    oval.tofile(tmp_path / "one.roi")
    assert diameter_of_shapes(tmp_path / "one.roi") == (20.0, 1)
    roiwrite(tmp_path / "all.zip", [oval, box, drawn], name=["a", "b", "c"])
    assert diameter_of_shapes(tmp_path / "all.zip") == (pytest.approx((20 + 20 + 60) / 3, rel=1e-2), 3)


@dataclass
class Layer:
    """What of a napari Shapes layer counts; napari itself needs a display."""

    name: str
    data: list[Any]
    shape_type: Any


@pytest.mark.parametrize("kinds", [["ellipse", "ellipse"], "ellipse"])
def test_a_layer_of_napari(kinds: Any) -> None:
    layer = Layer("cells", [np.array(BOX), np.array(BOX) * 2], kinds)
    assert diameter_of_layer(layer) == (pytest.approx(1.5 * math.sqrt(200)), 2)
    assert Settings.of(diameter=layer).survey.diameter == round(1.5 * math.sqrt(200), 2)


def test_no_shapes_are_refused(tmp_path: Path) -> None:
    for path in (
        napari_csv(tmp_path / "none.csv", []),
        geojson(tmp_path / "none.geojson", []),
    ):
        with pytest.raises(SettingsError, match="holds no shapes; draw circles or boxes round some cells"):
            diameter_of_shapes(path)
    with pytest.raises(SettingsError, match="layer 'empty' holds no shapes"):
        diameter_of_layer(Layer("empty", [], []))


def test_shapes_without_a_size_are_refused(tmp_path: Path) -> None:
    flat = [(5.0, 5.0), (5.0, 9.0), (5.0, 9.0), (5.0, 5.0)]
    with pytest.raises(SettingsError, match=r"shape 2 of 2 of .* has no size"):
        diameter_of_shapes(napari_csv(tmp_path / "flat.csv", [("ellipse", BOX), ("rectangle", flat)]))
    with pytest.raises(SettingsError, match=r"shape 1 of 1 of .* has no size"):
        diameter_of_shapes(geojson(tmp_path / "flat.geojson", [polygon([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)])]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("shapes.txt", "", "is no file of shapes"),
        ("shapes.csv", "a,b\n1,2\n", "as napari saves shapes"),
        ("shapes.csv", "index,shape-type,vertex-index,axis-0,axis-1\n0,blob,0,1,1\n", "kind 'blob'"),
        ("shapes.csv", "index,shape-type,vertex-index,axis-0,axis-1\n0,ellipse,0,x,1\n", "cannot be read"),
        ("shapes.geojson", "{", "cannot be read"),
        ("shapes.geojson", '{"type": "Feature"}', "cannot be read"),
        ("shapes.geojson", "[" * 100_000, "cannot be read"),
        ("shapes.geojson", '[{"geometry": {"type": "Point", "coordinates": [1, 2]}}]', "kind 'Point'"),
        ("shapes.roi", "Iout", "cannot be read"),
        ("shapes.zip", "PK", "cannot be read"),
    ],
)
def test_files_that_are_no_shapes_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError, match=message):
        diameter_of_shapes(tmp_path / name)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no file"):
        diameter_of_shapes(tmp_path / "shapes.csv")


@given(st.binary(max_size=200), st.sampled_from([".csv", ".roi", ".zip", ".geojson"]))
def test_any_bytes_give_one_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"shapes{suffix}"
    path.write_bytes((b"Iout" if suffix == ".roi" else b"") + content)
    with pytest.raises(SettingsError):
        diameter_of_shapes(path)


def test_a_run_with_shapes_is_one_with_their_diameter(
    slide: Slide, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = napari_csv(tmp_path / "cells.csv", [("ellipse", np.array(BOX) * 2), ("ellipse", np.array(BOX) * 1.5)])
    caplog.set_level(logging.INFO, "tiledseg")
    found = tiledseg.segment(slide[0][:200, :200], diameter=f"shapes:{drawn}")
    assert found.report.diameter is not None
    assert found.report.diameter.value == pytest.approx(1.75 * math.sqrt(200), abs=0.01)
    assert f"the mean of 2 shapes in {drawn}" in caplog.text


def test_a_histogram_shows_what_an_estimate_rests_on(slide: Slide, tmp_path: Path) -> None:
    plain = tiledseg.estimate_diameter(slide[0], picture=tmp_path / "sizes.png")
    with Image.open(tmp_path / "sizes.png") as picture:
        pixels = np.asarray(picture)
    assert plain.source == "estimated"
    bars = (pixels == (66, 113, 174)).all(axis=2)
    # Nuclei of 24 px, give or take a fifth: bars in the middle of the axis, none at its beginning.
    columns = np.flatnonzero(bars.any(axis=0))
    assert bars.sum() > 1000
    assert columns.min() > 200
    with pytest.raises(SettingsError, match="no histogram to draw"):
        tiledseg.estimate_diameter(slide[0], diameter=20, picture=tmp_path / "none.png")


def test_the_command_writes_the_histogram(slide: Slide, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiledseg.omezarr import write_image

    write_image(tmp_path / "slide.ome.zarr", slide[0][:300, :300], axes="yx")
    command = ["diameter", str(tmp_path / "slide.ome.zarr"), "--picture", str(tmp_path / "sizes.png")]
    assert main(command) == 0
    assert "objects in" in capsys.readouterr().out
    with Image.open(tmp_path / "sizes.png") as picture:
        assert picture.format == "PNG"
    assert main([*command[:3], str(tmp_path / "no" / "sizes.png")]) == 2
    assert "cannot write picture" in capsys.readouterr().err
