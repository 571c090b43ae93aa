"""Stage 2: the network, every tile once.

Reads
    The image on the working grid, the survey.
Writes
    ``flows.zarr``: per chunk of the lattice the weighted sum of its tiles, in float16: flow along
    each axis, then the cell logit above its floor. 0 means "nothing here", so a chunk in which
    nothing was computed need not be stored.
Parallel over
    Chunks of the lattice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import Executor, peak_memory
from .cores import CORES
from .grid import Index, Lattice, Region, enclosing, region_shape, shift
from .job import CELLPROB_FLOOR, Job
from .networks.runner import load_network
from .progress import Progress
from .working import pixels_to_read, read_tile

__all__ = ["PIXELS_AT_ONCE", "compute_chunk", "process_block", "run"]

FloatArray = npt.NDArray[np.float32]

PIXELS_AT_ONCE = 2**22
"""Of a level of the image, times inputs, that are read at once for the tiles of a chunk."""


def process_block(outputs: dict[Index, FloatArray], lattice: Lattice, chunk: Index) -> npt.NDArray[np.float16]:
    """Blend the network's output on the tiles of one chunk.

    Parameters
    ----------
    outputs : dict of tile index to array of float32, shape (ndim + 1, b, b)
        Unit flow per axis and cell logit; tiles left out count as background.
    lattice : Lattice
        The lattice the tiles belong to.
    chunk : tuple of int
        Index of the chunk.

    Returns
    -------
    piece : array of float16, shape (ndim + 1, *lattice.piece_shape)
        The chunk's share of the blend.
    """
    n = len(chunk) + 1
    piece = np.zeros((n, *lattice.piece_shape), np.float32)
    origin = tuple(p.start for p in lattice.piece_region(chunk))
    for tile in sorted(outputs):
        output = outputs[tile].copy()
        output[-1] = np.maximum(output[-1], CELLPROB_FLOOR) - CELLPROB_FLOOR
        for axis, weights in enumerate(lattice.weights(tile)):
            output *= weights.reshape((-1,) + (1,) * (len(chunk) - 1 - axis))
        where = tuple(slice(p.start - o, p.stop - o) for p, o in zip(lattice.tile_region(tile), origin, strict=True))
        piece[(slice(None), *where)] += output
    return piece.astype(np.float16)


def compute_chunk(number: int, job: Job) -> dict[str, Any]:
    """Task: run the network on the tiles of one chunk and store the piece."""
    lattice, working = job.lattice, job.working
    chunk = tuple(int(i) for i in np.unravel_index(number, lattice.chunk_counts))
    tiles = lattice.tiles_of(chunk)
    seen = job.may_hold_cells([working.region_in_image(lattice.tile_region(tile)) for tile in tiles])
    wanted = list(itertools.compress(tiles, seen))
    if wanted:
        network = load_network(job.model, job.device)
        read = _reader(job, wanted)

        def predict(batch: list[Index]) -> FloatArray:
            inputs = np.zeros((len(batch), job.model.n_channels, lattice.tile, lattice.tile), np.float32)
            is_mirrored = job.settings.flows.augment
            for values, tile in zip(inputs, batch, strict=True):
                shown = read(lattice.tile_region(tile))
                values[: len(shown)] = _mirrored(shown, tile) if is_mirrored else shown
            predicted = network.predict(inputs)[0]
            if is_mirrored:
                for output, tile in zip(predicted, batch, strict=True):
                    output[:] = _mirrored(output, tile)
                    # The flow along an axis that is turned round turns with it.
                    output[[axis for axis, i in enumerate(tile) if i % 2]] *= -1
            return predicted

        batches = [wanted[start : start + network.batch] for start in range(0, len(wanted), network.batch)]
        outputs: dict[Index, FloatArray] = {}
        for batch, found in zip(batches, CORES.run(predict, batches), strict=True):
            outputs.update(zip(batch, found, strict=True))
        job.store.open("flows.zarr")[chunk] = process_block(outputs, lattice, chunk)
    return {"n_tiles": len(wanted), "n_skipped": len(tiles) - len(wanted), "peak": peak_memory()}


def _mirrored(values: FloatArray, tile: Index) -> FloatArray:
    """Channels of a tile mirrored along the axes on which its index is odd."""
    return np.flip(values, tuple(axis - len(tile) for axis, i in enumerate(tile) if i % 2))


def _reader(job: Job, tiles: list[Index]) -> Callable[[Region], FloatArray]:
    """Gives the normalised pixels of some tiles of a chunk, read together where that is not too much: tiles
    overlap, and storage chunks are larger than tiles."""
    lattice, working = job.lattice, job.working
    shown = job.shown
    around = enclosing([lattice.tile_region(tile) for tile in tiles])

    def read(region: Region) -> FloatArray:
        return read_tile(job.image, shown, working, region)

    if len(shown) * math.prod(pixels_to_read(job.image, working, region_shape(around))) > PIXELS_AT_ONCE:
        return read
    whole, origin = read(around), tuple(p.start for p in around)
    return lambda region: whole[(slice(None), *shift(region, origin))]


def run(job: Job, executor: Executor, progress: Progress) -> dict[str, int]:
    """Compute the chunks that are missing; returns how many tiles were computed and skipped now."""
    lattice = job.lattice
    n = len(job.shape) + 1
    ones = (1,) * len(lattice.chunk_counts)
    job.store.create(
        "flows.zarr",
        (*lattice.chunk_counts, n, *lattice.piece_shape),
        (*ones, n, *lattice.piece_shape),
        "float16",
    )
    n_chunks = math.prod(lattice.chunk_counts)
    done = job.store.done("flows")
    progress.start("flows", n_chunks, len(done))
    totals = {"n_tiles": 0, "n_skipped": 0}
    todo = (number for number in range(n_chunks) if number not in done)
    for number, record in executor.stream(compute_chunk, todo, job):
        job.store.mark("flows", [number])
        totals = {key: totals[key] + record[key] for key in totals}
        progress.step(record["peak"])
    return totals
