"""Outlines along pixel edges: drawn again they give back the labels, whatever the objects and the blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiledseg.exports.outlines import trace

Picture = npt.NDArray[np.uint32]


def boxes_of(labels: Picture) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and boxes of all objects."""
    ids = np.unique(labels[labels > 0])
    where = [np.argwhere(labels == i) for i in ids]
    boxes = [[at.min(axis=0), at.max(axis=0) + 1] for at in where]
    return ids.astype(np.int64), np.array(boxes, np.int64).reshape(-1, 2, 2)


def drawn(corners: npt.NDArray[np.int64], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Pixels inside a ring, by counting the edges left of each."""
    inside = np.zeros(shape, bool)
    for (x, y), (x_after, y_after) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        assert (x == x_after) != (y == y_after)
        inside[min(y, y_after) : max(y, y_after), x:] ^= True
    return inside


def check(labels: Picture) -> None:
    """Rings are simple, turn at every corner, run the right way, and give back the pixels."""
    ids, boxes = boxes_of(labels)
    rings = trace(labels, ids, boxes)
    again = np.zeros_like(labels)
    assert np.array_equal(np.unique(rings.objects), np.arange(ids.size))
    assert (np.diff(rings.objects) >= 0).all()
    for k, owner in enumerate(rings.objects):
        ring = rings.corners[rings.starts[k] : rings.starts[k + 1]]
        assert len(np.unique(ring, axis=0)) == len(ring) >= 4
        x, y = ring.T
        steps = np.diff(ring, axis=0, append=ring[:1])
        assert (np.abs(np.sum(steps * np.roll(steps, 1, axis=0), axis=1)) == 0).all()
        doubled = np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)
        assert (doubled > 0) == rings.is_outer[k]
        inside = drawn(ring, labels.shape)
        assert inside.sum() == abs(doubled) // 2
        again[inside] += np.uint32(ids[owner] if rings.is_outer[k] else -ids[owner] % 2**32)
        assert labels[tuple(rings.pixels[k])] == ids[owner]
    assert np.array_equal(again, labels)


CASES = {
    "pixel": ["1"],
    "hole": ["111", "101", "111"],
    "two parts": ["101", "101"],
    "corner": ["10", "01"],
    "holes that touch": ["11111", "10111", "11011", "11111"],
    "hole open at a corner": ["1110", "1011", "1101", "1111"],
    "pinched": ["11100", "10111", "11011", "00111"],
    "holes and parts within": ["1111111", "1000001", "1011101", "1010101", "1011101", "1000001", "1111111"],
    "beside": ["1122", "1122", "3311"],
    "nothing": ["000"],
}


@pytest.mark.parametrize("name", CASES)
def test_outlines_of_drawn_shapes(name: str) -> None:
    check(np.array([list(map(int, row)) for row in CASES[name]], np.uint32))


@given(hnp.arrays(np.uint32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 3)))
def test_outlines_of_anything_give_back_the_pixels(labels: Picture) -> None:
    check(labels)


def test_a_square_runs_clockwise_on_the_screen() -> None:
    labels: Any = np.zeros((5, 6), np.uint16)
    labels[1:3, 2:5] = 9
    rings = trace(labels, np.array([9]), np.array([[[1, 2], [3, 5]]]))
    assert rings.corners.tolist() == [[2, 1], [5, 1], [5, 3], [2, 3]]
    assert rings.is_outer.tolist() == [True]
