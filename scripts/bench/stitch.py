"""Stitching at scale: seconds and memory of the merge, from 10^5 to 10^7 objects in 1 600 blocks.

    python scripts/bench/stitch.py [--max 10_000_000] [--blocks 40] [--save FILE]

There is no image: objects are squares on a jittered grid, nearly touching, cut by a grid of 40 x 40 blocks
as the masks stage would leave them (first pixels per block) and matched as the seams would match them (pairs
per block). The records are written to a scratch folder; then a fresh process per size runs the real merge over
them. Its peak memory is given above what it had with everything imported, and whole against the target.

Targets: 10^7 objects in under 2 minutes and under 2 GiB, and at most 12 times as long as 10^6. With a
smaller --max only what can be told is checked. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FOLDER = "masks"
PITCH, SIDE = 24, 22  # pixels from object to object, and side of one: the jitter is what is left
WIDTHS = (12, 10, 9, 12, 7, 11, 14, 9)
MAX_SECONDS, MAX_BYTES, MAX_RATIO = 120.0, 2 * 2**30, 12.0

Array = npt.NDArray[np.int64]


def geometry(n_objects: int, blocks_per_side: int) -> Any:
    """The grid of blocks over an image with room for this many objects."""
    from tiledseg.grid import BlockGrid

    side = (int(np.ceil(np.sqrt(n_objects))) + 1) * PITCH
    block = -(-side // blocks_per_side)
    return BlockGrid((side, side), (block, block), (2 * SIDE, 2 * SIDE))


def corners(n_objects: int) -> tuple[Array, Array]:
    """Row and column of each object's first pixel."""
    per_row = int(np.ceil(np.sqrt(n_objects)))
    jitter = np.random.default_rng(0).integers(0, PITCH - SIDE + 1, (2, n_objects))
    row, column = np.divmod(np.arange(n_objects), per_row)
    return row * PITCH + jitter[0], column * PITCH + jitter[1]


def parts(grid: Any, n_objects: int) -> list[tuple[Array, Array, Array]]:
    """Objects, their blocks and the first pixels they have there, for the up to four blocks each lies in."""
    top, left = corners(n_objects)
    block, width = grid.block[0], grid.shape[1]
    rows, columns = (top // block, (top + SIDE - 1) // block), (left // block, (left + SIDE - 1) // block)
    found = []
    for below, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        here = np.flatnonzero((below <= rows[1] - rows[0]) & (right <= columns[1] - columns[0]))
        row, column = rows[below][here], columns[right][here]
        first = np.maximum(top[here], row * block) * width + np.maximum(left[here], column * block)
        found.append((here, row * grid.counts[1] + column, first))
    return found


def build(store: Any, grid: Any, n_objects: int) -> int:
    """Write the records that masks and seams leave for these objects; returns the number of links."""
    found = parts(grid, n_objects)
    block_of, first = (np.concatenate([part[i] for part in found]) for i in (1, 2))
    order = np.argsort(block_of * np.prod(grid.shape) + first)
    starts = np.searchsorted(block_of[order], np.arange(grid.n_blocks + 1))
    local = np.empty(order.size, np.int64)
    local[order] = np.arange(order.size) - starts[block_of[order]] + 1
    sizes = np.cumsum([0, *(part[0].size for part in found)])
    links = []
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        _, at_i, at_j = np.intersect1d(found[i][0], found[j][0], assume_unique=True, return_indices=True)
        at_i, at_j = at_i + sizes[i], at_j + sizes[j]
        links.append(np.column_stack([block_of[at_i], local[at_i], block_of[at_j], local[at_j]]))
    pairs = np.concatenate(links)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    pair_starts = np.searchsorted(pairs[:, 0], np.arange(grid.n_blocks + 1))
    for position in range(grid.n_blocks):
        mine = order[starts[position] : starts[position + 1]]
        store.save(f"{FOLDER}/objects/{position}", np.concatenate([[0, 0], first[mine]]))
        seen = pairs[pair_starts[position] : pair_starts[position + 1], 1:]
        store.save(f"{FOLDER}/pairs/{position}", seen)
        n = len(seen)
        store.save(f"{FOLDER}/agreement/{position}", np.array([n, n, n, 2 * n, 2 * n], np.float64))
    return len(pairs)


def expected_ids(grid: Any, n_objects: int) -> list[npt.NDArray[np.uint32]]:
    """The ids of every block's labels, from where the objects were drawn."""
    top, left = corners(n_objects)
    rank = np.empty(n_objects, np.uint32)
    rank[np.argsort(top * grid.shape[1] + left)] = np.arange(1, n_objects + 1)
    found = parts(grid, n_objects)
    here, block_of, first = (np.concatenate([part[i] for part in found]) for i in range(3))
    order = np.argsort(block_of * np.prod(grid.shape) + first)
    starts = np.searchsorted(block_of[order], np.arange(1, grid.n_blocks))
    return np.split(rank[here[order]], starts)


def fullest_slab(store: Any, grid: Any) -> int:
    """Most labels that the blocks with one index along the first axis have together."""
    sizes = [store.view(f"{FOLDER}/objects/{position}").size - 2 for position in range(grid.n_blocks)]
    return int(np.reshape(sizes, (grid.counts[0], -1)).sum(axis=1).max())


def merge(store: Any, grid: Any) -> dict[str, Any]:
    """Merge the records and measure it; for a process that does nothing else."""
    import scipy.sparse.csgraph  # noqa: F401  before the memory is measured

    from tiledseg.cluster import peak_memory
    from tiledseg.stitch import merge_blocks, merge_memory

    in_slab = fullest_slab(store, grid)
    before = peak_memory()[1]
    start = time.perf_counter()
    facts = merge_blocks(store, FOLDER, grid)
    seconds = time.perf_counter() - start
    whole = peak_memory()[1]
    projected = merge_memory(in_slab, facts["n_pairs"], grid.n_blocks)
    return {"seconds": seconds, "peak": whole, "above": whole - before, "projected": projected, **facts}


def task(name: str, n_objects: int, blocks_per_side: int, folder: Path) -> dict[str, Any]:
    """One step for one size, in this process."""
    from tiledseg.store import DiskStore

    store, grid = DiskStore(folder), geometry(n_objects, blocks_per_side)
    if name == "build":
        return {"n_links": build(store, grid, n_objects)}
    if name == "merge":
        return merge(store, grid)
    ids = expected_ids(grid, n_objects)
    return {"n_wrong": sum(not np.array_equal(store.load(f"{FOLDER}/ids/{i}"), one) for i, one in enumerate(ids))}


def in_a_process(name: str, n_objects: int, blocks_per_side: int, folder: str) -> dict[str, Any]:
    """The same in a fresh process: this one stays small, as a child's peak begins with its parent's."""
    options = ["--max", str(n_objects), "--blocks", str(blocks_per_side), "--folder", folder]
    output = subprocess.run(
        [sys.executable, __file__, "--task", name, *options], check=True, stdout=subprocess.PIPE
    ).stdout
    facts: dict[str, Any] = json.loads(output)
    return facts


def measure(n_objects: int, blocks_per_side: int) -> dict[str, Any]:
    """All steps for one size."""
    with tempfile.TemporaryDirectory() as folder:
        steps = ("build", "merge", "check")
        facts = {step: in_a_process(step, n_objects, blocks_per_side, folder) for step in steps}
    return {"n_wanted": n_objects, **facts["build"], **facts["merge"], **facts["check"]}


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The targets that these measurements miss, as sentences."""
    found = []
    for row in rows:
        n = row["n_wanted"]
        if row["n_objects"] != n or row["n_wrong"]:
            found.append(f"{n:,} objects became {row['n_objects']:,}, with wrong ids in {row['n_wrong']} blocks")
        if row["seconds"] >= MAX_SECONDS or row["peak"] >= MAX_BYTES:
            found.append(f"{n:,} objects took {row['seconds']:.0f} s and {row['peak'] / 2**30:.2f} GiB")
    if len(rows) > 1 and rows[-1]["n_wanted"] >= 10_000_000:
        ratio = rows[-1]["seconds"] / rows[-2]["seconds"]
        if ratio > MAX_RATIO:
            found.append(f"the last tenfold took {ratio:.1f} times as long")
    return found


def main() -> int:
    """The table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max", type=int, default=10_000_000, help="largest number of objects")
    parser.add_argument("--blocks", type=int, default=40, help="blocks along each side of the image")
    parser.add_argument("--save", type=Path, help="also write the figures there, as JSON")
    parser.add_argument("--task", choices=["build", "merge", "check"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(task(options.task, options.max, options.blocks, options.folder)))
        return 0
    names = ["objects", "links", "seconds", "objects/s", "MiB", "projected", "bytes/object", "x tenth"]
    print("".join(f"{name:>{width}}" for name, width in zip(names, WIDTHS, strict=True)))
    rows: list[dict[str, Any]] = []
    for n_objects in [10**k for k in range(5, 12) if 10**k <= options.max] or [options.max]:
        row = measure(n_objects, options.blocks)
        ratio = f"{row['seconds'] / rows[-1]['seconds']:.1f}" if rows else ""
        rows.append(row)
        mib = [f"{row[key] / 2**20:.1f}" for key in ("above", "projected")]
        cells = [f"{n_objects:,}", f"{row['n_links']:,}", f"{row['seconds']:.2f}", f"{n_objects / row['seconds']:,.0f}"]
        cells += [*mib, f"{row['above'] / n_objects:.1f}", ratio]
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)
    if options.save:
        options.save.write_text(json.dumps(rows, indent=1))
    for sentence in missed(rows):
        print(f"missed: {sentence}", file=sys.stderr)
    return 1 if missed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
