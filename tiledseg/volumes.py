"""A synthetic fluorescence volume with known truth: for tests and benchmarks.

Every random number is drawn from a generator keyed by seed and purpose, and noise from one keyed by the plane
too, so a seed gives the same volume on any machine and however the planes are worked through.

Only arithmetic that IEEE 754 defines to the last bit is done per pixel, because NumPy's sine or
exponential may depend on where a value lies in its array.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SettingsError
from .heat import label_flows
from .objects import object_boxes, renumber

__all__ = ["label_volume", "plane_flows", "render_volume"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]

JITTER = 0.7  # how far a centre may lie from its place in the grid, all in all, spacings
RADII = (0.52, 0.7)  # of cells, spacings: most reach into their neighbours, whom they meet half way
STRETCH = 0.15  # of the axes of a cell, more or less

BACKGROUND = 400.0  # counts
BRIGHT = 2600.0  # counts of a nucleus of brightness 1
RIM = 0.5  # brightness of the outermost pixels of a nucleus, of its own
READ_NOISE = 22.0  # counts
COUNTS_PER_PHOTON = 7.0
PLANES = 16  # rendered at once
REACH = 6  # pixels from which blur and rims take light

_PLACES, _BRIGHTNESS, _NOISE = range(3)  # what random numbers are for


def label_volume(
    shape: tuple[int, int, int], spacing: float = 32.0, seed: int = 0, anisotropy: float = 1.0
) -> npt.NDArray[np.uint32]:
    """Draw a volume of touching cells.

    Parameters
    ----------
    shape : (int, int, int)
        Planes, rows and columns, pixels.
    spacing : float
        Mean distance of neighbouring centres along y and x, pixels; cells have about this diameter. About
        ``prod(shape) * anisotropy / spacing**3`` cells result.
    seed : int
        Another seed, another volume.
    anisotropy : float
        Distance of two planes over that of two rows; cells extend over so many times fewer planes.

    Returns
    -------
    labels : array of uint32, shape (*shape)
        Labels 1..n in raster order of first pixels, 0 background, about a quarter. Each cell is connected across
        faces, and nearly all touch others.

    Raises
    ------
    SettingsError
        If a setting is out of range.

    Notes
    -----
    Centres lie on a jittered grid. A pixel belongs to the cell whose ellipsoid it is deepest in. Takes 8 bytes a
    pixel while it works.
    """
    checks = (
        ("shape", shape, len(shape) == 3 and min(shape) >= 1, "three lengths in pixels"),
        ("spacing", spacing, 6 <= spacing <= 1000, "6 to 1000 pixels"),
        ("seed", seed, 0 <= seed < 2**32, f"an integer from 0 to {2**32 - 1}"),
        ("anisotropy", anisotropy, 1 <= anisotropy <= spacing / 3, "1 up to a third of the spacing"),
    )
    for name, value, is_good, wanted in checks:
        if not is_good:
            raise SettingsError(f"{name} of the volume is {value}; give {wanted}.")
    steps = np.array([anisotropy, 1.0, 1.0])  # physical length of a pixel
    centres, radii = _cells(np.array(shape) * steps, spacing, seed)
    labels, depth = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for number, (centre, radius) in enumerate(zip(centres / steps, radii / steps, strict=True), start=1):
        window, inside = _ellipsoid(shape, centre, radius)
        is_deeper = inside > depth[window]
        depth[window][is_deeper] = inside[is_deeper]
        labels[window][is_deeper] = number
    del depth
    _drop_crumbs(labels, len(centres))
    return renumber(labels, np.ones(len(centres), np.bool_)).view(np.uint32)


def _random(seed: int, purpose: int, place: int = 0) -> np.random.Generator:
    """Numbers that belong to a purpose and a place."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, place]))


def _cells(extent: npt.NDArray[np.float64], spacing: float, seed: int) -> tuple[Any, Any]:
    """Centres and radii along each axis, both float64 (n, 3) in physical units; a cell more on all sides."""
    counts = np.ceil(extent / spacing).astype(np.int64) + 2
    grid = np.indices(tuple(counts)).reshape(3, -1).T - 1
    numbers = _random(seed, _PLACES).random((len(grid), 7))
    # Rows are shifted against each other, and planes too, or gaps would lie in line.
    grid = grid + 0.5 * (np.roll(grid, 1, axis=1) % 2) * np.array([0, 1, 1])
    centres = (grid + 0.5 + JITTER * (numbers[:, :3] - 0.5)) * spacing
    sizes = RADII[0] + (RADII[1] - RADII[0]) * numbers[:, 3:4]
    radii = spacing * sizes * (1 + STRETCH * (2 * numbers[:, 4:] - 1))
    is_near = ((centres + radii > 0) & (centres - radii < extent)).all(axis=1)
    return centres[is_near], radii[is_near]


def _ellipsoid(
    shape: tuple[int, ...], centre: npt.NDArray[np.float64], radius: npt.NDArray[np.float64]
) -> tuple[tuple[slice, ...], Floats]:
    """The window an ellipsoid fills, and how deep in it each pixel lies: 1 at the centre, 0 at the surface."""
    window = tuple(
        slice(max(0, int(np.floor(c - r))), max(0, min(n, int(np.ceil(c + r)) + 1)))
        for c, r, n in zip(centre, radius, shape, strict=True)
    )
    squares = [
        np.square((np.arange(part.start, part.stop) + 0.5 - c) / r).astype(np.float32)
        for part, c, r in zip(window, centre, radius, strict=True)
    ]
    inside: Floats = np.float32(1) - (squares[0][:, None, None] + squares[1][:, None] + squares[2])
    return window, inside


def _drop_crumbs(labels: Labels, n_labels: int) -> None:
    """Keep the largest part of each label that is in several."""
    from scipy import ndimage

    boxes = object_boxes(labels, n_labels)
    for number, (start, stop) in enumerate(boxes, start=1):
        if (start >= stop).any():
            continue
        window = labels[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
        parts, n_parts = ndimage.label(window == number)
        if n_parts > 1:
            largest = np.bincount(parts.reshape(-1))[1:].argmax() + 1
            window[(parts > 0) & (parts != largest)] = 0


def plane_flows(labels: npt.NDArray[np.integer[Any]]) -> Floats:
    """Flows as a network gives them that is shown planes of a volume: the sum over the three orientations.

    Parameters
    ----------
    labels : array of integers, shape (z, y, x)
        Labels 1..n, 0 background.

    Returns
    -------
    flows : array of float32, shape (3, z, y, x)
        Toward the centre of an object's section in each of the three planes through a pixel, so up to 2 along
        each axis; 0 outside objects.
    """
    flows = np.zeros((3, *labels.shape), np.float32)
    for across in range(3):
        along = [axis for axis in range(3) if axis != across]
        sums = np.moveaxis(flows[along], across + 1, 0)
        for section, plane in zip(sums, np.moveaxis(labels, across, 0), strict=True):
            section += label_flows(np.ascontiguousarray(plane))
        flows[along] = np.moveaxis(sums, 0, across + 1)
    return flows


def render_volume(
    labels: npt.NDArray[np.integer[Any]], seed: int = 0, *, anisotropy: float = 1.0
) -> npt.NDArray[np.uint16]:
    """Photograph a volume of labels as fluorescent nuclei.

    Parameters
    ----------
    labels : array of integers, shape (z, y, x)
        Labels 1..n, 0 background.
    seed : int
        Another seed, other brightness and noise.
    anisotropy : float
        Distance of two planes over that of two rows: light is blurred over so many times fewer planes.

    Returns
    -------
    image : array of uint16, shape (z, y, x)
        Counts: nuclei of uneven brightness, dim at their rim so that touching ones can be told apart, on a
        background of 400 counts; blurred with a sigma of 1 pixel, with shot noise (as a normal variable) and
        read noise.
    """
    numbers = _random(seed, _BRIGHTNESS).random(int(labels.max(initial=0)))
    # Skewed: many nuclei of about 0.7, few of 1.5; none for the background.
    brightness = np.append(0, 0.6 + 0.9 * numbers * numbers).astype(np.float32)
    image = np.empty(labels.shape, np.uint16)
    for first in range(0, len(labels), PLANES):
        last = min(first + PLANES, len(labels))
        # Beyond the volume the light goes on as at its faces, or blur would darken them.
        planes = np.clip(np.arange(first - REACH, last + REACH), 0, len(labels) - 1)
        light = _blurred(_light(np.asarray(labels)[planes], brightness), anisotropy)[REACH:-REACH]
        counts = np.float32(BACKGROUND) + np.float32(BRIGHT) * light
        drawn = [_random(seed, _NOISE, z).standard_normal(counts.shape[1:], np.float32) for z in range(first, last)]
        counts += np.stack(drawn) * np.sqrt(np.float32(COUNTS_PER_PHOTON) * counts + np.float32(READ_NOISE**2))
        image[first:last] = np.clip(np.rint(counts), 0, 65535).astype(np.uint16)
    return image


def _light(labels: npt.NDArray[np.integer[Any]], brightness: Floats) -> Floats:
    """Light of each pixel before blur: dim in two layers under the surface of each nucleus."""
    light: Floats = brightness[labels]
    is_inner = labels > 0
    for share in (np.float32(RIM), np.float32((1 + RIM) / 2)):
        is_rim = np.zeros(labels.shape, np.bool_)
        for axis in range(labels.ndim):
            low, high = ((slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None)))
            differs = (labels[low] != labels[high]) | (is_inner[low] != is_inner[high])
            is_rim[low] |= differs
            is_rim[high] |= differs
        is_rim &= is_inner
        light[is_rim] *= share
        is_inner &= ~is_rim
    return light


def _blurred(light: Floats, anisotropy: float) -> Floats:
    """Gaussian of sigma 1, along z so many times less, cut at 4 pixels."""
    from scipy.ndimage import correlate1d

    for axis, sigma in enumerate((1 / anisotropy, 1.0, 1.0)):
        weights = np.array([math.exp(-0.5 * (k / sigma) ** 2) for k in range(-4, 5)])
        light = correlate1d(light, weights / weights.sum(), axis, mode="nearest")
    return light
