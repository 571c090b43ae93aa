"""Convex hulls of objects in volumes, as scikit-image has them, in a fraction of the time.

scikit-image compares every voxel with every facet; here a row of voxels is narrowed down facet by facet. What is inside
is the same: voxels lie either on a facet, to within the tolerance that is theirs, or far from it.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

__all__ = ["convex_volume"]

TOLERANCE = 1e-10
"""How far outside a facet the centre of a voxel may lie; that of ``skimage.morphology.convex_hull_image``."""


def convex_volume(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Voxels in the convex hull of an object, that of the middles of the faces of its voxels.

    Parameters
    ----------
    mask : array of bool, shape (z, y, x)
        The object, which extends in all three directions.

    Returns
    -------
    hull : array of bool, shape (z, y, x)
    """
    from scipy.spatial import ConvexHull

    at = np.argwhere(mask).astype(np.float64)
    outermost = at[ConvexHull(at).vertices]
    faces = np.concatenate([0.5 * np.eye(3), -0.5 * np.eye(3)])
    points = np.unique((outermost[:, None] + faces).reshape(-1, 3), axis=0)
    hull = np.zeros(mask.shape, np.bool_)
    _fill(np.unique(ConvexHull(points).equations, axis=0), hull)
    return hull


@nb.njit(cache=True, nogil=True)
def _fill(facets: Any, hull: Any) -> None:
    """Set all voxels that lie within all facets, given by normal and offset."""
    for z in range(hull.shape[0]):
        for y in range(hull.shape[1]):
            first, last = 0, hull.shape[2] - 1
            for facet in facets:
                slope, rest = facet[2], facet[0] * z + facet[1] * y + facet[3]
                # A row enters or leaves a facet once: from where it does, rounding apart, it is a step at most.
                if slope == 0.0:
                    if rest > TOLERANCE:
                        last = first - 1
                elif slope > 0.0:
                    if slope * last + rest > TOLERANCE:
                        last = min(last, int(np.floor((TOLERANCE - rest) / slope)) + 1)
                        while last >= first and slope * last + rest > TOLERANCE:
                            last -= 1
                elif slope * first + rest > TOLERANCE:
                    first = max(first, int(np.ceil((TOLERANCE - rest) / slope)) - 1)
                    while first <= last and slope * first + rest > TOLERANCE:
                        first += 1
                if first > last:
                    break
            if first <= last:
                hull[z, y, first : last + 1] = True
