"""Dynamics: the same cells wherever a block lies, and the cells Cellpose finds."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tiledseg import dynamics, gpu, heat, objects, particles
from tiledseg.cores import Cores
from tiledseg.dynamics import compute_masks, find_sinks, grow_sinks
from tiledseg.errors import ImageError, SettingsError
from tiledseg.heat import flow_errors
from tiledseg.objects import fill_holes
from tiledseg.particles import follow_flows

from .strategies import Labels, connected, ellipses, label_fields, numbered, seeds, smooth_noise

Flows = npt.NDArray[np.float32]


def logits(labels: Labels) -> Flows:
    """A cellprob that is sure of the drawn cells."""
    return np.where(labels > 0, 3.0, -3.0).astype(np.float32)


def matched(truth: npt.NDArray[np.integer], found: npt.NDArray[np.integer], min_iou: float) -> float:
    """Fraction of the true objects that have a partner of at least this IoU."""
    n_true, n_found = int(truth.max()) + 1, int(found.max()) + 1
    joint = np.bincount(truth.reshape(-1).astype(np.int64) * n_found + found.reshape(-1), minlength=n_true * n_found)
    joint = joint.reshape(n_true, n_found)
    union = joint.sum(1)[:, None] + joint.sum(0)[None] - joint
    return float(((joint / np.maximum(union, 1))[1:, 1:].max(axis=1, initial=0) >= min_iou).mean())


# The whole


def test_drawn_cells_come_back() -> None:
    truth = ellipses((300, 330), 20, 900, seed=0)
    found = compute_masks(heat.label_flows(truth), logits(truth))
    assert found.dtype == np.uint32
    assert found.max() == truth.max() > 150
    assert matched(truth, found, 0.95) == 1.0
    np.testing.assert_array_equal(found, numbered(found))


@pytest.fixture(scope="module")
def crowd() -> Labels:
    """Touching cells of 20 px, 600 x 600."""
    return ellipses((600, 600), 20, 4000, seed=1)


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4])
def test_blocks_equal_the_whole(crowd: Labels, noise: float) -> None:
    flows, cellprob = heat.label_flows(crowd), logits(crowd)
    if noise > 0:
        flows = flows + smooth_noise(crowd.shape, 3, noise, seed=2)
        # Ragged edges and holes, so that objects are small, hollow and dropped.
        cellprob = cellprob + smooth_noise(crowd.shape, 0.7, 1.5, seed=3)[0]
    whole = compute_masks(flows, cellprob)
    assert whole.max() > 200
    for core, halo in [(64, 48), (150, 48), (163, 60), (300, 48), (599, 48)]:
        for corner in itertools.product(range(0, 600, max(core, 150)), repeat=2):
            padded = tuple(slice(max(a - halo, 0), min(a + core + halo, 600)) for a in corner)
            inner = tuple(slice(a - p.start, min(a + core, 600) - p.start) for a, p in zip(corner, padded, strict=True))
            block = compute_masks(flows[:, *padded], cellprob[padded])
            expected = whole[tuple(slice(a, a + core) for a in corner)]
            np.testing.assert_array_equal(numbered(block[inner]), numbered(expected))


@settings(max_examples=25, deadline=None)
@given(label_fields(min_side=8, max_side=40), seeds, st.tuples(*[st.tuples(*[st.integers(1, 9)] * 2)] * 2))
def test_moving_an_image_moves_its_labels(field: Labels, seed: int, margin: tuple[tuple[int, int], ...]) -> None:
    # With background on all sides, since a particle may rest on the edge of the array.
    field = np.pad(field, 1)
    flows = heat.label_flows(field) + smooth_noise(field.shape, 2, 0.2, seed)
    there = compute_masks(np.pad(flows, ((0, 0), *margin)), np.pad(logits(field), margin, constant_values=-3))
    inner = tuple(slice(before, -after) for before, after in margin)
    np.testing.assert_array_equal(there[inner], compute_masks(flows, logits(field)))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_the_cells_of_cellpose(noise: float) -> None:
    torch = pytest.importorskip("torch")
    cellpose = pytest.importorskip("cellpose.dynamics")
    truth = ellipses((200, 210), 20, 500, seed=4)
    flows = heat.label_flows(truth) + smooth_noise(truth.shape, 2, max(noise, 1e-9), seed=5)
    ours = compute_masks(flows, logits(truth))
    theirs = cellpose.resize_and_compute_masks(flows * 5, logits(truth), device=torch.device("cpu"))
    assert theirs.max() > 70
    assert matched(theirs, ours, 0.8) >= 0.98
    assert matched(ours, theirs, 0.8) >= 0.98


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_the_flows_of_cellpose() -> None:
    cellpose = pytest.importorskip("cellpose.dynamics")
    torch = pytest.importorskip("torch")
    cell = ellipses((40, 40), 24, 4, seed=3) == 1
    # One object: with several, Cellpose lets all diffuse as long as the largest needs.
    theirs, _ = cellpose.masks_to_flows_gpu(cell.astype(np.int64), device=torch.device("cpu"))
    ours = heat.label_flows(cell.astype(np.int32))
    lengths = np.linalg.norm(ours, axis=0)[cell]
    assert np.median((ours * theirs).sum(0)[cell]) > 0.99
    assert ((lengths > 0.999) | (lengths == 0)).all()


# Its edges


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (1, 1), (1, 40), (40, 1), (30, 20)])
def test_nothing_gives_nothing(shape: tuple[int, int]) -> None:
    labels = compute_masks(np.ones((2, *shape), np.float32), np.full(shape, -1, np.float32))
    assert labels.shape == shape
    assert not labels.any()


@pytest.mark.parametrize("axis", [0, 1])
def test_one_pixel_wide(axis: int) -> None:
    truth = np.zeros((1, 60), np.int32)
    truth[0, 3:25], truth[0, 25:50] = 1, 2
    truth = truth if axis == 1 else np.ascontiguousarray(truth.T)
    found = compute_masks(heat.label_flows(truth), logits(truth))
    np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize("step", [(0.0, 0.0), (1.0, 0.0), (-0.7, 0.3), (1e5, -1e5)])
def test_constant_flow_ends_at_the_border(step: tuple[float, float]) -> None:
    flows = np.broadcast_to(np.array(step, np.float32)[:, None, None], (2, 30, 41))
    ends = follow_flows(flows, np.ones((30, 41), np.bool_), 200)
    y, x = np.unravel_index(ends, ends.shape)
    rows, columns = np.indices(ends.shape)
    for end, start, toward, side in ((y, rows, step[0], 30), (x, columns, step[1], 41)):
        np.testing.assert_array_equal(end, start if toward == 0 else np.full_like(end, (side - 1) * (toward > 0)))
    labels = compute_masks(flows, np.ones((30, 41), np.float32), flow_threshold=0)
    np.testing.assert_array_equal(labels, numbered(labels))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_no_flow_is_an_error(bad: float) -> None:
    flows = np.zeros((2, 8, 9), np.float32)
    flows[1, 2, 3] = bad
    cellprob = np.ones((8, 9), np.float32)
    with pytest.raises(ImageError, match=r"flow at pixel \(2, 3\) of the block is .*, which is no step; look for NaN"):
        compute_masks(flows, cellprob)
    cellprob[2, 3] = np.nan  # not above any threshold: background, where flows do not count
    assert not compute_masks(flows, cellprob).any()


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(SettingsError, match=r"flows of shape \(2, 8, 9\) do not fit .* give shape \(2, 9, 8\)"):
        compute_masks(np.zeros((2, 8, 9), np.float32), np.zeros((9, 8), np.float32))
    with pytest.raises(SettingsError, match="flows over 4 axes cannot be followed"):
        compute_masks(np.zeros((4, 4, 4, 4, 4), np.float32), np.zeros((4, 4, 4, 4), np.float32))
    huge = np.broadcast_to(np.False_, (2**16, 2**15))
    with pytest.raises(SettingsError, match=r"block of shape \(65536, 32768\) has 2\*\*30 pixels or more; use"):
        follow_flows(np.broadcast_to(np.float32(0), (2, *huge.shape)), huge, 1)


def test_inputs_are_left_alone() -> None:
    truth = ellipses((60, 60), 16, 30, seed=6)
    flows, cellprob = heat.label_flows(truth), logits(truth)
    flows.flags.writeable = cellprob.flags.writeable = False
    expected = compute_masks(flows, cellprob)
    every_other = np.zeros((2, 60, 120), np.float32)
    every_other[..., ::2] = flows
    np.testing.assert_array_equal(compute_masks(every_other[..., ::2], np.asfortranarray(cellprob)), expected)


# Each step


def check_particles_against_numpy(truth: Labels, flows: npt.NDArray[np.float32], offset: float) -> None:
    """They end where float64 and scipy's interpolation say; an end is a coordinate plus an offset, cut off."""
    inside = flows * (truth > 0)
    for niter in (0, 1, 7, 9):  # before the first look at what has settled
        ends = follow_flows(flows, truth > 0, niter)
        place = np.stack(np.nonzero(truth)).astype(np.float64)
        for _ in range(niter):
            step = np.stack([ndimage.map_coordinates(axis, place, order=1, mode="nearest") for axis in inside])
            place = np.clip(place + step, 0, np.array(truth.shape)[:, None] - 1)
        expected = np.ravel_multi_index(tuple((place + offset).astype(int)), truth.shape)
        assert (ends[truth > 0] == expected).mean() > 0.99  # float32 against float64
        assert (ends[truth == 0] == -1).all()


def test_particles_follow_as_in_plain_numpy() -> None:
    truth = ellipses((50, 46), 16, 60, seed=7)
    check_particles_against_numpy(truth, heat.label_flows(truth) + smooth_noise(truth.shape, 2, 0.2, seed=8), 0.0)


def test_settled_particles_may_stop() -> None:
    truth = ellipses((120, 120), 20, 120, seed=9)
    flows = heat.label_flows(truth)
    labels = [compute_masks(flows, logits(truth), niter=niter) for niter in (200, 2000)]
    np.testing.assert_array_equal(*labels)


def test_of_equal_sinks_the_first_counts() -> None:
    counts = np.zeros((9, 20), np.int32)
    counts[4, 3] = counts[4, 5] = counts[6, 4] = 11  # near each other
    counts[4, 8] = 10  # too few
    counts[0, 12], counts[0, 14] = 12, 13
    counts[8, 19] = 11  # in a corner
    assert [tuple(np.unravel_index(i, counts.shape)) for i in find_sinks(counts)] == [
        (0, 14),
        (4, 3),
        (8, 19),
    ]


def test_a_chain_of_equal_sinks() -> None:
    # Each is beaten by the one before it, whether or not that one is a sink: a local rule.
    counts = np.zeros((1, 30), np.int32)
    counts[0, 2:12:2] = 20
    assert find_sinks(counts).tolist() == [2]


def test_sinks_grow_over_what_holds_enough() -> None:
    counts = np.full((3, 24), 3, np.int32)
    counts[1, 1] = 11
    counts[:, 4] = 2  # a wall
    counts[1, 15] = 11
    regions = grow_sinks(counts, np.array([25, 39]))
    assert (regions[:, :4] == 1).all()
    assert not regions[:, 4:10].any()
    assert (regions[:, 10:21] == 2).all()  # five rounds either way
    assert not regions[:, 21:].any()


@pytest.mark.parametrize(("left", "right", "owner"), [(11, 12, 2), (12, 11, 1), (11, 11, 1)])
def test_where_sinks_meet_the_fuller_wins(left: int, right: int, owner: int) -> None:
    counts = np.full((1, 30), 3, np.int32)
    counts[0, 10], counts[0, 14] = left, right
    regions = grow_sinks(counts, np.array([10, 14]))[0]
    assert (regions[9:16] == owner).all()
    assert (regions[5:9] == 1).all()
    assert (regions[16:20] == 2).all()


def plain_flow(is_object: np.ndarray, dtype: type) -> np.ndarray:
    """The flow of one object that fills its box, shape (2, y, x), with heat of a precision."""
    weights = np.pad(is_object, 1).astype(dtype) / dtype(9)
    at = np.argwhere(is_object)
    centre = tuple(at[np.argmin(((at - at.mean(axis=0)) ** 2).sum(axis=1))] + 1)
    warmth = np.zeros_like(weights)
    for _ in range(2 * (sum(is_object.shape) + 2)):
        warmth[centre] += dtype(1)
        sums = warmth[:-2] + warmth[1:-1] + warmth[2:]
        warmth[1:-1, 1:-1] = (sums[:, :-2] + sums[:, 1:-1] + sums[:, 2:]) * weights[1:-1, 1:-1]
    double = warmth.astype(np.float64)
    slopes = np.stack([double[2:, 1:-1] - double[:-2, 1:-1], double[1:-1, 2:] - double[1:-1, :-2]])
    return (slopes / (np.sqrt((slopes**2).sum(axis=0)) + 1e-60) * is_object).astype(np.float32)


def test_flow_error_is_the_mean_square() -> None:
    labels = connected(ellipses((120, 300), 16, 30, seed=21))
    labels[30:, 160:] = 0
    labels = numbered(labels)
    labels[34:110, 170:290] = (np.hypot(*np.ogrid[-1:1:76j, -1:1:120j]) < 1) * (labels.max() + 1)
    flows = np.random.default_rng(0).standard_normal((2, *labels.shape)).astype(np.float32)
    boxes = objects.object_boxes(labels, int(labels.max()))
    n_rounds = 2 * (boxes[:, 1] - boxes[:, 0] + 1).sum(axis=1)
    assert (n_rounds[:-1] < heat.SINGLE_ROUNDS).any()
    assert n_rounds[-1] > heat.SINGLE_ROUNDS
    expected = []
    for label, (start, stop) in enumerate(boxes, start=1):
        box = tuple(slice(*of) for of in zip(start, stop, strict=True))
        dtype = np.float64 if n_rounds[label - 1] > heat.SINGLE_ROUNDS else np.float32
        is_object = labels[box] == label
        square = ((plain_flow(is_object, dtype).astype(np.float64) - flows[(slice(None), *box)]) ** 2).sum(axis=0)
        expected.append(square[is_object].mean())
    np.testing.assert_allclose(flow_errors(labels, flows, boxes), expected, rtol=1e-12)


def test_the_precision_of_the_heat_changes_no_more_than_where_it_is_level() -> None:
    labels = connected(ellipses((300, 300), 20, 150, seed=22))
    flows = heat.label_flows(labels) + smooth_noise(labels.shape, 2, 0.3, seed=23)
    square = ((heat.label_flows(labels).astype(np.float64) - flows) ** 2).sum(axis=0)
    expected = [square[labels == label].mean() for label in range(1, int(labels.max()) + 1)]
    errors = flow_errors(labels, flows)
    assert errors.max() > 0.1
    # In the middle of what is symmetric there is no slope but that of rounding: any unit vector.
    one_pixel = 8 / np.bincount(labels.ravel())[1:]
    assert (np.abs(errors - expected) < one_pixel + 1e-3).all()
    assert (np.abs(errors - expected) < 1e-6).mean() > 0.25


def test_flow_threshold_drops_what_the_network_contradicts() -> None:
    truth = np.zeros((40, 80), np.int32)
    truth[10:30, 10:30], truth[10:30, 45:65] = 1, 2
    flows = heat.label_flows(truth)
    flows[:, :, 40:] *= 0.3  # the right sinks, but far from unit length
    assert compute_masks(flows, logits(truth), flow_threshold=0).max() == 2
    kept = compute_masks(flows, logits(truth), flow_threshold=0.4)
    np.testing.assert_array_equal(kept > 0, truth == 1)


@pytest.mark.parametrize(("min_size", "n_objects"), [(0, 2), (25, 2), (26, 1), (101, 0)])
def test_min_size_is_the_smallest_that_stays(min_size: int, n_objects: int) -> None:
    truth = np.zeros((30, 30), np.int32)
    truth[2:7, 2:7], truth[12:22, 12:22] = 1, 2
    assert compute_masks(heat.label_flows(truth), logits(truth), min_size=min_size).max() == n_objects


@settings(deadline=None)
@given(label_fields(max_side=16), seeds)
def test_holes_are_those_of_scipy(field: Labels, seed: int) -> None:
    is_dropped = np.random.default_rng(seed).random(field.shape) < 0.3
    labels = numbered(np.where(is_dropped, 0, field))
    filled = fill_holes(labels)
    np.testing.assert_array_equal(filled[labels > 0], labels[labels > 0])
    expected = labels.copy()
    for label in range(1, labels.max(initial=0) + 1):
        expected[ndimage.binary_fill_holes(labels == label) & (expected == 0)] = label
    np.testing.assert_array_equal(filled, expected)


def test_an_object_within_another_stays() -> None:
    labels = np.ones((7, 7), np.int32)
    labels[1:6, 1:6] = 0
    labels[3, 3] = 2
    filled = fill_holes(labels)
    assert filled[3, 3] == 2
    assert (filled == 1).sum() == 48


@given(label_fields(max_side=16), seeds)
def test_renumbering(field: Labels, seed: int) -> None:
    n_labels = int(field.max(initial=0))
    rng = np.random.default_rng(seed)
    shuffled = np.concatenate([[0], rng.permutation(n_labels) + 1])[field].astype(np.int32)
    is_kept = rng.random(n_labels) < 0.7
    found = objects.renumber(shuffled, is_kept)
    np.testing.assert_array_equal(
        found, numbered(np.where(np.isin(shuffled, np.flatnonzero(is_kept) + 1), shuffled, 0))
    )
    np.testing.assert_array_equal(objects.renumber(found, np.ones(found.max(initial=0), np.bool_)), found)


@settings(deadline=None)
@given(st.integers(2, 3).flatmap(lambda ndim: label_fields(ndim, max_side=9)))
def test_boxes_and_unit_flows(field: Labels) -> None:
    boxes = objects.object_boxes(field, int(field.max(initial=0)) + 1)
    for label, found in enumerate(ndimage.find_objects(field), start=1):
        assert boxes[label - 1].T.tolist() == [[s.start, s.stop] for s in found]
    assert (boxes[-1, 0] > boxes[-1, 1]).all()  # absent
    flows = heat.label_flows(field)
    lengths = np.sqrt((flows.astype(np.float64) ** 2).sum(axis=0))
    np.testing.assert_allclose(lengths[lengths > 0], 1, rtol=1e-6)
    assert not flows[:, field == 0].any()


def test_a_cell_flows_the_same_among_others() -> None:
    crowd = ellipses((80, 80), 18, 90, seed=10)
    together = heat.label_flows(crowd)
    for label in range(1, crowd.max() + 1):
        alone = heat.label_flows((crowd == label).astype(np.int32))
        np.testing.assert_array_equal(alone, together * (crowd == label))


def test_warm_up_compiles_what_compute_masks_needs() -> None:
    dynamics.warm_up()
    homes = (dynamics, heat, objects, particles)
    kernels = [value for home in homes for value in vars(home).values() if hasattr(value, "nopython_signatures")]
    before = [len(kernel.nopython_signatures) for kernel in kernels]
    assert len(kernels) > 10
    truth = connected(ellipses((50, 50), 16, 30, seed=11))
    flows = heat.label_flows(truth)
    compute_masks(flows, logits(truth))
    flows.flags.writeable = False
    compute_masks(flows, logits(truth))
    assert before == [len(kernel.nopython_signatures) for kernel in kernels]


@pytest.mark.parametrize("n_cores", [2, 5])
def test_labels_do_not_depend_on_the_number_of_cores(n_cores: int) -> None:
    truth = connected(ellipses((150, 260), 14, 400, seed=12))
    flows = heat.label_flows(truth) + smooth_noise(truth.shape, 2, 0.3, seed=13)
    alone = compute_masks(flows, logits(truth))
    cores = Cores(n_cores)
    with cores.task():
        together = compute_masks(flows, logits(truth), cores=cores)
    assert alone.max() > 100
    np.testing.assert_array_equal(together, alone)


def torch_devices() -> list[str]:
    """Where the GPU's code can run here: torch has the same operations on the CPU."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", torch_devices())
@pytest.mark.parametrize(
    ("shape", "diameter", "niter"),
    [((90, 140), 14, 200), ((61, 33), 14, 7), ((1, 40), 14, 25), ((30, 1), 14, 10), ((90, 140), 95, 60)],
)
def test_the_loops_of_the_gpu_give_the_bits_of_the_cpu(
    shape: tuple[int, int], diameter: float, niter: int, device: str
) -> None:
    truth = connected(ellipses((90, 140), diameter, 120, seed=14))[: shape[0], : shape[1]]
    flows = heat.label_flows(truth) + smooth_noise(truth.shape, 2, 0.3, seed=15)
    is_foreground = truth > 0
    assert is_foreground.any()
    ends = follow_flows(flows, is_foreground, niter)
    np.testing.assert_array_equal(gpu.follow_flows(flows, is_foreground, niter, device), ends)
    boxes = objects.object_boxes(truth, int(truth.max()))
    boxes[1::7, 1] = -1
    errors = gpu.flow_errors(truth, flows, boxes, device)
    np.testing.assert_array_equal(errors, flow_errors(truth, flows, boxes))
    assert np.count_nonzero(errors) > 0


def test_the_gpu_has_nothing_to_do_where_nothing_is() -> None:
    nothing = np.zeros((20, 30), np.int32)
    flows = np.zeros((2, 20, 30), np.float32)
    assert (gpu.follow_flows(flows, nothing > 0, 10, "cpu") == -1).all()
    assert gpu.flow_errors(nothing, flows, np.zeros((0, 2, 2), np.int64), "cpu").size == 0


def test_without_a_gpu_masks_are_made_on_the_cpu() -> None:
    import torch

    with gpu.idle_device("cuda") as device:
        assert device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_busy_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_is_idle", lambda: True)  # no machine of ours has one
    with gpu.idle_device("cuda") as first, gpu.idle_device("cuda") as second:
        assert (first, second) == ("cuda", "cpu")
    with gpu.idle_device("cuda") as third, gpu.idle_device("cpu") as fourth:
        assert (third, fourth) == ("cuda", "cpu")
