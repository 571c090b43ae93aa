"""Means over boxes, in one pass: the bits of several."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiledseg.pool import box_moments
from tiledseg.working import box_mean


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_the_bits_are_those_of_box_means(height: int, width: int, side: int, seed: int) -> None:
    values = np.random.default_rng(seed).lognormal(5, 2, (height, width)).astype(np.float32)
    middle = np.float32(values.mean(dtype=np.float64))
    for view in (values, values.T, values[::2]):
        means, squares = box_moments(view, middle, side)
        np.testing.assert_array_equal(means, box_mean(view - middle, (side, side)))
        np.testing.assert_array_equal(squares, box_mean(np.square(view - middle), (side, side)))
