"""Running a network: load once per process, one fixed batch shape, the same bits every time.

On a CPU the batch is one tile and torch uses one thread per call: another batch size or thread
count changes last bits, and one thread per tile with several tiles at once is also the fastest.
Tiles run in parallel because tasks do.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..gpu import GPU
from ..malloc import keep_freed_memory
from ..meters import busy, metered
from .models import Model
from .transformer import transformer_of
from .unet import prepare_to_predict, read_state, unet_of

__all__ = ["Network", "computes_in_bfloat16", "load_network", "precision_of", "torch_threads_kept"]

Tiles = npt.NDArray[np.float32]

BATCH = {"cpu": 1, "cuda": 8}


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
        self._how: dict[str, Any] = {"dtype": torch.bfloat16 if model.precision == "bfloat16" else torch.float32}
        if model.architecture == "unet":
            net = unet_of(read_state(model.path), model.path).eval()
            prepare_to_predict(net)
            self._how["memory_format"] = torch.channels_last
        else:
            net = transformer_of(model).eval()
        self._net: Any = net.to(device, **self._how)
        if device == "cpu":
            keep_freed_memory()
        self.batch = BATCH[device]
        self._gpu = _name_of_gpu() if device == "cuda" else None
        # One forward pass at a time on a GPU: tasks overlap by reading while another computes.
        self._lock: contextlib.AbstractContextManager[Any] = GPU if device == "cuda" else contextlib.nullcontext()

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
        outputs, styles = [], []
        for batch, n in self._batches(tiles):
            if self._device == "cpu" and torch.get_num_threads() != 1:
                torch.set_num_threads(1)
            with contextlib.ExitStack() as until_results_are_here:
                with self._lock, torch.inference_mode():
                    # A GPU works on after it was told what to do.
                    until_results_are_here.enter_context(busy(self._gpu))
                    output, style = self._net(batch.to(self._device, **self._how))[:2]
                outputs.append(output[:n].float().cpu().numpy())
                styles.append(style[:n].float().cpu().numpy())
        result = np.concatenate(outputs)
        result[:, :-1] /= 5.0  # the networks are trained on five times the unit flow
        return result, np.concatenate(styles)

    def _batches(self, tiles: Tiles) -> Iterator[tuple[torch.Tensor, int]]:
        """Batches of the fixed size, the last filled up with zeros, and how many tiles are real."""
        for start in range(0, len(tiles), self.batch):
            batch = tiles[start : start + self.batch]
            n = len(batch)
            if n < self.batch:
                batch = np.concatenate([batch, np.zeros((self.batch - n, *batch.shape[1:]), np.float32)])
            yield torch.from_numpy(np.ascontiguousarray(batch)), n


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


def computes_in_bfloat16() -> bool:
    """Whether torch says that this CPU has instructions for bfloat16; older versions of torch do not say."""
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
        Whether every CPU that works has instructions for it, see `computes_in_bfloat16`.

    Returns
    -------
    precision : str
        ``"bfloat16"`` for transformers on a GPU: they are trained in it, and twice as fast. For U-Nets on such CPUs:
        there it is 1.6 to 2.1 times as fast, and finds the same cells. ``"float32"`` otherwise.
    """
    is_unet = model.architecture == "unet"
    is_half = has_bfloat16 if is_unet and device == "cpu" else not is_unet and device == "cuda"
    return "bfloat16" if is_half else "float32"


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch the threads back that it had before networks ran in this process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
