"""Where something rises above the noise: cells of a map, from statistics that the survey measures per cell."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["foreground_map"]

FloatArray = npt.NDArray[np.float32]

# What is left of white noise after means over 4 x 4 pixels and a Gaussian of one such mean.
NOISE_LEFT = 0.0705
RANGE_IN_NOISE = 12.0
RANGE_IN_CONTRAST = 0.005


def foreground_map(statistics: FloatArray, contrast: float, reach: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Cells of the map in or beside which something rises above the noise.

    A cell is empty if the smoothed values in it and around it span less than what noise alone
    does. The noise of the image is that of its quietest cells, so that dense tissue does not
    count as noise; gradients and correlated noise make more foreground, never less.

    Parameters
    ----------
    statistics : array of float32, shape (3, *cells)
        From `survey.process_block`: smallest and largest smoothed value, and noise.
    contrast : float
        Difference of the percentiles: what spans less than 1/200 of it is invisible to the network.
    reach : tuple of int
        How many cells around a cell count with it, along each axis.

    Returns
    -------
    is_foreground : array of bool, shape (*cells)
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    size = tuple(2 * cells + 1 for cells in reach)
    span = maximum_filter(statistics[1], size, mode="nearest") - minimum_filter(statistics[0], size, mode="nearest")
    noise = float(np.percentile(statistics[2], 5))
    threshold = max(RANGE_IN_NOISE * NOISE_LEFT * noise, RANGE_IN_CONTRAST * contrast)
    result: npt.NDArray[np.bool_] = span > threshold
    return result
