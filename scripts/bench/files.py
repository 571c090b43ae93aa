"""What it costs that files last: milliseconds per file and per block, written as a run does and without syncing.

    python scripts/bench/files.py [--folder DIR] [--blocks 40]

A block is what the masks leave of 2 148 x 2 148 pixels: 25 chunks of labels, and two small arrays. Each is
written by turns with and without syncing, and what the second left to the system is put on the disk and timed too.
Run it in a folder of the disk or network store that the scratch shall lie on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tiledseg.store import DiskStore

SIDE, CHUNK, CELL = 2148, 512, 25


@contextlib.contextmanager
def without_syncing() -> Iterator[None]:
    """Writes return before anything is on the disk."""
    fsync = os.fsync
    os.fsync = lambda _: None
    try:
        yield
    finally:
        os.fsync = fsync


def write_blocks(folder: Path, n_blocks: int) -> dict[str, float]:
    """Milliseconds for a block of labels, a small array and a mark."""
    store = DiskStore(folder)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.uint32) // CELL
    labels = y * 100 + x + 1
    store.create("labels.zarr", (n_blocks, SIDE, SIDE), (1, CHUNK, CHUNK), "uint32", codec="zstd")
    taken = dict.fromkeys(("block of 25 chunks", "small array", "mark"), 0.0)
    for block in range(n_blocks):
        since = time.perf_counter()
        store.open("labels.zarr")[block] = labels
        stored = time.perf_counter()
        store.save(f"objects/{block}", np.arange(8000))
        saved = time.perf_counter()
        store.mark("masks", [block])
        times = (stored - since, saved - stored, time.perf_counter() - saved)
        taken = {key: total + 1000 * took / n_blocks for (key, total), took in zip(taken.items(), times, strict=True)}
    return taken


def main(arguments: list[str] | None = None) -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--blocks", type=int, default=40)
    options = parser.parse_args(arguments)
    print(f"{'ms each':<24}{'synced':>10}{'not':>10}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_blocks(Path(folder) / "warm", 2)
        os.sync()
        synced = write_blocks(Path(folder) / "synced", options.blocks)
        with without_syncing():
            plain = write_blocks(Path(folder) / "plain", options.blocks)
        since = time.perf_counter()
        os.sync()
        later = time.perf_counter() - since
    for key in synced:
        print(f"{key:<24}{synced[key]:>10.1f}{plain[key]:>10.1f}")
    print(f"what was not synced took {later:.2f} s to get on the disk")


if __name__ == "__main__":
    main()
