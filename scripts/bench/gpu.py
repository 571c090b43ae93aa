"""Networks on a GPU beside Cellpose's own way of running them, and how busy a whole run keeps the GPU.

    python scripts/bench/gpu.py [--size 16384] [--contrib-size 16384] [--cellpose-python PATH] [--device cuda]
        [--toy] [--save FILE]

First, tiles per second for cpsam and for the residual U-Net of Cellpose 1-3 with random weights, which take as long
as any. Cellpose's are `cellpose.core.run_net` on a picture in memory, at its own batch of 8 and at the best of several,
and its bare forward pass without cutting tiles and averaging them; its U-Net is the network as it is in Cellpose 3, in
float32. Ours are tiles in memory through `Network.start`, in the precision and the batch of a run. Beside them the
share of the rate at which the same device multiplies large matrices in the same type, and the difference of outputs.

Second, whole runs from an OME-Zarr on disk to published labels, on a slide of `--size` pixels: with the default model,
and with cpsam with random weights that see no cell anywhere; so its masks cost nothing, its flows all. Third, such a
slide, if `--contrib-size` says so a smaller one, through `cellpose.contrib.distributed_segmentation` with the default
model, see peers.py for its environment. How busy the GPU is says
nvidia-smi ten times a second: the share of time in which any kernel ran. On a CPU it is the share of its cores
that were at work: this script can be tried without a GPU, and its targets are not judged there.

Three minutes on an H100 with `--contrib-size 2048`; contrib takes the longer the larger its slide.
"""

from __future__ import annotations

import bisect
import functools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from images import DIAMETER, Example, RepeatedSlide
from report import Table, Target, finish, parser, save
from runs import Bench, prepare, run_peer

import tiledseg
from tiledseg.networks.batches import fitting_batch, free_memory
from tiledseg.networks.models import find_model
from tiledseg.networks.runner import (
    computes_in_bfloat16,
    forget_networks,
    load_network,
    precision_of,
)
from tiledseg.networks.unet import ResidualUNet
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide

TIMES_CELLPOSE = 2.0
BUSY = 0.9
DIFFERENCE = 0.03
"""Of outputs, root mean square over that of Cellpose's: bfloat16 has three figures."""
CELLPOSE_BATCH = 8
BATCHES = (1, 2, 4, 8, 16, 32, 64)
UNLIKELY = -20.0
"""Added to the cell logit of random weights."""
POLL_MS = 100
PIECE = 2048
"""Side of the slide that is laid side by side."""
COLUMNS = {"network": 9, "who": 21, "batch": 6, "tiles/s": 9, "x Cellpose": 11, "TFLOP/s": 9, "of matrices": 12}
RUN_COLUMNS = {"run": 20, "px": 7, "s": 8, "Mpx/s": 7, "flows s": 9, "tiles": 8, "tiles/s": 9, "busy": 7, "in flows": 9}


@dataclass(frozen=True)
class Bare:
    """A network as Cellpose runs it.

    Attributes
    ----------
    name : str
        ``"cpsam"`` or ``"unet"``.
    path : Path
        The same weights as a model file.
    net : Module
        What `cellpose.core` is given.
    """

    name: str
    path: Path
    net: Any


class Counted(torch.nn.Module):
    """A network with what `cellpose.core` asks of one, that counts the tiles it is shown."""

    def __init__(self, inner: Any, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner.to(device, dtype)
        self.device, self.dtype, self.n_tiles = torch.device(device), dtype, 0

    def forward(self, tiles: torch.Tensor) -> Any:
        self.n_tiles += len(tiles)
        return self.inner(tiles)


def random_cpsam(folder: Path, device: str, n_layers: int | None) -> Bare:
    """cpsam with random weights that sees no cells; with a number of layers, with so many of a quarter the width.

    The class of Cellpose takes its encoder from a registry, which is then changed for this process, so that the model
    file is read as such a network.
    """
    from cellpose import vit

    if n_layers is not None:
        from segment_anything.modeling.image_encoder import ImageEncoderViT

        def sam(_: None) -> torch.nn.Module:
            norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
            made = torch.nn.Module()
            made.image_encoder = ImageEncoderViT(
                depth=n_layers, embed_dim=256, num_heads=4, norm_layer=norm, use_rel_pos=True, window_size=14
            )
            return made

        vit.sam_model_registry = {"vit_l": sam}
    torch.manual_seed(0)
    net = vit.CPSAM().eval()
    with torch.no_grad():
        for name, values in net.named_parameters():
            if "pos" in name:  # zero in a new network
                torch.nn.init.normal_(values, std=0.1)
        net.out.bias[2 * net.ps**2 :] += UNLIKELY
    torch.save(net.state_dict(), folder / "cpsam")
    # Cellpose computes in bfloat16 unless told otherwise.
    return Bare("cpsam", folder / "cpsam", Counted(net, device, torch.bfloat16))


def random_unet(folder: Path, device: str) -> Bare:
    """The residual U-Net of Cellpose 1-3 with random weights."""
    torch.manual_seed(0)
    net = ResidualUNet().eval()
    torch.save(net.state_dict(), folder / "unet")
    return Bare("unet", folder / "unet", Counted(net, device, torch.float32))


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def rate_of(work: Callable[[], int], device: str, seconds: float) -> float:
    """What some work gets through in a second, once it is warm."""
    work()
    wait_for(device)
    start, n = time.perf_counter(), work()
    while time.perf_counter() - start < seconds:
        n += work()
    wait_for(device)
    return n / (time.perf_counter() - start)


def matrix_rate(device: str, dtype: torch.dtype, side: int, seconds: float) -> float:
    """Operations per second of a product of two large matrices."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> int:
        for _ in range(4):
            torch.mm(left, right)
        wait_for(device)
        return 4 * 2 * side**3

    with torch.inference_mode():
        return rate_of(multiply, device, seconds)


def operations(bare: Bare, tiles: np.ndarray) -> int:
    """Floating point operations for a tile, as Cellpose computes it."""
    from cellpose import core
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        core._forward(bare.net, tiles[:1])
    return counter.get_total_flops()


def cellpose_rates(bare: Bare, tiles: np.ndarray, options: Any) -> list[dict[str, Any]]:
    """Rows of Cellpose's own way: at its defaults, at its best batch size, and without cutting and averaging."""
    from cellpose import core

    side, seconds = tiles.shape[-1], options.seconds
    n = 1 if options.toy else 8
    picture = np.random.default_rng(0).random((1, n * side, n * side, tiles.shape[1]), np.float32)

    def run(batch: int) -> int:
        before = bare.net.n_tiles
        core.run_net(bare.net, picture, batch_size=batch, bsize=side)
        return int(bare.net.n_tiles - before)

    def forward(batch: int) -> int:
        core._forward(bare.net, tiles[:batch])
        return batch

    rates: dict[int, float] = {}
    for batch in (1, 2) if options.toy else BATCHES:
        try:
            rates[batch] = rate_of(functools.partial(run, batch), options.device, seconds)
        except torch.cuda.OutOfMemoryError:
            break
    best = max(rates, key=lambda batch: rates[batch])
    usual = CELLPOSE_BATCH if CELLPOSE_BATCH in rates else best
    bare_rate = rate_of(functools.partial(forward, best), options.device, seconds)
    return [
        {"network": bare.name, "who": "Cellpose, defaults", "batch": usual, "tiles/s": rates[usual]},
        {"network": bare.name, "who": "Cellpose, best batch", "batch": best, "tiles/s": rates[best]},
        {"network": bare.name, "who": "Cellpose, forward", "batch": best, "tiles/s": bare_rate},
    ]


def compare(bare: Bare, table: Table, options: Any) -> list[Target]:
    """Rows for one network, and what they are held against."""
    from cellpose import core

    device, toy = options.device, options.toy
    model = find_model(str(bare.path))
    precision = precision_of(model, device, bool(computes_in_bfloat16(device)))
    batch = fitting_batch(model, free_memory() or 0) if device == "cuda" else None
    network = load_network(replace(model, precision=precision, batch=batch), device)
    shape = (max(BATCHES[-1] if not toy else 2, network.batch), model.n_channels, model.tile, model.tile)
    tiles = np.random.default_rng(0).random(shape, np.float32)
    per_tile = operations(bare, tiles)
    dtypes = {"Cellpose": bare.net.dtype, "tiledseg": getattr(torch, precision)}
    side = 256 if toy else 8192
    peaks = {who: matrix_rate(device, dtype, side, options.seconds) for who, dtype in dtypes.items()}

    def ours() -> int:
        for wait in [network.start(tiles[: network.batch]) for _ in range(1 if toy else 4)]:
            wait()
        return network.batch * (1 if toy else 4)

    rows = cellpose_rates(bare, tiles, options)
    rate = rate_of(ours, device, options.seconds)
    rows.append({"network": bare.name, "who": "tiledseg", "batch": network.batch, "tiles/s": rate, "note": precision})
    for row in rows:
        row["x Cellpose"] = row["tiles/s"] / rows[0]["tiles/s"]
        row["TFLOP/s"] = row["tiles/s"] * per_tile / 1e12
        row["of matrices"] = row["tiles/s"] * per_tile / peaks[row["who"].partition(",")[0]]
        table.add(row)
    theirs = core._forward(bare.net, tiles[:1])[0]
    found = network.predict(tiles[:1])[0] * np.array([5, 5, 1], np.float32)[:, None, None]
    difference = float(np.sqrt(np.square(found - theirs).mean() / np.square(theirs).mean()))
    name = f"{bare.name}: difference of outputs, of their size"
    targets = [Target(name, difference, DIFFERENCE, at_least=False, needs_size=False)]
    if bare.name == "cpsam" and device == "cuda":
        times = rate / max(rows[0]["tiles/s"], rows[1]["tiles/s"])
        targets.append(Target("cpsam: tile rate over that of run_net", times, TIMES_CELLPOSE))
    return targets


class Busy:
    """How busy a device is while this is entered."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._times: list[float] = []
        self._shares: list[float] = []
        self._has_ended = threading.Event()

    def __enter__(self) -> Busy:
        self._watching: Any = None
        if self._device == "cuda":
            which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
            command = [*query, f"--id={which}", f"--loop-ms={POLL_MS}"]
            self._watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        if self._watching is not None:
            self._watching.terminate()
            self._watching.wait()
        self._thread.join()

    def _watch(self) -> None:
        """Note what is said of the device until this ends."""
        if self._watching is not None:
            for line in self._watching.stdout:
                self._note(float(line) if line.strip().isdigit() else float("nan"))
            return
        while not self._has_ended.is_set():
            self._note(psutil.cpu_percent(interval=POLL_MS / 1000))

    def _note(self, percent: float) -> None:
        self._times.append(time.monotonic())
        self._shares.append(percent / 100)

    def share(self, start: float = 0.0, stop: float = float("inf")) -> float:
        """Share of the time between two moments, of `time.monotonic`, in which the device was at work."""
        first, last = bisect.bisect_left(self._times, start), bisect.bisect_right(self._times, stop)
        return float(np.mean(self._shares[first:last])) if last > first else float("nan")


def whole_run(name: str, image: Path, folder: Path, model: str, device: str) -> dict[str, Any]:
    """A row for a run of tiledseg in this process, from an image on disk to labels on disk."""
    seen: dict[str, list[float]] = {}

    def listen(stage: str, _done: int, _all: int) -> None:
        seen.setdefault(stage, []).append(time.monotonic())

    start = time.monotonic()
    with Busy(device) as busy:
        out = folder / f"{name}.ome.zarr"
        report = tiledseg.segment(image, out, model=model, diameter=DIAMETER, device=device, progress=listen).report
        stop = time.monotonic()
    flows = report.seconds["flows"]
    return {
        "run": name,
        "s": stop - start,
        "flows s": flows,
        "tiles": report.n_tiles,
        "tiles/s": report.n_tiles / flows,
        "busy": busy.share(start, stop),
        "in flows": busy.share(seen["flows"][0], seen["flows"][-1]),
        "note": f"{report.n_objects} objects",
    }


def contrib_run(slide: Any, folder: Path, options: Any) -> dict[str, Any]:
    """A row for `cellpose.contrib.distributed_segmentation` with our default model on a slide."""
    row: dict[str, Any] = {"run": "contrib", "px": slide.shape[0]}
    if options.cellpose_python is None:
        return {**row, "note": "no environment given"}
    pixels = slide[tuple(slice(0, n) for n in slide.shape)]
    example = Example("slide", pixels, np.zeros((0, 0), np.uint32), DIAMETER)
    pythons = {"cellpose": options.cellpose_python}
    bench = Bench(example, folder / "contrib", 1024, os.cpu_count() or 1, pythons, gpu=options.device == "cuda")
    prepare(bench)
    with Busy(options.device) as busy:
        measured, labels = run_peer(bench, "contrib", options.cellpose_python)
    done = measured.failure if labels is None else {"Mpx/s": slide.shape[0] ** 2 / measured.seconds / 1e6}
    return {**row, "s": measured.seconds, "busy": busy.share(), **done}


def runs(folder: Path, cpsam: Path, table: Table, options: Any) -> list[Target]:
    """Rows of the whole runs, and what they are held against."""
    side = options.size or (300 if options.toy else 16384)
    piece, _ = synthetic_slide((min(side, PIECE),) * 2, diameter=DIAMETER)
    slide = RepeatedSlide(piece, (side, side))
    write_image(folder / "slide.ome.zarr", slide, axes="yx", spacing_um=(0.5, 0.5))
    targets = []
    for name, model in (("tiledseg-nuclei", "tiledseg-nuclei"), ("cpsam", str(cpsam))):
        row = whole_run(name, folder / "slide.ome.zarr", folder, model, options.device)
        table.add({**row, "px": side, "Mpx/s": side**2 / row["s"] / 1e6})
        if options.device == "cuda":
            targets.append(Target(f"{name}: GPU busy in the flows stage", table.rows[-1]["in flows"], BUSY))
    side = options.contrib_size or side
    table.add(contrib_run(RepeatedSlide(piece, (side, side)), folder, options))
    return targets


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge; returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what computes (default cuda)")
    made.add_argument("--size", type=int, metavar="PX", help="side of the slide of the whole runs (default 16384)")
    made.add_argument("--contrib-size", type=int, metavar="PX", help="side of that for contrib (default: the same)")
    made.add_argument("--seconds", type=float, metavar="S", help="to measure a rate for (default 5)")
    made.add_argument("--cellpose-python", type=Path, metavar="PATH", help="interpreter with cellpose 3.1.1.3")
    options = made.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("torch finds no GPU here; give --device cpu to try the script.")
    options.seconds = options.seconds if options.seconds is not None else 0.0 if options.toy else 5.0
    if options.device == "cpu":
        torch.set_num_threads(1)  # as ours has it
    with tempfile.TemporaryDirectory(prefix="tiledseg-bench-") as name:
        folder = Path(name)
        cpsam = random_cpsam(folder, options.device, 1 if options.toy else None)
        table, targets = Table(COLUMNS), []
        for bare in (cpsam, random_unet(folder, options.device)):
            targets += compare(bare, table, options)
            save(options.save, table.rows, targets)
        # Cellpose's networks go, so that the runs have the whole device.
        path = cpsam.path
        del bare, cpsam
        forget_networks()
        print()
        second = Table(RUN_COLUMNS)
        targets += runs(folder, path, second, options)
    return finish(targets, [*table.rows, *second.rows], toy=options.toy, path=options.save)


if __name__ == "__main__":
    sys.exit(main())
