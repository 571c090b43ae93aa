"""Tables of labels: what numpy gives, in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tiledseg.objects import first_pixels, look_up

SHAPES = array_shapes(max_dims=3, max_side=6)
LABELS = arrays(st.sampled_from([np.int32, np.uint32]), SHAPES, elements=st.integers(0, 9))


@given(LABELS, st.sampled_from([np.int32, np.uint32]), st.integers(0, 2**31 - 1))
def test_values_are_looked_up(labels: Any, dtype: Any, seed: int) -> None:
    table = np.random.default_rng(seed).integers(0, 2**31, 10).astype(dtype)
    for view in (labels, labels.T, labels[::2]):
        found = look_up(table, view)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, table[view])


@given(LABELS)
def test_the_first_pixel_of_each_label_is_found(labels: Any) -> None:
    for view in (labels, labels.T, labels[::2]):
        found = first_pixels(view, 10)
        assert found[0] == -1
        for label in range(1, 11):
            where = np.flatnonzero(view == label)
            assert found[label] == (where[0] if where.size else -1)


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_nothing_holds_nothing(shape: tuple[int, ...]) -> None:
    nothing = np.zeros(shape, np.int32)
    assert look_up(np.zeros(1, np.int32), nothing).shape == shape
    assert first_pixels(nothing, 0).tolist() == [-1]


def test_a_label_that_is_in_no_table_is_refused() -> None:
    with pytest.raises(IndexError, match="label 3 has no entry in a table of 3"):
        look_up(np.zeros(3, np.uint32), np.array([[0, 1], [3, 2]], np.uint32))
