"""Stage 4: one identity for what several blocks saw.

Reads
    ``<labels>/labels.zarr`` where padded blocks overlap; ``<labels>/objects``.
Writes
    ``<labels>/pairs/<block>``: labels of a block and of a later neighbour that are one object, and
    ``<labels>/exact/<block>``: how many of them are the same pixels for both;
    ``<labels>/ids/<block>``: the global id of every local label; ``<labels>/stitch.json``.
Parallel over
    Blocks, then one merge whose time and memory grow with the number of objects (some 100 bytes
    each), not with the image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Executor, peak_memory
from .grid import overlap, shift
from .job import Job
from .progress import Progress
from .seams import agreement, link, match_seam, node_index, number

__all__ = ["match_block", "merge", "process_block", "run"]

MIN_IOU = 0.5

Pairs = npt.NDArray[np.int64]


def process_block(low: npt.NDArray[np.uint32], high: npt.NDArray[np.uint32], neighbour: int) -> tuple[Pairs, int]:
    """Pair the labels that two blocks gave the region both saw.

    Parameters
    ----------
    low, high : array of uint32, shape (*overlap)
        Labels of a block and of a later neighbour.
    neighbour : int
        Position of the neighbour in raster order.

    Returns
    -------
    pairs : array of int64, shape (n, 3)
        Label of the block, the neighbour, its label.
    n_exact : int
        Pairs that are the same pixels for both.
    """
    pairs = match_seam(low, high, MIN_IOU)
    _, n_exact = agreement(low, high, pairs)
    return np.column_stack([pairs[:, 0], np.full(len(pairs), neighbour), pairs[:, 1]]).astype(np.int64), n_exact


def match_block(position: int, job: Job) -> dict[str, Any]:
    """Task: compare one block with its later neighbours."""
    grid, labels = job.blocks, job.store.open(f"{job.labels}/labels.zarr")
    block = grid.at(grid.index_of(position))
    found = [np.zeros((0, 3), np.int64)]
    n_exact = 0
    if _n_objects(job, position):
        for index in grid.later_neighbours(block.index):
            other = grid.at(index)
            shared = overlap(block.padded, other.padded)
            if shared is None or not _n_objects(job, grid.number(index)):
                continue
            low = labels[(position, *shift(shared, tuple(p.start for p in block.padded)))]
            high = labels[(grid.number(index), *shift(shared, tuple(p.start for p in other.padded)))]
            pairs, n_same = process_block(low, high, grid.number(index))
            found.append(pairs)
            n_exact += n_same
    job.store.save(f"{job.labels}/pairs/{position}", np.concatenate(found))
    job.store.save(f"{job.labels}/exact/{position}", np.array(n_exact))
    return {"peak": peak_memory()}


def _n_objects(job: Job, position: int) -> int:
    return int(job.store.load(f"{job.labels}/objects/{position}").size) - 2


def merge(_: int, job: Job) -> dict[str, Any]:
    """Task: link all pairs and number the objects."""
    n_blocks = job.blocks.n_blocks
    objects = [job.store.load(f"{job.labels}/objects/{position}") for position in range(n_blocks)]
    n_cut, n_skipped = (int(sum(o[i] for o in objects)) for i in range(2))
    first = np.concatenate([o[2:] for o in objects])
    offsets = np.concatenate([[0], np.cumsum([o.size - 2 for o in objects])]).astype(np.int64)
    links = [np.zeros((0, 2), np.int64)]
    n_pairs = n_exact = 0
    for position in range(n_blocks):
        pairs = job.store.load(f"{job.labels}/pairs/{position}")
        here = node_index(offsets, position, pairs[:, 0])
        links.append(np.column_stack([here, node_index(offsets, pairs[:, 1], pairs[:, 2])]))
        n_pairs += len(pairs)
        n_exact += int(job.store.load(f"{job.labels}/exact/{position}"))
    ids, n_objects = number(first, link(np.concatenate(links), first.size))
    for position in range(n_blocks):
        job.store.save(f"{job.labels}/ids/{position}", ids[offsets[position] : offsets[position + 1]])
    facts = {
        "n_objects": n_objects,
        "n_cut_by_halo": n_cut,
        "n_blocks": n_blocks,
        "n_skipped_blocks": n_skipped,
        "n_pairs": n_pairs,
        "n_exact_pairs": n_exact,
    }
    return {"facts": facts, "peak": peak_memory()}


def run(job: Job, executor: Executor, progress: Progress) -> dict[str, int]:
    """Stitch the blocks; returns counts of objects, blocks, cut objects and pairs."""
    n_blocks = job.blocks.n_blocks
    stage = f"{job.labels}/seams"
    done = job.store.done(stage)
    known = job.store.read_json(f"{job.labels}/stitch.json")
    progress.start("stitch", n_blocks + 1, len(done) + (known is not None))
    todo = (position for position in range(n_blocks) if position not in done)
    for position, record in executor.stream(match_block, todo, job):
        job.store.mark(stage, [position])
        progress.step(record["peak"])
    if known is None:
        for _, record in executor.stream(merge, [0], job):
            known = record["facts"]
            job.store.write_json(f"{job.labels}/stitch.json", known)
            progress.step(record["peak"])
    return dict(known or {})
