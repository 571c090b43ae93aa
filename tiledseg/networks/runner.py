"""Running a network: load once per process, one fixed batch shape, the same bits every time.

On a CPU the batch is one tile and torch uses one thread per call: another batch size or thread
count changes last bits, and one thread per tile with several tiles at once is also the fastest.
Tiles run in parallel because tasks do. Of batches on a GPU see `batches`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..malloc import keep_freed_memory
from ..meters import busy, metered
from .batches import Passes
from .models import Model
from .transformer import transformer_of
from .unet import fuse_for_cpu, prepare_to_predict, read_state, unet_of

__all__ = [
    "Network",
    "as_float16",
    "computes_in_bfloat16",
    "forget_networks",
    "load_network",
    "precision_of",
    "torch_threads_kept",
]

Tiles = npt.NDArray[np.float32]

BATCH = {"cpu": 1, "cuda": 8}
"""Tiles, where the run has not chosen: on a CPU always, on a GPU for a forecast."""
NATIVE_BFLOAT16 = (8, 0)
"""CUDA's number for the first GPUs that compute in bfloat16; older ones do it by detours."""


class Network:
    """A network on one device.

    Parameters
    ----------
    model : Model
        Which.
    device : str
        ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, model: Model, device: str) -> None:
        self._device = device
        self._use_one_thread()
        how: dict[str, Any] = {"dtype": torch.bfloat16 if model.precision == "bfloat16" else torch.float32}
        if model.architecture == "unet":
            net = unet_of(read_state(model.path), model.path).eval()
            prepare_to_predict(net)
            if device == "cpu" and model.precision != "bfloat16":
                fuse_for_cpu(net)
            # GPUs have their kernels of float32 for the usual order.
            is_last = device == "cpu" or model.precision == "bfloat16"
            how["memory_format"] = torch.channels_last if is_last else torch.contiguous_format
        else:
            net = transformer_of(model).eval()
        keep_freed_memory()
        self.batch = model.batch or BATCH[device]
        self._gpu = _name_of_gpu() if device == "cuda" else None
        self._passes = Passes(_UnitFlows(net), device, how, self.batch, (model.n_channels, model.tile, model.tile))

    @property
    def shortage(self) -> tuple[int, bool] | None:
        """Tiles that go through at once for want of memory, and whether they are exact; None if all of a batch do."""
        at_once = self._passes.at_once
        return None if at_once == self.batch else (at_once, self._passes.is_exact)

    @metered("network")
    def predict(self, tiles: Tiles) -> tuple[Tiles, Tiles]:
        """Run the network on any number of tiles, in batches of one fixed shape.

        Parameters
        ----------
        tiles : array of float32, shape (n, channels, b, b)
            Normalised tiles.

        Returns
        -------
        output : array of float32, shape (n, 3, b, b)
            Flow along y and x in unit length, and the cell logit.
        styles : array of float32, shape (n, n_style)
            Style vectors of unit length; transformers have none that means anything.
        """
        return self.start(tiles)()

    @metered("network")
    def start(self, tiles: Tiles) -> Callable[[], tuple[Tiles, Tiles]]:
        """Start what `predict` does; returns what waits for it. A GPU computes meanwhile, a CPU does so at once."""
        self._use_one_thread()
        with contextlib.ExitStack() as stack:
            stack.enter_context(busy(self._gpu))
            begun = [(self._passes.begin(batch), n) for batch, n in self._batches(tiles)]
            until_results_are_here = stack.pop_all()

        @metered("network")
        def finish() -> tuple[Tiles, Tiles]:
            with until_results_are_here:
                found = [[values[:n].numpy() for values in results()] for results, n in begun]
            output, styles = (of[0] if len(of) == 1 else np.concatenate(of) for of in zip(*found, strict=True))
            return output, styles

        return finish

    def _use_one_thread(self) -> None:
        """On a CPU: others would look for work for a while after each piece of it, on the cores of other tasks."""
        if self._device == "cpu" and torch.get_num_threads() != 1:
            torch.set_num_threads(1)

    def _batches(self, tiles: Tiles) -> Iterator[tuple[torch.Tensor, int]]:
        """Batches of the fixed size, the last filled up with zeros, and how many tiles are real."""
        for start in range(0, len(tiles), self.batch):
            batch = tiles[start : start + self.batch]
            n = len(batch)
            if n < self.batch:
                batch = np.concatenate([batch, np.zeros((self.batch - n, *batch.shape[1:]), np.float32)])
            yield torch.from_numpy(np.ascontiguousarray(batch)), n


class _UnitFlows(torch.nn.Module):
    """A network, trained on five times the unit flow, that gives the unit flow."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output, in float32, and style."""
        output, style = self.net(tiles)[:2]
        output = output.float()
        output[:, :-1] /= 5.0
        return output, style


def _name_of_gpu() -> str:
    """The GPU that this process uses, as no other one of a cluster is called."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    which = getattr(found, "uuid", None) or os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return f"{found.name} {which} on {socket.gethostname()}"


_loading = threading.Lock()


@metered("load")
def load_network(model: Model, device: str) -> Network:
    """The network of a model, loaded once per process."""
    with _loading:
        return _load(model, device)


@functools.lru_cache(maxsize=4)
def _load(model: Model, device: str) -> Network:
    return Network(model, device)


def forget_networks() -> None:
    """Let go of the networks that were loaded, and of what a GPU keeps for them."""
    with _loading:
        _load.cache_clear()
        torch.cuda.empty_cache()  # does nothing without a GPU


def computes_in_bfloat16(device: str = "cpu") -> bool | None:
    """Whether torch says that this process's CPU or GPU has instructions for bfloat16; older versions do not say.

    None where there is no such device.
    """
    if device == "cuda":
        return torch.cuda.get_device_capability() >= NATIVE_BFLOAT16 if torch.cuda.is_available() else None
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def precision_of(model: Model, device: str, has_bfloat16: bool) -> str:
    """The precision of a model where none is asked for.

    Parameters
    ----------
    model : Model
    device : str
        ``"cpu"`` or ``"cuda"``.
    has_bfloat16 : bool
        Whether every CPU or GPU that works has instructions for it, see `computes_in_bfloat16`.

    Returns
    -------
    precision : str
        ``"bfloat16"`` for transformers on such GPUs: they are trained in it, and twice as fast. ``"float32"``
        otherwise: U-Nets would be faster and as good (on held-out images AP differs by 0.001), but machines with and
        without it would draw other outlines, and the same cells everywhere come first.
    """
    is_half = has_bfloat16 and device == "cuda" and model.architecture != "unet"
    return "bfloat16" if is_half else "float32"


def as_float16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """What ``values.astype("float16")`` gives, by the processor's instructions for it: numpy takes thrice the time."""
    rounded: npt.NDArray[np.float16] = torch.from_numpy(values).to(torch.float16).numpy()
    return rounded


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch the threads back that it had before networks ran in this process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
