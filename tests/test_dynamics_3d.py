"""Dynamics of volumes: the same cells wherever a block lies, and the cells Cellpose finds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import tiledseg
from tiledseg import dynamics, gpu, heat, objects, particles
from tiledseg.cores import Cores
from tiledseg.dynamics import compute_masks, find_sinks, grow_sinks
from tiledseg.errors import ImageError, SettingsError
from tiledseg.objects import fill_holes
from tiledseg.particles import follow_flows
from tiledseg.volumes import label_volume, plane_flows, render_volume

from .strategies import Labels, label_fields, logits, numbered, seeds
from .test_dynamics import check_particles_against_numpy

Flows = npt.NDArray[np.float32]


def masks(flows: Flows, cellprob: Flows, min_size: int = 15, cores: Cores | None = None) -> npt.NDArray[np.uint32]:
    """Labels as of a volume: no flow threshold."""
    if cores is None:
        return compute_masks(flows, cellprob, flow_threshold=0, min_size=min_size)
    with cores.task():
        return compute_masks(flows, cellprob, flow_threshold=0, min_size=min_size, cores=cores)


def noise(shape: tuple[int, ...], sigma: float, size: float, seed: int) -> Flows:
    """Noise of standard deviation `size`, smooth over `sigma` pixels."""
    values = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma, axes=(-3, -2, -1))
    return (values * (size / values.std())).astype(np.float32)


def cells(shape: tuple[int, int, int], spacing: float, seed: int) -> Labels:
    """Touching cells."""
    return label_volume(shape, spacing, seed).astype(np.int32)


def matched(truth: npt.NDArray[np.integer], found: npt.NDArray[np.integer], min_iou: float) -> float:
    """Fraction of the objects of `truth` of 500 pixels or more that have a partner of at least this IoU."""
    n_true, n_found = int(truth.max()) + 1, int(found.max()) + 1
    pairs = truth.reshape(-1).astype(np.int64) * n_found + found.reshape(-1)
    joint = np.bincount(pairs, minlength=n_true * n_found).reshape(n_true, n_found)
    union = joint.sum(1)[:, None] + joint.sum(0)[None] - joint
    is_large = joint.sum(1)[1:] >= 500
    return float(((joint / union)[1:, 1:].max(axis=1, initial=0) >= min_iou)[is_large].mean())


@pytest.fixture(scope="module")
def crowd() -> Labels:
    """Touching cells of about 14 px, 112 x 104 x 120."""
    return cells((112, 104, 120), 14, seed=1)


@pytest.fixture(scope="module")
def crowd_flows(crowd: Labels) -> Flows:
    """Flows of the crowd as a network of planes gives them, and somewhat wrong."""
    return plane_flows(crowd) + noise((3, *crowd.shape), 2, 0.2, seed=2)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Threads of torch wait for one another at every operation, which takes long where others use the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The whole


def test_drawn_cells_come_back() -> None:
    truth = cells((80, 90, 100), 20, seed=0)
    boxes = objects.object_boxes(truth, int(truth.max()))
    is_whole = ((boxes[:, 0] > 0) & (boxes[:, 1] < truth.shape)).all(axis=1)
    truth = objects.renumber(truth, is_whole)
    found = masks(heat.label_flows(truth), logits(truth))
    assert found.dtype == np.uint32
    assert found.max() == truth.max() > 30
    np.testing.assert_array_equal(found, numbered(found))
    assert tiledseg.compare(found, truth, thresholds=(0.9, 0.97)).overall.ap == (1.0, 1.0)


def test_flows_of_planes_lead_to_the_cells(crowd: Labels, crowd_flows: Flows) -> None:
    assert 2 < np.linalg.norm(crowd_flows, axis=0).max() < 4
    found = masks(crowd_flows, logits(crowd))
    assert found.max() > 400
    assert matched(crowd, found, 0.5) > 0.9


@pytest.mark.parametrize("is_ragged", [False, True])
def test_blocks_equal_the_whole(crowd: Labels, crowd_flows: Flows, is_ragged: bool) -> None:
    cellprob = logits(crowd)
    if is_ragged:
        cellprob = cellprob + noise(crowd.shape, 0.7, 1.5, seed=3)  # ragged edges, holes and crumbs
    whole = masks(crowd_flows, cellprob)
    assert whole.max() > 400
    # The cells reach over 25 px; the halo is that and the way a sink spreads.
    halo = 33
    for core, corners in [
        ((37, 41, 29), [(0, 63, 45), (37, 31, 91)]),
        ((111, 7, 50), [(0, 51, 33)]),
        ((1, 103, 119), [(64, 0, 0)]),
    ]:
        for corner in corners:
            parts = list(zip(corner, core, crowd.shape, strict=True))
            padded = tuple(slice(max(a - halo, 0), min(a + n + halo, side)) for a, n, side in parts)
            inner = tuple(
                slice(a - p.start, min(a + n, side) - p.start) for (a, n, side), p in zip(parts, padded, strict=True)
            )
            block = masks(crowd_flows[:, *padded], cellprob[padded])
            expected = whole[tuple(slice(a, a + n) for a, n, _ in parts)]
            np.testing.assert_array_equal(numbered(block[inner]), numbered(expected))


def test_objects_wholly_inside_a_block_are_those_of_the_whole(crowd: Labels, crowd_flows: Flows) -> None:
    cellprob = logits(crowd)
    whole = masks(crowd_flows, cellprob)
    block = (slice(5, 110), slice(7, 104), slice(3, 112))
    inside = masks(crowd_flows[:, *block], cellprob[block])
    # Far from the block's faces, where other objects are cut.
    boxes = objects.object_boxes(whole.view(np.int32), int(whole.max()))
    low, high = (np.array([getattr(part, end) for part in block]) for end in ("start", "stop"))
    is_edge = high == np.array(crowd.shape)
    is_inside = ((boxes[:, 0] >= low + 10) & (is_edge | (boxes[:, 1] <= high - 10))).all(axis=1)
    assert is_inside.sum() > 40
    for label in np.flatnonzero(is_inside) + 1:
        here = whole[block] == label
        (twin,) = np.unique(inside[here])
        np.testing.assert_array_equal(inside == twin, here)


@settings(max_examples=15)
@given(label_fields(3, min_side=4, max_side=16), seeds, st.tuples(*[st.tuples(*[st.integers(1, 5)] * 2)] * 3))
def test_moving_a_volume_moves_its_labels(field: Labels, seed: int, margin: tuple[tuple[int, int], ...]) -> None:
    # With background on all sides, since a particle may rest on a face of the array; a step is up to 3 px.
    field = np.pad(field, 4)
    flows = plane_flows(field) + noise((3, *field.shape), 2, 0.2, seed)
    there = masks(np.pad(flows, ((0, 0), *margin)), np.pad(logits(field), margin, constant_values=-3))
    inner = tuple(slice(before, -after) for before, after in margin)
    np.testing.assert_array_equal(there[inner], masks(flows, logits(field)))


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("size", [0.0, 0.2])
def test_the_cells_of_cellpose(size: float) -> None:
    torch = pytest.importorskip("torch")
    cellpose = pytest.importorskip("cellpose.dynamics")
    truth = cells((40, 44, 48), 15, seed=4)
    flows = heat.label_flows(truth) + noise((3, *truth.shape), 2, max(size, 1e-9), seed=5)
    ours = masks(flows, logits(truth))
    theirs = cellpose.compute_masks(
        flows * 5, logits(truth), flow_threshold=0, do_3D=True, min_size=15, device=torch.device("cpu")
    )
    assert theirs.max() > 40
    assert matched(theirs, ours, 0.7) >= 0.97
    assert matched(ours, theirs, 0.7) >= 0.97


@pytest.mark.parametrize("n_cores", [2, 5])
def test_labels_do_not_depend_on_the_number_of_cores(crowd: Labels, crowd_flows: Flows, n_cores: int) -> None:
    part = np.s_[:50, :60, :]
    values = np.ascontiguousarray(crowd_flows[:, *part]), logits(crowd[part])
    np.testing.assert_array_equal(masks(*values, cores=Cores(n_cores)), masks(*values))


# Its edges


@pytest.mark.parametrize("shape", [(0, 0, 0), (0, 4, 7), (4, 0, 7), (4, 7, 0), (1, 1, 1), (1, 1, 30), (9, 11, 10)])
def test_nothing_gives_nothing(shape: tuple[int, int, int]) -> None:
    labels = masks(np.ones((3, *shape), np.float32), np.full(shape, -1, np.float32))
    assert labels.shape == shape
    assert not labels.any()


def test_a_volume_of_one_plane_is_that_plane_whichever_way_it_lies(crowd: Labels) -> None:
    plane = np.ascontiguousarray(crowd[50])
    flows = heat.label_flows(plane) + noise((2, 1, *plane.shape), 2, 0.2, seed=9)[:, 0]
    expected = dynamics.gather_pixels(flows, logits(plane), cellprob_threshold=0, niter=200)
    found = []
    for across in range(3):
        volume = np.insert(np.expand_dims(flows, across + 1), across, 0, axis=0)
        logit = np.expand_dims(logits(plane), across)
        found.append(dynamics.gather_pixels(volume, logit, cellprob_threshold=0, niter=200).squeeze(across))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
    # In a plane coordinates are cut off, in a volume rounded: fewer sinks fall apart.
    assert expected.max() * 0.9 < found[0].max() <= expected.max()


def test_two_planes(crowd: Labels) -> None:
    truth = numbered(crowd[50:52])
    found = masks(heat.label_flows(truth), logits(truth))
    assert matched(truth, found, 0.9) > 0.9
    flows = plane_flows(truth)
    np.testing.assert_array_equal(masks(flows, logits(truth), cores=Cores(3)), masks(flows, logits(truth)))


@pytest.mark.parametrize("step", [(0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (-0.7, 0.3, -1.9), (1e5, -1e5, 1e5)])
def test_constant_flow_ends_at_the_faces(step: tuple[float, float, float]) -> None:
    shape = (11, 23, 41)
    flows = np.broadcast_to(np.array(step, np.float32)[:, None, None, None], (3, *shape))
    ends = follow_flows(flows, np.ones(shape, np.bool_), 200)
    for end, start, toward, side in zip(np.unravel_index(ends, shape), np.indices(shape), step, shape, strict=True):
        np.testing.assert_array_equal(end, start if toward == 0 else np.full_like(end, (side - 1) * (toward > 0)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_no_flow_is_an_error(bad: float) -> None:
    flows = np.zeros((3, 6, 8, 9), np.float32)
    flows[2, 4, 2, 3] = bad
    cellprob = np.ones((6, 8, 9), np.float32)
    with pytest.raises(ImageError, match=r"flow at pixel \(4, 2, 3\) of the block is .*, which is no step; look for"):
        masks(flows, cellprob)
    cellprob[4, 2, 3] = np.nan  # not above any threshold: background, where flows do not count
    assert not masks(flows, cellprob).any()


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(SettingsError, match=r"flows of shape \(2, 4, 8, 9\) do not fit .* give shape \(3, 4, 8, 9\)"):
        masks(np.zeros((2, 4, 8, 9), np.float32), np.zeros((4, 8, 9), np.float32))
    for shape in [(5,), (2, 3, 4, 5)]:
        flows, cellprob = np.zeros((len(shape), *shape), np.float32), np.zeros(shape, np.float32)
        with pytest.raises(SettingsError, match=f"over {len(shape)} axes cannot be followed; give arrays of two axes"):
            masks(flows, cellprob)


@pytest.mark.parametrize(
    ("shape", "text"),
    [((1024, 1024, 1024), r"2\*\*31 / 3"), ((1, 2**15, 2**14), r"2\*\*31 / 3"), ((1, 2**29), r"2\*\*30")],
)
def test_blocks_with_more_pixels_than_indices(shape: tuple[int, ...], text: str) -> None:
    # One more pixel along each axis counts: so the last two are too large.
    huge = np.broadcast_to(np.False_, shape)
    with pytest.raises(
        SettingsError, match=rf"block of shape \({shape[0]}, .*\) has {text} pixels or more; use a smaller"
    ):
        follow_flows(np.broadcast_to(np.float32(0), (len(shape), *shape)), huge, 1)


def test_inputs_may_lie_in_any_order_and_are_left_alone(crowd: Labels, crowd_flows: Flows) -> None:
    part = np.s_[10:40, :50, 20:75]
    flows, cellprob = np.ascontiguousarray(crowd_flows[:, *part]), logits(crowd[part])
    flows.flags.writeable = cellprob.flags.writeable = False
    expected = masks(flows, cellprob)
    assert expected.max() > 20
    turned = np.ascontiguousarray(flows.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0)
    every_other = np.zeros((3, *flows.shape[1:3], 2 * flows.shape[3]), np.float32)
    every_other[..., ::2] = flows
    backwards = np.ascontiguousarray(flows[:, ::-1, :, ::-1])[:, ::-1, :, ::-1]
    for other in (np.asfortranarray(flows), turned, every_other[..., ::2], backwards):
        assert not other.flags.c_contiguous
        np.testing.assert_array_equal(masks(other, np.asfortranarray(cellprob)), expected)


# Each step


def test_particles_follow_as_in_plain_numpy() -> None:
    truth = cells((20, 34, 27), 14, seed=7)
    check_particles_against_numpy(truth, plane_flows(truth) + noise((3, *truth.shape), 2, 0.2, seed=8), 0.5)


def torch_devices() -> list[str]:
    """Where the GPU's code can run here: torch has the same operations on the CPU."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("device", torch_devices())
@pytest.mark.parametrize(
    ("shape", "niter"),
    [((24, 28, 30), 200), ((23, 31, 17), 7), ((1, 40, 33), 25), ((2, 1, 60), 10), ((30, 20, 1), 0), ((0, 5, 6), 3)],
)
def test_the_gpu_gives_the_bits_of_the_cpu(
    crowd: Labels,
    crowd_flows: Flows,
    shape: tuple[int, int, int],
    niter: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = tuple(slice(30, 30 + n) for n in shape)
    flows, is_foreground = crowd_flows[:, *part], crowd[part] > 0
    ends = follow_flows(flows, is_foreground, niter)
    np.testing.assert_array_equal(gpu.follow_flows(flows, is_foreground, niter, device), ends)
    monkeypatch.setattr(gpu, "AT_ONCE", 5000)
    np.testing.assert_array_equal(gpu.follow_flows(flows, is_foreground, niter, device), ends)


def test_the_flow_error_of_a_volume_is_found_on_the_cpu(crowd: Labels, crowd_flows: Flows) -> None:
    part = np.s_[20:60, 20:60, 20:60]
    flows = crowd_flows[:, *part]
    gathered = dynamics.gather_pixels(flows, logits(crowd[part]), cellprob_threshold=0, niter=50)
    kept, none = (
        dynamics.finish_masks(gathered, flows, flow_threshold=threshold, min_size=15, device="cuda")
        for threshold in (100.0, 0.001)
    )
    np.testing.assert_array_equal(kept, dynamics.finish_masks(gathered, flows, flow_threshold=0, min_size=15))
    assert kept.any()
    assert not none.any()


def test_of_equal_sinks_the_first_counts() -> None:
    counts = np.zeros((9, 9, 20), np.int32)
    counts[4, 4, 3] = counts[4, 4, 5] = counts[6, 2, 4] = counts[5, 6, 3] = 11  # near each other
    counts[4, 4, 8] = 10  # too few
    counts[0, 0, 12], counts[2, 2, 14] = 12, 13
    counts[8, 8, 19] = 11  # in a corner
    found = [tuple(int(k) for k in np.unravel_index(i, counts.shape)) for i in find_sinks(counts)]
    assert found == [(2, 2, 14), (4, 4, 3), (8, 8, 19)]


@pytest.mark.parametrize(("left", "right", "owner"), [(11, 12, 2), (12, 11, 1), (11, 11, 1)])
def test_where_sinks_meet_the_fuller_wins(left: int, right: int, owner: int) -> None:
    counts = np.full((13, 13, 24), 3, np.int32)
    counts[6, 6, 10], counts[6, 6, 14] = left, right
    regions = grow_sinks(counts, np.flatnonzero(counts > 10))
    inner = regions[1:12, 1:12]  # five rounds to either side
    assert (inner[:, :, 9:16] == owner).all()
    assert (inner[:, :, 5:9] == 1).all()
    assert (inner[:, :, 16:20] == 2).all()
    assert (regions > 0).sum() == inner[:, :, 5:20].size


def test_holes_of_touching_cells() -> None:
    labels = np.zeros((12, 12, 23), np.int32)
    labels[1:11, 1:11, 1:11], labels[1:11, 1:11, 11:22] = 1, 2
    expected = labels.copy()
    labels[4:6, 4:6, 4:6] = 0  # enclosed by the first
    labels[7:9, 7:9, 15:20] = 0  # enclosed by the second,
    labels[8, 8, 17] = 1  # but for a pixel that another has
    expected[8, 8, 17] = 1
    for way_out in (np.s_[0:3, 2, 2], np.s_[2, 8, 8:14]):  # to the background, and between the two
        labels[way_out] = expected[way_out] = 0
    assert labels[2, 8, 10] == labels[2, 8, 11] == 0
    np.testing.assert_array_equal(fill_holes(labels), expected)


@settings(max_examples=40)
@given(label_fields(3, max_side=10), seeds)
def test_holes_are_those_of_scipy(field: Labels, seed: int) -> None:
    is_dropped = np.random.default_rng(seed).random(field.shape) < 0.15
    labels = numbered(np.where(is_dropped, 0, field))
    expected = labels.copy()
    for label in range(1, labels.max(initial=0) + 1):
        expected[ndimage.binary_fill_holes(labels == label) & (expected == 0)] = label
    np.testing.assert_array_equal(fill_holes(labels), expected)


def test_warm_up_compiles_what_volumes_need() -> None:
    dynamics.warm_up(3)
    homes = (dynamics, heat, objects, particles)
    kernels = [value for home in homes for value in vars(home).values() if hasattr(value, "nopython_signatures")]
    before = [len(kernel.nopython_signatures) for kernel in kernels]
    assert particles._follow_3d in kernels
    truth = cells((30, 30, 30), 14, seed=11)
    flows = heat.label_flows(truth)
    masks(flows, logits(truth))
    flows.flags.writeable = False
    masks(flows, logits(truth))
    objects.measure_objects(truth, np.ones((1, *truth.shape), np.uint16), np.arange(truth.max()) + 1)
    assert before == [len(kernel.nopython_signatures) for kernel in kernels]


# The volumes this is tried on


@pytest.fixture(scope="module")
def volume() -> Labels:
    """A volume with planes three pixels apart."""
    return label_volume((30, 100, 110), 24, seed=6, anisotropy=3.0).astype(np.int32)


def test_cells_of_a_volume_are_connected_and_touch(volume: Labels) -> None:
    np.testing.assert_array_equal(volume, numbered(volume))
    boxes, sizes = objects.object_extents(volume, int(volume.max()))
    assert 80 < volume.max() < 300
    assert 0.05 < (volume == 0).mean() < 0.4
    is_touching = np.zeros(volume.max() + 1, np.bool_)
    for axis in range(3):
        low, high = np.moveaxis(volume, axis, 0)[:-1], np.moveaxis(volume, axis, 0)[1:]
        meets = (low != high) & (low > 0) & (high > 0)
        is_touching[low[meets]] = is_touching[high[meets]] = True
    assert is_touching[1:][sizes > 100].mean() > 0.9
    for label in range(1, volume.max() + 1):
        assert ndimage.label(volume == label)[1] == 1
    lengths = (boxes[:, 1] - boxes[:, 0])[sizes > 2000]
    assert np.median(lengths[:, 1]) == pytest.approx(3 * np.median(lengths[:, 0]), rel=0.2)
    assert np.median(lengths[:, 1]) == pytest.approx(24, rel=0.3)


def test_a_seed_makes_a_volume(volume: Labels) -> None:
    np.testing.assert_array_equal(label_volume(volume.shape, 24, seed=6, anisotropy=3.0), volume)
    assert (label_volume(volume.shape, 24, seed=7, anisotropy=3.0) != volume).any()
    image = render_volume(volume, seed=1, anisotropy=3.0)
    np.testing.assert_array_equal(render_volume(volume, seed=1, anisotropy=3.0), image)
    assert (render_volume(volume, seed=2, anisotropy=3.0) != image).any()


def test_nuclei_are_bright_and_dim_at_their_rims(volume: Labels, monkeypatch: pytest.MonkeyPatch) -> None:
    image = render_volume(volume, seed=1, anisotropy=3.0)
    assert image.dtype == np.uint16
    depth = ndimage.distance_transform_edt(np.pad(volume > 0, 1), (3, 1, 1))[1:-1, 1:-1, 1:-1]
    assert np.median(image[depth == 0]) < 700
    assert image[depth > 4].mean() > 1500
    # Where two cells touch it is darker than inside either.
    touches = np.zeros(volume.shape, np.bool_)
    touches[:, :, 1:] = (volume[:, :, 1:] != volume[:, :, :-1]) & (volume[:, :, 1:] > 0) & (volume[:, :, :-1] > 0)
    assert image[touches].mean() < 0.8 * image[depth > 4].mean()
    from tiledseg import volumes

    monkeypatch.setattr(volumes, "PLANES", 7)
    np.testing.assert_array_equal(render_volume(volume, seed=1, anisotropy=3.0), image)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"shape": (5, 5)}, "shape of the volume is .5, 5.; give three lengths"),
        ({"spacing": 3.0}, "spacing of the volume is 3.0; give 6 to 1000 pixels"),
        ({"seed": -1}, "seed of the volume is -1; give an integer"),
        ({"anisotropy": 0.5}, "anisotropy of the volume is 0.5; give 1 up to a third of the spacing"),
    ],
)
def test_settings_of_a_volume(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        label_volume(**{"shape": (20, 20, 20), **wrong})
