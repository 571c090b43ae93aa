"""A synthetic fluorescence slide with known truth: for the demo, tests and benchmarks.

Any region of a slide can be made on its own and holds the same pixels as the whole, so a slide
larger than memory can be written piece by piece. Every random number belongs to a place: each square
of 16 x 16 points of a lattice has a Philox generator keyed by seed, purpose and position.

Only arithmetic that IEEE 754 defines to the last bit is done per pixel, because NumPy's sine or
exponential may depend on where a value lies in its array.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import SettingsError

__all__ = ["synthetic_slide", "synthetic_slide_block"]

Floats = npt.NDArray[np.floating[Any]]
Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Region = tuple[slice, slice]

PIECE = 1024  # pixels per side made at once
MARGIN = 8  # pixels round a piece that blur and rims need
BACKGROUND = 400.0  # counts
BRIGHT = 2600.0  # counts of a nucleus of brightness 1
READ_NOISE = 22.0  # counts
COUNTS_PER_PHOTON = 7.0
PITCH = 0.93  # distance of candidate centres, diameters
CLOSEST = 0.84  # least distance of two centres, sums of their radii
CLUSTER = 5.0  # distance of the points that shape the tissue, diameters

_PLACES, _SHAPES, _TISSUE, _HAZE, _TEXTURE, _GRAIN, _NOISE = range(7)  # what random numbers are for


@dataclass(frozen=True)
class _Recipe:
    """Everything that determines a slide."""

    shape: tuple[int, ...]
    diameter: float
    density: float
    seed: int
    dim_fraction: float
    illumination: float

    def __post_init__(self) -> None:
        checks = (
            ("shape", self.shape, len(self.shape) == 2 and min(self.shape) >= 1, "two lengths in pixels"),
            ("diameter", self.diameter, 6 <= self.diameter <= 1000, "6 to 1000 pixels"),
            ("density", self.density, 0 < self.density <= 1, "a part above 0 and up to 1"),
            ("dim_fraction", self.dim_fraction, 0 <= self.dim_fraction <= 1, "a part from 0 to 1"),
            ("illumination", self.illumination, 1 <= self.illumination <= 1000, "a ratio from 1 to 1000"),
            ("seed", self.seed, 0 <= self.seed < 2**32, f"an integer from 0 to {2**32 - 1}"),
        )
        for name, value, is_good, wanted in checks:
            if not is_good:
                raise SettingsError(f"{name} of the slide is {value}; give {wanted}.")


def synthetic_slide(
    shape: tuple[int, int] = (4096, 4096),
    *,
    diameter: float = 24.0,
    density: float = 0.8,
    seed: int = 0,
    dim_fraction: float = 0.05,
    illumination: float = 1.0,
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]:
    """Draw a slide of fluorescent nuclei and their true labels.

    Parameters
    ----------
    shape : (int, int)
        Height and width, pixels.
    diameter : float
        Mean diameter of the nuclei, pixels.
    density : float
        Part of the slide that is dense tissue, in (0, 1]; the rest is nearly empty.
    seed : int
        Another seed, another slide.
    dim_fraction : float
        Part of the nuclei with about a third of the brightness of the others, in [0, 1].
    illumination : float
        Light at the last corner of the slide over that at the first. All light, and with it the shot noise, rises
        evenly from 1 / `illumination` of the full light at the first corner to the full light at the last.

    Returns
    -------
    image : array of uint16, shape (*shape)
        Counts: nuclei of uneven brightness with texture on an uneven weak background, blurred with
        a sigma of about 1 pixel, with shot noise (as a normal variable) and read noise.
    labels : array of uint32, shape (*shape)
        Labels 1..n in raster order of first pixels, 0 background; each is 4-connected.

    Raises
    ------
    SettingsError
        If a setting is out of range.
    """
    recipe = _Recipe(tuple(shape), diameter, density, seed, dim_fraction, illumination)
    return _draw(recipe, (slice(0, shape[0]), slice(0, shape[1])))


def synthetic_slide_block(
    shape: tuple[int, int],
    region: tuple[slice, slice],
    *,
    diameter: float = 24.0,
    density: float = 0.8,
    seed: int = 0,
    dim_fraction: float = 0.05,
    illumination: float = 1.0,
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]:
    """Draw a region of the slide that :func:`synthetic_slide` would draw, with the same pixels.

    Takes what :func:`synthetic_slide` takes, and `region`: rows and columns of the slide, slices
    without steps. Returns image and labels of the region's shape, and raises SettingsError also if the
    region holds no pixels of the slide.

    Notes
    -----
    The first call for a slide draws all its outlines once, to number them; the numbers are kept for
    the last few slides, 12 bytes a nucleus.
    """
    recipe = _Recipe(tuple(shape), diameter, density, seed, dim_fraction, illumination)
    rows, columns = (slice(*of_axis.indices(n)) for of_axis, n in zip(region, shape, strict=True))
    if rows.step != 1 or columns.step != 1 or rows.start >= rows.stop or columns.start >= columns.stop:
        raise SettingsError(f"region {region} holds no pixels of a slide of {shape}, or skips some.")
    return _draw(recipe, (rows, columns))


def _draw(recipe: _Recipe, region: Region) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]:
    """Image and labels of a region, piece by piece."""
    keys, numbers = _numbering(recipe)
    shape = tuple(part.stop - part.start for part in region)
    image, labels = np.empty(shape, np.uint16), np.empty(shape, np.uint32)
    for piece in _pieces(region):
        inside = tuple(
            slice(part.start - whole.start, part.stop - whole.start) for part, whole in zip(piece, region, strict=True)
        )
        wide = [slice(part.start - MARGIN, part.stop + MARGIN) for part in piece]
        nuclei = _nuclei(recipe, (wide[0], wide[1]))
        owner, depth = _paint(recipe, nuclei, (wide[0], wide[1]))
        # Beyond the slide the light goes on as at its edge, or blur would darken the edge.
        rows, columns = (
            np.clip(np.arange(part.start, part.stop), 0, length - 1) - part.start
            for part, length in zip(wide, recipe.shape, strict=True)
        )
        owner, depth = owner[np.ix_(rows, columns)], depth[np.ix_(rows, columns)]
        image[inside] = _photograph(recipe, nuclei, owner, depth, piece)
        in_order = np.append(numbers[np.searchsorted(keys, nuclei.keys)], np.uint32(0))
        labels[inside] = in_order[owner[MARGIN:-MARGIN, MARGIN:-MARGIN]]
    return image, labels


def _pieces(region: Region) -> Iterator[Region]:
    """Regions of at most PIECE pixels a side that partition a region."""
    rows, columns = (
        [slice(at, min(at + PIECE, part.stop)) for at in range(part.start, part.stop, PIECE)] for part in region
    )
    yield from itertools.product(rows, columns)


@functools.lru_cache(maxsize=4)
def _numbering(recipe: _Recipe) -> tuple[Int64, npt.NDArray[np.uint32]]:
    """Keys of all nuclei of a slide, sorted, and the label of each: raster order of first pixels."""
    whole = (slice(0, recipe.shape[0]), slice(0, recipe.shape[1]))
    found = [np.empty((2, 0), np.int64)]
    for piece in _pieces(whole):
        nuclei = _nuclei(recipe, piece)
        owner, _ = _paint(recipe, nuclei, piece)
        flat = owner.reshape(-1)
        starts = np.flatnonzero((np.diff(flat, prepend=-1) != 0) & (flat >= 0))
        present, at = np.unique(flat[starts], return_index=True)
        row, column = np.divmod(starts[at], owner.shape[1])
        first = (row + piece[0].start) * recipe.shape[1] + column + piece[1].start
        found.append(np.stack([nuclei.keys[present], first]))
    keys, firsts = np.unique(np.concatenate(found, axis=1), axis=1)  # by key, then by first pixel
    keys, at = np.unique(keys, return_index=True)
    numbers = np.zeros(keys.size + 1, np.uint32)  # one more for a nucleus that got no pixel
    numbers[np.argsort(firsts[at])] = np.arange(1, keys.size + 1)
    return keys, numbers


def _lattice(
    recipe: _Recipe, purpose: int, region: Region, n: int, *, tile: int = 16, is_normal: bool = False
) -> Floats:
    """Random numbers of lattice points: float32 (rows, columns, n), uniform in [0, 1) or normal."""
    tiles = [range(part.start // tile, -(-part.stop // tile)) for part in region]
    out = np.empty((len(tiles[0]) * tile, len(tiles[1]) * tile, n), np.float32)
    for i, j in itertools.product(*tiles):
        position = [0, 0, i + 2**40, j + 2**40]
        generator = np.random.Generator(np.random.Philox(key=[recipe.seed, purpose], counter=position))
        draw = generator.standard_normal if is_normal else generator.random
        top, left = (i - tiles[0][0]) * tile, (j - tiles[1][0]) * tile
        out[top : top + tile, left : left + tile] = draw((tile, tile, n), np.float32)
    at = (np.arange(part.start, part.stop) - of_axis[0] * tile for part, of_axis in zip(region, tiles, strict=True))
    return out[np.ix_(*at)]


def _smooth_field(recipe: _Recipe, purpose: int, rows: Floats, columns: Floats, scale: float) -> Floats:
    """Smooth random field on a grid of positions: mean 0, deviation about 1, features of `scale`.

    Cubic B-splines with random coefficients `scale` apart.
    """
    ends = [slice(int(at[0] / scale // 1) - 1, int(at[-1] / scale // 1) + 3) for at in (rows, columns)]
    field = _lattice(recipe, purpose, (ends[0], ends[1]), 1)[:, :, 0] - np.float32(0.5)
    for positions, end in zip((rows, columns), ends, strict=True):
        at = positions / scale
        knot = np.floor(at).astype(np.int64)
        t = (at - knot).astype(np.float32)[:, None]
        s = 1 - t
        weights = (s * s * s, 3 * t * t * t - 6 * t * t + 4, 3 * s * s * s - 6 * s * s + 4, t * t * t)
        total = weights[0] * field[knot - 1 - end.start]
        for k in range(1, 4):
            total += weights[k] * field[knot - 1 + k - end.start]
        field = total.T / np.float32(6)  # turned, so the next round does the other axis
    # A uniform variable has deviation 0.2887, smoothing leaves 0.479 of it along the two axes together.
    return field / np.float32(0.2887 * 0.479)


@dataclass(frozen=True)
class _Nuclei:
    """Nuclei by rising key."""

    keys: Int64
    centres: Floats  # (n, 2) pixels
    radii: Floats  # (n,) pixels, of a circle of about the same area
    uniform: Floats  # (n, 6) numbers that outline and brightness are made of
    normal: Floats  # (n, 9)


def _reach(recipe: _Recipe) -> int:
    """Largest distance of a nucleus's pixel from its centre."""
    return int(np.ceil(0.5 * recipe.diameter * 1.4 * 1.2 * 1.2)) + 1


def _nuclei(recipe: _Recipe, region: Region) -> _Nuclei:
    """All nuclei that can change a pixel's label in a region: those that reach into it, and theirs."""
    pitch = PITCH * recipe.diameter
    beyond = 3 * _reach(recipe) + 4
    n_around = 12  # lattice points that decide, over three rounds, whether one of them is kept
    rows, columns = (
        slice(int((part.start - beyond) // pitch) - n_around, int((part.stop + beyond) // pitch) + n_around)
        for part in region
    )
    uniform = _lattice(recipe, _PLACES, (rows, columns), 9).astype(np.float64)
    normal = _lattice(recipe, _SHAPES, (rows, columns), 9, is_normal=True).astype(np.float64)
    i, j = np.arange(rows.start, rows.stop), np.arange(columns.start, columns.stop)
    y = (i[:, None] + uniform[..., 0]) * pitch
    x = (j[None, :] + 0.5 * (i[:, None] % 2) + uniform[..., 1]) * pitch
    radius = 0.5 * recipe.diameter * (1 + 0.12 * np.clip(normal[..., 8], -2.5, 3))
    tissue = _smooth_field(recipe, _TISSUE, i * pitch, j * pitch, CLUSTER * recipe.diameter)
    is_dense = tissue < (NormalDist().inv_cdf(recipe.density) if recipe.density < 1 else np.inf)
    is_wanted = uniform[..., 2] < np.where(is_dense, 1.0, 0.06)
    is_kept = _keep_apart(is_wanted, y, x, radius, uniform[..., 8])
    for at, length, part in zip((y, x), recipe.shape, region, strict=True):
        is_kept &= (at >= max(0, part.start - beyond)) & (at < min(length, part.stop + beyond))
    keys = ((i[:, None] + 64) << 32) + (j[None, :] + 64)
    centres = np.stack([y[is_kept], x[is_kept]], axis=1)
    return _Nuclei(keys[is_kept], centres, radius[is_kept], uniform[is_kept][:, 2:8], normal[is_kept])


def _keep_apart(is_wanted: Bools, y: Floats, x: Floats, radius: Floats, rank: Floats) -> Bools:
    """Keep candidates of low rank, drop those too near to one that is kept; three rounds of it.

    What is undecided after that is dropped, so each decision looks at a bounded neighbourhood.
    """
    offsets = [(a, b) for a in range(-2, 3) for b in range(-2, 3) if (a, b) != (0, 0)]
    is_near = []
    for offset in offsets:
        there_y, there_x, there_r = (np.roll(values, offset, (0, 1)) for values in (y, x, radius))
        least = CLOSEST * (radius + there_r)
        is_near.append((y - there_y) ** 2 + (x - there_x) ** 2 < least * least)
    is_open, is_kept = is_wanted.copy(), np.zeros_like(is_wanted)
    for _ in range(3):
        is_beaten = np.zeros_like(is_wanted)
        for near, offset in zip(is_near, offsets, strict=True):
            is_better = np.roll(is_open, offset, (0, 1)) & (np.roll(rank, offset, (0, 1)) < rank)
            is_beaten |= near & is_better
        is_new = is_open & ~is_beaten
        is_kept |= is_new
        is_open &= ~is_new
        for near, offset in zip(is_near, offsets, strict=True):
            is_open &= ~(near & np.roll(is_new, offset, (0, 1)))
    return is_kept


def _outlines(recipe: _Recipe, nuclei: _Nuclei, chosen: Int64) -> Floats:
    """Distance of window pixels (n, w, w) outside the outline, along the ray from the centre.

    The outline is an ellipse whose radius is changed by waves of three to five turns.
    """
    reach = _reach(recipe)
    corners = np.floor(nuclei.centres[chosen]).astype(np.int64) - reach
    steps = np.arange(2 * reach + 1)
    y = (corners[:, :1] + steps + 0.5 - nuclei.centres[chosen, :1])[:, :, None]
    x = (corners[:, 1:] + steps + 0.5 - nuclei.centres[chosen, 1:])[:, None, :]
    numbers = nuclei.normal[chosen][:, :, None, None]
    length = np.sqrt(x * x + y * y) + 1e-9
    cos, sin = x / length, y / length
    norm = np.sqrt(numbers[:, 0] ** 2 + numbers[:, 1] ** 2) + 1e-9
    along = (cos * numbers[:, 0] + sin * numbers[:, 1]) / norm
    ratio = (1 + 0.2 * nuclei.uniform[chosen, 1])[:, None, None]  # long axis over that of a circle
    across = 1 - along * along
    radius = nuclei.radii[chosen][:, None, None] / np.sqrt((along / ratio) ** 2 + across * ratio * ratio)
    wave = np.zeros_like(radius)
    turned = (cos * cos - sin * sin, 2 * cos * sin)  # cosine and sine of k times the angle, k = 2
    for k, size in ((3, 0.033), (4, 0.022), (5, 0.012)):
        turned = (turned[0] * cos - turned[1] * sin, turned[0] * sin + turned[1] * cos)
        wave += size * (turned[0] * numbers[:, 2 * k - 4] + turned[1] * numbers[:, 2 * k - 3])
    outside: Floats = length - radius * (1 + np.clip(wave, -0.2, 0.2))
    return outside


def _paint(recipe: _Recipe, nuclei: _Nuclei, region: Region) -> tuple[npt.NDArray[np.int32], Floats]:
    """Who owns each pixel (place in `nuclei`, -1 nobody), and how deep inside it lies, in radii.

    A pixel within several outlines goes to the one it is deepest in, so touching nuclei meet in a
    smooth line; crumbs that this cuts off a nucleus become background.
    """
    from scipy import ndimage

    side = 2 * _reach(recipe) + 1
    margin = 2 * side + 4  # holds the windows of all that reach into the region, and of their neighbours
    origin = np.array([part.start - margin for part in region])
    shape = tuple(part.stop - part.start + 2 * margin for part in region)
    nearest, owner = np.zeros(shape), np.full(shape, -1, np.int32)
    corners = np.floor(nuclei.centres).astype(np.int64) - side // 2 - origin
    painted = np.flatnonzero(((corners >= 0) & (corners + side <= shape)).all(axis=1))
    windows = [(slice(i, i + side), slice(j, j + side)) for i, j in corners.tolist()]
    batch = max(1, 2**17 // side**2)
    for start in range(0, painted.size, batch):
        chosen = painted[start : start + batch]
        for k, distance in zip(chosen.tolist(), _outlines(recipe, nuclei, chosen), strict=True):
            is_deeper = distance < nearest[windows[k]]
            nearest[windows[k]][is_deeper] = distance[is_deeper]
            owner[windows[k]][is_deeper] = k
    for axis, length in enumerate(recipe.shape):
        at = np.arange(shape[axis]) + origin[axis]
        owner[(slice(None),) * axis + ((at < 0) | (at >= length),)] = -1
    for k in painted.tolist():
        parts, n_parts = ndimage.label(owner[windows[k]] == k)
        if n_parts > 1:
            largest = np.bincount(parts.reshape(-1))[1:].argmax() + 1
            owner[windows[k]][(parts > 0) & (parts != largest)] = -1
    nearest, owned = (values[margin:-margin, margin:-margin] for values in (nearest, owner))
    depth = np.where(owned >= 0, -nearest / np.append(nuclei.radii, 1.0)[owned], 0.0)
    return owned, depth.astype(np.float32)


def _photograph(
    recipe: _Recipe, nuclei: _Nuclei, owner: npt.NDArray[np.int32], depth: Floats, piece: Region
) -> npt.NDArray[np.uint16]:
    """Image of a piece, from owner and depth of the piece and MARGIN pixels round it."""
    rows, columns = (np.arange(part.start - MARGIN, part.stop + MARGIN) + 0.5 for part in piece)
    # Skewed: many nuclei of about 0.7, few of 1.5.
    brightness = 0.6 + 0.9 * nuclei.uniform[:, 2] ** 2
    brightness = np.where(nuclei.uniform[:, 3] < recipe.dim_fraction, 0.35, 1.0) * brightness
    light = np.append(brightness, 0.0).astype(np.float32)[owner]
    light *= 0.72 + 0.28 * np.minimum(1, 2.5 * depth)
    texture = 0.12 * _smooth_field(recipe, _TEXTURE, rows, columns, recipe.diameter / 6)
    texture += 0.06 * _smooth_field(recipe, _GRAIN, rows, columns, recipe.diameter / 14)
    light *= np.clip(1 + texture, 0.5, 1.5)
    light = _blur(np.where(_is_rim(owner), np.float32(0.6) * light, light))
    haze = 1 + 0.25 * np.clip(_smooth_field(recipe, _HAZE, rows, columns, 9 * recipe.diameter), -2, 3)
    inner = (slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    counts = np.float32(BACKGROUND) * haze[inner] + np.float32(BRIGHT) * light[inner]
    if recipe.illumination > 1:
        counts *= _light(recipe, piece)
    noise = _lattice(recipe, _NOISE, piece, 1, tile=256, is_normal=True)[:, :, 0]
    counts += noise * np.sqrt(np.float32(COUNTS_PER_PHOTON) * counts + np.float32(READ_NOISE**2))
    return np.clip(np.rint(counts), 0, 65535).astype(np.uint16)


def _light(recipe: _Recipe, piece: Region) -> Floats:
    """Share of the full light that falls on each pixel of a piece: rises along both axes, 1 at the last corner."""
    shares = [
        np.arange(part.start, part.stop) / (2.0 * max(1, length - 1))
        for part, length in zip(piece, recipe.shape, strict=True)
    ]
    least = 1 / recipe.illumination
    light: Floats = (least + (1 - least) * np.add.outer(*shares)).astype(np.float32)
    return light


def _is_rim(owner: npt.NDArray[np.int32]) -> Bools:
    """Pixels beside a pixel of another nucleus."""
    is_rim = np.zeros(owner.shape, np.bool_)
    for low, high in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        touches = (owner[low] != owner[high]) & (owner[low] >= 0) & (owner[high] >= 0)
        is_rim[low] |= touches
        is_rim[high] |= touches
    return is_rim


def _blur(light: Floats) -> Floats:
    """Gaussian of sigma 1, cut at 4 pixels, in a fixed order of sums; the outermost 4 pixels are wrong."""
    weights = np.array([0.39894, 0.24197, 0.05399, 0.00443, 0.00013], np.float32)
    for axis in (0, 1):
        total = weights[0] * light
        for k in range(1, 5):
            total += weights[k] * (np.roll(light, k, axis) + np.roll(light, -k, axis))
        light = total
    return light
