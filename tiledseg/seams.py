"""From labels of overlapping blocks to one numbering: match, link, number.

Arrays in, arrays out. A **node** is one label of one block, named by a dense running index
(:func:`node_index`). Neighbouring blocks are compared only where both saw the image
(:func:`match_seam`); the pairs found are links between nodes, and what is linked is one object
(:func:`link`), numbered by where it begins (:func:`number`). Only pairs and one record per node
ever meet in one place: the cost is set by how many there are, never by the largest id.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SettingsError

__all__ = ["MAX_LABEL", "agreement", "exact_pairs", "link", "match_seam", "node_index", "number"]

IntArray = npt.NDArray[np.integer[Any]]
Pairs = npt.NDArray[np.uint32]
Nodes = npt.NDArray[np.int64]

MAX_LABEL = 2**32 - 1
_LOW_BITS = np.uint64(32)


def match_seam(low: Pairs, high: Pairs, min_iou: float) -> Pairs:
    """Pair labels that are the same cell on both sides of one seam.

    Parameters
    ----------
    low, high : array of uint32, shape (*overlap)
        Labels the two blocks gave the same pixels, 0 background.
    min_iou : float
        Intersection over union needed, within the overlap, in (0, 1].

    Returns
    -------
    pairs : array of uint32, shape (n_pairs, 2)
        Row ``(a, b)``: ``a`` of `low` and ``b`` of `high` are one cell. Ascending, and each label
        occurs once at most: of several partners only the best counts, the lowest label if tied,
        and only if the choice is mutual.

    Raises
    ------
    SettingsError
        If the shapes differ or `min_iou` is out of range.

    Notes
    -----
    Not checked: that both arrays show the same part of the image. A cell cut by the outer edge of
    a halo is compared by the part that both blocks saw.
    """
    if not 0 < min_iou <= 1:
        raise SettingsError(f"min_iou is {min_iou}; the overlap needed to link two labels lies in (0, 1].")
    pairs, ious = _overlap_ious(low, high)
    pairs, ious = pairs[ious >= min_iou], ious[ious >= min_iou]
    is_mutual = _is_best(pairs[:, 0], pairs[:, 1], ious) & _is_best(pairs[:, 1], pairs[:, 0], ious)
    return pairs[is_mutual]


def _is_best(labels: Pairs, partners: Pairs, ious: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether each pair has the highest IoU of its label, the lowest partner if tied."""
    order = np.lexsort((partners, -ious, labels))
    is_best = np.zeros(labels.size, np.bool_)
    is_best[order] = np.diff(labels[order].astype(np.int64), prepend=-1) != 0
    return is_best


def _overlap_ious(low: Pairs, high: Pairs) -> tuple[Pairs, npt.NDArray[np.float64]]:
    """All pairs of labels that share a pixel, ascending, and the IoU of each."""
    if low.shape != high.shape:
        raise SettingsError(
            f"labels of shapes {low.shape} and {high.shape} cannot be compared; "
            "cut both to the pixels that the two blocks share."
        )
    both = low.astype(np.uint64).reshape(-1) << _LOW_BITS | high.astype(np.uint64).reshape(-1)
    keys, n_shared = _count(both)
    a, b = (keys >> _LOW_BITS).astype(np.uint32), keys.astype(np.uint32)
    _, a_index = np.unique(a, return_inverse=True)
    _, b_index = np.unique(b, return_inverse=True)
    a_pixels = np.bincount(a_index, n_shared)[a_index]
    b_pixels = np.bincount(b_index, n_shared)[b_index]
    is_pair = (a > 0) & (b > 0)
    ious = n_shared[is_pair] / (a_pixels + b_pixels - n_shared)[is_pair]
    return np.stack([a[is_pair], b[is_pair]], axis=1), ious


def _count(values: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], Nodes]:
    """Distinct values, ascending, and how often each occurs."""
    if values.size == 0:
        return values, np.zeros(0, np.int64)
    # Labels come in long runs: sorting runs instead of pixels is what makes this fast.
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    lengths = np.diff(starts, append=values.size)
    distinct, index = np.unique(values[starts], return_inverse=True)
    counts = np.zeros(distinct.size, np.int64)
    np.add.at(counts, index, lengths)
    return distinct, counts


def exact_pairs(low: Pairs, high: Pairs, pairs: Pairs) -> npt.NDArray[np.bool_]:
    """Which pairs are the same pixels in both blocks.

    Parameters
    ----------
    low, high : array of uint32, shape (*overlap)
        Labels the two blocks gave the same pixels, 0 background.
    pairs : array of uint32, shape (n_pairs, 2)
        What :func:`match_seam` made of them.

    Returns
    -------
    is_exact : array of bool, shape (n_pairs,)
        Whether the two labels cover the same pixels throughout the overlap.

    Raises
    ------
    SettingsError
        If the shapes differ.
    """
    met, ious = _overlap_ious(low, high)
    return np.isin(_packed(pairs), _packed(met[ious == 1.0]))


def agreement(low: Pairs, high: Pairs, pairs: Pairs) -> tuple[int, int]:
    """How well two blocks agreed on the cells that both saw.

    Parameters
    ----------
    low, high, pairs
        As for :func:`exact_pairs`.

    Returns
    -------
    n_pairs, n_exact : int
        Cells matched, and those that are the same pixels in both.
    """
    return len(pairs), int(exact_pairs(low, high, pairs).sum())


def _packed(pairs: Pairs) -> npt.NDArray[np.uint64]:
    """One integer per pair."""
    wide = pairs.astype(np.uint64)
    return wide[:, 0] << _LOW_BITS | wide[:, 1]


def node_index(offsets: Nodes, block: IntArray | int, local: IntArray | int) -> Nodes:
    """Running index of a block's label.

    Parameters
    ----------
    offsets : array of int64, shape (n_blocks,)
        Labels in all blocks before each: the cumulative counts, beginning with 0.
    block : int or array of integers, shape (n,)
        Block numbers.
    local : int or array of integers, shape (n,)
        Local labels, from 1.

    Returns
    -------
    nodes : array of int64, shape (n,)
        Node of each label, from 0.
    """
    return np.asarray(offsets[block] + np.asarray(local, np.int64) - 1, np.int64)


def link(pairs: Nodes, n_nodes: int) -> Nodes:
    """Join nodes that are one object.

    Parameters
    ----------
    pairs : array of int64, shape (n_pairs, 2)
        Nodes that are the same cell, in any order, repeated or not.
    n_nodes : int
        Number of nodes.

    Returns
    -------
    roots : array of int64, shape (n_nodes,)
        Smallest node of each node's object; a node without links is its own.

    Raises
    ------
    SettingsError
        If a pair names a node that is not in 0..n_nodes - 1.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    linked, ends = np.unique(pairs.reshape(-1, 2), return_inverse=True)
    roots = np.arange(n_nodes, dtype=np.int64)
    if linked.size == 0:
        return roots
    if linked[0] < 0 or linked[-1] >= n_nodes:
        raise SettingsError(
            f"links name nodes {linked[0]} to {linked[-1]} where there are {n_nodes}; "
            "they come from another run, remove the scratch folder and start again."
        )
    low, high = ends.reshape(-1, 2).T
    graph = coo_array((np.ones(low.size, np.bool_), (low, high)), shape=(linked.size, linked.size))
    n_objects, objects = connected_components(graph, directed=False)
    smallest = np.full(n_objects, n_nodes, np.int64)
    np.minimum.at(smallest, objects, linked)
    roots[linked] = smallest[objects]
    return roots


def number(first_pixels: Nodes, roots: Nodes, max_label: int = MAX_LABEL) -> tuple[Pairs, int]:
    """Number objects without gaps by where they begin.

    Parameters
    ----------
    first_pixels : array of int64, shape (n_nodes,)
        Flat index in the whole image of each node's first pixel within its block's core, in raster
        order; negative for a node that lies in the halo alone and paints nothing.
    roots : array of int64, shape (n_nodes,)
        Object of each node, as :func:`link` gives it.
    max_label : int
        Largest id that can be stored.

    Returns
    -------
    ids : array of uint32, shape (n_nodes,)
        Global label of each node: 1..n_objects in raster order of the objects' first pixels; 0 for
        an object that paints nothing.
    n_objects : int
        Objects that paint something.

    Raises
    ------
    SettingsError
        If there are more objects than `max_label`.
    """
    nowhere = np.iinfo(np.int64).max
    first = np.full(roots.size, nowhere, np.int64)
    np.minimum.at(first, roots, np.where(first_pixels < 0, nowhere, first_pixels))
    painting = np.flatnonzero(first < nowhere)
    if painting.size > max_label:
        raise SettingsError(
            f"{painting.size} objects do not fit into labels up to {max_label}; "
            "segment parts of the image, or raise --min-size if most of them are specks."
        )
    ids = np.zeros(roots.size, np.uint32)
    ids[painting[np.argsort(first[painting], kind="stable")]] = np.arange(1, painting.size + 1, dtype=np.uint32)
    return ids[roots], int(painting.size)
