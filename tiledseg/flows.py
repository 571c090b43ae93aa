"""Stage 2: the network, every tile once.

Reads
    The image on the working grid, the survey.
Writes
    ``flows.zarr``: for each orientation of the planes that the network sees (one in a picture, three in a
    volume) and each chunk of its lattice the weighted sum of its tiles, in float16: flow along both axes of
    the plane, then the cell logit above its floor. 0 means "nothing here"; a chunk in which nothing was
    computed is stored all the same, so that one that is lost is not taken for it.
Parallel over
    Chunks of the lattices, of all frames.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from .blend import add_tiles, cleared, cut_tiles, load_kernels
from .cluster import Executor, peak_memory
from .cores import CORES
from .frames import frame_region
from .grid import Index, Lattice, Region, enclosing, region_shape, region_text, shift
from .job import CELLPROB_FLOOR, N_OUTPUTS, Job, Sheet
from .meters import meter, metered, note
from .networks.batches import shortage_text
from .networks.models import Model
from .networks.runner import as_float16, load_network
from .progress import Progress
from .reach import Reach
from .store import Store
from .tasks import Tasks
from .working import pixels_to_read, read_tile

__all__ = [
    "PIXELS_AT_ONCE",
    "begin_loading",
    "compute_chunk",
    "group_shape",
    "n_inexact_tiles",
    "process_block",
    "run",
    "tasks_of",
]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
Batch = tuple[list[Index], FloatArray]
"""Tiles, and what the network gives for them, shape (n, 3, b, b)."""

PIXELS_AT_ONCE = 2**22
"""Of a level of the image, times inputs, that are read at once for some tiles of a chunk."""
TILES_AT_ONCE = 64
"""Of a volume, that are worked on together."""
SHORTAGE = "shortage.json"
"""What there is to say of batches that were halved."""


def begin_loading(model: Model, device: str) -> None:
    """Load network and kernels beside what else this process does; what goes wrong is said to whoever needs them."""
    loader = ThreadPoolExecutor(1, "tiledseg-load")
    loader.submit(load_network, model, device)
    loader.submit(load_kernels)
    loader.shutdown(wait=False)


@metered("blend")
def process_block(outputs: Iterable[Batch], lattice: Lattice, piece: Region) -> npt.NDArray[np.float16]:
    """Blend the network's output on some tiles.

    Parameters
    ----------
    outputs : iterable of (list of tile index, array of float32, shape (n, 3, b, b))
        Tiles in raster order of each plane, and for each the unit flow along both axes of its plane and the cell
        logit; tiles left out count as background.
    lattice : Lattice
        The lattice the tiles belong to.
    piece : tuple of slice
        The part of the working grid that is wanted; holds the tiles.

    Returns
    -------
    blended : array of float16, shape (3, *piece)
        The tiles' share of the blend, the logit above its floor.
    """
    thin = lattice.thin
    # Planes lie one after the other, whichever axis is across them.
    n_planes = 1 if thin is None else region_shape(piece)[thin]
    blended = cleared((N_OUTPUTS, n_planes, *lattice.along_plane(region_shape(piece))))
    for tiles, found in outputs:
        weights = [lattice.along_plane(lattice.weights(tile)) for tile in tiles]
        rows, columns = (np.stack(of) for of in zip(*weights, strict=True))
        add_tiles(found, _places(lattice, tiles, piece), rows, columns, np.float32(CELLPROB_FLOOR), blended)
    halved = as_float16(blended)
    return halved[:, 0] if thin is None else np.moveaxis(halved, 1, 1 + thin)


def _places(lattice: Lattice, tiles: Sequence[Index], region: Region) -> npt.NDArray[np.int64]:
    """Plane, top and left of some tiles in a region, shape (n, 3)."""
    origin, places = tuple(p.start for p in region), []
    for tile in tiles:
        corner = tuple(p.start for p in shift(lattice.tile_region(tile), origin))
        places.append((0 if lattice.thin is None else corner[lattice.thin], *lattice.along_plane(corner)))
    return np.array(places, np.int64)


def compute_chunk(number: int, job: Job) -> dict[str, Any]:
    """Task: run the network on the tiles of one chunk and store the piece."""
    sheet, index = Reach(job).chunk(number)
    lattice, working = sheet.lattice, job.working(sheet.moment)
    frame, chunk = sheet.frame_of(index[: len(sheet.frames)]), index[len(sheet.frames) :]
    tiles = lattice.tiles_of(chunk)
    in_image = [working.region_in_image(lattice.tile_region(tile)) for tile in tiles]
    seen = job.may_hold_cells([frame_region(frame, region) for region in in_image])
    wanted = list(itertools.compress(tiles, seen))
    whole, shape = lattice.piece_region(chunk), (N_OUTPUTS, *lattice.piece_shape)
    piece: npt.NDArray[np.float16] | None = None
    for group in _groups(lattice, wanted) if wanted else ():
        part = _planes_of(lattice, whole, group)
        blended = process_block(_predict(job, sheet, frame, group), lattice, part)
        if part == whole:
            piece = blended
        else:
            piece = cleared(shape, np.float16) if piece is None else piece
            piece[(slice(None), *shift(part, tuple(p.start for p in whole)))] = blended
    with meter("write"):
        job.store.open(sheet.name)[index] = cleared(shape, np.float16) if piece is None else piece
    note("n_tiles", len(wanted))
    note("n_skipped_tiles", len(tiles) - len(wanted))
    shortage = load_network(job.model, job.device).shortage if wanted else None
    return {"n_tiles": len(wanted), "shortage": shortage, "peak": peak_memory()}


def _planes_together(lattice: Lattice) -> int:
    """Planes of a volume that are worked on together."""
    return max(1, TILES_AT_ONCE // math.prod(lattice.along_plane(lattice.chunk_tiles)))


def group_shape(lattice: Lattice) -> Index:
    """Working pixels of the tiles that are worked on together, along each axis, at most."""
    n = _planes_together(lattice)
    return tuple(min(n, side) if axis == lattice.thin else side for axis, side in enumerate(lattice.piece_shape))


def _groups(lattice: Lattice, tiles: list[Index]) -> Iterator[list[Index]]:
    """Tiles that are worked on together: all of a picture; of a volume those of a few planes, to bound the memory."""
    thin = lattice.thin
    if thin is None:
        yield tiles
        return
    n_together = _planes_together(lattice)
    by_plane = sorted(tiles, key=lambda tile: tile[thin])
    for _, group in itertools.groupby(by_plane, key=lambda tile: tile[thin] // n_together):
        yield list(group)


def _planes_of(lattice: Lattice, piece: Region, tiles: list[Index]) -> Region:
    """The part of a piece between the first and last plane of some tiles."""
    if lattice.thin is None:
        return piece
    planes = [tile[lattice.thin] for tile in tiles]
    here = slice(min(planes), max(planes) + 1)
    return tuple(here if axis == lattice.thin else p for axis, p in enumerate(piece))


def _predict(job: Job, sheet: Sheet, frame: Index, tiles: list[Index]) -> list[Batch]:
    """The network's output on some tiles, batch by batch."""
    lattice, model = sheet.lattice, job.model
    network = load_network(model, job.device)
    fill = _reader(job, sheet, frame, tiles)
    is_mirrored = job.settings.flows.augment

    def start(batch: list[Index]) -> Callable[[], tuple[FloatArray, FloatArray]]:
        inputs = cleared((len(batch), model.n_channels, lattice.tile, lattice.tile))
        fill(batch, inputs)
        if is_mirrored:
            _mirror(inputs, batch, lattice)
        return network.start(inputs)

    batches = [tiles[start : start + network.batch] for start in range(0, len(tiles), network.batch)]
    outputs = []
    # All batches are started before the first is waited for: a GPU computes while the next one is read.
    for batch, finish in zip(batches, CORES.run(start, batches), strict=True):
        found = finish()[0]
        if is_mirrored:
            _mirror(found, batch, lattice)
            for output, tile in zip(found, batch, strict=True):
                # The flow along an axis that is turned round turns with it.
                output[[axis for axis, i in enumerate(lattice.along_plane(tile)) if i % 2]] *= -1
        outputs.append((batch, found))
    return outputs


def _mirror(values: FloatArray, tiles: list[Index], lattice: Lattice) -> None:
    """Mirror the channels of each tile along the axes on which its index is odd."""
    for tile, of in zip(values, tiles, strict=True):
        in_plane = lattice.along_plane(of)
        tile[:] = np.flip(tile, tuple(axis - len(in_plane) for axis, i in enumerate(in_plane) if i % 2)).copy()


def _reader(job: Job, sheet: Sheet, frame: Index, tiles: list[Index]) -> Callable[[list[Index], FloatArray], None]:
    """Fills in the normalised pixels of some tiles of a chunk, read together where that is not too much: tiles
    overlap, and storage chunks are larger than tiles."""
    lattice, working = sheet.lattice, job.working(sheet.moment)
    shown = job.shown(sheet.moment)
    around = enclosing([lattice.tile_region(tile) for tile in tiles])

    def read(region: Region) -> FloatArray:
        return read_tile(job.image, shown, working, frame, region)

    def fill_each(batch: list[Index], inputs: FloatArray) -> None:
        for values, tile in zip(inputs, batch, strict=True):
            values[: len(shown)] = read(lattice.tile_region(tile)).reshape(-1, lattice.tile, lattice.tile)

    if len(shown) * math.prod(pixels_to_read(job.image, working, region_shape(around))) > PIXELS_AT_ONCE:
        return fill_each
    whole = read(around)
    planes = np.ascontiguousarray(whole[:, None] if lattice.thin is None else np.moveaxis(whole, 1 + lattice.thin, 1))
    return lambda batch, inputs: cut_tiles(planes, _places(lattice, batch, around), inputs)


def _where(job: Job, number: int) -> str:
    """A chunk, and what it covers of the image."""
    sheet, index = Reach(job).chunk(number)
    n = len(sheet.frames)
    inside = job.working(sheet.moment).region_in_image(sheet.lattice.piece_region(index[n:]))
    region = region_text(job.extent.axes, frame_region(sheet.frame_of(index[:n]), inside))
    return f"chunk {index} of {sheet.name.removeprefix('flows.zarr/')} at {region}"


def tasks_of(job: Job, progress: Progress) -> Tasks:
    """The chunks that are missing."""
    n_chunks = 0
    for sheet in job.sheets:
        ones = (1,) * len(sheet.chunk_counts)
        job.store.create(sheet.name, sheet.array_shape, (*ones, N_OUTPUTS, *sheet.lattice.piece_shape), "float16")
        n_chunks += math.prod(sheet.chunk_counts)
    done = job.store.done("flows")

    def took(number: int, record: dict[str, Any]) -> None:
        job.store.mark("flows", [number])
        _note_shortage(job, record["shortage"], record["n_tiles"])
        progress.step(record["peak"], "flows")

    return Tasks(
        "flows",
        compute_chunk,
        (number for number in range(n_chunks) if number not in done),
        (job,),
        kind="network",
        claims=job.device != "cpu",
        where=lambda number: _where(job, number),
        begin=lambda: progress.start("flows", n_chunks, len(done)),
        took=took,
    )


def run(job: Job, executor: Executor, progress: Progress) -> None:
    """Compute the chunks that are missing."""
    executor.work(tasks_of(job, progress))


def _note_shortage(job: Job, shortage: tuple[int, bool] | None, n_tiles: int) -> None:
    """Say once that batches went through a network in parts, and keep count of tiles that may not be exact."""
    if shortage is None:
        return
    noted = job.store.read_json(SHORTAGE) or {"said": [], "n_inexact_tiles": 0}
    text = shortage_text(*shortage)
    if text not in noted["said"]:
        logger.warning(text)
        noted["said"].append(text)
    elif shortage[1]:
        return
    noted["n_inexact_tiles"] += 0 if shortage[1] else n_tiles
    job.store.write_json(SHORTAGE, noted)


def n_inexact_tiles(store: Store) -> int:
    """Tiles of the flows that were computed in halved batches and might differ in their last bits."""
    return int((store.read_json(SHORTAGE) or {"n_inexact_tiles": 0})["n_inexact_tiles"])
