"""The first promise, in the real stages: the labels do not depend on the blocks, whatever the flows.

Masks, stitch and publish run in memory on flows that are given, in place of what a network would have said. A small
network is pretended (cells of 8 px, tiles of 64 px), so that small images have many blocks, tiles and chunks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiledseg import flows, heat, masks, publish, stitch
from tiledseg.cluster import ThreadExecutor
from tiledseg.config import Settings
from tiledseg.images import open_image
from tiledseg.inputs import Input
from tiledseg.job import Diameter, Job, Moment, Surveyed
from tiledseg.networks.models import find_model
from tiledseg.progress import Progress
from tiledseg.store import MemoryStore
from tiledseg.table import table_of

from .strategies import Labels, connected, crowds, label_fields, logits, numbered, seeds, sides, smooth_noise, swarms

DIAM_MEAN = 8.0
HALO = 16
MAX_SIDE = 80
FOREGROUND_CELL = 8

Flows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """What a network would have said of an image: flows and logits on the working grid."""

    shape: tuple[int, ...]
    diameter: float
    values: Flows

    @classmethod
    def of(
        cls,
        field: Labels,
        *,
        noise: float = 0.0,
        seed: int = 0,
        zoom: float = 1.0,
        shape: tuple[int, ...] | None = None,
    ) -> Case:
        """Flows of drawn cells, with noise; the image is larger than the working grid by `zoom`."""
        unit, cellprob = heat.label_flows(field), logits(field)
        if noise > 0:
            unit = unit + smooth_noise(field.shape, 2, noise, seed)
            # Ragged edges and holes, so that objects are small, hollow and dropped.
            cellprob = cellprob + smooth_noise(field.shape, 0.7, 5 * noise, seed + 1)[0]
        values = np.concatenate([unit, cellprob[None]]).astype(np.float32)
        return cls(shape or field.shape, DIAM_MEAN * zoom, values)


def surveyed(case: Case, is_mapped: bool) -> Surveyed:
    """What the survey would have found."""
    diameter = Diameter(case.diameter, "given", (case.diameter, case.diameter))
    cell = (float(FOREGROUND_CELL),) * len(case.shape) if is_mapped else ()
    return Surveyed((Moment(((0.0, 1.0),), False, diameter),), 0, cell, 1.0)


def fill_flows(job: Job, case: Case) -> None:
    """The pieces of the given flows, blended from tiles by the flows stage itself."""
    for sheet in job.sheets:
        lattice = sheet.lattice
        assert lattice.shape == case.values.shape[1:]
        # Of a volume every component of the flow is the sum of two orientations.
        share = case.values[[*sheet.planes, -1]] / (len(case.shape) - 1)
        job.store.create(sheet.name, sheet.array_shape, (), "float16")
        for chunk in lattice.chunks():
            outputs = []
            for tile in lattice.tiles_of(chunk):
                filled = np.zeros((3, *lattice.sides), np.float32)
                region = lattice.tile_region(tile)
                inside = tuple(
                    slice(max(p.start, 0), min(p.stop, n)) for p, n in zip(region, lattice.shape, strict=True)
                )
                there = tuple(slice(p.start - q.start, p.stop - q.start) for p, q in zip(inside, region, strict=True))
                filled[:, *there] = share[:, *inside]
                outputs.append(([tile], filled.reshape(1, 3, lattice.tile, lattice.tile)))
            piece = flows.process_block(outputs, lattice, lattice.piece_region(chunk))
            job.store.open(sheet.name)[(0,) * len(sheet.frames) + chunk] = piece


def fill_foreground(job: Job, case: Case) -> None:
    """The map of where the image holds something: here, where the logit is positive."""
    counts = [-(-n // FOREGROUND_CELL) for n in case.shape]
    pad = [(0, count * FOREGROUND_CELL - n) for count, n in zip(counts, case.shape, strict=True)]
    boxes = [side for count in counts for side in (count, FOREGROUND_CELL)]
    is_cell = np.pad(case.values[-1] > 0, pad).reshape(boxes)
    job.store.create("survey.zarr/foreground", tuple(counts), (), "bool")
    job.store.open("survey.zarr/foreground")[:] = is_cell.any(axis=tuple(range(1, len(boxes), 2)))


def labelled(
    case: Case, block: int, *, is_mapped: bool = False, **chosen: Any
) -> tuple[npt.NDArray[np.uint32], dict[str, int]]:
    """Labels of the real stages, and what stitching counted."""
    model = dataclasses.replace(find_model("tiledseg-nuclei"), diam_mean=DIAM_MEAN, tile=64, stride=40)
    chosen = {"do_3d": len(case.shape) == 3, **chosen}
    config = Settings.of(diameter=case.diameter, block=block, **chosen)
    image = open_image(np.zeros(case.shape, np.uint8), axes="zyx"[-len(case.shape) :])
    job = Job(
        image, (Input((0,)),), config, model, "cpu", MemoryStore(), "masks-test", surveyed=surveyed(case, is_mapped)
    )
    fill_flows(job, case)
    if is_mapped:
        fill_foreground(job, case)
    job.store.create("masks-test/published", case.shape, (), "uint32")
    executor, progress = ThreadExecutor(2), Progress(None)
    masks.run(job, executor, progress)
    facts = stitch.run(job, executor, progress)
    publish.run(job, executor, progress)
    labels = job.store.open("masks-test/published")
    np.testing.assert_array_equal(labels, numbered(labels))
    assert facts["n_objects"] == labels.max()
    assert table_of(job).num_rows == labels.max()
    return labels, facts


def check_blocks_equal_the_whole(case: Case, block: int, **chosen: Any) -> npt.NDArray[np.uint32]:
    """Blocks of some size against a single one; no cell may be larger than the halo. Returns the labels."""
    whole, facts = labelled(case, max(16, block, *case.shape), **chosen)
    assert facts["n_pairs"] == 0
    assert facts["n_blocks"] == 1
    parts, facts = labelled(case, block, **chosen)
    np.testing.assert_array_equal(parts, whole)
    assert facts["n_cut_by_halo"] == 0
    assert facts["n_exact_pairs"] == facts["n_pairs"]
    return whole


@st.composite
def cases(draw: Any, block: int, max_side: int = MAX_SIDE) -> Case:
    """Crowds with flows as they are drawn, or more or less disturbed."""
    shape = draw(sides(block, max_side)), draw(sides(block, max_side))
    noise = draw(st.sampled_from([0.0, 0.1, 0.3]))
    return Case.of(draw(crowds(shape, DIAM_MEAN)), noise=noise, seed=draw(seeds) // 2)


blocks = st.one_of(st.sampled_from([16, 17, 32]), st.integers(16, MAX_SIDE))
thresholds = st.fixed_dictionaries(
    {"flow_threshold": st.sampled_from([0.0, 0.4]), "min_size": st.sampled_from([0, 15]), "niter": st.just(200)}
)


@settings(max_examples=60, derandomize=True)
@given(st.data(), blocks, thresholds)
def test_one_answer_with_the_automatic_halo(data: st.DataObject, block: int, chosen: dict[str, Any]) -> None:
    check_blocks_equal_the_whole(data.draw(cases(block)), block, **chosen)


@settings(max_examples=60, derandomize=True)
@given(st.data(), blocks, st.integers(0, 16), thresholds)
def test_one_answer_with_any_halo_of_two_diameters(
    data: st.DataObject, block: int, more: int, chosen: dict[str, Any]
) -> None:
    halo = HALO + min(more, block - HALO)
    check_blocks_equal_the_whole(data.draw(cases(block)), block, halo=halo, **chosen)


@settings(max_examples=40, derandomize=True)
@given(st.data(), st.sampled_from([0.6, 1.0, 1.7, 2.5]), st.booleans(), seeds)
def test_one_answer_on_another_grid(data: st.DataObject, zoom: float, resample: bool, seed: int) -> None:
    shape = (data.draw(st.integers(2, 110)), data.draw(st.integers(2, 110)))
    working = tuple(max(1, round(n * (1 / zoom))) for n in shape)
    field = data.draw(crowds((working[0], working[1]), DIAM_MEAN))
    case = Case.of(field, noise=0.1, seed=seed // 2, zoom=zoom, shape=shape)
    block = data.draw(st.integers(max(16, int(np.ceil(2 * case.diameter))), 110))
    check_blocks_equal_the_whole(case, block, resample=resample)


@settings(max_examples=40, derandomize=True)
@given(st.data(), st.integers(16, 30), st.tuples(st.integers(0, 3), st.integers(0, 3)), st.integers(0, 1))
def test_remainders_of_one_pixel(data: st.DataObject, block: int, n_whole: tuple[int, int], axis: int) -> None:
    shape = [n * block + data.draw(st.integers(1, 3)) for n in n_whole]
    shape[axis] = n_whole[axis] * block + 1
    case = Case.of(data.draw(crowds((shape[0], shape[1]), DIAM_MEAN)), noise=0.1)
    check_blocks_equal_the_whole(case, block, min_size=0)


@settings(max_examples=60, derandomize=True)
@given(label_fields(min_side=34, max_side=70), st.integers(16, 34), st.sampled_from([HALO, "auto"]), seeds)
def test_objects_of_any_size_are_exact_or_reported(field: Labels, block: int, halo: int | str, seed: int) -> None:
    case = Case.of(field, noise=0.1 * (seed % 3), seed=seed // 2)
    whole, _ = labelled(case, 70, halo=halo)
    parts, facts = labelled(case, block, halo=halo)
    is_reported = facts["n_cut_by_halo"] > 0
    assert is_reported or np.array_equal(parts, whole)
    assert is_reported or facts["n_exact_pairs"] == facts["n_pairs"]
    # The automatic halo grows to eight diameters, as much as the longest of these objects.
    assert not (is_reported and halo == "auto")


@settings(max_examples=30, derandomize=True)
@given(crowds((90, 75), DIAM_MEAN), st.integers(16, 40), st.tuples(st.integers(0, 89), st.integers(0, 74)))
def test_empty_blocks_are_skipped_and_change_nothing(field: Labels, block: int, corner: tuple[int, int]) -> None:
    field[corner[0] :], field[:, corner[1] :] = 0, 0
    case = Case.of(connected(field))
    whole, _ = labelled(case, 90)
    parts, facts = labelled(case, block, is_mapped=True)
    np.testing.assert_array_equal(parts, whole)
    counts = [-(-n // block) for n in case.shape]
    is_far = [range(-(-(at + HALO + FOREGROUND_CELL) // block), n) for at, n in zip(corner, counts, strict=True)]
    n_far = counts[0] * counts[1] - (counts[0] - len(is_far[0])) * (counts[1] - len(is_far[1]))
    assert n_far <= facts["n_skipped_blocks"] <= facts["n_blocks"] == counts[0] * counts[1]


@pytest.mark.parametrize("shift", [(0, 0), (-2, 1), (1, -2)])
@pytest.mark.parametrize("block", [16, 24, 31])
def test_an_object_in_four_blocks_is_one(block: int, shift: tuple[int, int]) -> None:
    y, x = np.mgrid[: 2 * block + 1, : 2 * block + 1] - block + 0.5
    case = Case.of((np.hypot(y - shift[0], x - shift[1]) < DIAM_MEAN / 2).astype(np.int32))
    whole = check_blocks_equal_the_whole(case, block)
    assert whole.max() == 1
    corners = whole[block - 1 : block + 1, block - 1 : block + 1]
    assert corners.all(), "the object does not touch all four blocks: the test shows nothing"
    _, facts = labelled(case, block)
    assert facts["n_pairs"] == facts["n_exact_pairs"] >= 6  # each two of four blocks


@pytest.fixture(scope="module")
def strip() -> Case:
    """One object of 400 x 6 px, far longer than any halo."""
    field = np.zeros((64, 410), np.int32)
    field[29:35, 5:405] = 1
    return Case.of(field)


@pytest.mark.parametrize("flow_threshold", [0.0, 0.4])
@pytest.mark.parametrize("halo", [HALO, "auto"])
def test_an_object_larger_than_the_halo_is_linked_counted_and_reported(
    strip: Case, halo: int | str, flow_threshold: float
) -> None:
    whole, facts = labelled(strip, 410, flow_threshold=flow_threshold)
    assert facts["n_cut_by_halo"] == 0
    # Each part alone disagrees with the flow of the whole, and is not dropped for that.
    parts, facts = labelled(strip, 32, halo=halo, flow_threshold=flow_threshold)
    np.testing.assert_array_equal(parts, whole)
    assert whole.max() == 1
    assert facts["n_cut_by_halo"] == facts["n_blocks"] == 26
    assert facts["n_exact_pairs"] == facts["n_pairs"] >= 25


def test_a_large_object_is_whole_again_with_the_automatic_halo() -> None:
    y, x = np.mgrid[:100, :100] - 50
    case = Case.of((np.hypot(y, x) < 5 * DIAM_MEAN).astype(np.int32))
    _, facts = labelled(case, 32, halo=HALO)
    assert facts["n_cut_by_halo"] > 0
    assert check_blocks_equal_the_whole(case, 32).max() == 1


@settings(max_examples=25, derandomize=True)
@given(st.data(), st.sampled_from([16, 17, 24]), st.sampled_from([0.0, 0.2]), st.sampled_from([0, 40]))
def test_one_answer_in_a_volume(data: st.DataObject, block: int, noise: float, min_size: int) -> None:
    # A volume of a single plane is segmented as one.
    shape = tuple(max(data.draw(sides(block, 44)), 2 if axis == "z" else 1) for axis in "zyx")
    case = Case.of(data.draw(swarms(shape, DIAM_MEAN)), noise=noise, seed=data.draw(seeds) // 2)
    check_blocks_equal_the_whole(case, block, min_size=min_size)


@settings(max_examples=15, derandomize=True)
@given(st.data(), st.sampled_from([2.0, 5.0]), st.booleans(), st.sampled_from([0.0, 1.0]))
def test_one_answer_in_a_volume_of_thick_planes(
    data: st.DataObject, anisotropy: float, resample: bool, smooth: float
) -> None:
    shape = (data.draw(st.integers(2, 12)), *(data.draw(st.integers(20, 60)) for _ in range(2)))
    field = data.draw(swarms((round(shape[0] * anisotropy), *shape[1:]), DIAM_MEAN))
    case = Case.of(field, noise=0.1, shape=shape)
    block = data.draw(st.integers(16, 40))
    check_blocks_equal_the_whole(case, block, anisotropy=anisotropy, resample=resample, flow3d_smooth=smooth)


def test_a_ball_in_eight_blocks_is_one() -> None:
    places = np.indices((41, 41, 41)) - 20
    case = Case.of((np.sqrt(np.square(places).sum(axis=0)) < DIAM_MEAN / 2).astype(np.int32))
    whole = check_blocks_equal_the_whole(case, 20)
    assert whole.max() == 1
    assert whole[19:21, 19:21, 19:21].all(), "the ball does not touch all eight blocks: the test shows nothing"
    _, facts = labelled(case, 20)
    assert facts["n_pairs"] == facts["n_exact_pairs"] >= 28  # each two of eight blocks


def test_thin_planes_are_followed_in_true_directions() -> None:
    field = np.zeros((60, 40, 40), np.int32)
    for centre in (12, 30, 48):
        places = np.indices(field.shape) - np.array([centre, 20, 20])[:, None, None, None]
        field[np.sqrt(np.square(places).sum(axis=0)) < 8] = centre
    case = Case.of(numbered(field), shape=(12, 40, 40))
    labels, _ = labelled(case, 40, anisotropy=5.0)
    assert labels.max() == 3
    np.testing.assert_array_equal(labels[[2, 6, 9], 20, 20], [1, 2, 3])
