"""Shape features of single objects, as scikit-image defines them; arrays in, arrays out.

All of them follow from the pixels within an object's own box, so they do not depend on where the object lies or on
how the image was cut.

References
----------
scikit-image, ``skimage.measure.regionprops``: what each feature is called and means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .frames import Extent
from .hulls import convex_volume

__all__ = ["LARGEST_BOX", "feature_names", "shape_features"]

LARGEST_BOX = 2**24
"""Pixels of the box of an object that is measured; scikit-image takes up to 30 bytes for each."""

LENGTHS = ("axis_major_length", "axis_minor_length", "equivalent_diameter_area")
PLAIN = ("area_convex", *LENGTHS, "euler_number", "extent", "feret_diameter_max", "solidity")
OF_HULL = ("area_convex", "feret_diameter_max", "solidity")
IN_PLANES = ("eccentricity", "orientation", "perimeter")
ALIKE = 1e-6
"""Sizes of pixels along two axes that differ by a smaller share are the same."""


def feature_names(extent: Extent, spacing_um: Sequence[float] | None) -> tuple[str, ...]:
    """What is measured of every object.

    Parameters
    ----------
    extent : Extent
        Along which axes objects extend.
    spacing_um : sequence of float, optional
        Size of a pixel per spatial axis in micrometres, if it is known.

    Returns
    -------
    names : tuple of str
        As scikit-image calls them, in pixels (of volumes ``area`` is the volume); then lengths in micrometres,
        ``_um``. A perimeter in micrometres is there only if pixels are square.
    """
    is_flat = len(extent.objects) == 2
    names = PLAIN + (IN_PLANES if is_flat else ())
    if spacing_um is None:
        return names
    is_square = is_flat and math.isclose(spacing_um[-2], spacing_um[-1], rel_tol=ALIKE)
    in_um = (*LENGTHS, "feret_diameter_max", *(["perimeter"] if is_square else []))
    return names + tuple(f"{name}_um" for name in in_um)


def shape_features(mask: npt.NDArray[np.bool_], spacing_um: Sequence[float] | None) -> list[float]:
    """Measure one object.

    Parameters
    ----------
    mask : array of bool, shape (*object axes)
        The object's box: which pixels are its own; every face has some.
    spacing_um : sequence of float, optional
        Size of a pixel per spatial axis in micrometres; the last ones are those of the object.

    Returns
    -------
    values : list of float
        In the order of :func:`feature_names`. Of an object of a volume that lies in a plane, which has no convex hull,
        what comes of that is NaN.
    """
    from skimage.measure import regionprops

    labels = mask.view(np.uint8)
    (plain,) = regionprops(labels)
    values = {name: getattr(plain, name) for name in PLAIN if name not in OF_HULL}
    corners, area_convex = np.full((2, mask.ndim), np.nan), math.nan
    if mask.ndim == 2 or _is_solid(mask):
        hull = plain.image_convex if mask.ndim == 2 else convex_volume(mask)
        corners, area_convex = _corners(hull), float(np.count_nonzero(hull))
    values |= {"area_convex": area_convex, "solidity": plain.area / area_convex}
    values["feret_diameter_max"] = _largest_distance(corners)
    if mask.ndim == 2:
        values |= {name: getattr(plain, name) for name in IN_PLANES}
    order = [*PLAIN, *(IN_PLANES if mask.ndim == 2 else ())]
    found = [float(values[name]) for name in order]
    if spacing_um is None:
        return found
    steps = tuple(spacing_um[-mask.ndim :])
    if all(math.isclose(step, steps[-1], rel_tol=ALIKE) for step in steps):
        in_um = [*LENGTHS, "feret_diameter_max", *(["perimeter"] if mask.ndim == 2 else [])]
        return found + [float(values[name]) * steps[-1] for name in in_um]
    (scaled,) = regionprops(labels, spacing=steps)
    found += [float(getattr(scaled, name)) for name in LENGTHS]
    return [*found, _largest_distance(corners * np.array(steps))]


def _is_solid(mask: npt.NDArray[np.bool_]) -> bool:
    """Whether pixels extend in all directions, and not in a plane or along a line only."""
    at = np.argwhere(mask).astype(np.float64)
    at -= at.mean(axis=0)
    return bool(np.linalg.matrix_rank(at.T @ at) == mask.ndim)


def _corners(convex: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Corners of the convex hull of the outline that scikit-image measures distances on; it compares all its points
    with each other, and of a large object that is more than fits in memory."""
    from scipy.spatial import ConvexHull
    from skimage.measure import find_contours, marching_cubes

    padded = np.pad(convex, 2)
    if convex.ndim == 2:
        points = np.vstack(find_contours(padded, 0.5, fully_connected="high"))
    else:
        points = marching_cubes(padded, level=0.5)[0]
    corners: npt.NDArray[np.float64] = points[ConvexHull(points).vertices]
    return corners


def _largest_distance(points: Any) -> float:
    """Between any two points."""
    from scipy.spatial.distance import pdist

    return math.sqrt(float(pdist(points, "sqeuclidean").max()))
