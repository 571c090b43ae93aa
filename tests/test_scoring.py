"""The score of two label arrays, against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiledseg.errors import SettingsError
from tiledseg.scoring import compare, exact_difference

THRESHOLDS = (0.3, 0.5, 0.6, 0.9)


def brute_matches(predicted, truth, min_iou):
    """Greedy matches {truth id: (predicted id, IoU)} by looking at every pair of ids."""
    candidates = []
    for t in np.unique(truth[truth > 0]).tolist():
        for p in np.unique(predicted[predicted > 0]).tolist():
            union = ((truth == t) | (predicted == p)).sum()
            iou = ((truth == t) & (predicted == p)).sum() / union
            if iou >= min_iou:
                candidates.append((-iou, t, p))
    matches = {}
    for iou, t, p in sorted(candidates):
        if t not in matches and p not in {other for other, _ in matches.values()}:
            matches[t] = (p, -iou)
    return matches


def crosses(mask, block):
    """Whether a mask has pixels in two different blocks along some axis."""
    return any(np.unique(indices // block).size > 1 for indices in np.nonzero(mask))


def brute_covering(predicted, mask):
    """Masks of the predictions that hold 20 % of a mask or more."""
    ids = np.unique(predicted[mask & (predicted > 0)])
    return [predicted == p for p in ids if 5 * (mask & (predicted == p)).sum() >= mask.sum()]


def brute_is_cut(predicted, mask, block):
    """The definition in the docstring, edge by edge."""
    covering = brute_covering(predicted, mask)
    for axis, length in enumerate(mask.shape):
        for edge in range(block, length, block):

            def sides(one, axis=axis, edge=edge):
                indices = np.nonzero(one)[axis]
                return (indices < edge).any(), (indices >= edge).any()

            both = {(True, False), (False, True)}
            if all(sides(mask)) and {sides(one) for one in covering} == both:
                return True
    return False


def score_counts(score):
    return (score.n_true_positive, score.n_false_positive, score.n_false_negative)


@st.composite
def label_pairs(draw, max_side=9, max_label=4):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=max_side))
    truth = draw(hnp.arrays(np.uint16, shape, elements=st.integers(0, max_label)))
    noise = draw(hnp.arrays(np.bool_, shape))
    predicted = np.where(noise, draw(hnp.arrays(np.uint16, shape, elements=st.integers(0, max_label))), truth)
    return predicted, truth


@settings(max_examples=150, deadline=None)
@given(label_pairs(), st.integers(1, 5))
def test_compare_agrees_with_counting_by_hand(pair, block):
    predicted, truth = pair
    found = compare(predicted, truth, thresholds=THRESHOLDS, block=block)

    matches = brute_matches(predicted, truth, min(THRESHOLDS))
    truth_ids = np.unique(truth[truth > 0]).tolist()
    predicted_ids = np.unique(predicted[predicted > 0]).tolist()
    truth_crosses = {t: crosses(truth == t, block) for t in truth_ids}
    predicted_crosses = {p: crosses(predicted == p, block) for p in predicted_ids}
    predicted_crosses |= {p: truth_crosses[t] for t, (p, _) in matches.items()}

    def expected(wanted):
        n_truth = sum(wanted(truth_crosses[t]) for t in truth_ids)
        n_predicted = sum(wanted(predicted_crosses[p]) for p in predicted_ids)
        tp = [
            sum(iou >= threshold and wanted(truth_crosses[t]) for t, (_, iou) in matches.items())
            for threshold in THRESHOLDS
        ]
        return tuple(tp), tuple(n_predicted - n for n in tp), tuple(n_truth - n for n in tp)

    assert score_counts(found.overall) == expected(lambda _: True)
    assert score_counts(found.at_seams) == expected(lambda at_seam: at_seam)
    assert score_counts(found.elsewhere) == expected(lambda at_seam: not at_seam)
    assert found.n_cut == sum(brute_is_cut(predicted, truth == t, block) for t in truth_ids)
    assert found.n_split == sum(len(brute_covering(predicted, truth == t)) > 1 for t in truth_ids)
    assert found.n_different == (predicted != truth).sum() == exact_difference(predicted, truth)
    assert found.exact == np.array_equal(predicted, truth)
    if matches:
        assert found.overall.mean_iou_matched == pytest.approx(np.mean([iou for _, iou in matches.values()]))


@settings(max_examples=60, deadline=None)
@given(label_pairs(), st.integers(1, 40))
def test_result_does_not_depend_on_how_much_is_read_at_once(pair, pixels_at_once):
    predicted, truth = pair
    whole = compare(predicted, truth, block=3)
    assert compare(predicted, truth, block=3, pixels_at_once=pixels_at_once) == whole
    assert exact_difference(predicted, truth, pixels_at_once=pixels_at_once) == whole.n_different


@settings(max_examples=60, deadline=None)
@given(label_pairs(max_label=6), st.permutations([2**32 - 1, 2**31, 7, 99_999, 2**32 - 5, 2**24 + 1]))
def test_ids_may_be_huge_and_in_any_order(pair, ids):
    predicted, truth = pair
    table = np.array([0, *ids], np.uint32)
    # Renaming only the prediction keeps ties, which go by the lowest id, out of the picture above 0.5.
    plain = compare(predicted, truth, thresholds=(0.51,), block=4)
    renamed = compare(table[predicted], truth, thresholds=(0.51,), block=4)
    assert renamed.overall == plain.overall
    assert (renamed.at_seams, renamed.n_cut, renamed.n_split) == (plain.at_seams, plain.n_cut, plain.n_split)


def test_ids_past_32_bits():
    truth = np.array([[0, 1, 1], [2, 2, 0]], np.uint64)
    predicted = truth * np.uint64(2**61)
    assert compare(predicted, truth).overall.ap == (1.0, 1.0, 1.0)
    with pytest.raises(SettingsError, match="predicted holds ids below 0 or past"):
        compare(truth * np.uint64(2**62), truth)
    with pytest.raises(SettingsError, match="truth holds ids below 0"):
        compare(predicted, np.array([[0, 0, -1], [0, 0, 0]]))


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_cellpose(seed):
    metrics = pytest.importorskip("cellpose.metrics")
    from scipy.ndimage import grey_erosion, shift
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 120, (60, 2))
    where = np.stack(np.meshgrid(np.arange(120), np.arange(120), indexing="ij"), axis=-1)
    distance, nearest = cKDTree(points).query(where)
    truth = np.where(distance < 9, nearest + 1, 0).astype(np.int32)
    moved = shift(truth, rng.integers(-1, 2, 2), order=0)
    predicted = np.where(rng.uniform(size=61)[moved] < 0.5, grey_erosion(moved, 3), moved)
    predicted = np.where(predicted % 7 == 3, 0, predicted)

    thresholds = (0.5, 0.6, 0.7, 0.8)
    gap_free = np.unique(predicted, return_inverse=True)[1].reshape(truth.shape)
    ap, tp, fp, fn = metrics.average_precision(truth, gap_free, list(thresholds))
    score = compare(predicted, truth, thresholds=thresholds).overall
    assert score_counts(score) == (tuple(tp), tuple(fp), tuple(fn))
    assert score.ap == pytest.approx(ap, abs=1e-6)
    assert 0 < score.ap[-1] < score.ap[0] < 1


def test_a_tie_at_exactly_one_half_counts_once():
    truth = np.array([[1, 1, 1, 1]])
    predicted = np.array([[9, 9, 4, 4]])
    score = compare(predicted, truth, thresholds=(0.5,)).overall
    assert score_counts(score) == ((1,), (1,), (0,))
    assert score.ap == (0.5,)
    assert score.mean_iou_matched == 0.5


def test_no_objects_at_all_is_perfect_and_one_sided_is_nothing():
    empty = np.zeros((5, 6), np.uint32)
    some = empty.copy()
    some[1:3, 1:3] = 8
    found = compare(empty, empty, block=2)
    assert found.overall.ap == found.at_seams.ap == (1.0, 1.0, 1.0)
    assert found.overall.mean_iou_matched == 1.0
    assert (found.exact, found.n_cut, found.n_split) == (True, 0, 0)
    for predicted, truth in ((some, empty), (empty, some)):
        found = compare(predicted, truth)
        assert found.overall.ap == (0.0, 0.0, 0.0)
        assert found.overall.mean_iou_matched == 0.0
        assert (found.n_different, found.at_seams, found.n_cut) == (4, None, None)
    assert compare(np.zeros((0, 4), int), np.zeros((0, 4), int)).exact


def square(first_row, last_row, first_column, last_column, label=1, out=None):
    out = np.zeros((20, 20), np.int32) if out is None else out
    out[first_row:last_row, first_column:last_column] = label
    return out


@pytest.mark.parametrize(
    ("boundary", "block", "n_cut", "n_split"),
    [
        (10, 10, 1, 1),  # cut where the block ends
        (9, 10, 0, 1),  # cut a pixel off: one piece crosses the edge, so the edge is not to blame
        (10, 20, 0, 1),  # no block ends there
        (15, 10, 0, 0),  # the second piece is too small a part to count
        (10, 5, 1, 1),  # cut at one of two edges
    ],
)
def test_cut_means_two_pieces_on_either_side_of_an_edge(boundary, block, n_cut, n_split):
    truth = square(2, 6, 4, 16)
    predicted = square(2, 6, boundary, 16, 3, square(2, 6, 4, boundary, 2))
    found = compare(predicted, truth, block=block)
    assert (found.n_cut, found.n_split) == (n_cut, n_split)


def test_groups_follow_the_truth_of_a_matched_prediction():
    truth = square(2, 6, 4, 10)  # ends where the block ends
    predicted = square(2, 6, 4, 11)  # reaches across
    found = compare(predicted, truth, block=10)
    assert score_counts(found.elsewhere) == ((1, 1, 0), (0, 0, 1), (0, 0, 1))
    assert found.at_seams.n_truth == found.at_seams.n_predicted == 0
    found = compare(predicted, np.zeros_like(truth), block=10)
    assert found.at_seams.n_predicted == 1


def test_time_is_not_space():
    truth = np.zeros((2, 4, 4), np.int32)
    truth[:, 1, 1] = 1
    assert compare(truth, truth, block=1).at_seams.n_truth == 1
    assert compare(truth, truth, block=1, n_spatial=2).at_seams.n_truth == 0


def test_zarr_and_dask_with_an_extra_axis(tmp_path: Path):
    import dask.array as da
    import zarr

    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(0, 5, (11, 7)), np.ones((5, 5), int)).astype(np.uint32)
    predicted = np.roll(truth, 2, axis=1)
    stored = zarr.create_array(tmp_path / "predicted.zarr", shape=(1, 1, 55, 35), chunks=(1, 1, 16, 8), dtype="uint32")
    stored[0, 0] = predicted
    lazy = da.from_array(truth, chunks=(20, 9))
    seen = []
    found = compare(stored, lazy, block=10, pixels_at_once=64, progress=lambda *counts: seen.append(counts))
    assert found == compare(predicted, truth, block=10)
    assert seen[-1] == ("compare", len(seen), len(seen))
    assert len(seen) > 30
    assert exact_difference(lazy, stored) == found.n_different > 0


def test_json_of_a_comparison():
    labels = square(2, 6, 4, 16)
    as_read = json.loads(json.dumps(compare(labels, labels, block=10).as_dict()))
    assert as_read["exact"] is True
    assert as_read["at_seams"]["ap"] == [1.0, 1.0, 1.0]
    assert as_read["overall"]["n_truth"] == as_read["overall"]["n_predicted"] == 1
    assert as_read["elsewhere"]["n_truth"] == as_read["n_cut"] == as_read["n_different"] == 0
    assert json.loads(json.dumps(compare(labels, labels).as_dict()))["at_seams"] is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"thresholds": ()}, "thresholds is empty"),
        ({"thresholds": (0.5, 1.2)}, "threshold 1.2 is no IoU"),
        ({"block": 0}, "block is 0; give a number of pixels"),
        ({"pixels_at_once": -1}, "pixels_at_once is -1"),
        ({"n_spatial": 3}, "n_spatial is 3 but the labels have 2 axes; give 1 to 2"),
    ],
)
def test_settings_out_of_range_are_refused(options, text):
    labels = np.zeros((4, 4), int)
    with pytest.raises(SettingsError, match=text):
        compare(labels, labels, **options)


def test_arrays_that_do_not_fit_are_refused():
    labels = np.zeros((4, 4), int)
    with pytest.raises(SettingsError, match=r"predicted has shape \(4, 4\) and truth \(4, 5\)"):
        compare(labels, np.zeros((4, 5), int))
    with pytest.raises(SettingsError, match=r"predicted has shape \(2, 4, 4\)"):
        exact_difference(np.zeros((2, 4, 4), int), labels)
    with pytest.raises(SettingsError, match="predicted is an array of float32; give labels"):
        compare(labels.astype(np.float32), labels)
