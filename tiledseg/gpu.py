"""The two costly loops of the dynamics on a GPU, bit for bit what `particles` and `heat` do.

Arrays in, arrays out, through torch. Every operation is a kernel of its own and in the order of the
CPU's loops, so nothing is contracted or reordered and a block may be worked on by whichever device is
idle. Sums over an object are left to the CPU: on a GPU their order is not fixed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .heat import object_centres, sum_errors
from .particles import CHECK_EVERY, SETTLED, check_flows

__all__ = ["GPU", "flow_errors", "follow_flows", "idle_device"]

FloatArray = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]

GPU = threading.Lock()
"""Held by whoever keeps the GPU of this process busy."""


@contextlib.contextmanager
def idle_device(device: str) -> Iterator[str]:
    """The run's device if it has nothing else to do, ``"cpu"`` otherwise."""
    if device == "cpu" or not GPU.acquire(blocking=False):
        yield "cpu"
        return
    try:
        yield device
    finally:
        GPU.release()


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
    import torch

    masked = check_flows(flows, is_foreground)
    height, width = is_foreground.shape
    first = np.flatnonzero(is_foreground)
    ends = np.full(is_foreground.size, -1, np.int32)
    with torch.inference_mode():
        flow = torch.from_numpy(masked.reshape(-1, 2)).to(device)
        start = torch.from_numpy(first).to(device)
        settled_at = torch.empty(start.numel(), dtype=torch.int64, device=device)
        moving = torch.arange(start.numel(), device=device)
        y, x = start // width, start % width
        low = torch.stack([-y, -x], dim=1).float()
        high = torch.stack([height - 1 - y, width - 1 - x], dim=1).float()
        at = y * (width + 1) + x
        moved = torch.zeros((start.numel(), 2), dtype=torch.float32, device=device)
        n_steps = 0
        while moving.numel() > 0:
            before = moved
            for _ in range(min(CHECK_EVERY, niter - n_steps)):
                moved = _step_2d(flow, at, width + 1, moved, low, high)
            n_steps += CHECK_EVERY
            net = moved - before
            net = net * net
            has_ended = (net[:, 0] + net[:, 1] < float(SETTLED)) | (n_steps >= niter)
            whole = moved.floor().long()
            settled_at[moving[has_ended]] = (whole[:, 0] * width + whole[:, 1])[has_ended]
            left = ~has_ended
            moving, at, moved, low, high = moving[left], at[left], moved[left], low[left], high[left]
        ends[first] = (start + settled_at).to(torch.int32).cpu().numpy()
    return ends.reshape(is_foreground.shape)


def _step_2d(flow: Any, at: Any, row: int, moved: Any, low: Any, high: Any) -> Any:
    """One Euler step, as `particles._step_2d` has it."""
    whole = moved.floor()
    weight = moved - whole
    other = 1.0 - weight
    index = at + whole[:, 0].long() * row + whole[:, 1].long()
    corners = [
        (other[:, 0] * other[:, 1], index),
        (other[:, 0] * weight[:, 1], index + 1),
        (weight[:, 0] * other[:, 1], index + row),
        (weight[:, 0] * weight[:, 1], index + row + 1),
    ]
    parts = [share[:, None] * flow[where] for share, where in corners]
    moved = moved + ((parts[0] + parts[1]) + (parts[2] + parts[3]))
    return moved.maximum(low).minimum(high)


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
    values = _object_flows(flat, labels.shape, pixels, n_iter, object_centres(labels, boxes), device)
    return sum_errors(flat, pixels, values, flows, len(boxes))


def _object_flows(
    flat: Labels,
    shape: tuple[int, ...],
    pixels: npt.NDArray[np.int64],
    n_iter: npt.NDArray[np.int64],
    centres: npt.NDArray[np.int64],
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
        heat = torch.zeros(pixels.size + 1, dtype=torch.float64, device=device)
        for n, m in zip(n_active.tolist(), n_lit.tolist(), strict=True):
            heat[lit[:m]] += 1.0
            columns = [(heat[around[c][:n]] + heat[around[c + 3][:n]]) + heat[around[c + 6][:n]] for c in range(3)]
            heat[:n] = ((columns[0] + columns[1]) + columns[2]) * (1.0 / 9)
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
