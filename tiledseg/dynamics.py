"""From flows to labels and back: Cellpose's dynamics, made independent of where a block lies.

Arrays in, arrays out. The method is Cellpose's (every pixel follows the
flow to a sink, sinks are grown into objects, objects whose flow disagrees with the network are
dropped), but each step is local, so an object wholly inside two overlapping blocks is the same
set of pixels in both:

- particles (`particles`) carry a displacement from their start, so moving the block by whole pixels
  changes no bit of their path;
- the reference flow of an object (`heat`) diffuses for a time set by its own box, and errors are
  summed over its pixels in raster order;
- ties are broken by raster order. It needs no global position: raster order compares indices axis
  by axis, a block subtracts one constant per axis, so any two pixels of a block are in the same
  order as in the whole image.

Planes (y, x) and volumes (z, y, x) go the same way. All but the Euler step works on flattened arrays with one
index step per axis: 3D is one kernel more.

References
----------
Stringer et al. (2021), "Cellpose: a generalist algorithm for cellular segmentation",
Nature Methods 18, 100-106.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from . import gpu
from .blend import load_kernels
from .cores import ALONE, Cores
from .errors import SettingsError
from .heat import flow_errors, label_flows
from .meters import metered
from .objects import fill_holes, first_pixels, look_up, measure_objects, object_extents, renumber
from .particles import follow_flows
from .pool import box_moments

__all__ = ["compute_masks", "find_sinks", "finish_masks", "gather_pixels", "grow_sinks", "warm_up"]

FloatArray = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]

PEAK_COUNT = 10  # a sink needs more than this many particles in its pixel,
PEAK_RADIUS = 2  # the most of all pixels this near,
GROW_COUNT = 2  # and takes in pixels with more than this many
GROW_ROUNDS = 5  # in so many rounds

_jit = nb.njit(cache=True, nogil=True)


def compute_masks(
    flows: FloatArray,
    cellprob: FloatArray,
    *,
    cellprob_threshold: float = 0.0,
    flow_threshold: float = 0.4,
    niter: int = 200,
    min_size: int = 15,
    cores: Cores = ALONE,
    device: str = "cpu",
) -> npt.NDArray[np.uint32]:
    """Objects of one block.

    Parameters
    ----------
    flows : array of float32, shape (ndim, *spatial)
        Flow in pixels per step, about unit length: the network's output already divided by 5. Of a volume
        the sum over the planes a pixel lies in, so up to 2 along each axis.
    cellprob : array of float32, shape (*spatial)
        Logit of being inside an object; axes y and x, or z, y and x.
    cellprob_threshold : float
        Pixels above this are foreground.
    flow_threshold : float
        Objects with a larger flow error are dropped; 0 keeps all. Of a volume give 0, as Cellpose does: the
        error is that of flows of unit length.
    niter : int
        Euler steps at most.
    min_size : int
        Objects of fewer pixels, before their holes are filled, are dropped; 0 keeps all.
    cores : Cores
        To share the work, within :meth:`Cores.task`; the result is the same for any number.
    device : str
        Where the two costly loops run: ``"cpu"``, or a GPU of torch, to the same bits.

    Returns
    -------
    labels : array of uint32, shape (*spatial)
        Labels 1..n without gaps, in raster order of each object's first pixel; 0 background.

    Raises
    ------
    ImageError
        If a foreground flow is not finite, or beyond 1e6.
    SettingsError
        If the shapes do not fit, the arrays have neither two axes nor three, or they hold 2**30 pixels or
        more, in 3D 2**31 / 3.
    """
    if flows.shape != (cellprob.ndim, *cellprob.shape):
        raise SettingsError(
            f"flows of shape {flows.shape} do not fit a cellprob of shape {cellprob.shape}; "
            f"give shape {(cellprob.ndim, *cellprob.shape)}."
        )
    gathered = gather_pixels(
        flows, cellprob, cellprob_threshold=cellprob_threshold, niter=niter, cores=cores, device=device
    )
    return finish_masks(gathered, flows, flow_threshold=flow_threshold, min_size=min_size, cores=cores, device=device)


@metered("dynamics")
def gather_pixels(
    flows: FloatArray,
    cellprob: FloatArray,
    *,
    cellprob_threshold: float,
    niter: int,
    cores: Cores = ALONE,
    device: str = "cpu",
) -> Labels:
    """The first half of :func:`compute_masks`: which foreground pixels flow to the same sink.

    Parameters are those of :func:`compute_masks`.

    Returns
    -------
    labels : array of int32, shape (*spatial)
        One label per sink in no particular order, 0 background.
    """
    is_foreground = cellprob > cellprob_threshold
    if device == "cpu":
        ends = follow_flows(flows, is_foreground, niter, cores)
    else:
        ends = gpu.follow_flows(flows, is_foreground, niter, device)
    if not is_foreground.any():
        return np.zeros(cellprob.shape, np.int32)
    counts = np.zeros(ends.shape, np.int32)
    _count_ends(ends.reshape(-1), counts.reshape(-1))
    regions = grow_sinks(counts, find_sinks(counts))
    _look_up(regions.reshape(-1), ends.reshape(-1))
    return ends


@_jit
def _count_ends(ends: Any, counts: Any) -> None:
    for i in range(ends.size):
        if ends[i] >= 0:
            counts[ends[i]] += 1


@_jit
def _look_up(regions: Any, ends: Any) -> None:
    """Replace every end by the region it lies in."""
    for i in range(ends.size):
        ends[i] = regions[ends[i]] if ends[i] >= 0 else 0


@metered("dynamics")
def finish_masks(
    gathered: Labels,
    flows: FloatArray,
    *,
    flow_threshold: float,
    min_size: int,
    spared: Labels | None = None,
    cores: Cores = ALONE,
    device: str = "cpu",
) -> npt.NDArray[np.uint32]:
    """The second half of :func:`compute_masks`: drop what is no object, fill holes, number.

    Parameters
    ----------
    gathered : array of int32, shape (*spatial)
        From :func:`gather_pixels`.
    flows, flow_threshold, min_size, cores, device
        As for :func:`compute_masks`.
    spared : array of int32, shape (n,), optional
        Labels that are not held against the flow threshold: of objects that the block shows in part, and
        whose shape cannot agree for that.

    Returns
    -------
    labels : array of uint32, shape (*spatial)
        As of :func:`compute_masks`.
    """
    boxes, sizes = object_extents(gathered, int(gathered.max(initial=0)))
    is_kept = sizes >= max(min_size, 1)
    if flow_threshold > 0:
        boxes[~is_kept, 1] = -1
        if device == "cpu" or gathered.ndim != 2:
            errors = flow_errors(gathered, flows, boxes, cores)
        else:
            errors = gpu.flow_errors(gathered, flows, boxes, device)
        does_agree = errors <= flow_threshold
        if spared is not None:
            does_agree[spared - 1] = True
        is_kept &= does_agree
    # Filling takes no pixel from another object and adds none before an object's first: no object
    # becomes too small (Cellpose looks again) and the numbering stays in order.
    return fill_holes(renumber(gathered, is_kept), cores).view(np.uint32)


def find_sinks(counts: Labels) -> Indices:
    """Pixels where particles gather.

    Parameters
    ----------
    counts : array of int32, shape (*spatial)
        Particles that end in each pixel.

    Returns
    -------
    sinks : array of int64, shape (n_sinks,)
        Flat indices, ascending, of pixels with more than 10 particles that hold the most of all pixels
        up to 2 away along every axis; of equal ones the first in raster order counts.
    """
    padded = np.pad(counts, PEAK_RADIUS)
    sinks = _peaks(padded.reshape(-1), _window(padded.shape, PEAK_RADIUS))
    return _reindex(sinks, padded.shape, counts.shape, -PEAK_RADIUS)


def _reindex(flat: Indices, source: tuple[int, ...], target: tuple[int, ...], shift: int) -> Indices:
    """Flat indices of an array as those of another, shifted along every axis."""
    places = tuple(axis + shift for axis in np.unravel_index(flat, source))
    return np.asarray(np.ravel_multi_index(places, target), np.int64)


def _window(shape: tuple[int, ...], radius: int) -> Indices:
    """Flat index offsets of the pixels within `radius` along every axis, without the middle."""
    middle = int(np.ravel_multi_index((radius,) * len(shape), shape))
    places = np.indices((2 * radius + 1,) * len(shape)).reshape(len(shape), -1)
    offsets: Indices = np.asarray(np.ravel_multi_index(tuple(places), shape), np.int64) - middle
    is_other = offsets != 0
    around: Indices = offsets[is_other]
    return around


@_jit
def _peaks(counts: Any, offsets: Any) -> Any:
    """Flat indices whose count is the largest around, the first in raster order among equals."""
    peaks = np.empty(np.sum(counts > PEAK_COUNT), np.int64)
    n_peaks = 0
    for i in range(counts.size):
        if counts[i] <= PEAK_COUNT:
            continue
        is_peak = True
        for offset in offsets:
            other = counts[i + offset]
            if other > counts[i] or (other == counts[i] and offset < 0):
                is_peak = False
                break
        if is_peak:
            peaks[n_peaks] = i
            n_peaks += 1
    return peaks[:n_peaks]


def grow_sinks(counts: Labels, sinks: Indices) -> Labels:
    """Regions round the sinks: particles that end in one region are one object.

    Parameters
    ----------
    counts : array of int32, shape (*spatial)
        Particles that end in each pixel.
    sinks : array of int64, shape (n_sinks,)
        Flat indices, ascending.

    Returns
    -------
    regions : array of int32, shape (*spatial)
        1 + index of the sink whose region a pixel is in, 0 for none. A region spreads 5 times to
        the neighbours that hold more than 2 particles; where regions meet, the sink with more
        particles has the pixel, the first in raster order of equal ones.
    """
    padded = np.pad(counts, 1)
    starts = _reindex(sinks, counts.shape, padded.shape, 1)
    regions = np.zeros(padded.shape, np.int32)
    _grow(padded.reshape(-1), _window(padded.shape, 1), starts, regions.reshape(-1))
    return np.ascontiguousarray(regions[(slice(1, -1),) * counts.ndim])


@_jit
def _grow(counts: Any, offsets: Any, sinks: Any, regions: Any) -> None:
    """Breadth-first growth of each sink over the counts, see grow_sinks."""
    seen = np.zeros(counts.size, np.int32)
    window = 1
    while 3**window < offsets.size + 1:
        window += 1
    queue = np.empty((2 * GROW_ROUNDS + 1) ** window, np.int64)
    for k in range(sinks.size):
        queue[0] = sinks[k]
        seen[sinks[k]] = k + 1
        n_queued = 1
        n_done = 0
        for _ in range(GROW_ROUNDS):
            end_of_round = n_queued
            while n_done < end_of_round:
                for offset in offsets:
                    i = queue[n_done] + offset
                    if counts[i] > GROW_COUNT and seen[i] != k + 1:
                        seen[i] = k + 1
                        queue[n_queued] = i
                        n_queued += 1
                n_done += 1
        for i in queue[:n_queued]:
            if regions[i] == 0 or counts[sinks[k]] > counts[sinks[regions[i] - 1]]:
                regions[i] = k + 1


def warm_up(ndim: int = 2) -> None:
    """Compile every kernel, or load it from numba's cache: once, before workers start.

    Parameters
    ----------
    ndim : int
        Axes of the blocks that will be labelled, 2 or 3.
    """
    labels = np.zeros((16,) * ndim, np.int32)
    labels[(slice(2, 14),) * ndim] = 1
    labels[(8,) * ndim] = 0
    flows = label_flows(labels)
    compute_masks(flows, labels.astype(np.float32), min_size=1)
    load_kernels()
    box_moments(np.zeros((1, 1), np.float32), np.float32(0), 1)
    look_up(first_pixels(labels, 1).astype(np.int32), labels)
    measure_objects(labels, labels[None], np.arange(2))  # of two: a table of one row lies otherwise in memory
