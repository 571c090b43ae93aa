"""What Jupyter shows: of results, images, plans and diameters; of progress, in a real kernel."""

from __future__ import annotations

import base64
import io
import re

import nbformat
import numpy as np
import pytest
import tifffile
import zarr
from nbclient import NotebookClient
from PIL import Image

import tiledseg
from tiledseg.errors import SettingsError
from tiledseg.omezarr import write_image

NAME = "a<script>alert(1)</script>&b.ome.zarr"


@pytest.fixture(scope="module")
def result(slide, tmp_path_factory):
    """A run on the disk, of a file with a name that is no good HTML."""
    path = tmp_path_factory.mktemp("result") / NAME
    write_image(path, slide[0], axes="yx", spacing_um=(0.5, 0.5))
    return tiledseg.segment(path, diameter=24, block=256)


def pictures(page):
    """The pictures within a page."""
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")) for one in found]


def words(page):
    """A page without its pictures."""
    return re.sub(r"data:image/[^\"]+", "", page)


def is_coloured(picture):
    return (np.ptp(picture.astype(int), axis=-1) > 60).any()


def test_a_result_shows_outlines_figures_and_sizes(result):
    page = result._repr_html_()
    overview, histogram = pictures(page)
    assert is_coloured(overview)
    assert overview.shape[0] / overview.shape[1] == pytest.approx(700 / 610, rel=0.01)
    assert histogram.shape == (540, 900, 3)
    text = words(page)
    assert f"{result.report.n_objects:,}" in text
    assert "24.0 px" in text
    assert "tiledseg-nuclei" in text
    assert repr(result) == (
        f"<Segmentation of {result.image.name}: {result.report.n_objects:,} objects, labels at {result.path}>"
    )


def test_what_files_say_is_escaped(result):
    for shown in (result, result.image, tiledseg.preview(str(result.image.name), name="other")):
        text = words(shown._repr_html_())
        assert "<script" not in text
        assert "&lt;script&gt;" in text


def test_names_of_channels_are_escaped(tmp_path):
    path = tmp_path / "a.ome.tif"
    names = ["<img src=x onerror=alert(1)>", "b"]
    metadata = {"axes": "CYX", "Channel": {"Name": names}}
    tifffile.imwrite(path, np.zeros((2, 40, 50), np.uint16), metadata=metadata)
    text = words(tiledseg.open_image(path)._repr_html_())
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text


def test_places_are_told_from_the_present_folder(result, monkeypatch):
    monkeypatch.chdir(result.path.parents[2])
    assert str(result.path.parents[2]) not in words(result._repr_html_()).replace(
        str(result.image.name).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"), ""
    )


def test_a_result_without_its_files_still_shows_its_figures(slide, tmp_path):
    import shutil

    result = tiledseg.segment(slide[0][:256, :256], tmp_path / "out.ome.zarr", diameter=24)
    shutil.rmtree(tmp_path / "out.ome.zarr")
    page = result._repr_html_()
    (picture,) = pictures(page)
    assert not is_coloured(picture)
    assert f'<b style="font-size:1.35em">{result.report.n_objects:,}</b>' in page
    assert "; no outlines: " in page


def test_a_result_in_memory_and_one_without_objects(slide):
    found = tiledseg.segment(slide[0][:200, :200], diameter=24)
    assert len(pictures(found._repr_html_())) == 2
    assert repr(found).endswith("objects, labels in memory>")
    nothing = tiledseg.segment(np.zeros((64, 64), np.uint16), diameter=24)
    assert len(pictures(nothing._repr_html_())) == 1


def test_volumes_series_and_many_channels():
    rng = np.random.default_rng(0)
    for axes, shape in (
        ("zyx", (9, 40, 50)),
        ("tcyx", (3, 2, 40, 50)),
        ("cyx", (40, 40, 50)),
        ("tczyx", (2, 3, 4, 40, 50)),
    ):
        page = tiledseg.open_image(rng.integers(0, 900, shape, np.uint16), axes=axes)._repr_html_()
        (picture,) = pictures(page)
        assert picture.shape[:2] == (40 * 8, 50 * 8), axes
        assert axes in page
    assert "and 28 more" in tiledseg.open_image(np.zeros((40, 40, 50), np.uint8), axes="cyx")._repr_html_()


def test_a_volume_shows_balls():
    blob = np.zeros((12, 40, 40), np.uint16)
    blob[3:9, 10:28, 10:28] = 900

    def bright(pixels):
        return (pixels > 500).astype(np.uint32)

    found = tiledseg.segment(blob, axes="zyx", do_3d=True, segmenter=bright, halo=4)
    page = found._repr_html_()
    assert "as balls of the same size" in page
    sizes, n = found.object_sizes(10)
    assert n == 1
    assert sizes == pytest.approx([(6 * 6 * 18 * 18 / np.pi) ** (1 / 3)])


def test_of_a_huge_image_few_chunks_are_read(tmp_path):
    """A million pixels a side: with a pyramid, and without, where the middle is shown."""
    side = 2**20
    group = zarr.open_group(tmp_path / "huge.zarr", mode="w", zarr_format=3)
    levels = [1, 1024]
    for i, factor in enumerate(levels):
        group.create_array(str(i), shape=(side // factor,) * 2, chunks=(512, 512), dtype="uint16")
    group["1"][:] = np.arange(1024 * 1024).reshape(1024, 1024) % 999
    scale = [
        {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": [f, f]}]}
        for i, f in enumerate(levels)
    ]
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": scale}]}
    image = tiledseg.open_image(tmp_path / "huge.zarr")
    (picture,) = pictures(image._repr_html_())
    assert picture.shape == (342, 342, 3)
    assert picture.max() > 200
    bare = tiledseg.open_image(tmp_path / "huge.zarr" / "0", axes="yx")
    page = bare._repr_html_()
    assert len(pictures(page)) == 1
    assert f"y {side // 2 - 512}:{side // 2 + 512}" in page


def test_an_image_with_chunks_that_are_too_large_says_so(tmp_path):
    zarr.create_array(tmp_path / "one.zarr", shape=(20_000, 20_000), chunks=(20_000, 20_000), dtype="uint16")
    page = tiledseg.open_image(tmp_path / "one.zarr", axes="yx")._repr_html_()
    assert pictures(page) == []
    assert "which is too much for a quick look; store the image in smaller ones." in page


def test_a_plan_shows_what_it_needs_and_why_it_is_refused(slide):
    plan = tiledseg.preview(slide[0], diameter=24, block=128)
    page = plan._repr_html_()
    assert "30</b>" in page
    assert "as given" in page
    assert repr(plan).startswith("<Plan for numpy array: 30 blocks, ")
    refused = tiledseg.pipeline.Plan({**plan, "refused": "too <large>"})
    assert "It would be refused:</b> too &lt;large&gt;" in refused._repr_html_()
    assert repr(refused) == "<Plan for numpy array: refused>"


def test_a_diameter_shows_its_spread(slide):
    found = tiledseg.estimate_diameter(slide[0][:400, :400])
    page = found._repr_html_()
    (histogram,) = pictures(page)
    assert histogram.shape == (540, 900, 3)
    assert f"{found.n_objects:,} objects in {found.n_windows:,} windows" in page
    assert np.median(found.sizes) == pytest.approx(found.value, rel=0.01)
    given = tiledseg.estimate_diameter(slide[0], diameter=30)
    assert pictures(given._repr_html_()) == []
    assert "as given" in given._repr_html_()
    assert set(given.as_dict()) == {"value", "source", "quartiles", "n_objects", "n_windows"}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What cells leave in a notebook that a real kernel has run."""
    folder = tmp_path_factory.mktemp("kernel")
    cells = [
        "import numpy as np, tiledseg, tiledseg.live\n"
        "from tiledseg.slides import synthetic_slide\n"
        "tiledseg.live.SHOW_AFTER_S = 0\n"
        "pixels, _ = synthetic_slide((300, 300), seed=3)\n"
        "result = tiledseg.segment(pixels, diameter=24, block=128)",
        "tiledseg.segment(pixels, diameter=24, progress=False).report.n_objects",
        "result",
        "tiledseg.show(result, 'y=0:100,x=0:100')",
        "def broken(pixels):\n"
        "    raise ValueError('no')\n"
        "try:\n"
        "    tiledseg.segment(pixels, segmenter=broken, halo=8)\n"
        "except tiledseg.errors.TiledsegError as error:\n"
        "    pass",
        "tuner = tiledseg.tune(result, 'y=50:250,x=50:250', progress=False)\ntuner",
        "tuner.widget.knobs['min_size'].value = 400\n"
        "(tuner.shown.n_objects, tuner.shown.settings, tuner.widget.children[-2].value.count('lost'))",
        "tuner.widget.knobs['niter'].value = 0\n"
        "tuner.widget.knobs['max_size'].value = 10\n"
        "tuner.widget.children[-2].value",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell.outputs for cell in notebook.cells]


def test_progress_is_kept_as_a_line_of_text(outputs):
    """One output, updated in place: what a notebook keeps is the end of it."""
    (shown,) = [output for output in outputs[0] if output.output_type == "display_data"]
    assert re.fullmatch(
        r"done in [\d.]+ s: survey 1, flows \d+, masks 9, stitch 10, publish \d+", shown.data["text/plain"]
    )
    assert shown.data["text/html"] == f"<div>{shown.data['text/plain']}</div>"


def test_progress_can_be_left_out(outputs):
    assert [output.output_type for output in outputs[1]] == ["execute_result"]


def test_a_result_shows_itself_in_a_kernel(outputs):
    (shown,) = outputs[2]
    assert "as circles of the same size" in shown.data["text/html"]
    assert shown.data["text/plain"].startswith("<Segmentation of numpy array: ")


def test_a_picture_shows_itself_in_a_kernel(outputs):
    (shown,) = outputs[3]
    kinds = {"image/png", "image/jpeg"} & set(shown.data)
    assert len(kinds) == 1
    picture = Image.open(io.BytesIO(base64.b64decode(shown.data[kinds.pop()])))
    assert picture.size == (400, 400)


def test_an_error_ends_progress_as_text(outputs):
    texts = [output.data["text/plain"] for output in outputs[4] if output.output_type == "display_data"]
    assert len(texts) == 1
    assert texts[0].startswith("stopped by an error after ")


def test_a_tuner_shows_sliders_and_without_them_a_picture(outputs):
    shown = outputs[5][-1].data
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert len(pictures(shown["text/html"])) == 1
    assert shown["text/plain"].startswith("<Tuner of 200 x 200 pixels of numpy array: ")


def test_a_slider_makes_the_masks_again(outputs):
    n_objects, settings, n_named = eval(outputs[6][-1].data["text/plain"])
    assert settings["min_size"] == 400
    assert n_named == 1
    assert 0 < n_objects < 60


def test_a_setting_that_is_refused_is_said_beside_the_sliders(outputs):
    assert "max_size 10 is below min_size 400" in outputs[7][-1].data["text/plain"]


def test_progress_elsewhere_is_quiet_unless_asked_for(slide, capfd):
    pixels = slide[0][:200, :200]
    tiledseg.segment(pixels, diameter=24)
    assert capfd.readouterr().err == ""
    tiledseg.segment(pixels, diameter=24, progress=True)
    assert "publish: 100%" in capfd.readouterr().err
    seen = []
    tiledseg.segment(pixels, diameter=24, progress=lambda *what: seen.append(what))
    assert seen[-1] == ("publish", 1, 1)


def test_sliders_without_ipywidgets_name_what_to_install(slide, monkeypatch):
    import importlib.util

    tuner = tiledseg.tune(slide[0][:128, :128], "y=0:64,x=0:64", diameter=24)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        SettingsError, match=r'sliders need ipywidgets; install them with: pip install -e "\.\[notebook\]"'
    ):
        _ = tuner.widget
