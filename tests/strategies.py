"""Random inputs: hypothesis strategies, and drawings for tests that need one large image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

Labels = npt.NDArray[np.int32]

seeds = st.integers(0, 2**32 - 1)


def shapes(ndim: int = 2, min_side: int = 1, max_side: int = 24) -> st.SearchStrategy[tuple[int, ...]]:
    """Array shapes, odd sides and sides of one pixel among them."""
    return st.tuples(*[st.integers(min_side, max_side)] * ndim)


@st.composite
def label_fields(draw: Any, ndim: int = 2, min_side: int = 1, max_side: int = 24) -> Labels:
    """Connected objects of all sizes, touching or not, numbered by first pixel; perhaps none."""
    shape = draw(shapes(ndim, min_side, max_side))
    n_boxes = draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(seeds))
    painted = np.zeros(shape, np.int32)
    for value in range(1, n_boxes + 1):
        corners = np.sort(rng.integers(0, np.array(shape) + 1, (2, ndim)), axis=0)
        painted[tuple(slice(*axis) for axis in corners.T)] = value * rng.integers(0, 2)
    return connected(painted)


def connected(labels: npt.NDArray[np.integer[Any]]) -> Labels:
    """The connected parts of each label as objects of their own, numbered by first pixel."""
    from skimage.measure import label

    return numbered(label(labels, connectivity=labels.ndim))


def numbered(labels: npt.NDArray[np.integer[Any]]) -> Labels:
    """The same objects numbered 1..n in raster order of their first pixel."""
    values, first, index = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.where(values == 0, -1, first))
    ids = np.empty(values.size, np.int32)
    ids[order] = np.arange(values.size) + (0 if 0 in values else 1)
    return ids[index].reshape(labels.shape)


def ellipses(shape: tuple[int, int], diameter: float, n_tries: int, seed: int) -> Labels:
    """Ellipses thrown at an image, up to a fifth covered by earlier ones, numbered by first pixel."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    reach = int(np.ceil(diameter))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    for value in range(1, n_tries + 1):
        long = diameter / 2 * rng.uniform(0.7, 1.2)
        short = long * rng.uniform(0.6, 1.0)
        angle = rng.uniform(0, np.pi)
        u, v = y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
        is_in = (u / long) ** 2 + (v / short) ** 2 <= 1
        centre = rng.integers(0, shape)
        rows, columns = y[is_in] + centre[0], x[is_in] + centre[1]
        inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
        rows, columns = rows[inside], columns[inside]
        free = labels[rows, columns] == 0
        if free.mean() >= 0.8:
            labels[rows[free], columns[free]] = value
    return connected(labels)


def smooth_noise(shape: tuple[int, ...], sigma: float, size: float, seed: int) -> npt.NDArray[np.float32]:
    """A component along each axis of noise of standard deviation `size`, smooth over `sigma` pixels."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(seed).standard_normal((len(shape), *shape))
    smooth = np.stack([gaussian_filter(axis, sigma) for axis in noise])
    return (smooth * (size / smooth.std())).astype(np.float32)


def logits(labels: npt.NDArray[np.integer[Any]], size: float = 3.0) -> npt.NDArray[np.float32]:
    """A cellprob that is sure of the drawn cells."""
    return np.where(labels > 0, size, -size).astype(np.float32)


def sides(block: int, max_side: int) -> st.SearchStrategy[int]:
    """Lengths of an axis cut into blocks: any, one pixel more than whole blocks, whole blocks, a single pixel."""
    whole = list(range(block, max_side, block))
    return st.one_of(
        st.integers(1, max_side),
        st.sampled_from([n + 1 for n in whole] or [max_side]),
        st.sampled_from([*whole, 1]),
    )


@st.composite
def crowds(draw: Any, shape: tuple[int, int], diameter: float) -> Labels:
    """Ellipses of about a diameter, from a few to as many as fit, perhaps none in half of the image."""
    n_tries = draw(st.sampled_from([0, 3, 30, 200]))
    labels = ellipses(shape, diameter, n_tries, draw(seeds))
    axis, is_halved = draw(st.integers(0, 1)), draw(st.booleans())
    if is_halved:
        half = np.moveaxis(labels, axis, 0)
        half[: half.shape[0] // 2] = 0
    return numbered(labels)


def balls(shape: tuple[int, ...], diameter: float, n_tries: int, seed: int, thickness: float = 1.0) -> Labels:
    """Balls thrown at a volume of planes `thickness` pixels thick, up to a fifth covered by earlier ones."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    places = np.indices(shape).astype(np.float32) * np.array([thickness, 1, 1], np.float32)[:, None, None, None]
    for value in range(1, n_tries + 1):
        centre = rng.uniform(0, np.array(shape) * [thickness, 1, 1])
        radius = diameter / 2 * rng.uniform(0.7, 1.2)
        is_in = np.square(places - centre[:, None, None, None]).sum(axis=0) <= radius**2
        is_free = is_in & (labels == 0)
        if is_free.sum() >= 0.8 * is_in.sum():
            labels[is_free] = value
    return connected(labels)


@st.composite
def swarms(draw: Any, shape: tuple[int, ...], diameter: float, thickness: float = 1.0) -> Labels:
    """Balls of about a diameter, from a few to as many as fit."""
    n_tries = draw(st.sampled_from([0, 3, 20, 60]))
    return numbered(balls(shape, diameter, n_tries, draw(seeds), thickness))
