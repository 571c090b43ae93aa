"""Seams: what neighbours agree on, and one numbering from it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiledseg.errors import SettingsError
from tiledseg.seams import MAX_LABEL, Numbering, agreement, link, match_seam, node_index, number

from .strategies import Labels, label_fields, numbered, seeds

Nodes = npt.NDArray[np.int64]


def row(*labels: int) -> npt.NDArray[np.uint32]:
    return np.array([labels], np.uint32)


def pairs_of(low: npt.NDArray[np.uint32], high: npt.NDArray[np.uint32], min_iou: float) -> list[list[int]]:
    pairs: list[list[int]] = match_seam(low, high, min_iou)[0].tolist()
    return pairs


def roots_of(pairs: Nodes, n_nodes: int) -> Nodes:
    """Smallest node of each node's object, for all nodes."""
    roots = np.arange(n_nodes)
    linked, objects = link(pairs, n_nodes)
    assert objects.dtype == np.int32
    for which in np.unique(objects):
        roots[linked[objects == which]] = linked[objects == which].min()
    return roots


def test_match_takes_what_overlaps_enough() -> None:
    low = row(1, 1, 1, 1, 0, 2, 2, 3)
    high = row(0, 7, 7, 7, 0, 9, 9, 9)
    assert pairs_of(low, high, 0.5) == [[1, 7], [2, 9]]
    assert match_seam(low, high, 0.5)[1].tolist() == [3 / 4, 2 / 3]
    assert pairs_of(low, high, 0.7) == [[1, 7]]
    assert pairs_of(low, high, 0.8) == []


def test_match_counts_pixels_that_met_background() -> None:
    assert pairs_of(row(1, 1, 1), row(5, 0, 0), 0.5) == []
    assert pairs_of(row(1, 1, 0), row(5, 0, 0), 0.5) == [[1, 5]]


def test_match_of_a_tie_is_the_lowest_label() -> None:
    assert pairs_of(row(4, 4, 4, 4), row(9, 9, 8, 8), 0.5) == [[4, 8]]
    assert pairs_of(row(9, 9, 8, 8), row(4, 4, 4, 4), 0.5) == [[8, 4]]


def test_match_is_mutual() -> None:
    # 2 overlaps 6 best, but 6 has a better one.
    low, high = row(2, 2, 1, 1, 1), row(6, 6, 6, 6, 6)
    assert pairs_of(low, high, 0.1) == [[1, 6]]


def test_match_holds_labels_of_all_32_bits() -> None:
    low, high = row(MAX_LABEL, 2**31), row(2**31, MAX_LABEL)
    assert pairs_of(low, high, 1.0) == [[2**31, MAX_LABEL], [MAX_LABEL, 2**31]]


@pytest.mark.parametrize("shape", [(0, 4), (3, 4), (2, 0, 5)])
def test_match_of_nothing(shape: tuple[int, ...]) -> None:
    nothing = np.zeros(shape, np.uint32)
    pairs, ious = match_seam(nothing, nothing, 0.5)
    assert pairs.shape == (0, 2)
    assert pairs.dtype == np.uint32
    everything = (slice(None),) * len(shape)
    assert agreement(nothing, nothing, (pairs, ious), everything, everything).tolist() == [0] * 5


def test_match_refuses_other_shapes() -> None:
    with pytest.raises(SettingsError, match=r"shapes \(1, 2\) and \(1, 3\) cannot be compared; cut both"):
        match_seam(row(1, 1), row(1, 1, 1), 0.5)


@pytest.mark.parametrize("min_iou", [0.0, -1.0, 1.01, float("nan")])
def test_match_refuses_an_overlap_out_of_range(min_iou: float) -> None:
    with pytest.raises(SettingsError, match=rf"min_iou is {min_iou}; .* lies in \(0, 1\]"):
        match_seam(row(1), row(1), min_iou)


@given(label_fields(max_side=12), seeds, st.sampled_from([0.1, 0.3, 0.5, 0.75]))
def test_match_is_one_to_one_symmetric_and_as_counted(low: Labels, seed: int, min_iou: float) -> None:
    rng = np.random.default_rng(seed)
    high = np.where(rng.random(low.shape) < 0.3, rng.integers(0, 5, low.shape), low).astype(np.uint32)
    pairs, ious = match_seam(low.astype(np.uint32), high, min_iou)
    swapped, _ = match_seam(high, low.astype(np.uint32), min_iou)
    assert sorted(map(tuple, pairs.tolist())) == sorted((a, b) for b, a in swapped.tolist())
    assert np.unique(pairs[:, 0]).size == np.unique(pairs[:, 1]).size == len(pairs)
    expected = [((low == a) & (high == b)).sum() / ((low == a) | (high == b)).sum() for a, b in pairs.tolist()]
    assert ious.tolist() == expected
    assert min(expected, default=1) >= min_iou
    half = low.shape[0] // 2
    cores = (slice(0, half),), (slice(half, None),)
    across = [set(labels[:half][labels[:half] > 0]) & set(labels[half:].flat) for labels in (low, high)]
    linked = [len(found & set(pairs[:, side])) for side, found in enumerate(across)]
    counts = agreement(low.astype(np.uint32), high, (pairs, ious), *cores)
    assert counts.tolist() == [len(pairs), expected.count(1), ious.sum(), sum(map(len, across)), sum(linked)]
    if min_iou > 0.5:  # then at most one partner is good enough, and all of those must be there
        every = itertools.product(np.unique(low[low > 0]), np.unique(high[high > 0]))
        n_good = sum(((low == a) & (high == b)).sum() / ((low == a) | (high == b)).sum() >= min_iou for a, b in every)
        assert n_good == len(pairs)


def test_agreement_counts_exact_ones_and_those_across_the_border() -> None:
    low, high = row(1, 1, 2, 2, 2, 3, 3, 0), row(5, 5, 6, 6, 0, 0, 0, 7)
    matched = match_seam(low, high, 0.5)
    assert matched[0].tolist() == [[1, 5], [2, 6]]
    everywhere = slice(None)
    # Of the one block 2 crosses the border after three pixels, of the other 6: both are in the pair.
    cores = (everywhere, slice(0, 3)), (everywhere, slice(3, 8))
    assert agreement(low, high, matched, *cores).tolist() == [2, 1, 1 + 2 / 3, 2, 2]
    # After six pixels it is 3, which the other block did not find.
    cores = (everywhere, slice(0, 6)), (everywhere, slice(6, 8))
    assert agreement(low, high, matched, *cores).tolist() == [2, 1, 1 + 2 / 3, 1, 0]
    # Pixels that lie in neither core, as where four blocks meet, do not count.
    cores = (everywhere, slice(0, 2)), (everywhere, slice(4, 5))
    assert agreement(low, high, matched, *cores).tolist() == [2, 1, 1 + 2 / 3, 0, 0]


def test_node_index_is_dense() -> None:
    counts = [3, 0, 2]
    offsets = np.array([0, 3, 3], np.int64)
    nodes = [node_index(offsets, block, np.arange(1, n + 1)) for block, n in enumerate(counts)]
    assert np.concatenate(nodes).tolist() == [0, 1, 2, 3, 4]
    assert int(node_index(offsets, 2, 2)) == 4
    # Local labels come as uint32 and offsets may pass 2**32.
    assert node_index(np.array([2**33]), 0, np.array([2**32 - 1], np.uint32)).tolist() == [2**33 + 2**32 - 2]


def test_link_joins_chains() -> None:
    linked, objects = link(np.array([[5, 4], [2, 4], [2, 5], [0, 6]], np.int64), 8)
    assert linked.tolist() == [0, 2, 4, 5, 6]
    assert objects[0] == objects[4] != objects[1] == objects[2] == objects[3]
    assert set(objects) == {0, 1}


@pytest.mark.parametrize("n_nodes", [0, 3, 10**18])
def test_link_without_links(n_nodes: int) -> None:
    linked, objects = link(np.zeros((0, 2), np.int64), n_nodes)
    assert linked.size == objects.size == 0


@pytest.mark.parametrize("pair", [(-1, 0), (0, 3)])
def test_link_refuses_unknown_nodes(pair: tuple[int, int]) -> None:
    with pytest.raises(SettingsError, match=r"links name nodes -?\d to \d where there are 3; .* start again"):
        link(np.array([pair], np.int64), 3)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_link_does_not_depend_on_order(case: tuple[int, list[tuple[int, int]]]) -> None:
    n_nodes, links = case
    roots = roots_of(np.array(links, np.int64).reshape(-1, 2), n_nodes)
    turned = [(b, a) for a, b in reversed(links)]
    np.testing.assert_array_equal(roots, roots_of(np.array(turned, np.int64).reshape(-1, 2), n_nodes))
    expected = list(range(n_nodes))
    for _ in links:
        for a, b in links:
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert roots.tolist() == expected


def test_number_is_by_first_pixel_and_without_gaps() -> None:
    first_pixels = np.array([70, 10, -1, 40, 5, -1], np.int64)
    roots = np.array([0, 1, 2, 1, 0, 1], np.int64)
    ids, n_objects = number(first_pixels, roots)
    # Nodes 2 and 5 lie in a halo: they paint nothing, though the object of node 5 has an id.
    assert ids.tolist() == [1, 2, 0, 2, 1, 0]
    assert ids.dtype == np.uint32
    assert n_objects == 2
    assert number(first_pixels, roots, n_before=40)[0].tolist() == [41, 42, 0, 42, 41, 0]


def test_number_of_nothing() -> None:
    ids, n_objects = number(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert ids.size == n_objects == 0


def test_number_refuses_more_objects_than_ids() -> None:
    nodes = np.arange(4, dtype=np.int64)
    assert number(nodes, nodes, max_label=4)[1] == 4
    with pytest.raises(SettingsError, match="4 objects do not fit into labels up to 3; segment parts"):
        number(nodes, nodes, max_label=3)
    with pytest.raises(SettingsError, match="6 objects do not fit into labels up to 5; segment parts"):
        number(nodes, nodes, n_before=2, max_label=5)
    numbering = Numbering(*link(np.array([[0, 4]]), 8), max_label=6)
    assert numbering.take(nodes).tolist() == [1, 2, 3, 4]
    with pytest.raises(SettingsError, match="7 objects do not fit into labels up to 6; segment parts"):
        numbering.take(nodes + 4)
    assert np.iinfo(np.uint32).max == MAX_LABEL


@st.composite
def linked_slabs(draw: Any) -> tuple[list[Nodes], Nodes]:
    """First pixels of the nodes of some slabs, some negative, and links between any of the nodes."""
    rng = np.random.default_rng(draw(seeds))
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    slabs = []
    for i, size in enumerate(sizes):
        first = rng.permutation(20)[:size] + 20 * i
        slabs.append(np.where(rng.random(size) < 0.2, -1, first).astype(np.int64))
    n_links = draw(st.integers(0, 25)) if sum(sizes) else 0
    return slabs, rng.integers(0, max(sum(sizes), 1), (n_links, 2))


@settings(max_examples=300)
@given(linked_slabs())
def test_numbering_slab_by_slab_is_the_same_as_at_once(case: tuple[list[Nodes], Nodes]) -> None:
    slabs, pairs = case
    first = np.concatenate(slabs)
    # The straightforward way: objects as sets of nodes, sorted by the least pixel that they paint.
    roots = roots_of(pairs, first.size)
    painted = {root: min(p for p in first[roots == root] if p >= 0) for root in set(roots[first >= 0].tolist())}
    id_of = {root: i + 1 for i, root in enumerate(sorted(painted, key=lambda root: painted[root]))}
    expected = [id_of[root] if pixel >= 0 else 0 for root, pixel in zip(roots.tolist(), first, strict=True)]
    ids, n_objects = number(first, roots)
    assert ids.tolist() == expected
    numbering = Numbering(*link(pairs, first.size))
    streamed = [numbering.take(slab) for slab in slabs]
    assert np.concatenate(streamed).tolist() == expected
    assert numbering.n_objects == n_objects == len(painted)


def cut(field: Labels, core: tuple[int, ...], halo: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Padded blocks of a field, each with its own random numbering, as the masks stage leaves them."""
    blocks = []
    positions = np.arange(field.size, dtype=np.int64).reshape(field.shape)
    for corner in itertools.product(*[range(0, n, c) for n, c in zip(field.shape, core, strict=True)]):
        stop = [min(a + c, n) for a, c, n in zip(corner, core, field.shape, strict=True)]
        box = [(max(a - halo, 0), min(b + halo, n)) for a, b, n in zip(corner, stop, field.shape, strict=True)]
        seen = field[tuple(slice(*side) for side in box)]
        values = np.unique(seen[seen > 0])
        local = np.zeros(int(field.max()) + 1, np.uint32)
        local[values] = rng.permutation(values.size) + 1
        in_core = tuple(slice(a, b) for a, b in zip(corner, stop, strict=True))
        first = np.full(values.size, -1, np.int64)
        painted, where = np.unique(local[field[in_core]], return_index=True)
        first[painted[painted > 0] - 1] = positions[in_core].reshape(-1)[where[painted > 0]]
        blocks.append({"box": box, "core": in_core, "labels": local[seen], "first": first})
    return blocks


def shared(a: dict[str, Any], b: dict[str, Any]) -> list[npt.NDArray[np.uint32]] | None:
    """The labels of two blocks in the part that both saw."""
    box = [(max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a["box"], b["box"], strict=True)]
    if any(start >= stop for start, stop in box):
        return None
    return [
        block["labels"][tuple(slice(p - o[0], q - o[0]) for (p, q), o in zip(box, block["box"], strict=True))]
        for block in (a, b)
    ]


def stitched(field: Labels, core: tuple[int, ...], halo: int, seed: int) -> npt.NDArray[np.uint32]:
    """Cut a field and put it together again."""
    blocks = cut(field, core, halo, np.random.default_rng(seed))
    counts = [block["first"].size for block in blocks]
    offsets = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    links = [np.zeros((0, 2), np.int64)]
    for (i, a), (j, b) in itertools.combinations(enumerate(blocks), 2):
        if (seen := shared(a, b)) is None:
            continue
        pairs, ious = match_seam(*seen, 0.5)
        assert (ious == 1).all()
        links.append(np.stack([node_index(offsets, i, pairs[:, 0]), node_index(offsets, j, pairs[:, 1])], axis=1))
    numbering = Numbering(*link(np.concatenate(links), sum(counts)))
    slabs = itertools.groupby(blocks, key=lambda block: block["core"][0].start)
    ids = np.concatenate([numbering.take(np.concatenate([block["first"] for block in slab])) for _, slab in slabs])
    assert numbering.n_objects == field.max(initial=0)
    out = np.zeros(field.shape, np.uint32)
    for i, block in enumerate(blocks):
        table = np.zeros(counts[i] + 1, np.uint32)
        table[1:] = ids[node_index(offsets, i, np.arange(1, counts[i] + 1))]
        inner = tuple(slice(s.start - o[0], s.stop - o[0]) for s, o in zip(block["core"], block["box"], strict=True))
        out[block["core"]] = table[block["labels"][inner]]
    return out


@settings(max_examples=150, deadline=None)
@given(label_fields(max_side=30), st.tuples(*[st.integers(2, 31)] * 2), st.integers(1, 6), seeds)
def test_stitching_gives_back_the_field(field: Labels, core: tuple[int, int], halo: int, seed: int) -> None:
    np.testing.assert_array_equal(stitched(field, core, halo, seed), field)


@settings(max_examples=30, deadline=None)
@given(label_fields(ndim=3, max_side=9), st.tuples(*[st.integers(2, 10)] * 3), st.integers(1, 3), seeds)
def test_stitching_in_3d(field: Labels, core: tuple[int, ...], halo: int, seed: int) -> None:
    np.testing.assert_array_equal(stitched(field, core, halo, seed), field)


@pytest.mark.parametrize(
    "pixels",
    [
        [(9, 9), (9, 10), (10, 9), (10, 10)],  # the corner of four blocks
        [(9, 9), (10, 10)],  # across the corner, seen by no face
        [(5, x) for x in range(37)],  # through all blocks, far longer than a halo
    ],
)
def test_stitching_over_corners_and_long_objects(pixels: list[tuple[int, int]]) -> None:
    field = np.zeros((37, 37), np.int32)
    field[tuple(np.transpose(pixels))] = 1
    field[22:25, 3:6] = 2  # and most blocks empty
    np.testing.assert_array_equal(stitched(numbered(field), (10, 10), 2, 0), numbered(field))
