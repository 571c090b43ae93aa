"""How well two label arrays agree: average precision, cells cut at block edges, bit equality.

Labels in, numbers out; `overlaps` streams the arrays, so memory grows with the number of objects and
with nothing else.

References
----------
Stringer et al. (2021), "Cellpose: a generalist algorithm for cellular segmentation", Nature Methods
18, 100-106, for average precision as tp / (tp + fp + fn) of objects matched by IoU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SettingsError
from .overlaps import Contents, LabelArray, LabelPair, read_contents

__all__ = ["Comparison", "Score", "compare", "exact_difference"]

PIXELS_AT_ONCE = 1 << 22
COVERS = 5  # a prediction covers a truth object if it holds at least one part in this many: 20 %

Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Listener = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Score:
    """How many objects of a set were found; one count per threshold."""

    thresholds: tuple[float, ...]
    """IoU a pair needs to count as found, each in (0, 1]."""
    n_true_positive: tuple[int, ...]
    n_false_positive: tuple[int, ...]
    n_false_negative: tuple[int, ...]
    mean_iou_matched: float
    """Of the pairs matched at the lowest threshold; 1 if there are no objects, 0 if no pairs."""

    @property
    def n_predicted(self) -> int:
        """Predicted objects in the set."""
        return self.n_true_positive[0] + self.n_false_positive[0]

    @property
    def n_truth(self) -> int:
        """Truth objects in the set."""
        return self.n_true_positive[0] + self.n_false_negative[0]

    @property
    def ap(self) -> tuple[float, ...]:
        """Average precision tp / (tp + fp + fn) at each threshold; 1 where there are no objects at all."""
        counts = zip(self.n_true_positive, self.n_false_positive, self.n_false_negative, strict=True)
        return tuple(tp / (tp + fp + fn) if tp + fp + fn else 1.0 for tp, fp, fn in counts)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and tuples of them, fit for JSON."""
        return {**asdict(self), "ap": self.ap, "n_predicted": self.n_predicted, "n_truth": self.n_truth}


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; `at_seams`, `elsewhere` and `n_cut` are None without a block."""

    overall: Score
    at_seams: Score | None
    """Score of objects that cross a block edge."""
    elsewhere: Score | None
    """Score of all other objects; the counts of both add up to those of `overall`."""
    n_cut: int | None
    """Truth objects cut in two at a block edge."""
    n_split: int
    """Truth objects of which two or more predictions hold at least 20 % each, wherever they lie."""
    n_different: int
    """Pixels whose two values differ."""

    @property
    def exact(self) -> bool:
        """Whether every pixel has the same value in both."""
        return self.n_different == 0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, tuples and dicts of them, fit for JSON."""
        scores = {"overall": self.overall, "at_seams": self.at_seams, "elsewhere": self.elsewhere}
        as_dicts = {name: score and score.as_dict() for name, score in scores.items()}
        counts = {"n_cut": self.n_cut, "n_split": self.n_split, "n_different": self.n_different}
        return {**as_dicts, **counts, "exact": self.exact}


def compare(
    predicted: LabelArray,
    truth: LabelArray,
    *,
    thresholds: Sequence[float] = (0.5, 0.75, 0.9),
    block: int | None = None,
    n_spatial: int | None = None,
    pixels_at_once: int = PIXELS_AT_ONCE,
    progress: Listener | None = None,
) -> Comparison:
    """Score predicted labels against true ones, over the whole array and along block edges.

    Parameters
    ----------
    predicted, truth : array of integers, shape (*shape)
        Labels, 0 background, ids in any order and with any gaps; NumPy, Zarr or Dask. Leading axes
        of length 1 that only one of them has are ignored.
    thresholds : sequence of float
        IoU thresholds in (0, 1].
    block : int, optional
        Side of the blocks the prediction was made in, pixels: every multiple of it along every
        spatial axis is a block edge. Objects with pixels on both sides of one are scored apart.
    n_spatial : int, optional
        How many of the last axes are space. Default all.
    pixels_at_once : int
        Pixels of each array held in memory at a time.
    progress : callable, optional
        Called with ``"compare"``, the pieces done and all pieces, whenever one ends.

    Returns
    -------
    comparison : Comparison

    Raises
    ------
    SettingsError
        If the shapes differ, an array does not hold labels, or a threshold or block is out of range.

    Notes
    -----
    Pairs are matched greedily from the highest IoU down, ties to the lowest truth id, then the lowest
    predicted id, each object in one pair at most. From a threshold of 0.5 up this is the best matching
    there is: above 0.5 a partner is unique. Below 0.5 it is greedy and no more.

    A matched prediction belongs to the set of its truth object (at_seams or elsewhere), an unmatched
    one to that of its own box, where matched means at the lowest threshold.

    A truth object is cut if it crosses a block edge, at least one prediction that holds 20 % of it
    lies wholly on either side of that edge, and no prediction that holds 20 % of it crosses that edge.

    A label is one object, connected or not.
    """
    cut_offs = _checked_thresholds(thresholds)
    _check_positive("block", block)
    _check_positive("pixels_at_once", pixels_at_once)
    pair = LabelPair(predicted, truth)
    n_space = pair.ndim if n_spatial is None else n_spatial
    if not 1 <= n_space <= pair.ndim:
        raise SettingsError(f"n_spatial is {n_spatial} but the labels have {pair.ndim} axes; give 1 to {pair.ndim}.")
    contents, n_different = read_contents(pair, n_space if block else 0, pixels_at_once, progress)
    matches = _match(contents, min(cut_offs))
    overall = _score(cut_offs, matches, contents.truth.ids > 0, contents.predicted.ids > 0)
    at_seams = elsewhere = n_cut = None
    if block:
        truth_crosses = _crosses(contents.truth.boxes, block)
        predicted_crosses = _crosses(contents.predicted.boxes, block)
        predicted_crosses[matches.predicted] = truth_crosses[matches.truth]
        at_seams = _score(cut_offs, matches, truth_crosses, predicted_crosses)
        elsewhere = _score(cut_offs, matches, ~truth_crosses, ~predicted_crosses)
        n_cut = _count_cut(contents, block)
    return Comparison(overall, at_seams, elsewhere, n_cut, _count_split(contents), n_different)


def exact_difference(
    predicted: LabelArray,
    truth: LabelArray,
    *,
    pixels_at_once: int = PIXELS_AT_ONCE,
    progress: Listener | None = None,
) -> int:
    """Count the pixels whose two values differ: 0 if and only if the arrays are equal.

    Parameters, streaming and errors are those of :func:`compare`.
    """
    _check_positive("pixels_at_once", pixels_at_once)
    pair = LabelPair(predicted, truth)
    n_different = 0
    for region in pair.regions(pixels_at_once, progress):
        left, right = pair.read(region)
        n_different += int(np.count_nonzero(left != right))
    return n_different


def _checked_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """The thresholds as floats, or an error that names the bad one."""
    if len(thresholds) == 0:
        raise SettingsError("thresholds is empty; give at least one IoU threshold, for example 0.5.")
    for threshold in thresholds:
        if not 0 < threshold <= 1:
            raise SettingsError(f"threshold {threshold} is no IoU; give thresholds above 0 and up to 1.")
    return tuple(float(threshold) for threshold in thresholds)


def _check_positive(name: str, value: int | None) -> None:
    """Refuse a size below 1."""
    if value is not None and value < 1:
        raise SettingsError(f"{name} is {value}; give a number of pixels of 1 or more.")


@dataclass(frozen=True)
class _Matches:
    """Matched pairs, by place in the id arrays."""

    truth: Int64
    predicted: Int64
    iou: npt.NDArray[np.float64]


def _match(contents: Contents, min_iou: float) -> _Matches:
    """Match greedily by falling IoU; the matching at a higher threshold is a part of this one."""
    truth, predicted = contents.pair_truth, contents.pair_predicted
    union = contents.truth.sizes[truth] + contents.predicted.sizes[predicted] - contents.pair_sizes
    iou = contents.pair_sizes / union
    candidates = np.flatnonzero(iou >= min_iou)
    # Stable, and pairs are sorted by truth and then predicted id: that is how ties are settled.
    candidates = candidates[np.argsort(-iou[candidates], kind="stable")]
    n_unique = int(np.count_nonzero(iou[candidates] > 0.5))
    is_free_truth = np.ones(contents.truth.ids.size, np.bool_)
    is_free_predicted = np.ones(contents.predicted.ids.size, np.bool_)
    is_free_truth[truth[candidates[:n_unique]]] = False
    is_free_predicted[predicted[candidates[:n_unique]]] = False
    is_kept = np.ones(candidates.size, np.bool_)
    for k in range(n_unique, candidates.size):
        a, b = truth[candidates[k]], predicted[candidates[k]]
        is_kept[k] = is_free_truth[a] and is_free_predicted[b]
        if is_kept[k]:
            is_free_truth[a] = is_free_predicted[b] = False
    chosen = candidates[is_kept]
    return _Matches(truth[chosen], predicted[chosen], iou[chosen])


def _score(thresholds: tuple[float, ...], matches: _Matches, in_truth: Bools, in_predicted: Bools) -> Score:
    """Score of a subset of the objects that holds both partners of a match or neither."""
    iou = matches.iou[in_truth[matches.truth]]
    n_truth, n_predicted = int(in_truth.sum()), int(in_predicted.sum())
    n_found = tuple(int(np.count_nonzero(iou >= threshold)) for threshold in thresholds)
    return Score(
        thresholds=thresholds,
        n_true_positive=n_found,
        n_false_positive=tuple(n_predicted - n for n in n_found),
        n_false_negative=tuple(n_truth - n for n in n_found),
        mean_iou_matched=float(iou.mean()) if iou.size else float(n_truth + n_predicted == 0),
    )


def _crosses(boxes: Int64, block: int) -> Bools:
    """Whether each box (n, 2, n_axes) has pixels on both sides of a block edge."""
    in_block = boxes // block
    crosses: Bools = (in_block[:, 0] != in_block[:, 1]).any(axis=1)
    return crosses


def _main_pairs(contents: Contents) -> Int64:
    """Pairs whose prediction covers the truth object, of truth objects with two such predictions or more."""
    covers = COVERS * contents.pair_sizes >= contents.truth.sizes[contents.pair_truth]
    n_covering = np.bincount(contents.pair_truth[covers], minlength=contents.truth.ids.size)
    return np.flatnonzero(covers & (n_covering[contents.pair_truth] >= 2))


def _count_split(contents: Contents) -> int:
    """Truth objects that two or more predictions cover."""
    return int(np.unique(contents.pair_truth[_main_pairs(contents)]).size)


def _count_cut(contents: Contents, block: int) -> int:
    """Truth objects cut in two at a block edge, as the Notes of :func:`compare` define it."""
    pairs = _main_pairs(contents)
    pairs = pairs[_crosses(contents.truth.boxes, block)[contents.pair_truth[pairs]]]
    boxes = contents.predicted.boxes[contents.pair_predicted[pairs]] // block
    groups = np.split(boxes, np.flatnonzero(np.diff(contents.pair_truth[pairs])) + 1)
    return sum(any(_is_cut(*pieces[:, :, axis].T) for axis in range(boxes.shape[2])) for pieces in groups)


def _is_cut(first: Int64, last: Int64) -> bool:
    """Whether an edge before some piece has pieces on both sides and none across; in block indices."""
    for edge in first:
        is_before, is_after = last < edge, first >= edge
        if is_before.any() and (is_before | is_after).all():
            return True
    return False
