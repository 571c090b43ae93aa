"""Stage 4: one identity for what several blocks saw.

Reads
    ``<labels>/labels.zarr`` where padded blocks overlap; ``<labels>/objects``; ``<labels>/links`` if planes
    are stitched; ``<labels>/sizes`` if objects can be too large, or too small once they are put together.
Writes
    ``<labels>/pairs/<block>``: labels of a block and of a later neighbour that are one object, and
    ``<labels>/agreement/<block>``: how well it agreed with its later neighbours;
    ``<labels>/ids/<block>``: the global id of every local label; ``<labels>/objects-per-block``: a coarse picture
    of how many objects each block has; ``<labels>/stitch.json``.
Parallel over
    Blocks, then one merge. Its time grows with the number of objects, its memory with the links and
    with the labels in one slab of blocks (those of a frame that share their index along the first axis), not
    with the image or the number of objects; see `merge_memory`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Executor, peak_memory
from .grid import BlockGrid, Region, overlap, region_shape, shift
from .job import Job, has_size_limits
from .meters import meter, metered
from .progress import Progress
from .seams import Numbering, agreement, link, match_seam, node_index
from .store import Store

__all__ = ["match_block", "merge", "merge_blocks", "merge_memory", "process_block", "run"]

MIN_IOU = 0.5
PICTURE = "objects-per-block"
PICTURE_SIDE = 256
MAX_SIZE = 2**62
"""Pixels that no object has."""

BYTES_PER_LINK = 100
BYTES_PER_LABEL = 80
BYTES_PER_BLOCK = 400
BYTES_IN_ANY_CASE = 2**19

Pairs = npt.NDArray[np.int64]
Counts = npt.NDArray[np.float64]


@metered("match")
def process_block(
    low: npt.NDArray[np.uint32],
    high: npt.NDArray[np.uint32],
    cores: tuple[Region, Region],
    neighbour: int,
) -> tuple[Pairs, Counts]:
    """Pair the labels that two blocks gave the region both saw.

    Parameters
    ----------
    low, high : array of uint32, shape (*overlap)
        Labels of a block and of a later neighbour.
    cores : (tuple of slice, tuple of slice)
        Parts of the overlap in the core of the block and of the neighbour.
    neighbour : int
        Position of the neighbour in raster order.

    Returns
    -------
    pairs : array of int64, shape (n, 3)
        Label of the block, the neighbour, its label.
    counts : array of float64, shape (5,)
        How well the two agreed, see `seams.agreement`.
    """
    pairs, ious = match_seam(low, high, MIN_IOU)
    counts = agreement(low, high, (pairs, ious), *cores)
    return np.column_stack([pairs[:, 0], np.full(len(pairs), neighbour), pairs[:, 1]]).astype(np.int64), counts


def match_block(position: int, job: Job) -> dict[str, Any]:
    """Task: compare one block with its later neighbours."""
    grid, labels = job.blocks, job.store.open(f"{job.labels}/labels.zarr")
    block = grid.at(grid.index_of(position))
    is_empty = _is_empty(job, position)
    found, counts = [np.zeros((0, 3), np.int64)], np.zeros(5)
    if job.extent.is_stitched and not is_empty:
        links = job.store.load(f"{job.labels}/links/{position}").astype(np.int64)
        found.append(np.insert(links, 1, position, axis=1))
    for index in grid.later_neighbours(block.index):
        other, number = grid.at(index), grid.number(index)
        shared = overlap(block.padded, other.padded)
        # Where only one of them found anything there is no pair, but perhaps a label that is cut.
        if shared is None or (is_empty and _is_empty(job, number)):
            continue
        with meter("read"):
            low, high = (
                np.zeros(region_shape(shared), np.uint32)
                if _is_empty(job, at)
                else labels[(at, *shift(shared, tuple(p.start for p in of.padded)))]
                for at, of in ((position, block), (number, other))
            )
        pairs, agreed = process_block(low, high, _cores(shared, block.core, other.core), number)
        found.append(pairs)
        counts += agreed
    results = {"pairs": np.concatenate(found), "agreement": counts}
    job.store.save_all({f"{job.labels}/{name}/{position}": values for name, values in results.items()})
    return {"peak": peak_memory()}


def _is_empty(job: Job, position: int) -> bool:
    """Whether nothing was found in a block."""
    return job.store.view(f"{job.labels}/objects/{position}").size == 2


def _cores(shared: Region, low: Region, high: Region) -> tuple[Region, Region]:
    """The parts of the region that two neighbours share that lie in their cores, seen from its origin."""
    origin = tuple(p.start for p in shared)
    parts = [
        tuple(slice(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(shared, core, strict=True))
        for core in (low, high)
    ]
    return shift(parts[0], origin), shift(parts[1], origin)


@metered("merge")
def merge(_: int, job: Job) -> dict[str, Any]:
    """Task: link all pairs and number the objects; done again from the start if it was interrupted."""
    masks = job.settings.masks
    min_size = masks.min_size if job.extent.is_stitched else 0
    limits = (min_size, masks.max_size or MAX_SIZE) if has_size_limits(job) else None
    facts = merge_blocks(job.store, job.labels, job.blocks, limits)
    return {"facts": facts, "peak": peak_memory()}


def merge_blocks(store: Store, folder: str, grid: BlockGrid, limits: tuple[int, int] | None = None) -> dict[str, Any]:
    """Link the pairs of all blocks and number the objects slab by slab.

    Parameters
    ----------
    store : Store
        The scratch.
    folder : str
        Folder of it that holds ``objects``, ``pairs`` and ``agreement`` of every block, and gets ``ids``.
    grid : BlockGrid
        The blocks.
    limits : (int, int), optional
        Objects of fewer or more pixels get no number. The pixels of each are in the folder's ``sizes`` then.

    Returns
    -------
    facts : dict
        ``n_objects``, ``n_too_large``, ``n_cut_by_halo``, ``n_blocks``, ``n_skipped_blocks``, ``n_pairs``,
        ``n_exact_pairs``, ``mean_iou``, ``n_seam``, ``n_seam_linked``; see `report.Report`. ``per_block``: what the
        folder's ``objects-per-block`` shows, see `report.Report`.
    """
    n_blocks = grid.n_blocks
    offsets, n_cut, n_skipped = _count(store, folder, n_blocks)
    links, counts = _links(store, folder, offsets)
    linked, objects = link(links, int(offsets[-1]))
    del links
    limit = None if limits is None else _SizeLimits(store, folder, offsets, (linked, objects), limits)
    numbering = Numbering(linked, objects)
    per_slab = n_blocks // grid.n_slabs
    picture = _Picture(grid)
    for start in range(0, n_blocks, per_slab):
        slab = range(start, start + per_slab)
        first = np.concatenate([store.load(f"{folder}/objects/{position}")[2:] for position in slab])
        if limit is not None:
            first[limit.exclude(slab)] = -1
        ids = numbering.take(first)
        parts = np.split(ids, offsets[start + 1 : start + per_slab] - offsets[start])
        store.save_all({f"{folder}/ids/{position}": part for position, part in zip(slab, parts, strict=True)})
        for position, part in zip(slab, parts, strict=True):
            picture.add(position, part)
    store.save(f"{folder}/{PICTURE}", picture.counts)
    n_pairs, n_exact, sum_iou, n_seam, n_seam_linked = counts.tolist()
    return {
        "n_objects": numbering.n_objects,
        "n_too_large": 0 if limit is None else limit.n_too_large,
        "n_cut_by_halo": n_cut,
        "n_blocks": n_blocks,
        "n_skipped_blocks": n_skipped,
        "n_pairs": int(n_pairs),
        "n_exact_pairs": int(n_exact),
        "mean_iou": sum_iou / n_pairs if n_pairs else 1.0,
        "n_seam": int(n_seam),
        "n_seam_linked": int(n_seam_linked),
        "per_block": picture.facts(),
    }


class _Picture:
    """How many objects reach into each block, blocks beside each other put together where there are many, and blocks
    of all frames and planes: a picture of at most 256 x 256 elements."""

    def __init__(self, grid: BlockGrid) -> None:
        self._counts = grid.counts
        self._together = tuple(-(-n // PICTURE_SIDE) for n in grid.counts[-2:])
        shape = tuple(-(-n // k) for n, k in zip(grid.counts[-2:], self._together, strict=True))
        self.counts = np.zeros(shape, np.int64)
        self._fewest, self._most = MAX_SIZE, 0

    def add(self, position: int, ids: npt.NDArray[np.uint32]) -> None:
        """Count the objects of a block by the ids of its labels, of which several may be one object."""
        ids = np.sort(ids)  # several times as fast as np.unique
        n = int(np.count_nonzero(ids[1:] != ids[:-1])) + int((ids[:1] > 0).sum())
        index = np.unravel_index(position, self._counts)[-2:]
        row, column = (int(i) // k for i, k in zip(index, self._together, strict=True))
        self.counts[row, column] += n
        self._fewest, self._most = min(self._fewest, n), max(self._most, n)

    def facts(self) -> dict[str, Any]:
        """What the picture shows."""
        together = [*self._counts[:-2], *self._together]
        return {"fewest": self._fewest, "most": self._most, "blocks": list(self._counts), "together": together}


class _SizeLimits:
    """Which objects are too large or too small: pixels of their parts in all blocks count together.

    Memory grows with the links, not with the objects.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        offsets: Pairs,
        links: tuple[Pairs, npt.NDArray[np.int32]],
        limits: tuple[int, int],
    ) -> None:
        self._store, self._folder, self._offsets = store, folder, offsets
        self._linked, self._objects = links
        self._smallest, self._largest = limits
        self._sizes = np.zeros(int(self._objects.max(initial=-1)) + 1, np.int64)
        for position in range(offsets.size - 1):
            nodes, objects = self._linked_in(position, position + 1)
            if nodes.size:
                np.add.at(self._sizes, objects, self._sizes_of(position)[nodes])
        self.n_too_large = int((self._sizes > self._largest).sum())

    def exclude(self, slab: range) -> npt.NDArray[np.bool_]:
        """Whether each label of some successive blocks belongs to an object that is too large or too small."""
        sizes = np.concatenate([self._sizes_of(position) for position in slab])
        nodes, objects = self._linked_in(slab.start, slab.stop)
        is_alone = np.ones(sizes.size, np.bool_)
        is_alone[nodes] = False
        self.n_too_large += int((sizes[is_alone] > self._largest).sum())
        sizes[nodes] = self._sizes[objects]
        is_excluded: npt.NDArray[np.bool_] = (sizes > self._largest) | (sizes < self._smallest)
        return is_excluded

    def _sizes_of(self, position: int) -> Pairs:
        """Pixels of each label of a block in its core."""
        if self._offsets[position + 1] == self._offsets[position]:
            return np.zeros(0, np.int64)
        return self._store.load(f"{self._folder}/sizes/{position}")

    def _linked_in(self, start: int, stop: int) -> tuple[Pairs, npt.NDArray[np.int32]]:
        """The linked labels of some blocks, counted from the first of them, and their objects."""
        first = self._offsets[start]
        low, high = np.searchsorted(self._linked, [first, self._offsets[stop]])
        return self._linked[low:high] - first, self._objects[low:high]


def _count(store: Store, folder: str, n_blocks: int) -> tuple[Pairs, int, int]:
    """Labels in all blocks before each and in all; objects that were cut; blocks that were skipped."""
    offsets = np.zeros(n_blocks + 1, np.int64)
    n_cut = n_skipped = 0
    for position in range(n_blocks):
        objects = store.view(f"{folder}/objects/{position}")
        offsets[position + 1] = offsets[position] + objects.size - 2
        n_cut += int(objects[0])
        n_skipped += int(objects[1])
    return offsets, n_cut, n_skipped


def _links(store: Store, folder: str, offsets: Pairs) -> tuple[Pairs, Counts]:
    """Pairs of nodes of all blocks, and how well the blocks agreed."""
    links, counts = [np.zeros((0, 2), np.int64)], np.zeros(5)
    for position in range(offsets.size - 1):
        pairs = store.load(f"{folder}/pairs/{position}")
        counts += store.load(f"{folder}/agreement/{position}")
        if len(pairs):
            here = node_index(offsets, position, pairs[:, 0])
            links.append(np.column_stack([here, node_index(offsets, pairs[:, 1], pairs[:, 2])]))
    return np.concatenate(links), counts


def merge_memory(n_labels: int, n_links: int, n_blocks: int) -> int:
    """Memory that a merge needs at most, besides what a process has with everything imported.

    Parameters
    ----------
    n_labels : int
        Local labels in the fullest slab: the blocks that share their index along the first axis.
    n_links : int
        Pairs of labels of neighbouring blocks that are one object, in the whole image.
    n_blocks : int
        Blocks of the image.

    Returns
    -------
    mem_bytes : int

    Notes
    -----
    The factors are measured ones with a margin (``scripts/bench/stitch.py``, tests/test_stitch.py).
    Below some MiB what a process takes varies by more than this.
    """
    by_size = BYTES_PER_LINK * n_links + BYTES_PER_LABEL * n_labels + BYTES_PER_BLOCK * n_blocks
    return BYTES_IN_ANY_CASE + by_size


def run(job: Job, executor: Executor, progress: Progress) -> dict[str, Any]:
    """Stitch the blocks; returns counts of objects, blocks, cut objects, pairs and how blocks agreed."""
    n_blocks = job.blocks.n_blocks
    stage = f"{job.labels}/seams"
    done = job.store.done(stage)
    known = job.store.read_json(f"{job.labels}/stitch.json")
    progress.start("stitch", n_blocks + 1, len(done) + (known is not None))
    todo = (position for position in range(n_blocks) if position not in done)
    where = functools.partial(job.blocks.text, job.extent.axes)
    for position, record in executor.stream(match_block, todo, job, name="stitch", where=where):
        job.store.mark(stage, [position])
        progress.step(record["peak"])
    if known is None:
        for _, record in executor.stream(merge, [0], job, name="merge", where=lambda _: "of all blocks"):
            known = record["facts"]
            job.store.write_json(f"{job.labels}/stitch.json", known)
            progress.step(record["peak"])
    return dict(known or {})
