"""A whole run: its time beside the bare network's, its cells and time beside untiled Cellpose.

    python scripts/bench/whole.py --cellpose-python PATH [--size 8192] [--beside 2048] [--repeat 3] [--toy]
        [--save FILE]

First, on a dense synthetic slide (the demo's, `--size` pixels a side): the whole run of `tiledseg.segment`, from
an OME-Zarr on disk to published labels and table in a new process, start-up included, over the bare
network time of its tiles: all tiles of the lattice, read beforehand, through `Network.predict` on as many
threads as there are cores. The diameter is given, so that no tile is asked but those of the lattice. Both are timed
in turns, `--repeat` times: a machine that others use as well may change between the two.

Second, on a slide of `--beside` pixels: tiledseg and untiled Cellpose 3.1.1.3 with the same weights, see peers.py
for its environment; without it only the first part is measured, and the table says so.

Some ten minutes on two cores, two of them to draw the slide; memory for 128 tiles.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from images import DIAMETER, LazySlide, synthetic
from report import Table, Target, finish, parser, save
from runs import Bench, prepare, row_of, run_tiledseg

from tiledseg.dynamics import warm_up
from tiledseg.frames import label_shape
from tiledseg.grid import Lattice, WorkingGrid
from tiledseg.images import open_image
from tiledseg.inputs import Input
from tiledseg.networks.models import find_model
from tiledseg.networks.runner import computes_in_bfloat16, load_network, precision_of, torch_threads_kept
from tiledseg.normalisation import WholeRange
from tiledseg.omezarr import write_image
from tiledseg.working import read_tile

LIMIT = 1.5
AP_SLACK = 0.01
AT_ONCE = 128


def bare_network_s(path: Path, percentiles: tuple[float, float], n_threads: int) -> tuple[float, int]:
    """Seconds of the network alone for all tiles of an image, and how many there are.

    Tiles are read in rounds that are not timed: what is timed is the network on tiles in memory.
    """
    image, model = open_image(path), find_model("tiledseg-nuclei")
    model = dataclasses.replace(model, precision=precision_of(model, "cpu", computes_in_bfloat16()))
    working = WorkingGrid.for_diameter(label_shape(image), DIAMETER, model.diam_mean)
    lattice = Lattice(working.shape, model.tile, model.stride)
    network, shown = load_network(model, "cpu"), [(Input((0,)), WholeRange(*percentiles))]
    tiles = itertools.product(*(range(n) for n in lattice.counts))
    seconds = 0.0
    with torch_threads_kept(), ThreadPoolExecutor(n_threads) as pool:

        def read(tile: tuple[int, ...]) -> np.ndarray:
            inputs = np.zeros((1, model.n_channels, model.tile, model.tile), np.float32)
            inputs[0, :1] = read_tile(image, shown, working, (), lattice.tile_region(tile))
            return inputs

        list(pool.map(network.predict, [read((0, 0))] * 2 * n_threads))  # warm
        while batch := list(itertools.islice(tiles, AT_ONCE)):
            inputs = list(pool.map(read, batch))
            start = time.perf_counter()
            for _ in pool.map(network.predict, inputs):
                pass
            seconds += time.perf_counter() - start
    return seconds, lattice.n_tiles


def times_of_whole(folder: Path, side: int, cores: int, n_times: int) -> Iterator[dict[str, Any]]:
    """Rows of the first table."""
    warm_up()
    path = folder / "slide.ome.zarr"
    write_image(path, LazySlide((side, side)), axes="yx", spacing_um=(0.5, 0.5))
    for _ in range(n_times):
        yield time_of_whole(folder, path, cores)


def time_of_whole(folder: Path, path: Path, cores: int) -> dict[str, Any]:
    """A whole run, and the bare network after it."""
    measured, report = run_tiledseg(folder, path, {"diameter": DIAMETER}, cores)
    row: dict[str, Any] = {"slide": path.name, "whole s": measured.seconds}
    if not report:
        return {**row, "ratio": float("nan"), **measured.failure}
    height, width = report["image"]["shape"]
    network_s, n_tiles = bare_network_s(path, report["percentiles"][0], cores)
    stages = {stage: report["seconds"][stage] for stage in ("flows", "masks", "stitch", "publish")}
    return {
        **row,
        "slide": f"{height} x {width}",
        "tiles": n_tiles,
        "network s": network_s,
        "ratio": measured.seconds / network_s,
        "objects": report["n_objects"],
        "GiB": measured.total_peak / 2**30,
        "note": ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items()),
        "stages": stages,
    }


def beside_untiled(bench: Bench, table: Table, save_to: Path | None) -> list[Target]:
    """Rows of the second table, and what they are held against."""
    prepare(bench)
    for who in ("tiledseg", "untiled"):
        table.add(row_of(bench, who))
        save(save_to, table.rows)
    ours, theirs = table.rows
    if "AP" not in ours or "AP" not in theirs:
        return []
    targets = [Target("time of untiled Cellpose over ours", theirs["seconds"] / ours["seconds"], 1)]
    for at, mine, other in zip((0.5, 0.75, 0.9), ours["AP"], theirs["AP"], strict=True):
        targets.append(Target(f"AP at {at} beside untiled Cellpose", mine, other - AP_SLACK))
    return targets


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge; returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--size", type=int, metavar="PX", help="side of the slide of the whole run (default 8192)")
    made.add_argument(
        "--beside", type=int, metavar="PX", help="side of the slide beside Cellpose (default 2048, 0 none)"
    )
    made.add_argument("--cellpose-python", type=Path, metavar="PATH", help="interpreter with cellpose 3.1.1.3")
    made.add_argument("--repeat", type=int, metavar="N", help="times that both are measured, in turns (default 3)")
    made.add_argument("--cores", type=int, default=2, metavar="N", help="cores of each")
    options = made.parse_args(arguments)
    side = options.size or (512 if options.toy else 8192)
    beside = options.beside if options.beside is not None else (512 if options.toy else 2048)
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    with tempfile.TemporaryDirectory(prefix="tiledseg-bench-") as name:
        columns = {"slide": 16, "tiles": 7, "network s": 11, "whole s": 9, "ratio": 7, "objects": 9, "GiB": 7}
        table = Table(columns)
        for row in times_of_whole(Path(name), side, options.cores, options.repeat or (1 if options.toy else 3)):
            table.add(row)
            save(options.save, table.rows)
        rows += table.rows
        whole, network = (sum(row.get(of, float("nan")) for row in rows) for of in ("whole s", "network s"))
        targets.append(Target("whole run over bare network", whole / network, LIMIT, at_least=False))
        if beside:
            print()
            table = Table({"who": 12, "seconds": 9, "GiB": 7, "objects": 9, "AP": 23, "cut": 6})
            bench = Bench(
                synthetic(beside), Path(name) / "beside", 1024, options.cores, {"cellpose": options.cellpose_python}
            )
            targets += beside_untiled(bench, table, None)
            rows += table.rows
    return finish(targets, rows, toy=options.toy, path=options.save)


if __name__ == "__main__":
    sys.exit(main())
