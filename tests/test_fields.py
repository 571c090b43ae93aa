"""Fields of a mosaic: found where exposure jumps along straight lines, and normalised each by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiledseg
from tiledseg.fields import FieldPoints, field_starts, on_lattice, steps_along
from tiledseg.job import Surveyed
from tiledseg.normalisation import range_map, sample_cells
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide
from tiledseg.store import DiskStore

from .conftest import Slide

LINES = (230, 410), (201,)
EXPOSURES = np.array([[1.0, 0.1], [0.25, 0.6], [0.1, 1.0]])
LOCAL = {"normalize": "local", "diameter": 24.0}


def exposed(image: np.ndarray, dtype: type = np.uint16) -> np.ndarray:
    """An image as fields with a ten-fold spread of exposure."""
    rows, columns = (np.searchsorted(lines, np.arange(n), "right") for lines, n in zip(LINES, image.shape, strict=True))
    return (image * EXPOSURES[np.ix_(rows, columns)]).astype(dtype)


def starts_of(image: np.ndarray, region: int = 4096) -> list[tuple[int, ...]]:
    """Fields of an image that is seen region by region, as the survey does."""
    totals = [np.zeros(n) for n in image.shape]
    for y in range(0, image.shape[0], region):
        for x in range(0, image.shape[1], region):
            ends = min(y + region, image.shape[0]), min(x + region, image.shape[1])
            wide = image[max(0, y - 16) : ends[0] + 16, max(0, x - 16) : ends[1] + 16].astype(np.float32)
            first = min(y, 16), min(x, 16)
            core = tuple(slice(at, at + end - start) for at, start, end in zip(first, (y, x), ends, strict=True))
            for total, start, steps in zip(totals, (y, x), steps_along(wide, core), strict=True):
                total[start : start + steps.size] += steps
    return [field_starts(total[None], 128) for total in totals]


@pytest.mark.parametrize("region", [4096, 192, 230])
def test_fields_are_found_to_the_pixel_whatever_the_regions(slide: Slide, region: int) -> None:
    assert starts_of(exposed(slide[0]), region) == [(0, *LINES[0]), (0, *LINES[1])]


def test_cells_light_and_haze_are_no_fields() -> None:
    rising, _ = synthetic_slide((700, 610), diameter=24.0, seed=3, illumination=5.0)
    noise = np.random.default_rng(0).poisson(150, (600, 600))
    hazy = noise + np.add.outer(np.linspace(0, 30000, 600), np.linspace(0, 30000, 600))
    for image in (rising, noise, hazy, np.full((300, 300), 7), np.zeros((1, 1))):
        assert starts_of(image) == [(0,), (0,)]


def test_fields_are_no_smaller_than_the_distance_of_points() -> None:
    image = np.random.default_rng(0).poisson(100, (900, 20)).astype(float)
    for start, factor in ((60, 9.0), (300, 3.0), (340, 30.0), (700, 0.1), (828, 9.0)):
        image[start:] *= factor
    steps = steps_along(image.astype(np.float32), np.s_[0:900, 0:20])[0]
    # The line at 60 is too near to the image's edge, as is that at 828; of 300 and 340 the stronger counts.
    assert field_starts(steps[None], 128) == (0, 340, 700)


def test_a_jump_in_any_input_counts() -> None:
    steps = np.ones((2, 1000))
    steps[1, 400] = 50.0
    assert field_starts(steps, 128) == (0, 400)


def test_every_field_has_points_of_its_own() -> None:
    points = FieldPoints(700, 128, (0, 200, 456))
    assert points.edges.tolist() == [0, 128, 200, 328, 456, 584, 700]
    assert points.firsts == (0, 2, 4)
    assert points.count == 6
    fields = tuple(zip((0.0, 200.0, 456.0), points.firsts, strict=True))
    at = np.array([0.0, 63.5, 127.5, 199.0, 200.0, 263.5, 455.0, 456.0, 583.5, 699.0])
    assert on_lattice(at, 128.0, 6, fields).tolist() == [0, 0, 0.5, 1, 2, 2, 3, 4, 4.5, 5]


def test_the_map_of_a_field_is_that_of_the_field_alone() -> None:
    image = exposed(np.random.default_rng(0).uniform(200, 1200, (700, 610)), np.float32)
    starts = (0, *LINES[0]), (0, *LINES[1])

    def map_of(part: np.ndarray, starts: tuple[tuple[int, ...], ...]) -> np.ndarray:
        samples = sample_cells(part)
        points = [FieldPoints(n, 128, of) for n, of in zip(part.shape, starts, strict=True)]
        counted, noise = np.ones(samples.shape[:2], bool), np.zeros(samples.shape[:2], np.float32)
        return range_map(lambda a, b: samples[a:b], noise, counted, (100.0, 1100.0), (points[0], points[1]))

    low, difference = map_of(image, starts)
    assert low.shape == (2 + 2 + 3, 2 + 4)
    for rows, top in zip((slice(0, 2), slice(2, 4), slice(4, 7)), range(3), strict=True):
        for columns, left in zip((slice(0, 2), slice(2, 6)), range(2), strict=True):
            exposure = EXPOSURES[top, left]
            assert low[rows, columns] == pytest.approx(210 * exposure, rel=0.2)
            assert difference[rows, columns] == pytest.approx(max(980 * exposure, 200), rel=0.1)
    # A field that begins with a cell of samples has the very values that it has alone.
    beside = np.concatenate([image[:, :192] * 5, image[:, 192:]], axis=1)
    assert np.array_equal(map_of(beside, ((0,), (0, 192)))[..., 2:], map_of(beside[:, 192:], ((0,), (0,))))


def test_exposure_that_jumps_costs_little_with_a_local_normalisation(slide: Slide, tmp_path: Path, client: Any) -> None:
    image, truth = slide
    mosaic = exposed(image)

    def score(of: np.ndarray, normalize: str) -> np.ndarray:
        labels = tiledseg.segment(of, diameter=24.0, normalize=normalize).labels.compute()
        return np.array(tiledseg.compare(labels, truth).overall.ap)

    even, whole, local = score(image, "global"), score(mosaic, "global"), score(mosaic, "local")
    # Fields of some 200 pixels hold few cells to take percentiles from.
    assert (local >= even - np.array([0.02, 0.02, 0.04])).all()
    assert (local > whole + np.array([0.03, 0.06, 0.15])).all()
    write_image(tmp_path / "mosaic.ome.zarr", mosaic, axes="yx", chunk=256)
    at_once = tiledseg.segment(mosaic, **LOCAL).labels.compute()
    blocks = tiledseg.segment(tmp_path / "mosaic.ome.zarr", client=client, block=256, **LOCAL).labels.compute()
    assert np.array_equal(at_once, blocks)


def test_fields_are_those_of_the_level_that_is_surveyed_and_of_every_frame(
    slide: Slide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiledseg import survey

    image = slide[0][:, :400].copy()
    image[420:] //= 5
    write_image(tmp_path / "two.ome.zarr", np.stack([image] * 2), axes="tyx", n_levels=2)
    monkeypatch.setattr(survey, "LARGE_IMAGE", 300_000)
    found = tiledseg.segment(tmp_path / "two.ome.zarr", tmp_path / "cells.ome.zarr", **LOCAL)
    document = json.loads((Path(str(found.report.scratch)) / "survey.json").read_text())
    points = DiskStore(Path(str(found.report.scratch))).open("survey.zarr/normalisation")
    assert Surveyed.from_json(document).normalisation_fields == (((0, 0),), ((0, 0), (420, 2)), ((0, 0),))
    assert points.shape == (1, 2, 2, 4, 2)
