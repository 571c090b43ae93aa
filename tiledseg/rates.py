"""How fast this machine is at what takes longest, measured: for a forecast of how long a run takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .dynamics import compute_masks, warm_up
from .heat import label_flows
from .networks.models import Model
from .networks.runner import load_network

__all__ = ["pixels_per_second", "tiles_per_second"]

REPEATS = 3
DIAMETER = 17
SIDE = {2: 1020, 3: 102}
"""Of the picture or volume whose masks are made, by the number of axes; whole cells of it."""


def tiles_per_second(model: Model, device: str, n_threads: int) -> float:
    """Network tiles that a process of so many threads gets through in a second."""
    network = load_network(model, device)
    tiles = np.zeros((network.batch, model.n_channels, model.tile, model.tile), np.float32)
    network.predict(tiles)
    return network.batch / _seconds_each(lambda: network.predict(tiles), n_threads)


def pixels_per_second(ndim: int, n_threads: int) -> float:
    """Pixels that a process of so many threads makes masks of in a second, where cells lie side by side."""
    warm_up(ndim)
    side = SIDE[ndim]
    places = np.indices((side,) * ndim) % DIAMETER - DIAMETER // 2
    is_in = np.square(places).sum(axis=0) < (DIAMETER / 2) ** 2
    cells = np.ravel_multi_index(tuple(np.indices((side,) * ndim) // DIAMETER), (side // DIAMETER,) * ndim) + 1
    labels = np.where(is_in, cells, 0).astype(np.int32)
    flows, cellprob = label_flows(labels), np.where(is_in, np.float32(3), np.float32(-3))
    threshold = 0.4 if ndim == 2 else 0.0
    return labels.size / _seconds_each(lambda: compute_masks(flows, cellprob, flow_threshold=threshold), n_threads)


def _seconds_each(work: Callable[[], Any], n_threads: int) -> float:
    """Seconds for some work while as much of it is done at once as there are threads, shared among them."""
    with ThreadPoolExecutor(n_threads) as pool:
        start = time.perf_counter()
        for done in [pool.submit(work) for _ in range(REPEATS * n_threads)]:
            done.result()
        return (time.perf_counter() - start) / (REPEATS * n_threads)
