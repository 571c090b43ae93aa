"""Batches: how many tiles fit, and what happens when they do not. No GPU: networks say that the memory is short."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiledseg
from tiledseg import flows, gpu, particles
from tiledseg.errors import DeviceError
from tiledseg.networks import batches, runner
from tiledseg.networks.batches import Passes, fitting_batch, free_memory, tile_memory
from tiledseg.networks.models import Model, find_model
from tiledseg.networks.unet import ResidualUNet, prepare_to_predict
from tiledseg.runs import in_batches
from tiledseg.store import DiskStore

from .conftest import Slide
from .test_attention import small_cpsam

SHAPE = (2, 32, 32)


class Narrow(torch.nn.Module):
    """A network on a device whose memory is enough for some tiles at once.

    Tiles come out the same in any company, or a little different for every further tile.
    """

    def __init__(self, inner: Any, room: Callable[[], int], company: float = 0.0) -> None:
        super().__init__()
        self.inner, self.room, self.company = inner, room, company
        self.seen: list[int] = []

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.seen.append(len(tiles))
        if len(tiles) > self.room():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        found = [self.inner(tile[None]) for tile in tiles]
        output, style = (torch.cat(of) for of in zip(*found, strict=True))
        return output + self.company * len(tiles), style


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(batches, "WAITS_S", (0.0, 0.0))
    with runner.torch_threads_kept():
        torch.set_num_threads(1)
        yield


def unet() -> ResidualUNet:
    torch.manual_seed(0)
    net = ResidualUNet((2, 4, 8)).eval()
    prepare_to_predict(net)
    return net


def tiles(n: int) -> torch.Tensor:
    return torch.randn((n, *SHAPE), generator=torch.Generator().manual_seed(1))


def passes(net: Any, batch: int = 4) -> Passes:
    return Passes(net, "cpu", {"dtype": torch.float32}, batch, SHAPE)


def test_a_batch_is_halved_until_it_fits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    room = [4]
    net = Narrow(unet(), lambda: room[0])
    running = passes(net)
    before = running.begin(tiles(4))()
    room[0] = 1
    net.seen.clear()
    with caplog.at_level(logging.INFO):
        after = running.begin(tiles(4))()
    # As it is three times, then halves twice, each with a look at the sample.
    assert net.seen[:3] == [4, 4, 4]
    assert net.seen[-4:] == [1, 1, 1, 1]
    assert (running.at_once, running.is_exact) == (1, True)
    assert all(map(torch.equal, before, after))
    assert "now computes 1 tile at once; tiles come out as before to the last bit" in caplog.text


def test_where_halves_give_other_bits_tiles_are_not_exact(caplog: pytest.LogCaptureFixture) -> None:
    room = [4]
    running = passes(Narrow(unet(), lambda: room[0], company=1e-6))
    assert running.is_exact
    room[0] = 2
    with caplog.at_level(logging.INFO):
        running.begin(tiles(4))()
    assert (running.at_once, running.is_exact) == (2, False)
    assert "now computes 2 tiles at once; the last bits of what follows may differ" in caplog.text


def test_a_batch_that_never_fitted_is_not_known_to_be_exact() -> None:
    running = passes(Narrow(unet(), lambda: 2))
    assert (running.at_once, running.is_exact) == (2, False)


def test_memory_that_is_short_for_a_moment_changes_nothing() -> None:
    room = iter([4, 1, 1, 4, 4])
    running = passes(Narrow(unet(), lambda: next(room)))
    running.begin(tiles(4))()
    assert (running.at_once, running.is_exact) == (4, True)
    assert next(room) == 4


def test_without_room_for_one_tile_it_says_what_to_do() -> None:
    with pytest.raises(DeviceError, match=r"too little for the network and a tile; end what else .* --device cpu"):
        passes(Narrow(unet(), lambda: 0))


def test_other_errors_of_a_network_are_not_taken_for_a_want_of_memory() -> None:
    class Broken(torch.nn.Module):
        def forward(self, _: torch.Tensor) -> None:
            raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        passes(Broken(), batch=1).begin(tiles(1))
    assert gpu.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))


@pytest.mark.parametrize("in_new_words", [False, True])
def test_settings_of_torch_are_fixed_during_a_pass_only(in_new_words: bool) -> None:
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    is_new = hasattr(products, "fp32_precision")
    first = products.fp32_precision if is_new else products.allow_tf32
    products.allow_tf32 = True  # as cellpose.vit sets it
    if in_new_words and is_new:
        products.fp32_precision = "ieee"  # from now on torch refuses to tell allow_tf32
    try:
        with batches._fixed_kernels():
            assert (products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (False, False, False)
            assert cudnn.deterministic
        assert (cudnn.allow_tf32, cudnn.deterministic) == (True, False)
        if is_new:
            expected = "ieee" if in_new_words else "tf32"
            assert (products.fp32_precision, cudnn.conv.fp32_precision) == (expected, "tf32")
    finally:
        products.allow_tf32 = False
        if is_new:
            products.fp32_precision = first


class Live(TorchDispatchMode):
    """The most bytes that tensors hold at once, of those made within."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.kept = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in known}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.kept:
                self.now += storage.nbytes()
                self.kept[storage._cdata] = weakref.ref(storage, self._gone(storage._cdata, storage.nbytes()))
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, n_bytes: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            del self.kept[key]
            self.now -= n_bytes

        return gone


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["unet", "cpsam"])
def test_the_memory_of_a_tile_is_what_the_network_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str, precision: str
) -> None:
    model = dataclasses.replace(find_model("tiledseg-nuclei"), precision=precision)
    if architecture == "unet":
        net = ResidualUNet((2, 8, 16, 32, 64)).eval()
        torch.save(net.state_dict(), tmp_path / "unet")
        model = dataclasses.replace(model, path=tmp_path / "unet")
        prepare_to_predict(net)
    else:
        _, net = small_cpsam(monkeypatch, depth=1)
        model = dataclasses.replace(model, architecture="cpsam", tile=256, n_channels=3)
    dtype = getattr(torch, precision)
    net.to(dtype)
    shown = torch.randn(1, model.n_channels, model.tile, model.tile).to(dtype)
    with torch.no_grad(), Live(shown, *net.parameters(), *net.buffers()) as live:
        net(shown)
    assert 0.8 * tile_memory(model) < live.peak <= tile_memory(model)


def test_a_batch_fits_the_memory() -> None:
    model = find_model("tiledseg-nuclei")
    sizes = [fitting_batch(model, n_bytes) for n_bytes in (0, 2**27, 2**28, 2**29, 2**33)]
    assert sizes == [1, 2, 4, 8, 16]
    half = dataclasses.replace(model, precision="bfloat16")
    assert fitting_batch(half, 2**28) == 8
    for size, n_bytes in zip(sizes[1:], (2**27, 2**28, 2**29, 2**33), strict=True):
        assert size * tile_memory(model) < n_bytes / 2


def test_without_a_gpu_no_memory_of_one_is_free() -> None:
    assert (free_memory() is None) == (not torch.cuda.is_available())


class Workers:
    """Says what workers with these GPUs, and one with none, would say."""

    def __init__(self, *free: int) -> None:
        self.free = free

    def ask(self, _: Callable[[], Any]) -> list[int | None]:
        return [None, *self.free]


@pytest.mark.slow
def test_a_run_keeps_its_batch_whoever_works(slide: Slide, tmp_path: Path) -> None:
    job = tiledseg.segment(slide[0][:200, :200], tmp_path / "out.ome.zarr", diameter=24.0).job
    assert isinstance(job.store, DiskStore)
    assert in_batches(job, Workers(2**33)).model.batch is None
    job = dataclasses.replace(job, device="cuda")
    for worker in (Workers(2**28, 2**40), Workers(2**40)):
        assert in_batches(job, worker).model.batch == fitting_batch(job.model, 2**28)
    assert (job.store.read_json("run.json") or {})["settings"]["device"] == "cpu"


@pytest.fixture
def network_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Have networks compute in batches of four on a device that has room for fewer."""

    def use(room: int, company: float = 0.0) -> None:
        runner.forget_networks()
        monkeypatch.setitem(runner.BATCH, "cpu", 4)
        # There is room for the first batch, which is the sample.
        first = iter([4])
        make = runner.Passes
        monkeypatch.setattr(
            runner, "Passes", lambda net, *how: make(Narrow(net, lambda: next(first, room), company), *how)
        )

    yield use
    runner.forget_networks()


def test_a_run_short_of_memory_gives_the_same_labels(
    slide: Slide, tmp_path: Path, network_of: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    image = slide[0][:300, :300]
    expected = tiledseg.segment(image, diameter=24.0)
    network_of(room=2)
    found = tiledseg.segment(image, tmp_path / "out.ome.zarr", diameter=24.0)
    assert np.array_equal(found.labels.compute(), expected.labels.compute())
    assert (found.report.n_tiles, found.report.n_inexact_tiles) == (expected.report.n_tiles, 0)
    said = [line for line in caplog.records if line.levelno == logging.WARNING]
    assert [(line.name, "short of memory" in line.message) for line in said] == [(flows.__name__, True)]


def test_tiles_that_may_differ_are_counted_also_when_the_run_goes_on(
    slide: Slide, tmp_path: Path, network_of: Callable[..., None]
) -> None:
    image, out = slide[0][:300, :300], tmp_path / "out.ome.zarr"
    network_of(room=1, company=1e-6)
    first = tiledseg.segment(image, out, diameter=24.0).report
    again = tiledseg.segment(image, out, diameter=24.0, min_size=30).report
    assert first.n_inexact_tiles == first.n_tiles > 0
    assert (again.n_tiles, again.n_inexact_tiles) == (0, first.n_tiles)


def test_masks_that_do_not_fit_a_gpu_are_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    rng = np.random.default_rng(0)
    vectors, is_foreground = rng.normal(size=(2, 40, 30)).astype(np.float32), rng.random((40, 30)) > 0.3
    expected = particles.follow_flows(vectors, is_foreground, 20)
    assert np.array_equal(gpu.follow_flows(vectors, is_foreground, 20, "cpu"), expected)
    monkeypatch.setattr(gpu, "_ends_of", short)
    assert np.array_equal(gpu.follow_flows(vectors, is_foreground, 20, "cpu"), expected)


def test_a_model_that_chose_a_batch_computes_in_it() -> None:
    model: Model = dataclasses.replace(find_model("tiledseg-nuclei"), batch=2)
    network = runner.Network(model, "cpu")
    shown = np.random.default_rng(0).normal(size=(3, 2, 224, 224)).astype(np.float32)
    output, styles = network.predict(shown)
    assert (network.batch, network.shortage, output.shape, styles.shape) == (2, None, (3, 3, 224, 224), (3, 128))
    alone = runner.load_network(find_model("tiledseg-nuclei"), "cpu").predict(shown)[0]
    np.testing.assert_allclose(output, alone, rtol=0, atol=1e-6 * np.abs(alone).max())
