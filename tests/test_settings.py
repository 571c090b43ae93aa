"""Settings do what their help says, on slides with known truth."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.measure import regionprops

import tiledseg
from tiledseg.config import Settings
from tiledseg.errors import SettingsError
from tiledseg.networks.models import find_model
from tiledseg.networks.runner import precision_of
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide

from .conftest import Slide

DIAMETER = 24.0


def labels_of(image: Any, **settings: Any) -> Any:
    """Labels at full size."""
    return tiledseg.segment(image, **{"diameter": DIAMETER, **settings}).labels.compute()


@pytest.fixture(scope="module")
def dim() -> Any:
    """A slide on which cells are hardly brighter than the noise, so that thresholds matter."""
    image, _ = synthetic_slide((300, 280), diameter=DIAMETER, seed=9)
    noise = np.random.default_rng(9).normal(0, 1.2 * image.std(), image.shape)
    return np.clip(image + noise, 0, 65535).astype(np.uint16)


def test_a_lower_cellprob_threshold_finds_more_and_larger_objects(dim: Any) -> None:
    low, default, high = (labels_of(dim, cellprob_threshold=value, flow_threshold=0.0) for value in (-2.0, 0.0, 2.0))
    assert (low > 0).sum() > (default > 0).sum() > (high > 0).sum()
    assert low.max() >= default.max() >= high.max()
    assert low.max() > high.max()


def test_a_higher_flow_threshold_keeps_at_least_as_many(dim: Any) -> None:
    strict, default, loose, off = (labels_of(dim, flow_threshold=value).max() for value in (0.1, 0.4, 1.0, 0.0))
    assert strict < default <= loose <= off
    assert strict < off


def test_min_size_drops_what_is_smaller(slide: Slide) -> None:
    default = labels_of(slide[0])
    sizes = np.bincount(default.ravel())[1:]
    limit = int(np.median(sizes))
    kept = np.bincount(labels_of(slide[0], min_size=limit).ravel())[1:]
    assert sorted(kept) == sorted(sizes[sizes >= limit])


def test_more_overlap_takes_more_tiles(slide: Slide) -> None:
    few, many = (tiledseg.segment(slide[0], diameter=DIAMETER, tile_overlap=value) for value in (0.1, 0.4))
    assert many.report.n_tiles > few.report.n_tiles
    assert tiledseg.compare(many.labels, slide[1]).overall.ap[0] > 0.97


def test_augmenting_asks_mirrored_tiles_and_does_not_depend_on_blocks(slide: Slide) -> None:
    image, truth = slide
    plain = tiledseg.segment(image, diameter=DIAMETER)
    whole, blocks = (tiledseg.segment(image, diameter=DIAMETER, augment=True, block=size) for size in (2048, 200))
    assert whole.report.n_tiles > plain.report.n_tiles
    assert not np.array_equal(whole.labels.compute(), plain.labels.compute())
    assert np.array_equal(whole.labels.compute(), blocks.labels.compute())
    # Were flows not turned with their tile, particles of neighbouring tiles would run apart.
    assert (
        tiledseg.compare(whole.labels, truth).overall.ap[1]
        >= tiledseg.compare(plain.labels, truth).overall.ap[1] - 0.01
    )


def test_half_the_precision_finds_the_same_cells_whatever_the_blocks(slide: Slide) -> None:
    image = slide[0][:400, :400]
    full = labels_of(image, precision="float32")
    whole, blocks = (labels_of(image, precision="bfloat16", block=size) for size in (2048, 130))
    assert not np.array_equal(whole, full)
    assert np.array_equal(whole, blocks)
    score = tiledseg.compare(whole, full).overall
    assert whole.max() == pytest.approx(full.max(), abs=1)
    assert score.ap[2] > 0.97


def test_without_a_word_the_network_computes_in_float32(slide: Slide) -> None:
    image = slide[0][:200, :200]
    assert np.array_equal(labels_of(image), labels_of(image, precision="float32"))


@pytest.mark.parametrize(
    ("architecture", "device", "has_bfloat16", "expected"),
    [
        ("unet", "cpu", True, "float32"),
        ("unet", "cpu", False, "float32"),
        ("unet", "cuda", True, "float32"),
        ("unet", "cuda", False, "float32"),
        ("cpsam", "cpu", True, "float32"),
        ("cpsam", "cuda", True, "bfloat16"),
        ("cpsam", "cuda", False, "float32"),
    ],
)
def test_the_precision_by_network_and_device(architecture: str, device: str, has_bfloat16: bool, expected: str) -> None:
    model = dataclasses.replace(find_model("tiledseg-nuclei"), architecture=architecture)
    assert precision_of(model, device, has_bfloat16) == expected


@pytest.mark.parametrize("began", ["float32", "bfloat16"])
def test_a_run_goes_on_in_the_precision_it_began_with(slide: Slide, tmp_path: Path, began: str) -> None:
    image, out = slide[0][:200, :200], tmp_path / "out.ome.zarr"
    first = tiledseg.segment(image, out, diameter=DIAMETER, precision=began)
    again = tiledseg.segment(image, out, diameter=DIAMETER)
    assert first.report.computed["flows"] > 0
    assert again.report.computed["flows"] == 0
    other = "bfloat16" if began == "float32" else "float32"
    with pytest.raises(SettingsError, match=f"precision was '{began}' and is now '{other}'"):
        tiledseg.segment(image, out, diameter=DIAMETER, precision=other)
    anew = tiledseg.segment(image, out, diameter=DIAMETER, restart=True)
    assert anew.report.model["precision"] == "float32"  # as this network has it where nobody says


@pytest.mark.parametrize("value", [0.0, 0.5, "much"])
def test_an_overlap_that_tiles_cannot_have_is_refused(slide: Slide, value: object) -> None:
    with pytest.raises(SettingsError, match="tile_overlap must be"):
        tiledseg.segment(slide[0], tile_overlap=value)


@pytest.fixture(scope="module")
def grainy() -> tuple[Any, Any]:
    """Discs of 40 px, 6 px apart, with grains in them: what is seen at another scale is something else."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:400, :400]
    truth = np.zeros(y.shape, np.uint32)
    for label, (cy, cx) in enumerate(itertools.product(range(30, 376, 46), repeat=2), 1):
        truth[(y - cy) ** 2 + (x - cx) ** 2 < 20**2] = label
    grains = gaussian_filter(rng.normal(size=truth.shape), 4)
    light = (truth > 0) * np.clip(1 + 0.5 * grains / grains.std(), 0.05, 3)
    return rng.poisson(1000 * gaussian_filter(light, 1) + 100).astype(np.uint16), truth


def parts_and_neighbours(labels: Any, truth: Any) -> tuple[int, int]:
    """How many cells hold several objects, and how many objects hold several cells, by at least 40 pixels each."""
    pairs, counts = np.unique(np.stack([truth.ravel(), labels.ravel()]), axis=1, return_counts=True)
    cells, objects = pairs[:, (pairs > 0).all(axis=0) & (counts >= 40)]
    return int((np.bincount(cells) > 1).sum()), int((np.bincount(objects) > 1).sum())


def test_a_diameter_that_is_too_small_splits(grainy: tuple[Any, Any]) -> None:
    image, truth = grainy
    assert parts_and_neighbours(labels_of(image, diameter=40), truth)[0] <= 3
    assert parts_and_neighbours(labels_of(image, diameter=13), truth)[0] > 10


def test_a_diameter_that_is_too_large_merges(slide: Slide) -> None:
    image, truth = slide
    assert parts_and_neighbours(labels_of(image), truth)[1] == 0
    assert parts_and_neighbours(labels_of(image, diameter=2.5 * DIAMETER), truth)[1] > 20


def test_resampling_makes_smooth_outlines_of_large_cells() -> None:
    """Followed on the network's grid, cells seven times as large as it has them get stairs of seven pixels."""
    image, truth = synthetic_slide((700, 700), diameter=120.0, seed=5)
    smooth, stairs = (labels_of(image, diameter=120.0, resample=value) for value in (True, False))
    assert tiledseg.compare(smooth, truth).overall.ap[2] >= tiledseg.compare(stairs, truth).overall.ap[2]
    roundness = [
        np.median([4 * np.pi * cell.area / cell.perimeter**2 for cell in regionprops(labels.astype(np.int32))])
        for labels in (smooth, stairs)
    ]
    assert roundness[0] > 1.2 * roundness[1]


def test_too_few_steps_leave_pixels_on_their_way_and_more_than_enough_change_nothing(slide: Slide) -> None:
    image, truth = slide
    few, default, many = (tiledseg.compare(labels_of(image, niter=value), truth).overall for value in (3, "auto", 2000))
    assert few.ap[1] < 0.5 < 0.98 < default.ap[1]
    assert many.ap == default.ap


@pytest.mark.parametrize("block", [2048, 130, 64])
def test_max_size_drops_what_is_larger_wherever_blocks_cut_it(slide: Slide, block: int) -> None:
    image = slide[0][:400, :400]
    everything = labels_of(image, block=block, halo=48)
    sizes = np.bincount(everything.ravel())
    limit = int(np.median(sizes[1:]))
    found = tiledseg.segment(image, diameter=DIAMETER, block=block, halo=48, max_size=limit)
    expected = np.where(sizes <= limit, np.arange(sizes.size), 0)[everything]
    kept = np.unique(expected)
    assert np.array_equal(found.labels.compute(), np.searchsorted(kept, expected))
    assert found.report.n_too_large == (sizes[1:] > limit).sum()
    assert found.table.num_rows == found.report.n_objects == kept.size - 1


def test_max_size_may_change_on_a_finished_run(slide: Slide, tmp_path: Path) -> None:
    write_image(tmp_path / "slide.ome.zarr", slide[0][:300, :300], axes="yx")
    everything = tiledseg.segment(tmp_path / "slide.ome.zarr", diameter=DIAMETER).report
    fewer = tiledseg.segment(tmp_path / "slide.ome.zarr", diameter=DIAMETER, max_size=400).report
    assert fewer.computed["flows"] == 0
    assert fewer.n_objects + fewer.n_too_large == everything.n_objects
    assert fewer.n_too_large > 0


def test_a_largest_size_below_the_smallest_is_refused() -> None:
    with pytest.raises(SettingsError, match="max_size 10 is below min_size 15"):
        Settings.of(max_size=10)


def test_every_setting_has_a_row_in_the_readme_and_every_row_a_test() -> None:
    folder = Path(__file__).parents[1]
    rows = re.findall(r"^\| (.*--.*) \| (.*) \| (.*test_.*) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    flags = {flag for setting, effect, _ in rows for flag in re.findall(r"--(?:no-)?([a-z0-9-]+)", setting + effect)}
    elsewhere = {"model", "device", "name", "ome-zarr"}  # said in the text
    assert {name.replace("_", "-") for name in Settings().flat()} - flags == elsewhere
    for setting, _, tests in rows:
        for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests):
            assert f"def {name}(" in (folder / "tests" / file).read_text(), setting
