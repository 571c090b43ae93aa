"""How weak a seam `tiledseg qc` finds, and whether it finds any where there is none.

    python scripts/bench/edges.py [--side 2048] [--slides 6] [--save FILE]

True labels of synthetic slides are cut at the borders of blocks, as blocks that were not stitched leave them: of a
share of the cells, the parts become objects of their own. The judge sees the labels alone. Of every share and block the
share of border lines that are found is given, and the lines found elsewhere, of all slides together.

Targets: every line where half of the cells are cut, 90 % where a fifth are, none that is not there. Exit code 1 if one
is missed.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from report import Table, Target, finish, parser

from tiledseg.quality.edges import EdgeJudge, count_edges
from tiledseg.slides import synthetic_slide

SHARES = (1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05, 0.0)
BLOCKS = (128, 256, 512, 1024)
DIAMETER = 24.0
WANTED = {0.5: 1.0, 0.2: 0.9}

Labels = npt.NDArray[np.integer[Any]]


def cut(labels: Labels, block: int, share: float, seed: int) -> npt.NDArray[np.int32]:
    """Labels of which a share is cut at the borders of blocks, numbered anew."""
    n = int(labels.max())
    is_cut = np.random.default_rng(seed).random(n + 1) < share
    rows, columns = (np.arange(side) // block for side in labels.shape)
    number = rows[:, None] * (int(columns[-1]) + 1) + columns
    parts = np.where((labels > 0) & is_cut[labels], labels.astype(np.int64) + (number + 1) * (n + 1), labels)
    return np.unique(parts, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)


def lines_in(labels: npt.NDArray[np.int32]) -> set[tuple[int, int]]:
    """Axis and position of what the judge reports."""
    judge = EdgeJudge(labels.shape)
    whole = tuple(slice(0, side) for side in labels.shape)
    judge.add(count_edges(labels, int(labels.max()), whole, (0, 0), judge.sides))
    return {(edge.axis, edge.position) for edge in judge.found()}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge; returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--side", type=int, default=2048, metavar="N", help="of a slide, pixels")
    made.add_argument("--slides", type=int, default=6, metavar="N", help="how many")
    options = made.parse_args(arguments)
    side, n_slides = (1024, 1) if options.toy else (options.side, options.slides)
    truths = [synthetic_slide((side, side), diameter=DIAMETER, seed=seed)[1] for seed in range(n_slides)]
    table = Table({"block": 7, "cut": 7, "lines": 7, "found": 7, "share": 7, "elsewhere": 11, "s": 8})
    targets, n_elsewhere = [], 0
    for block in [block for block in BLOCKS if block < side]:
        borders = {(axis, at) for axis in (0, 1) for at in range(block, side, block)}
        for share in SHARES:
            start, found = time.perf_counter(), [lines_in(cut(t, block, share, i)) for i, t in enumerate(truths)]
            there = borders if share else set()
            n_found = sum(len(lines & there) for lines in found)
            elsewhere = sum(len(lines - there) for lines in found)
            n_elsewhere += elsewhere
            rate = n_found / (len(there) * n_slides) if there else float("nan")
            row = {"block": block, "cut": share, "lines": len(there) * n_slides, "found": n_found, "share": rate}
            table.add({**row, "elsewhere": elsewhere, "s": time.perf_counter() - start})
            if share in WANTED:
                targets.append(
                    Target(f"block {block}, {share:.0%} cut: found", rate, WANTED[share], needs_size=share < 0.5)
                )
    targets.append(Target("lines that are not there", n_elsewhere, 0, at_least=False, needs_size=False))
    return finish(targets, table.rows, toy=options.toy, path=options.save)


if __name__ == "__main__":
    sys.exit(main())
