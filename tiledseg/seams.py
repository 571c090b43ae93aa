"""From labels of overlapping blocks to one numbering: match, link, number.

Arrays in, arrays out. A **node** is one label of one block, named by a dense running index
(:func:`node_index`). Neighbouring blocks are compared only where both saw the image
(:func:`match_seam`); the pairs found are links between nodes, and what is linked is one object
(:func:`link`), numbered by where it begins (:func:`number`), slab after slab of blocks
(:class:`Numbering`). Only links, and the nodes of one slab, ever meet in one place: memory is set
by how many there are, never by the number of objects or the largest id.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SettingsError

__all__ = [
    "MAX_LABEL",
    "Numbering",
    "agreement",
    "is_best",
    "link",
    "match_seam",
    "node_index",
    "number",
    "overlap_ious",
]

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float64]
Pairs = npt.NDArray[np.uint32]
Nodes = npt.NDArray[np.int64]
Region = tuple[slice, ...]

MAX_LABEL = 2**32 - 1
_LOW_BITS = np.uint64(32)


def match_seam(low: Pairs, high: Pairs, min_iou: float) -> tuple[Pairs, FloatArray]:
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
    ious : array of float64, shape (n_pairs,)
        Intersection over union of each pair within the overlap; 1 where both are the same pixels.

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
    pairs, ious = overlap_ious(low, high)
    pairs, ious = pairs[ious >= min_iou], ious[ious >= min_iou]
    is_mutual = is_best(pairs[:, 0], pairs[:, 1], ious) & is_best(pairs[:, 1], pairs[:, 0], ious)
    return pairs[is_mutual], ious[is_mutual]


def is_best(labels: Pairs, partners: Pairs, ious: FloatArray) -> npt.NDArray[np.bool_]:
    """Which pairs are the choice of one of their labels.

    Parameters
    ----------
    labels, partners : array of uint32, shape (n_pairs,)
    ious : array of float64, shape (n_pairs,)

    Returns
    -------
    is_best : array of bool, shape (n_pairs,)
        Whether the pair has the highest IoU of its label, the lowest partner if tied.
    """
    order = np.lexsort((partners, -ious, labels))
    is_chosen = np.zeros(labels.size, np.bool_)
    is_chosen[order] = np.diff(labels[order].astype(np.int64), prepend=-1) != 0
    return is_chosen


def overlap_ious(low: Pairs, high: Pairs) -> tuple[Pairs, FloatArray]:
    """All pairs of labels that share a pixel, and how well they do.

    Parameters
    ----------
    low, high : array of uint32, one shape
        Labels of the same pixels, 0 background.

    Returns
    -------
    pairs : array of uint32, shape (n_pairs, 2)
        Ascending.
    ious : array of float64, shape (n_pairs,)
        Intersection over union.

    Raises
    ------
    SettingsError
        If the shapes differ.
    """
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


def agreement(
    low: Pairs, high: Pairs, matched: tuple[Pairs, FloatArray], low_core: Region, high_core: Region
) -> FloatArray:
    """How well two blocks agreed on the cells that both saw.

    Parameters
    ----------
    low, high : array of uint32, shape (*overlap)
        Labels the two blocks gave the same pixels, 0 background.
    matched : (array of uint32, shape (n_pairs, 2); array of float64, shape (n_pairs,))
        What :func:`match_seam` made of them.
    low_core, high_core : tuple of slice
        The parts of the overlap that lie in the core of the one and of the other block.

    Returns
    -------
    counts : array of float64, shape (5,)
        Pairs; pairs that are the same pixels for both; the sum of the IoU of the pairs; labels, of
        either block, with pixels in both cores; and those of them that are in a pair. They can be
        added up over seams.
    """
    pairs, ious = matched
    n_across = n_linked = 0
    for labels, partners in ((low, pairs[:, 0]), (high, pairs[:, 1])):
        in_low, in_high = (_count(labels[core].astype(np.uint64).reshape(-1))[0] for core in (low_core, high_core))
        across = np.intersect1d(in_low, in_high, assume_unique=True)
        across = across[across > 0]
        n_across += across.size
        n_linked += int(np.isin(across, partners).sum())
    return np.array([len(pairs), np.count_nonzero(ious == 1.0), ious.sum(), n_across, n_linked], np.float64)


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


def link(pairs: Nodes, n_nodes: int) -> tuple[Nodes, npt.NDArray[np.int32]]:
    """Join nodes that are one object.

    Parameters
    ----------
    pairs : array of int64, shape (n_pairs, 2)
        Nodes that are the same cell, in any order, repeated or not.
    n_nodes : int
        Number of nodes.

    Returns
    -------
    linked : array of int64, shape (n_linked,)
        Nodes that occur in a pair, ascending. A node that is in none is an object of its own.
    objects : array of int32, shape (n_linked,)
        Running number, from 0, of the object that each linked node belongs to.

    Raises
    ------
    SettingsError
        If a pair names a node that is not in 0..n_nodes - 1.

    Notes
    -----
    Memory grows with the pairs, not with `n_nodes`.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Not np.unique: it may build a hash table several times the size of the pairs.
    ends = np.sort(pairs, axis=None)
    linked = ends[np.concatenate([ends[:1] == ends[:1], ends[1:] != ends[:-1]])]
    del ends
    if linked.size == 0:
        return linked, np.zeros(0, np.int32)
    if linked[0] < 0 or linked[-1] >= n_nodes:
        raise SettingsError(
            f"links name nodes {linked[0]} to {linked[-1]} where there are {n_nodes}; "
            "they come from another run, remove the scratch folder and start again."
        )
    low, high = (np.searchsorted(linked, pairs[:, side]).astype(np.int32) for side in range(2))
    graph = coo_array((np.ones(low.size, np.bool_), (low, high)), shape=(linked.size, linked.size))
    return linked, connected_components(graph, directed=False)[1].astype(np.int32, copy=False)


def number(first_pixels: Nodes, roots: Nodes, n_before: int = 0, max_label: int = MAX_LABEL) -> tuple[Pairs, int]:
    """Number objects without gaps by where they begin.

    Parameters
    ----------
    first_pixels : array of int64, shape (n_nodes,)
        Flat index in the whole image of each node's first pixel within its block's core, in raster
        order; negative for a node that lies in the halo alone and paints nothing.
    roots : array of int64, shape (n_nodes,)
        Object of each node: the index of one of its nodes, the same for all of them.
    n_before : int
        Objects that have a number already.
    max_label : int
        Largest id that can be stored.

    Returns
    -------
    ids : array of uint32, shape (n_nodes,)
        Global label of each node: from n_before + 1 in raster order of the objects' first pixels; 0
        for a node that paints nothing.
    n_objects : int
        Objects that have a number now.

    Raises
    ------
    SettingsError
        If there are more objects than `max_label`.
    """
    nowhere = np.iinfo(np.int64).max
    first = np.full(roots.size, nowhere, np.int64)
    np.minimum.at(first, roots, np.where(first_pixels < 0, nowhere, first_pixels))
    painting = np.flatnonzero(first < nowhere)
    n_objects = n_before + painting.size
    if n_objects > max_label:
        raise SettingsError(
            f"{n_objects} objects do not fit into labels up to {max_label}; "
            "segment parts of the image, or raise --min-size if most of them are specks."
        )
    ids = np.zeros(roots.size, np.uint32)
    ids[painting[np.argsort(first[painting], kind="stable")]] = np.arange(n_before + 1, n_objects + 1, dtype=np.uint32)
    return np.where(first_pixels < 0, np.uint32(0), ids[roots]), n_objects


class Numbering:
    """Ids handed out slab after slab, the same as :func:`number` gives for all nodes at once.

    A slab is the blocks that share their index along the first axis that they divide, of one frame. In raster
    order of pixels the slabs follow each other, so an object's id is known with the first slab that it paints in, and
    only ids of linked objects need to be kept for the slabs to come.

    Parameters
    ----------
    linked : array of int64, shape (n_linked,)
    objects : array of int32, shape (n_linked,)
        As :func:`link` gives them.
    max_label : int
        Largest id that can be stored.

    Attributes
    ----------
    n_objects : int
        Objects numbered so far.

    Notes
    -----
    Memory: 16 bytes per linked node, some 50 per node of the slab being numbered.
    """

    def __init__(self, linked: Nodes, objects: npt.NDArray[np.int32], max_label: int = MAX_LABEL) -> None:
        self.n_objects = 0
        self._n_nodes = 0
        self._max_label = max_label
        self._linked, self._objects = linked, objects
        self._ids = np.zeros(int(objects.max(initial=-1)) + 1, np.uint32)

    def take(self, first_pixels: Nodes) -> Pairs:
        """Number the next slab.

        Parameters
        ----------
        first_pixels : array of int64, shape (n_nodes,)
            Of the nodes that follow those of the slab before, as for :func:`number`.

        Returns
        -------
        ids : array of uint32, shape (n_nodes,)
            Global label of each node, 0 for one that paints nothing.

        Raises
        ------
        SettingsError
            If there are more objects than `max_label`.

        Notes
        -----
        Not checked: that no first pixel of this slab comes before one of an earlier slab.
        """
        start, stop = np.searchsorted(self._linked, [self._n_nodes, self._n_nodes + first_pixels.size])
        nodes, objects = self._linked[start:stop] - self._n_nodes, self._objects[start:stop]
        begun = self._ids[objects] > 0
        new, new_objects = nodes[~begun], objects[~begun]
        roots = np.arange(first_pixels.size)
        _, smallest, which = np.unique(new_objects, return_index=True, return_inverse=True)
        roots[new] = new[smallest][which]
        begins = first_pixels.copy()
        begins[nodes[begun]] = -1
        ids, self.n_objects = number(begins, roots, self.n_objects, self._max_label)
        # A node in the halo alone has no id, but its object may have one from a node that paints.
        np.maximum.at(self._ids, new_objects, ids[new])
        paints = first_pixels[nodes] >= 0
        ids[nodes[paints]] = self._ids[objects[paints]]
        self._n_nodes += first_pixels.size
        return ids
