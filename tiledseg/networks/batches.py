"""Batches of tiles on a device: how many go into one, and what is done when they do not fit.

Bits. Libraries choose how to compute by the shape of what they are given, so a tile's last bits may depend on how many
tiles a batch has. A batch therefore has one shape throughout a run: chosen once, for the smallest GPU, and
recorded with the run. On a GPU nothing is tried out to find what is fastest, only deterministic kernels are taken, and
products of float32 are computed in float32 and not in TF32, whatever this process has set. What remains: two models
of GPU, or two versions of torch, may differ in last bits; and rather than fail for want of memory cuDNN may take
a kernel that needs less, and not say so: half of what is free is left to it.

Memory. What a pass needs is reserved from the first one on, so that others cannot take it. If it is short all the same,
what torch keeps unused is given back and the pass is tried again as it is: that changes nothing. Only then is
the batch halved, for as long as the process lives, and some tiles that were computed before are computed again in
halves: kernels are chosen by shapes and not by values, so if these come out the same to the last bit, all do. If not,
or if the whole batch never fitted, the tiles that follow are counted as inexact: the same cells, but some outlines
may differ by a pixel from those of a run that had the memory.

Time. To tell a GPU the hundreds of kernels of a pass takes Python about as long as the GPU takes to do them, and no
other thread can use Python meanwhile. So the pass is recorded once, as a CUDA graph, and replayed from then on, if what
comes of it is the same to the last bit.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DeviceError
from ..gpu import GPU, is_out_of_memory
from .models import POOLING, Model
from .states import load_state

__all__ = ["Passes", "fitting_batch", "free_memory", "shortage_text", "tile_memory"]

logger = logging.getLogger(__name__)

_cuda: Any = torch.cuda  # comes with few types

Results = Callable[[], list[Tensor]]
"""Waits for what a pass gives."""

UNET_VALUES = 9
"""That a U-Net holds at once, per pixel and channel of its first depth; 8.4, besides what kernels take themselves."""
TRANSFORMER_VALUES = {"cpsam": 14, "cpdino": 16, "cpdino-vitb": 16}
"""That a transformer holds at once, per patch and entry of its width; 12 in cpsam, not measured in cpdino."""
WIDTHS = {"cpsam": 1024, "cpdino": 1024, "cpdino-vitb": 768}

MOST_TILES = {"unet": 16, "cpsam": 8, "cpdino": 8, "cpdino-vitb": 8}
"""With which a large GPU has enough to do. A batch is filled up with empty tiles, and a chunk has 16 or fewer."""
SHARE = 0.5
"""Of the free memory; the rest is for kernels, and for the masks."""
WEIGHTS = 2
"""Times the size of its file that a network takes at most."""

WAITS_S = (0.0, 1.0, 4.0)
"""Before a pass is tried again as it is: others may need the memory for a moment only."""


def tile_memory(model: Model) -> int:
    """Bytes that a forward pass holds at once for each tile, besides the weights."""
    itemsize = 2 if model.precision == "bfloat16" else 4
    if model.architecture == "unet":
        return UNET_VALUES * itemsize * _unet_width(model.path) * model.tile**2
    per_entry = TRANSFORMER_VALUES[model.architecture] * itemsize
    return per_entry * WIDTHS[model.architecture] * (model.tile // POOLING) ** 2


@functools.lru_cache(maxsize=8)
def _unet_width(path: Path) -> int:
    """Channels of the first depth."""
    return int(load_state(path)["output.2.weight"].shape[1])


def free_memory() -> int | None:
    """Bytes of this process's GPU that nobody uses, None without one."""
    if not torch.cuda.is_available():
        return None
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + kept


def fitting_batch(model: Model, n_bytes: int) -> int:
    """Tiles of a batch for a device with this much free memory: a power of two, at least one.

    Parameters
    ----------
    model : Model
    n_bytes : int
        See `free_memory`.
    """
    room = SHARE * n_bytes - WEIGHTS * model.path.stat().st_size
    n_tiles = MOST_TILES[model.architecture]
    while n_tiles > 1 and n_tiles * tile_memory(model) > room:
        n_tiles //= 2
    return n_tiles


class Passes:
    """Forward passes of a network on a device, in batches of one shape; on a GPU one at a time.

    Parameters
    ----------
    net : Module
        Gives output and style. Is moved to the device.
    device : str
        ``"cpu"`` or ``"cuda"``.
    how : dict
        Type and memory format of network and tiles.
    batch : int
        Tiles of a batch.
    tile_shape : (int, int, int)
        Channels and sides of a tile.

    Attributes
    ----------
    at_once : int
        Tiles that go through the network together: of a batch, or of a part of it for want of memory.
    is_exact : bool
        Whether tiles come out as they do in whole batches, to the last bit, as far as that can be shown.
    """

    def __init__(
        self, net: Any, device: str, how: dict[str, Any], batch: int, tile_shape: tuple[int, int, int]
    ) -> None:
        self.at_once, self.is_exact = batch, True
        self._how = how
        self._way: _OnHost | _OnGpu = _OnGpu() if device == "cuda" else _OnHost()
        # Tasks overlap by reading while another computes; two passes at once would take twice the memory.
        self._lock: contextlib.AbstractContextManager[Any] = GPU if device == "cuda" else contextlib.nullcontext()
        self._whole: list[Tensor] = []
        self._recorded: _Recorded | None = None
        with self._lock:
            self._net = self._with_room(lambda: net.to(device, **how))
        if device == "cuda" or batch > 1:
            self._sample = torch.randn((batch, *tile_shape), generator=torch.Generator().manual_seed(0))
            found = self.begin(self._sample)()
            self._whole = found if self.at_once == batch else []
        if device == "cuda" and self._whole:
            with self._lock:
                self._record()

    def begin(self, tiles: Tensor) -> Results:
        """Start the pass of a batch; a GPU is told what to do and not waited for.

        Parameters
        ----------
        tiles : Tensor of float32, shape (batch, channels, b, b)
            In the memory of this machine.

        Returns
        -------
        results : callable
            Waits for output and style, as float32 in the memory of this machine.

        Raises
        ------
        DeviceError
            If the memory is not enough for one tile.
        """
        with self._lock:
            results: Results = self._with_room(lambda: self._queue(tiles), self._halve)
            return results

    def _queue(self, tiles: Tensor) -> Results:
        """Tell the device to send tiles through the network."""
        with self._way.kernels(), torch.inference_mode():
            sent = self._way.send(tiles)
            return self._way.fetch(self._compute(sent) if self._recorded is None else self._recorded(sent))

    def _compute(self, tiles: Tensor) -> list[Tensor]:
        """Output and style of tiles that are on the device."""
        found = [self._net(part.to(**self._how)) for part in torch.split(tiles, self.at_once)]
        return [torch.cat(of).float().contiguous() for of in zip(*found, strict=True)]

    def _record(self) -> None:
        """Record the pass of a batch, and replay it from now on if that gives the same bits."""
        reason = "replayed it gives other bits"
        try:
            with self._way.kernels(), torch.inference_mode():
                self._recorded = _Recorded(self._compute, self._sample)
            found = self._queue(self._sample)()
        except RuntimeError as error:
            reason, found = str(error), []
        if not (found and all(map(torch.equal, found, self._whole))):
            self._recorded = None
            logger.info("the pass of a batch is not recorded, which would save time: %s.", reason)
        self._way.give_back()  # the memory of the pass that was not recorded

    def _with_room(self, work: Callable[[], Any], make_room: Callable[[], None] | None = None) -> Any:
        """Do what needs memory of the device; where it is short, again, and again after making room."""
        n_tries = 0
        while True:
            done, found = _tried(work)
            if done:
                return found
            # Not within the handling of the error, which still holds what the work had made.
            self._way.give_back()
            if n_tries < len(WAITS_S):
                time.sleep(WAITS_S[n_tries])
                n_tries += 1
            elif make_room is None or self.at_once == 1:
                raise DeviceError(
                    f"the GPU has {(free_memory() or 0) / 2**30:.1f} GiB free, too little for the network and a tile; "
                    "end what else runs there, or use another GPU or --device cpu: what is done is kept."
                )
            else:
                make_room()

    def _halve(self) -> None:
        """From now on send half as many tiles through the network at once."""
        self.at_once //= 2
        self._recorded = None
        done, found = _tried(lambda: self._queue(self._sample)()) if self._whole else (False, [])
        self.is_exact = done and all(map(torch.equal, found, self._whole))
        # Whoever hands out the work warns, see `flows.run`: a worker's warnings are seldom read.
        logger.info(shortage_text(self.at_once, self.is_exact))


def shortage_text(at_once: int, is_exact: bool) -> str:
    """What it means that batches go through the network in parts."""
    means = "tiles come out as before to the last bit" if is_exact else "the last bits of what follows may differ"
    return f"a GPU is short of memory: it now computes {at_once} tile{'s'[: at_once - 1]} at once; {means}."


def _tried(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether there was memory enough for some work, and what came of it."""
    try:
        return True, work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return False, None


class _OnHost:
    """Tiles and results stay where they are."""

    kernels = staticmethod(contextlib.nullcontext)

    def send(self, tiles: Tensor) -> Tensor:
        """The tiles, where the network is."""
        return tiles

    def fetch(self, values: list[Tensor]) -> Results:
        """The results, in the memory of this machine."""
        return lambda: values

    def give_back(self) -> None:
        """Give memory back that is kept unused."""


class _OnGpu:
    """Copies that run beside the passes: those to the GPU and those from it each in a stream of their own."""

    def __init__(self) -> None:
        self._up, self._down = _cuda.Stream(), _cuda.Stream()

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Within, the same kernels are taken for the same shapes, whatever else this process has set."""
        with _fixed_kernels(), _fused_attention():
            yield

    def send(self, tiles: Tensor) -> Tensor:
        """The tiles on the GPU, for what is computed next."""
        computing, pinned = torch.cuda.current_stream(), tiles.pin_memory()
        with torch.cuda.stream(self._up):
            sent = pinned.to("cuda", non_blocking=True)
        computing.wait_stream(self._up)
        sent.record_stream(computing)
        return sent

    def fetch(self, values: Sequence[Tensor]) -> Results:
        """The results once they are computed, in pinned memory; the wait leaves the core to others."""
        self._down.wait_stream(torch.cuda.current_stream())
        fetched = [torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for value in values]
        arrived = _cuda.Event(blocking=True)
        with torch.cuda.stream(self._down):
            for here, there in zip(fetched, values, strict=True):
                here.copy_(there, non_blocking=True)
                there.record_stream(self._down)
            arrived.record(self._down)

        def wait() -> list[Tensor]:
            arrived.synchronize()
            return fetched

        return wait

    def give_back(self) -> None:
        """Give memory back that torch keeps unused."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class _Recorded:
    """What a GPU is told to do with a batch, as a CUDA graph with memory of its own.

    Parameters
    ----------
    work : callable
        From tiles on the GPU to a list of results there.
    sample : Tensor
        Tiles of the shape that all have.
    """

    def __init__(self, work: Callable[[Tensor], list[Tensor]], sample: Tensor) -> None:
        self._tiles = sample.to("cuda")
        aside = _cuda.Stream()
        aside.wait_stream(_cuda.current_stream())
        with _cuda.stream(aside):
            work(self._tiles)  # what libraries prepare on a stream is not to be recorded
        _cuda.current_stream().wait_stream(aside)
        self._graph = _cuda.CUDAGraph()
        # Other threads may go on to copy what they had computed.
        with _cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
            self._found = work(self._tiles)

    def __call__(self, tiles: Tensor) -> list[Tensor]:
        """The results, which the next batch does not overwrite."""
        self._tiles.copy_(tiles)
        self._graph.replay()
        return [values.clone() for values in self._found]


def _fused_attention() -> contextlib.AbstractContextManager[None]:
    """Within, torch takes the first of these kernels that computes what it is given."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: contextlib.AbstractContextManager[None]
    if "set_priority" in inspect.signature(sdpa_kernel).parameters:
        # Before torch 2.6 cuDNN's had errors, and no order could be given.
        context = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *kernels], set_priority=True)
    else:
        context = sdpa_kernel(kernels)
    return context


@contextlib.contextmanager
def _fixed_kernels() -> Iterator[None]:
    """Within, torch takes deterministic kernels, by rule and not by trial, none with TF32; then as before."""
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    fixed = [
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", True),
        (cudnn, "allow_tf32", False),
        (products, "allow_tf32", False),
    ]
    before = [(owner, name, _value_of(owner, name)) for owner, name, _ in fixed]
    # What is set the old way counts for the new way as well, but says less.
    operations = [getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), products]
    before += [(it, "fp32_precision", it.fp32_precision) for it in operations if hasattr(it, "fp32_precision")]
    try:
        _set(fixed)
        yield
    finally:
        _set(before)


def _value_of(owner: Any, name: str) -> Any:
    """A setting of torch; False where torch does not tell, because it was set partly the old way and partly the new."""
    try:
        return getattr(owner, name)
    except RuntimeError:
        return False


def _set(settings: Sequence[tuple[Any, str, Any]]) -> None:
    """Set attributes: owner, name, value."""
    for owner, name, value in settings:
        setattr(owner, name, value)
