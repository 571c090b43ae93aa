"""Percentiles of the whole image, and a map of them: the same whatever the blocks, and no seams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiledseg
from tiledseg.errors import SettingsError
from tiledseg.fields import FieldPoints
from tiledseg.grid import WorkingGrid
from tiledseg.images import open_image
from tiledseg.inputs import Input
from tiledseg.normalisation import LocalRange, WholeRange, range_map, sample_cells
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide
from tiledseg.store import DiskStore
from tiledseg.working import read_tile

from .conftest import Slide

LOCAL = {"normalize": "local", "diameter": 24.0}
WHOLE = (100.0, 1100.0)
LATTICE = (128.0, 128.0), (((0.0, 0),), ((0.0, 0),))


def map_of(
    image: np.ndarray,
    is_counted: np.ndarray | None = None,
    noise: float = 0.0,
    rows: tuple[int, ...] = (0,),
    columns: tuple[int, ...] = (0,),
) -> np.ndarray:
    samples = sample_cells(image.astype(np.float32))
    counted = np.ones(samples.shape[:2], bool) if is_counted is None else is_counted
    points = FieldPoints(image.shape[0], 128, rows), FieldPoints(image.shape[1], 128, columns)
    noises = np.full(counted.shape, noise, np.float32)
    return range_map(lambda start, stop: samples[start:stop], noises, counted, WHOLE, points)


@pytest.fixture(scope="module")
def uneven() -> tuple[np.ndarray, np.ndarray]:
    """A slide with light that rises five-fold over it."""
    return synthetic_slide((700, 610), diameter=24.0, seed=3, illumination=5.0)


def test_the_map_of_an_even_image_is_even() -> None:
    image = np.random.default_rng(0).uniform(200, 1200, (512, 640))
    low, difference = map_of(image)
    assert low.shape == (4, 5)
    assert low == pytest.approx(210, abs=15)
    assert low + difference == pytest.approx(1190, abs=15)


def test_the_map_follows_light_that_varies() -> None:
    texture = np.random.default_rng(0).uniform(0, 1, (1024, 1024))
    light = np.linspace(300, 500, 1024)
    low, difference = map_of(light * (1 + texture))
    points = light[64::128]
    # At the image's edge there is nothing outside to smooth with, so the map lags behind there.
    assert low[:, 1:-1] == pytest.approx(np.broadcast_to(points, (8, 8))[:, 1:-1], rel=0.1)
    assert difference[:, 1:-1] == pytest.approx(np.broadcast_to(points, (8, 8))[:, 1:-1], rel=0.15)


def test_cells_that_do_not_count_take_the_values_beside_them_and_far_off_those_of_the_image() -> None:
    image = np.random.default_rng(0).uniform(400, 800, (256, 3200))
    image[:, 256:] = 7777.0
    counted = np.zeros((4, 50), bool)
    counted[:, :4] = True
    low, difference = map_of(image, counted)
    assert low[:, :3] == pytest.approx(404, abs=5)
    assert low[:, -5:] == pytest.approx(WHOLE[0])
    assert difference[:, -5:] == pytest.approx(WHOLE[1] - WHOLE[0])
    assert (np.diff(low[0]) <= 1e-3).all()


def test_the_difference_is_bounded_by_noise_and_by_the_image() -> None:
    flat = np.full((256, 256), 500.0)
    assert map_of(flat)[1] == pytest.approx(200.0)
    assert map_of(flat, noise=50.0)[1] == pytest.approx(500.0, rel=0.01)
    assert map_of(flat)[0] == pytest.approx(500.0, rel=0.01)


def test_values_that_are_not_finite_do_not_count() -> None:
    image = np.random.default_rng(0).uniform(200, 1200, (256, 256))
    holed = image.copy()
    holed[:, 100:140] = np.nan
    assert np.isfinite(map_of(holed)).all()
    assert map_of(holed) == pytest.approx(map_of(image), rel=0.1)
    nothing = map_of(np.full((256, 256), np.nan))
    assert nothing[0] == pytest.approx(WHOLE[0])
    assert nothing[1] == pytest.approx(WHOLE[1] - WHOLE[0])


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (63, 65), (2100, 130)])
def test_every_size_has_a_map(shape: tuple[int, int]) -> None:
    points = map_of(np.random.default_rng(0).uniform(200, 1200, shape))
    assert points.shape == (2, *(-(-n // 128) for n in shape))
    assert np.isfinite(points).all()


@pytest.mark.parametrize("normalisation", ["whole", "local"])
def test_a_part_of_a_tile_holds_the_values_of_the_whole(normalisation: str) -> None:
    image = np.random.default_rng(1).uniform(0, 1000, (900, 700)).astype(np.float32)
    image[200:210, 300:330] = np.nan
    grid = WorkingGrid.for_diameter(image.shape, 20.0, 17.0)
    how = WholeRange(*WHOLE) if normalisation == "whole" else LocalRange(map_of(image)[None], 0, *LATTICE)
    opened = open_image(image, axes="yx")
    whole = read_tile(opened, [(Input((0,)), how)], grid, (), tuple(slice(0, n) for n in grid.shape))[0]
    for region in (np.s_[0:224, 0:224], np.s_[150:374, 130:354], np.s_[541:765, 371:595]):
        inside = tuple(slice(p.start, min(p.stop, n)) for p, n in zip(region, grid.shape, strict=True))
        part = read_tile(opened, [(Input((0,)), how)], grid, (), region)[0]
        expected = whole[inside]
        assert np.array_equal(part[tuple(slice(0, n) for n in expected.shape)], expected)
    assert np.isfinite(whole).all()
    # Working pixel (174, 268) lies amid the pixels that are not finite.
    assert whole[174, 268] == pytest.approx(0.0, abs=1e-4)


def test_pixels_that_are_not_finite_become_the_local_background() -> None:
    points = np.stack([np.linspace(100, 900, 6).reshape(1, 6), np.full((1, 6), 50.0)]).astype(np.float32)
    image = np.full((128, 768), np.inf, np.float32)
    grid = WorkingGrid(image.shape, (1.0, 1.0))
    how = LocalRange(points[None], 0, *LATTICE)
    values = read_tile(open_image(image, axes="yx"), [(Input((0,)), how)], grid, (), np.s_[0:128, 0:768])[0]
    assert np.array_equal(values, np.zeros_like(values))


def test_labels_are_the_same_whatever_the_blocks_and_workers(
    uneven: tuple[np.ndarray, np.ndarray], tmp_path: Path, client: Any
) -> None:
    image, truth = uneven[0][:420, :400], uneven[1][:420, :400]
    whole = tiledseg.segment(image, **LOCAL).labels.compute()
    blocks = tiledseg.segment(image, block=150, **LOCAL).labels.compute()
    write_image(tmp_path / "slide.ome.zarr", image, axes="yx", chunk=256)
    workers = tiledseg.segment(tmp_path / "slide.ome.zarr", client=client, block=256, **LOCAL).labels.compute()
    assert np.array_equal(whole, blocks)
    assert np.array_equal(whole, workers)
    assert tiledseg.compare(whole, truth).overall.ap[0] > 0.95


def test_a_survey_that_died_is_resumed_to_the_same_map(
    uneven: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiledseg import survey

    monkeypatch.setattr(survey, "REGION", 256)
    write_image(tmp_path / "slide.ome.zarr", uneven[0][:420, :400], axes="yx", chunk=256)
    once, parts = tmp_path / "once.ome.zarr", tmp_path / "parts.ome.zarr"
    at_once = tiledseg.segment(tmp_path / "slide.ome.zarr", once, **LOCAL)
    # A folder that a failed run made would go with it; after a kill it stays.
    scratch = tmp_path / "parts.ome.zarr.cells.tiledseg"
    scratch.mkdir()
    original = survey.survey_region
    calls = []

    def dying(number: int, job: Any) -> dict[str, Any]:
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(number, job)

    monkeypatch.setattr(survey, "survey_region", dying)
    with pytest.raises(KeyboardInterrupt):
        tiledseg.segment(tmp_path / "slide.ome.zarr", parts, **LOCAL)
    resumed = tiledseg.segment(tmp_path / "slide.ome.zarr", parts, **LOCAL)
    assert resumed.report.kept["survey"] >= 2
    assert resumed.report.kept["survey"] + resumed.report.computed["survey"] == 4
    assert resumed.report.computed["survey"] >= 1
    folders = (Path(str(at_once.report.scratch)), scratch)
    maps = [DiskStore(folder).open("survey.zarr/normalisation")[:] for folder in folders]
    assert maps[0].shape == (1, 2, 4, 4)
    assert np.array_equal(maps[0], maps[1])
    assert np.array_equal(at_once.labels.compute(), resumed.labels.compute())
    with pytest.raises(SettingsError, match="normalize was 'local' and is now 'global'"):
        tiledseg.segment(tmp_path / "slide.ome.zarr", parts, diameter=24.0)


def score(image: np.ndarray, truth: np.ndarray, normalize: str) -> np.ndarray:
    labels = tiledseg.segment(image, diameter=24.0, normalize=normalize).labels.compute()
    return np.array(tiledseg.compare(labels, truth).overall.ap)


def test_uneven_light_costs_nothing_with_a_local_normalisation(
    slide: Slide, uneven: tuple[np.ndarray, np.ndarray]
) -> None:
    even = score(*slide, "global")
    assert (np.abs(score(*slide, "local") - even) <= 0.02).all()
    assert (np.abs(score(*uneven, "local") - even) <= 0.02).all()


def test_haze_that_varies_hides_cells_from_a_global_normalisation_alone(slide: Slide) -> None:
    image, truth = slide
    haze = np.add.outer(np.linspace(0, 30000, image.shape[0]), np.linspace(0, 30000, image.shape[1]))
    hazy = (image + haze).astype(np.float32)
    whole, local = score(hazy, truth, "global"), score(hazy, truth, "local")
    assert local[0] > 0.95
    assert (local[:2] > whole[:2] + 0.05).all()


def test_empty_parts_stay_empty(slide: Slide) -> None:
    image = np.random.default_rng(0).poisson(150, (1000, 1400)).astype(np.uint16)
    image[:260, :260] = slide[0][:260, :260]
    # Light that falls off over the empty part is foreground to the survey, and holds nothing.
    image[:, 700:] += np.linspace(0, 400, 700).astype(np.uint16)
    labels = tiledseg.segment(image, foreground="off", **LOCAL).labels.compute()
    assert labels[:260, :260].max() > 40
    assert labels[270:].max() == 0
    assert labels[:, 270:].max() == 0


def test_images_with_little_in_them(slide: Slide) -> None:
    assert tiledseg.segment(np.full((90, 80), 7, np.uint8), **LOCAL).report.n_objects == 0
    assert tiledseg.segment(np.full((90, 80), np.nan, np.float32), **LOCAL).report.n_objects == 0
    small = slide[0][300:400, 200:320]
    local, whole = (
        tiledseg.segment(small, diameter=24.0, normalize=how).report.n_objects for how in ("local", "global")
    )
    assert local == whole > 3


def test_a_pyramid_does_not_change_the_labels(
    uneven: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A survey on level 0 of a pyramid is that of the image alone; one on level 1 finds nearly the same cells."""
    from tiledseg import survey

    image, truth = uneven
    write_image(tmp_path / "two.ome.zarr", image, axes="yx", n_levels=2)
    alone = tiledseg.segment(image, **LOCAL).labels.compute()
    fine = tiledseg.segment(tmp_path / "two.ome.zarr", tmp_path / "fine.ome.zarr", **LOCAL).labels.compute()
    assert np.array_equal(fine, alone)
    monkeypatch.setattr(survey, "LARGE_IMAGE", 300_000)
    coarse = tiledseg.segment(tmp_path / "two.ome.zarr", tmp_path / "coarse.ome.zarr", **LOCAL)
    points = DiskStore(Path(str(coarse.report.scratch))).open("survey.zarr/normalisation")
    assert points.shape == (1, 2, 3, 3)
    assert tiledseg.compare(coarse.labels.compute(), truth).overall.ap[0] > 0.97


def test_the_diameter_is_estimated_with_the_same_normalisation(slide: Slide) -> None:
    haze = np.linspace(0, 120000, 610)
    hazy = (slide[0] + haze).astype(np.float32)
    local = tiledseg.estimate_diameter(hazy, normalize="local")
    whole = tiledseg.estimate_diameter(hazy)
    assert local.value == pytest.approx(24, abs=3)
    assert local.n_objects > whole.n_objects
