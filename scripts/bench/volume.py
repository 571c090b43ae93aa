"""From flows to labels of a volume: tiledseg against Cellpose 4 on the same flows and the same cores.

    python scripts/bench/volume.py [--side 512] [--toy] [--planes] [--json FILE]

A synthetic volume of touching cells of about 34 px, and the exact flows of its cells, or with ``--planes`` the sum
of the flows of its planes, as a network of planes gives them. Both sides are given float32 flows at full size and
the steps and smallest size that Cellpose would take, both are warm; there is no flow threshold in 3D. At 512 x 512
x 512 it takes half an hour on two cores, nearly all of it Cellpose's, and some 20 GB.

Then a table of the network's tiles, which takes no time: those of tiledseg's lattices for a whole volume, beside
those of Cellpose on blocks of 256 x 256 x 256 read with a halo of two diameters. Cellpose pads a plane before it
tiles it, which can take it over the width of one tile; the table has the tiles of the planes as they are too. The
target is for the largest volume: in the others most blocks have a halo on one side alone.
"""

from __future__ import annotations

import collections
import itertools
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from masks import LOGIT, MIN_SIZE, NITER, best_of
from report import THRESHOLDS, Table, Target, finish, parser

import tiledseg
from tiledseg.cores import Cores
from tiledseg.dynamics import compute_masks, warm_up
from tiledseg.grid import BlockGrid, Lattice, WorkingGrid
from tiledseg.heat import label_flows
from tiledseg.networks.models import find_model
from tiledseg.volumes import label_volume, plane_flows

Floats = npt.NDArray[np.float32]
Values = tuple[Floats, Floats, int]

SPACING = 34.0
"""Of the cells, pixels."""
LIMIT = 15.0
"""How many times faster than Cellpose."""
SHAPES = (512, 1024, 4096)
BLOCK = 256
"""Side of the blocks that Cellpose's network is run on."""
BSIZE, TILE_OVERLAP = 224, 0.1
"""Of Cellpose's tiling."""
MOST_TILES = 0.45
"""Part of the tiles of blockwise evaluation that a volume of many blocks may need."""


def our_masks(n_threads: int) -> Any:
    """The labels of tiledseg, on so many cores."""
    cores = Cores(n_threads)

    def make(flows: Floats, cellprob: Floats, niter: int) -> npt.NDArray[Any]:
        with cores.task():
            return compute_masks(flows, cellprob, niter=niter, flow_threshold=0, min_size=MIN_SIZE, cores=cores)

    return make


def cellpose_masks(flows: Floats, cellprob: Floats, niter: int) -> npt.NDArray[Any]:
    """Cellpose's labels; it takes flows of five times the length."""
    import torch
    from cellpose import dynamics

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks")  # torch, of Cellpose's sparse histogram
        labels = dynamics.resize_and_compute_masks(
            flows, cellprob, niter=niter, flow_threshold=0, do_3D=True, min_size=MIN_SIZE, device=torch.device("cpu")
        )
    return np.asarray(labels)


def measure(side: int, n_runs: int, n_threads: int, *, has_planes: bool) -> dict[str, Any]:
    """A row of the table: both sides on the same flows."""
    start = time.perf_counter()
    truth = label_volume((side,) * 3, SPACING)
    flows = (plane_flows if has_planes else label_flows)(truth)
    cellprob = np.where(truth > 0, np.float32(LOGIT), np.float32(-LOGIT))
    n_cells = int(truth.max())
    print(f"{n_cells} cells and their flows in {time.perf_counter() - start:.0f} s", flush=True)
    ours_of = our_masks(n_threads)
    warm_up(3)
    corner = (slice(0, 48),) * 3
    few: Values = (np.ascontiguousarray(flows[:, *corner]), np.ascontiguousarray(cellprob[corner]), NITER)
    best_of(ours_of, 1, few)
    best_of(cellpose_masks, 1, (few[0] * 5, *few[1:]))
    ours_s, ours = best_of(ours_of, n_runs, (flows, cellprob, NITER))
    print(f"tiledseg: {ours_s:.1f} s", flush=True)
    flows *= 5
    theirs_s, theirs = best_of(cellpose_masks, n_runs, (flows, cellprob, NITER))
    scores = [tiledseg.compare(labels, truth, thresholds=THRESHOLDS).overall for labels in (ours, theirs)]
    return {
        "volume": f"{side}³{' planes' if has_planes else ''}",
        "cells": n_cells,
        "Cellpose s": theirs_s,
        "tiledseg s": ours_s,
        "ratio": theirs_s / ours_s,
        "n Cellpose": scores[1].n_predicted,
        "n tiledseg": scores[0].n_predicted,
        "AP Cellpose": scores[1].ap,
        "AP tiledseg": scores[0].ap,
    }


# Tiles of the network


def lattice_tiles(side: int, diameter: float) -> int:
    """Tiles of tiledseg for a volume, of the planes of all three orientations."""
    model = find_model("tiledseg-nuclei")
    working = WorkingGrid.for_diameter((side,) * 3, diameter, model.diam_mean)
    return sum(Lattice(working.shape, model.tile, model.stride, thin).n_tiles for thin in range(3))


def blockwise_tiles(side: int, diameter: float, diam_mean: float, *, is_padded: bool) -> int:
    """Tiles of Cellpose for a volume in blocks with a halo, each scaled to the network's diameter."""
    grid = BlockGrid((side,) * 3, (BLOCK,) * 3, (round(2 * diameter),) * 3)
    first = [grid.at((i, 0, 0)).padded[0] for i in range(grid.counts[0])]
    lengths = collections.Counter(int((part.stop - part.start) * diam_mean / diameter) for part in first)
    n_tiles = 0
    for axes in itertools.product(lengths.items(), repeat=3):
        n_blocks = math.prod(count for _, count in axes)
        for orientation in range(3):
            n_planes, *plane = (length for length, _ in axes[orientation:] + axes[:orientation])
            n_tiles += n_blocks * n_planes * tiles_of_plane(plane, is_padded=is_padded)
    return n_tiles


def tiles_of_plane(shape: Sequence[int], *, is_padded: bool) -> int:
    """Tiles of Cellpose for one plane: those of `cellpose.transforms.make_tiles`, after the margin that
    `cellpose.core.run_net` adds."""
    if is_padded:
        from cellpose.transforms import get_pad_yx

        pads = get_pad_yx(*shape, min_size=(BSIZE, BSIZE))
        shape = (shape[0] + pads[0] + pads[1], shape[1] + pads[2] + pads[3])
    counts = (1 if n <= BSIZE else math.ceil((1 + 2 * TILE_OVERLAP) * n / BSIZE) for n in shape)
    return math.prod(counts)


def tile_rows(side_of: Sequence[int] = SHAPES) -> list[dict[str, Any]]:
    """A row for each shape and diameter, printed."""
    diam_mean = find_model("tiledseg-nuclei").diam_mean
    table = Table(
        {"tiles": 12, "diameter": 10, "tiledseg": 12, "Cellpose": 12, "ratio": 8, "unpadded": 12, "ratio there": 13}
    )
    for side, diameter in itertools.product(side_of, (diam_mean, 30.0)):
        ours = lattice_tiles(side, diameter)
        theirs, bare = (blockwise_tiles(side, diameter, diam_mean, is_padded=is_padded) for is_padded in (True, False))
        table.add(
            {
                "tiles": f"{side}³",
                "diameter": diameter,
                "tiledseg": ours,
                "Cellpose": theirs,
                "ratio": ours / theirs,
                "unpadded": bare,
                "ratio there": ours / bare,
            }
        )
    return table.rows


def targets_of(row: dict[str, Any], tiles: Sequence[dict[str, Any]]) -> list[Target]:
    """What the rows are held against."""
    of_largest = [each for each in tiles if each["tiles"] == tiles[-1]["tiles"]]
    ours, theirs = (row[f"AP {side}"][THRESHOLDS.index(0.9)] for side in ("tiledseg", "Cellpose"))
    return [
        Target(f"{row['volume']}: times faster than Cellpose", row["ratio"], LIMIT),
        Target(f"{row['volume']}: AP at 0.9 beside Cellpose's", ours, theirs),
        *(
            Target(
                f"{each['tiles']}, diameter {each['diameter']:g}: part of the tiles",
                each["ratio"],
                MOST_TILES,
                False,
                False,
            )
            for each in of_largest
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge; returns the exit code."""
    import torch

    made = parser(__doc__)
    made.add_argument("--side", type=int, default=512, metavar="N", help="of the volume, pixels")
    made.add_argument("--planes", action="store_true", help="flows as a network of planes gives them")
    made.add_argument("--runs", type=int, default=1, metavar="N", help="runs of each side, of which the best counts")
    made.add_argument("--threads", type=int, default=2, metavar="N", help="threads of both sides")
    made.add_argument("--json", dest="save", type=Path, metavar="FILE", help="the same as --save")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tiles = tile_rows()
    print()
    row = measure(96 if options.toy else options.side, options.runs, options.threads, has_planes=options.planes)
    columns = {
        "volume": 14,
        "cells": 7,
        "Cellpose s": 12,
        "tiledseg s": 12,
        "ratio": 8,
        "n Cellpose": 12,
        "n tiledseg": 12,
    }
    Table({**columns, "AP Cellpose": 23, "AP tiledseg": 23}).add(row)
    return finish(targets_of(row, tiles), [row, *tiles], toy=options.toy, path=options.save)


if __name__ == "__main__":
    sys.exit(main())
