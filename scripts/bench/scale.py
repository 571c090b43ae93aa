"""Memory as the image grows: the most a worker and the client had resident, from 4096² to 32768² pixels.

    python scripts/bench/scale.py [--max 32768] [--toy] [--save FILE]

The slide is one piece of 4096² pixels laid side by side, written chunk by chunk: every size then holds the same
cells at the same density, and size is all that changes. In the middle of each piece are 2048² pixels of dense
tissue, the rest is noise, as glass is: what takes most memory, a block full of cells with a halo on every side, occurs
four times at 4096² and 256 times at 32768², and the glass takes little time. Nuclei are 68
pixels wide, so that the network's grid is a quarter of the image; masks, stitch and publish work at full size on
blocks of 1024 pixels. There are two workers of one thread each, so that a worker's peak does not depend on
which blocks meet in it.

A worker's peak must stay within 10 % of that at 4096², the client (with the scheduler in it) must grow by
less than 200 MiB, and no worker may take more than the preflight foresees, which is the last column.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from images import RepeatedSlide
from report import Table, Target, finish, parser, save
from runs import run_tiledseg

import tiledseg
from tiledseg.dynamics import warm_up
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide

DIAMETER = 68
BLOCK = 1024
PIECE = 4096
GLASS = 400, 50
"""Mean and deviation of the noise beside the tissue, counts."""
WORKERS = 2
SMALLEST = 4096
GROWTH_LIMIT = 1.10
CLIENT_LIMIT_MIB = 200.0
MIB = 2**20
COLUMNS = {
    "size": 12,
    "blocks": 8,
    "empty": 7,
    "objects": 9,
    "seconds": 9,
    "worker MiB": 12,
    "client MiB": 12,
    "foreseen MiB": 14,
}


def slide_piece(side: int) -> npt.NDArray[np.uint16]:
    """Noise with a square of tissue in its middle, half as wide."""
    piece = np.random.default_rng(0).normal(*GLASS, (side, side)).clip(0).astype(np.uint16)
    tissue, _ = synthetic_slide((side // 2, side // 2), diameter=DIAMETER)
    piece[side // 4 : side // 4 + side // 2, side // 4 : side // 4 + side // 2] = tissue
    return piece


def measure(folder: Path, slide: RepeatedSlide, block: int) -> dict[str, Any]:
    """Segment a slide in a process of its own with two workers; a row of the table."""
    path = folder / "slide.ome.zarr"
    write_image(path, slide, axes="yx", spacing_um=(0.25, 0.25))
    options = {"diameter": DIAMETER, "block": block, "workers": WORKERS}
    foreseen = tiledseg.preview(path, folder / "out.ome.zarr", **options)["worker_bytes"]
    measured, report = run_tiledseg(folder, path, options, cores=WORKERS)
    row = {
        "size": f"{slide.shape[0]}²",
        "seconds": measured.seconds,
        "worker MiB": max(measured.child_peaks, default=0) / MIB,
        "client MiB": measured.root_peak / MIB,
        "foreseen MiB": foreseen / MIB,
    }
    if not report:
        return {**row, **measured.failure}
    counts = {"blocks": report["n_blocks"], "empty": report["n_skipped_blocks"], "objects": report["n_objects"]}
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report["seconds"].items())
    return {**row, **counts, "note": stages}


def targets_of(rows: list[dict[str, Any]]) -> list[Target]:
    """What the largest size is held against, beside the smallest."""
    first, last = rows[0], rows[-1]
    failed = sum("objects" not in row for row in rows)
    growth = last["worker MiB"] / first["worker MiB"]
    over_foreseen = max(row["worker MiB"] / row["foreseen MiB"] for row in rows)
    return [
        Target("sizes at which the run failed", failed, 0, at_least=False, needs_size=False),
        Target("worker's peak over what was foreseen", over_foreseen, 1, at_least=False, needs_size=False),
        Target(f"worker's peak at {last['size']} over {first['size']}", growth, GROWTH_LIMIT, at_least=False),
        Target(
            f"MiB the client grew from {first['size']} to {last['size']}",
            last["client MiB"] - first["client MiB"],
            CLIENT_LIMIT_MIB,
            at_least=False,
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge; returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--max", type=int, default=32768, metavar="PX", help="the largest side; from 4096 it doubles")
    options = made.parse_args(arguments)
    smallest, largest, block, piece = (
        (512, min(options.max, 1024), 256, 512) if options.toy else (SMALLEST, options.max, BLOCK, PIECE)
    )
    warm_up()
    pixels = slide_piece(piece)
    table = Table(COLUMNS)
    side = smallest
    while side <= largest:
        # Gone before the next: a slide, its flows and its labels are some gigabytes at the largest size.
        with tempfile.TemporaryDirectory(prefix="tiledseg-bench-") as folder:
            table.add(measure(Path(folder), RepeatedSlide(pixels, (side, side)), block))
        save(options.save, table.rows)
        side *= 2
    return finish(targets_of(table.rows), table.rows, toy=options.toy, path=options.save)


if __name__ == "__main__":
    sys.exit(main())
