"""The two costly loops of the dynamics on a GPU, bit for bit what `particles` and `heat` do.

Arrays in, arrays out, through torch. Every operation is a kernel of its own and in the order of the
CPU's loops, so nothing is contracted or reordered and a block may be worked on by whichever device is
idle. Sums over an object are left to the CPU: on a GPU their order is not fixed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import particles
from .claims import claimed_if_free
from .heat import SINGLE_ROUNDS, object_centres, sum_errors
from .particles import CHECK_EVERY, SETTLED, check_flows

__all__ = ["GPU", "flow_errors", "follow_flows", "idle_device", "is_out_of_memory"]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]

AT_ONCE = 2**23  # particles that move together: in 3D each takes some 300 bytes

GPU = threading.Lock()
"""Held by whoever keeps the GPU of this process busy."""


@contextlib.contextmanager
def idle_device(device: str) -> Iterator[str]:
    """The run's device if this process has it and it has nothing else to do, ``"cpu"`` otherwise."""
    if device == "cpu" or not _is_idle() or not GPU.acquire(blocking=False):
        yield "cpu"
        return
    try:
        with claimed_if_free() as is_free:
            yield device if is_free else "cpu"
    finally:
        GPU.release()


def _is_idle() -> bool:
    """Whether this process has a GPU, and it works on no pass of the network that it was told of."""
    import torch

    return torch.cuda.is_available() and torch.cuda.current_stream().query()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that a device has too little memory."""
    import torch

    says = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in says or "ALLOC_FAILED" in says


def _if_it_fits(on_gpu: Callable[[], Any], on_cpu: Callable[[], Any]) -> Any:
    """What comes of some work on the GPU, or of the same on the CPU if the GPU has too little memory for it."""
    import torch

    try:
        return on_gpu()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    logger.info("the GPU has too little memory for the masks of a block: they are made on the CPU, to the same labels.")
    return on_cpu()


def follow_flows(flows: FloatArray, is_foreground: npt.NDArray[np.bool_], niter: int, device: str) -> Labels:
    """What :func:`tiledseg.particles.follow_flows` does, on a torch device.

    Parameters
    ----------
    flows, is_foreground, niter
        As there.
    device : str
        Of torch.

    Returns
    -------
    ends : array of int32, shape (*spatial)
        As there.

    Raises
    ------
    ImageError, SettingsError
        As there.
    """
    ends: Labels = _if_it_fits(
        lambda: _follow(flows, is_foreground, niter, device),
        lambda: particles.follow_flows(flows, is_foreground, niter),
    )
    return ends


def _follow(flows: FloatArray, is_foreground: npt.NDArray[np.bool_], niter: int, device: str) -> Labels:
    """`follow_flows` on the device."""
    import torch

    flow = torch.from_numpy(check_flows(flows, is_foreground).reshape(-1, is_foreground.ndim)).to(device)
    first = np.flatnonzero(is_foreground)
    ends = np.full(is_foreground.size, -1, np.int32)
    with torch.inference_mode():
        for some in np.array_split(first, max(1, math.ceil(first.size / AT_ONCE))):
            start = torch.from_numpy(some).to(device)
            ends[some] = _ends_of(flow, is_foreground.shape, start, niter).to(torch.int32).cpu().numpy()
    return ends.reshape(is_foreground.shape)


def _ends_of(flow: Any, shape: tuple[int, ...], start: Any, niter: int) -> Any:
    """Flat indices of the pixels in which the particles that start in some pixels end."""
    import torch

    ends = torch.empty_like(start)
    moving = torch.arange(start.numel(), device=start.device)
    # Index steps along each axis, in the image and in the flows, which have a margin.
    steps, wide_steps = ([math.prod(n[axis + 1 :]) for axis in range(len(n))] for n in (shape, [n + 1 for n in shape]))
    places = [start // step % n for step, n in zip(steps, shape, strict=True)]
    low = torch.stack([-place for place in places], dim=1).float()
    high = torch.stack([n - 1 - place for place, n in zip(places, shape, strict=True)], dim=1).float()
    at = _flat(places, wide_steps)
    moved = torch.zeros((start.numel(), len(shape)), dtype=torch.float32, device=start.device)
    n_steps = 0
    while moving.numel() > 0:
        before = moved
        for _ in range(min(CHECK_EVERY, niter - n_steps)):
            moved = _step(flow, at, wide_steps, moved, low, high)
        n_steps += CHECK_EVERY
        squares = torch.square(moved - before).unbind(dim=1)
        has_ended = (functools.reduce(operator.add, squares) < float(SETTLED)) | (n_steps >= niter)
        pixels = moved.floor() if moved.shape[1] == 2 else (moved + 0.5).floor()
        there = start[moving] + _flat(pixels.long().unbind(dim=1), steps)
        ends[moving[has_ended]] = there[has_ended]
        left = ~has_ended
        moving, at, moved, low, high = moving[left], at[left], moved[left], low[left], high[left]
    return ends


def _flat(places: Sequence[Any], steps: Sequence[int]) -> Any:
    """Flat index of each place, or what it changes by, from one array of integers per axis."""
    return functools.reduce(operator.add, (place * step for place, step in zip(places, steps, strict=True)))


def _step(flow: Any, at: Any, steps: Sequence[int], moved: Any, low: Any, high: Any) -> Any:
    """One Euler step, as `particles._step_2d` and `particles._step_3d` have it."""
    whole = moved.floor()
    weight = moved - whole
    other = 1.0 - weight
    # Share and index of each pixel round a particle, in raster order.
    index = at + _flat(whole.long().unbind(dim=1), steps)
    corners = [(other[:, 0], index), (weight[:, 0], index + steps[0])]
    for axis, step in enumerate(steps[1:], start=1):
        sides = ((other[:, axis], 0), (weight[:, axis], step))
        corners = [(share * side, near + shift) for share, near in corners for side, shift in sides]
    parts = [share[:, None] * flow[near] for share, near in corners]
    while len(parts) > 1:
        parts = [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)]
    return (moved + parts[0]).maximum(low).minimum(high)


def flow_errors(
    labels: Labels, flows: FloatArray, boxes: npt.NDArray[np.int64], device: str
) -> npt.NDArray[np.float64]:
    """What :func:`tiledseg.heat.flow_errors` does, on a torch device.

    Parameters
    ----------
    labels, flows, boxes
        As there; two axes.
    device : str
        Of torch.

    Returns
    -------
    errors : array of float64, shape (n,)
        As there.
    """
    is_present = boxes[:, 0, 0] < boxes[:, 1, 0]
    n_iter = np.where(is_present, 2 * (boxes[:, 1] - boxes[:, 0] + 1).sum(axis=1), 0)
    flat = np.ascontiguousarray(labels).reshape(-1)
    pixels = np.flatnonzero(np.concatenate([[False], is_present])[flat])
    centres = object_centres(labels, boxes)
    values = np.empty((2, pixels.size), np.float32)
    for precision, is_chosen in (("float32", n_iter <= SINGLE_ROUNDS), ("float64", n_iter > SINGLE_ROUNDS)):
        own = is_chosen[flat[pixels] - 1]
        flows_on = functools.partial(
            _object_flows, flat, labels.shape, pixels[own], np.where(is_chosen, n_iter, 0), centres, precision
        )
        values[:, own] = _if_it_fits(functools.partial(flows_on, device), functools.partial(flows_on, "cpu"))
    return sum_errors(flat, pixels, values, flows, len(boxes))


def _object_flows(
    flat: Labels,
    shape: tuple[int, ...],
    pixels: npt.NDArray[np.int64],
    n_iter: npt.NDArray[np.int64],
    centres: npt.NDArray[np.int64],
    precision: str,
    device: str,
) -> FloatArray:
    """Unit flow at each of the pixels, shape (2, n): heat that diffuses inside each object.

    All objects diffuse together; those that diffuse longest come first, so that the pixels still at
    work are always the first ones.
    """
    import torch

    if not pixels.size:
        return np.zeros((2, 0), np.float32)
    rounds = n_iter[flat[pixels] - 1]
    order = np.argsort(-rounds, kind="stable")
    n_active = np.searchsorted(-rounds[order], -np.arange(1, rounds.max() + 1), side="right")
    by_rounds = np.argsort(-n_iter, kind="stable")
    by_rounds = by_rounds[n_iter[by_rounds] > 0]
    n_lit = np.searchsorted(-n_iter[by_rounds], -np.arange(1, rounds.max() + 1), side="right")
    with torch.inference_mode():
        around, slots = _neighbours(flat, shape, pixels[order], device)
        lit = slots[torch.from_numpy(centres[by_rounds]).to(device)].long()
        heat = torch.zeros(pixels.size + 1, dtype=getattr(torch, precision), device=device)
        for n, m in zip(n_active.tolist(), n_lit.tolist(), strict=True):
            heat[lit[:m]] += 1.0
            columns = [(heat[around[c][:n]] + heat[around[c + 3][:n]]) + heat[around[c + 6][:n]] for c in range(3)]
            heat[:n] = ((columns[0] + columns[1]) + columns[2]) * (1.0 / 9)
        heat = heat.double()
        slopes = [heat[around[7]] - heat[around[1]], heat[around[5]] - heat[around[3]]]
        norm = (slopes[0] * slopes[0] + slopes[1] * slopes[1]).sqrt() + 1e-60
        ordered = torch.stack([slope / norm for slope in slopes]).float().cpu().numpy()
    values = np.empty_like(ordered)
    values[:, order] = ordered
    return values


def _neighbours(flat: Labels, shape: tuple[int, ...], pixels: npt.NDArray[np.int64], device: str) -> tuple[Any, Any]:
    """For each pixel the places in `pixels` of the 3 x 3 round it, in raster order, `len(pixels)` for
    those of other objects; and the place of every pixel of the image."""
    import torch

    height, width = shape
    labels = torch.from_numpy(flat).to(device)
    here = torch.from_numpy(pixels).to(device)
    slots = torch.full((flat.size,), pixels.size, dtype=torch.int32, device=device)
    slots[here] = torch.arange(pixels.size, dtype=torch.int32, device=device)
    y, x = here // width, here % width
    own = labels[here]
    around = []
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            is_inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            there = (here + (dy * width + dx)).clamp(0, flat.size - 1)
            is_own = is_inside & (labels[there] == own)
            around.append(torch.where(is_own, slots[there], pixels.size))
    return around, slots
