"""How far blocks of the masks reach into the flows, and in which order both are done so that they overlap.

The network fills GPUs while masks fill the other cores, so a block should be labelled as soon as the flows
under it are there. Chunks are therefore done in the order of the blocks that need them, and a block is let go
when the last chunk is done that its largest halo meets: with an automatic halo it may grow.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np

from .grid import Block, Index, Region, WorkingGrid
from .job import Job, Sheet
from .tasks import Tasks

__all__ = ["SMOOTHING_REACH", "Order", "Reach", "grown_blocks", "in_order", "smoothing", "smoothing_reach"]

HALO_GROWTHS = (1, 2, 4)
SMOOTHING_REACH = 4.0
"""Standard deviations after which a Gaussian ends."""
NEAREST = 2
"""Working pixels beside a position that its value may come from, and one to spare."""


def grown_blocks(job: Job, block: Block) -> Iterator[Block]:
    """The block with its halo, then with larger ones if the halo is automatic."""
    grid = job.blocks
    for growth in HALO_GROWTHS if job.settings.masks.halo == "auto" else HALO_GROWTHS[:1]:
        grown = grid.around(block.index, block.core, tuple(h * growth for h in grid.halo))
        n = job.extent.n_flow_frames
        # Of planes that are stitched each is looked at by itself.
        yield Block(block.index, (*block.core[:n], *grown.core[n:]), (*block.core[:n], *grown.padded[n:]))


def smoothing(job: Job) -> float:
    """Standard deviation of what flows are smoothed with."""
    return job.settings.masks.flow3d_smooth if len(job.extent.flows) == 3 else 0.0


def smoothing_reach(sigma: float) -> int:
    """Pixels round a place that its smoothed flow depends on."""
    return int(SMOOTHING_REACH * sigma + 0.5)


class Reach:
    """The chunks of the flows, numbered through all sheets, and those under a block.

    Parameters
    ----------
    job : Job
        After the survey.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._grid, self._n = job, job.blocks, job.extent.n_flow_frames
        self._sheets = job.sheets
        self._first = np.cumsum([0, *(math.prod(sheet.chunk_counts) for sheet in self._sheets)]).tolist()
        self._workings = [job.working(moment) for moment in range(len(job.found.moments))]

    @property
    def n_chunks(self) -> int:
        """Chunks of all sheets."""
        return int(self._first[-1])

    def chunk(self, number: int) -> tuple[Sheet, Index]:
        """The sheet that a chunk is in, and its index in the array."""
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        sheet = self._sheets[which]
        return sheet, tuple(int(i) for i in np.unravel_index(number - self._first[which], sheet.chunk_counts))

    def chunks_under(self, number: int) -> set[int]:
        """Chunks that the masks of a block may read."""
        return self.under(self._grid.at(self._grid.index_of(number)))

    def under(self, block: Block) -> set[int]:
        """The same of any block, also one that is not of the grid."""
        found = set()
        *_, largest = grown_blocks(self._job, block)
        # Planes of the halo are read as well where planes are stitched.
        for frame in itertools.product(*(range(p.start, p.stop) for p in block.padded[: self._n])):
            moment = self._job.moment_of(frame)
            region = self._in_working(self._workings[moment], largest.padded[self._n :])
            for first, sheet in zip(self._first, self._sheets, strict=False):
                if sheet.moment == moment:
                    at = sheet.index_of(frame)
                    chunks = sheet.lattice.chunks_meeting(region)
                    found |= {first + int(np.ravel_multi_index((*at, *c), sheet.chunk_counts)) for c in chunks}
        return found

    def _in_working(self, working: WorkingGrid, region: Region) -> Region:
        """Working pixels that a region of level 0 is made from, and a few more."""
        parts = []
        for part, scale, n in zip(region, working.scale, working.shape, strict=True):
            # Flows are smoothed on the grid that they are followed on.
            reach = smoothing_reach(smoothing(self._job)) * (scale if self._job.settings.masks.resample else 1.0)
            low = math.floor(part.start * scale - reach) - NEAREST
            high = math.ceil(part.stop * scale + reach) + NEAREST
            parts.append(slice(min(max(0, low), n - 1), max(1, min(high, n))))
        return tuple(parts)


class Order:
    """Which chunk comes next, and which blocks wait for none any more.

    Memory grows with the blocks that wait for chunks in flight, and by one byte for every chunk.

    Parameters
    ----------
    n_chunks : int
    missing : iterable of int
        Chunks that are to be done.
    blocks : collection of int
        Blocks that are to be done.
    chunks_under : callable
        Chunks that a block needs.
    """

    def __init__(
        self, n_chunks: int, missing: Iterable[int], blocks: Iterable[int], chunks_under: Callable[[int], set[int]]
    ) -> None:
        self._is_missing, self._is_due = bytearray(n_chunks), bytearray(n_chunks)
        self._n_missing = 0
        for chunk in missing:
            self._is_missing[chunk] = self._is_due[chunk] = 1
            self._n_missing += 1
        self._blocks, self._chunks_under = iter(blocks), chunks_under
        self._ready: deque[int] = deque()
        self._waits: dict[int, set[int]] = {}
        self._needed_by: dict[int, list[int]] = {}

    def chunks(self) -> Iterator[int]:
        """The missing chunks, in the order of the blocks that need them; in the end those that none needs."""
        while self._n_missing and (block := next(self._blocks, None)) is not None:
            yield from self._due(sorted(self._visit(block)))
        yield from self._due(range(len(self._is_due)))

    def _due(self, chunks: Iterable[int]) -> Iterator[int]:
        """Those of some chunks that did not have their turn yet."""
        for chunk in chunks:
            if self._is_due[chunk]:
                self._is_due[chunk] = 0
                yield chunk

    def _visit(self, block: int) -> Collection[int]:
        """Let a block wait for its missing chunks; returns these."""
        missing = {chunk for chunk in self._chunks_under(block) if self._is_missing[chunk]}
        if missing:
            self._waits[block] = missing
            for chunk in missing:
                self._needed_by.setdefault(chunk, []).append(block)
        else:
            self._ready.append(block)
        return missing

    def done(self, chunk: int) -> None:
        """A chunk is stored."""
        self._n_missing -= self._is_missing[chunk]
        self._is_missing[chunk] = 0
        for block in self._needed_by.pop(chunk, ()):
            self._waits[block].discard(chunk)
            if not self._waits[block]:
                del self._waits[block]
                self._ready.append(block)

    def blocks(self) -> Iterator[int | None]:
        """The blocks in the order in which they may be done, None where none may yet."""
        while True:
            if self._ready:
                yield self._ready.popleft()
            elif self._n_missing:
                yield None
            elif (block := next(self._blocks, None)) is not None:
                yield block
            else:
                return


def in_order(job: Job, flows: Tasks, masks: Tasks) -> tuple[Tasks, Tasks]:
    """The tasks of both stages, so that blocks follow the chunks under them.

    Parameters
    ----------
    job : Job
        After the survey.
    flows, masks : Tasks
        Their items are numbers of chunks and blocks.
    """
    reach = Reach(job)
    order = Order(reach.n_chunks, flows.items, masks.items, reach.chunks_under)

    def took(chunk: int, record: dict[str, object]) -> None:
        flows.took(chunk, record)
        order.done(chunk)

    return dataclasses.replace(flows, items=order.chunks(), took=took), dataclasses.replace(masks, items=order.blocks())
