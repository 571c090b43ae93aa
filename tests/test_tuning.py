"""A tuner shows what a run gives in a region, bit for bit, and what other thresholds change there."""

from __future__ import annotations

import gc
import shutil

import numpy as np
import pytest

import tiledseg
from tiledseg.canvas import Picture
from tiledseg.changes import COLOURS, changes_between, draw_changes
from tiledseg.errors import ImageError, SettingsError

REGION, TEXT = np.s_[200:500, 150:450], "y=200:500,x=150:450"
OTHER = {"flow_threshold": 0.1, "cellprob_threshold": 1.0, "min_size": 200}


@pytest.fixture(scope="module")
def result(slide):
    return tiledseg.segment(slide[0], block=256, diameter=24)


@pytest.fixture(scope="module")
def tuner(result):
    return tiledseg.tune(result, TEXT)


def renumbered(labels):
    """Labels of a region 1..n in raster order of first pixels."""
    ids, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(first[ids > 0])
    numbers = np.zeros(ids.size, np.uint32)
    numbers[np.flatnonzero(ids > 0)[order]] = np.arange(1, order.size + 1)
    return numbers[inverse].reshape(labels.shape)


def test_it_begins_with_what_the_run_gave(result, tuner):
    """Up to the edge of the region: what lies around it is seen as well."""
    np.testing.assert_array_equal(tuner.shown.labels, renumbered(result.labels.compute()[REGION]))
    assert tuner.shown.n_objects == tuner.shown.n_before > 50
    assert (tuner.shown.n_gained, tuner.shown.n_lost, tuner.shown.n_changed) == (0, 0, 0)


@pytest.mark.parametrize(
    "change", [OTHER, {"resample": False}, {"niter": 20}, {"max_size": 400}, {"flow_threshold": 0}]
)
def test_its_settings_give_the_same_in_a_run(slide, tuner, change):
    tuned = tuner(**change)
    assert tuned.settings == {"block": 256, "diameter": 24, **change}
    run = tiledseg.segment(slide[0], **tuner.settings)
    np.testing.assert_array_equal(tuned.labels, renumbered(run.labels.compute()[REGION]))


def test_of_an_image_it_shows_what_a_run_of_the_whole_gives(slide, tmp_path):
    """Though it asks the network for the region alone."""
    from tiledseg.omezarr import write_image

    path = tmp_path / "a.ome.zarr"
    write_image(path, slide[0][:300, :300], axes="yx")
    seen = []
    tuner = tiledseg.tune(path, "y=0:128,x=0:128", diameter=24, progress=lambda *what: seen.append(what))
    flows = [what for what in seen if what[0] == "flows"]
    run = tiledseg.segment(path, diameter=24, cellprob_threshold=0.5)
    assert flows[-1][1] == flows[-1][2] <= run.report.n_tiles
    tuned = tuner(cellprob_threshold=0.5)
    np.testing.assert_array_equal(tuned.labels, renumbered(run.labels.compute()[:128, :128]))
    assert tuner.settings == {"diameter": 24, "cellprob_threshold": 0.5}
    assert sorted(child.name for child in tmp_path.iterdir()) == ["a.ome.zarr", "a.ome.zarr.cells.tiledseg"]


def test_what_it_needed_of_the_disk_goes_with_it(slide, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tuner = tiledseg.tune(slide[0][:128, :128], "y=0:64,x=0:64", diameter=24)
    assert len(list(tmp_path.iterdir())) == 1
    del tuner
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ImageError):
        tiledseg.tune(slide[0][:128, :128], "y=0:640", diameter=24)
    assert list(tmp_path.iterdir()) == []


def test_changes_are_counted_and_drawn(tuner):
    tuned = tuner(min_size=400)
    sizes = np.bincount(tuner().labels.ravel())[1:]
    assert tuned.n_lost == tuned.n_before - tuned.n_objects > 0
    assert tuned.n_gained == 0
    assert tuned.n_lost <= (sizes < 400).sum()
    assert (tuned.picture.pixels == COLOURS["lost"]).all(axis=-1).any()
    assert not (tuned.picture.pixels == COLOURS["gained"]).all(axis=-1).any()
    assert repr(tuned) == (
        f"<Tuned: {tuned.n_objects:,} objects, 0 gained, {tuned.n_lost:,} lost, {tuned.n_changed:,} changed in shape>"
    )
    assert isinstance(tuned.picture, Picture)
    assert f"lost {tuned.n_lost:,} (orange)" in tuned._repr_html_()


def test_gained_lost_changed_and_unchanged_have_a_colour_each():
    before, now = np.zeros((2, 20, 40), np.uint32)
    before[2:8, 2:8] = now[2:8, 2:8] = 1
    before[2:8, 12:18] = 2
    now[2:8, 22:28] = 2
    before[2:8, 31:35] = 3
    now[2:8, 31:38] = 3
    changes = changes_between(before, now)
    assert changes.counts == {"gained": 1, "lost": 1, "changed": 1}
    picture = np.zeros((20, 40, 3), np.uint8)
    draw_changes(picture, before, now, changes)
    for column, colour in (
        (2, (220, 220, 220)),
        (12, COLOURS["lost"]),
        (22, COLOURS["gained"]),
        (31, COLOURS["changed"]),
    ):
        assert picture[2, column].tolist() == list(colour)
    assert changes_between(before, np.zeros_like(now)).counts == {"gained": 0, "lost": 3, "changed": 0}


def test_volumes_are_tuned_in_three_dimensions(tmp_path):
    from scipy.ndimage import gaussian_filter

    from tiledseg.volumes import label_volume

    truth = label_volume((20, 44, 44), 26.0, seed=2)
    pixels = (gaussian_filter((truth > 0) * 1.0, 1) * 900 + 50).astype(np.uint16)
    output = tmp_path / "out.ome.zarr"
    run = tiledseg.segment(pixels, output, axes="zyx", do_3d=True, diameter=34, anisotropy=1)
    labels = run.labels.compute()  # the second run puts its own in their place
    tuner = tiledseg.tune(run, "z=4:16,y=5:40,x=5:40")
    np.testing.assert_array_equal(tuner.shown.labels, renumbered(labels[4:16, 5:40, 5:40]))
    assert "flow_threshold" not in tuner.tunable
    assert "flow3d_smooth" in tuner.tunable
    assert "z 4:16, y 5:40" in tuner.shown.picture.caption
    changed = tuner(cellprob_threshold=1.5)
    again = tiledseg.segment(pixels, output, axes="zyx", **tuner.settings)
    np.testing.assert_array_equal(changed.labels, renumbered(again.labels.compute()[4:16, 5:40, 5:40]))


def test_planes_that_are_stitched_are_tuned_one_by_one(slide):
    stack = np.stack([slide[0][:160, :160]] * 3)
    run = tiledseg.segment(stack, axes="zyx", stitch_threshold=0.25, diameter=24)
    tuner = tiledseg.tune(run, "z=1,y=0:100,x=0:100")
    assert tuner.shown.labels.shape == (1, 100, 100)
    np.testing.assert_array_equal(tuner.shown.labels > 0, run.labels.compute()[1:2, :100, :100] > 0)
    with pytest.raises(SettingsError, match="min_size cannot be tuned on this region, only flow_threshold"):
        tuner(min_size=9)
    with pytest.raises(SettingsError, match="has 3 positions along z; say which to show"):
        tiledseg.tune(run, "y=0:100")


def test_time_series_and_a_region_of_its_own_choice(slide):
    series = np.stack([slide[0][:160, :160]] * 3)
    run = tiledseg.segment(series, axes="tyx", diameter=24)
    tuner = tiledseg.tune(run)
    assert [(part.start, part.stop) for part in tuner.region] == [(1, 2), (0, 160), (0, 160)]
    np.testing.assert_array_equal(tuner.shown.labels[0], renumbered(run.labels.compute()[1]))


def test_sizes_of_a_coarse_level_are_in_pixels_of_the_full_size(slide, tmp_path):
    import zarr

    from tiledseg.omezarr import write_image

    path = tmp_path / "a.ome.zarr"
    write_image(path, slide[0].repeat(2, axis=0).repeat(2, axis=1)[:600, :600], axes="yx", spacing_um=(1.0, 1.0))
    group = zarr.open_group(path, mode="r+")
    group.create_array("half", data=slide[0][:300, :300], chunks=(256, 256))
    ome = dict(group.attrs["ome"])
    levels = ome["multiscales"][0]["datasets"][:1]
    half = {"path": "half", "coordinateTransformations": [{"type": "scale", "scale": [2.0, 2.0]}]}
    ome["multiscales"][0]["datasets"] = [*levels, half]
    group.attrs["ome"] = ome
    run = tiledseg.segment(path, level=1, diameter=48, min_size=1200)
    tuner = tiledseg.tune(run, "y=50:250,x=50:250")
    sizes = np.bincount(tuner(min_size=1600).labels.ravel())[1:]
    assert tuner.shown.n_lost > 0
    again = tiledseg.segment(path, level=1, diameter=48, min_size=1600)
    np.testing.assert_array_equal(tuner.shown.labels, renumbered(again.labels.compute()[50:250, 50:250]))
    assert sizes.max() > 400


def test_what_cannot_be_tuned_is_said(result, tuner, slide, tmp_path):
    with pytest.raises(
        SettingsError, match=r"model cannot be tuned on this region, only flow_threshold, .*to tune\(\)"
    ):
        tuner(model="cyto3")
    with pytest.raises(SettingsError, match="flow_threshold must be"):
        tuner(flow_threshold=-1)
    with pytest.raises(SettingsError, match="min_size: a result has its own settings"):
        tiledseg.tune(result, TEXT, min_size=3)
    with pytest.raises(ImageError, match="has no region y=0:900"):
        tiledseg.tune(result, "y=0:900")

    def bright(pixels):
        return (pixels > 900).astype(np.uint32)

    found = tiledseg.segment(slide[0][:64, :64], segmenter=bright, halo=8)
    with pytest.raises(SettingsError, match=r"labels by the function .*bright have no flows to tune; call it instead"):
        tiledseg.tune(found)
    kept = tiledseg.segment(slide[0][:128, :128], tmp_path / "out.ome.zarr", diameter=24)
    shutil.rmtree(kept.report.scratch)
    with pytest.raises(SettingsError, match=r"the scratch of this result .* is gone or of another run; give the image"):
        tiledseg.tune(kept)


def test_a_region_that_is_too_large_to_tune_is_refused(tmp_path):
    import zarr

    zarr.create_array(tmp_path / "a.zarr", shape=(5000, 5000), chunks=(512, 512), dtype="uint16", fill_value=0)
    with pytest.raises(ImageError, match=r"a region of 25,000,000 pixels is too large to see changes at once"):
        tiledseg.tune(tmp_path / "a.zarr", "y=0:5000", axes="yx", diameter=20)
