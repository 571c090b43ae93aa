"""Images of other formats out as OME-Zarr: copied piece by piece, then a pyramid, and last the metadata.

Reads
    Any image that `images.open_image` opens.
Writes
    Its levels; beside the output a folder ``OUT.unfinished`` with marks of what is done, which goes at the end. Until
    then the output is no image: its metadata are written last.
Parallel over
    Pieces of whole files, see `pieces`; a level begins when the one before is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cluster import Executor, connect, peak_memory
from .config import ConvertConfig, digest
from .errors import OutputError, SettingsError
from .frames import label_axes, refuse_missing
from .grid import region_text
from .images import Image, open_image
from .lock import locked
from .meters import meter
from .omezarr import ImagePlan, create_image, finer_region, finish_image, image_level, shrink
from .omezarr.groups import check_writable, is_zarr
from .pieces import Pieces, calibrated, pieces_of_level, pieces_of_source, plan_of
from .progress import Listener, Progress
from .remote import Location, location, remove_tree
from .store import DiskStore

__all__ = ["Conversion", "convert"]

logger = logging.getLogger(__name__)

RECORD = "run.json"
FORMAT = 1
"""Of the marks; another number means that what is there cannot be continued."""
FEW_PIECES = 8
"""So few are done in this process."""
SAMPLED_CHUNKS = 64
"""Per channel, for the values that viewers show as black and white."""
SAMPLED_PIXELS = 2**14
"""Per chunk."""
SHOWN = 0.1, 99.9
"""Percentiles that viewers show as black and white."""
COLOURS = ("red", "green", "blue")
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes
    ----------
    path : Path or RemotePath
        The OME-Zarr.
    seconds : float
        From opening the image to the end.
    n_pieces, n_kept : int
        Pieces of all levels, and those that an earlier call had done.
    peak_memory : int
        Sum over processes of the most bytes each had resident.
    """

    path: Location
    seconds: float
    n_pieces: int
    n_kept: int
    peak_memory: int

    @property
    def image(self) -> Image:
        """The OME-Zarr, opened."""
        return open_image(str(self.path))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**facts, "path": str(self.path), "image": self.image.describe()}


@dataclass(frozen=True)
class _Work:
    """What every task is given."""

    image: Image
    plan: ImagePlan
    missing_chunks: str

    def pieces(self, level: int) -> Pieces:
        """Of a level."""
        return pieces_of_level(self.plan, level) if level else pieces_of_source(self.image, self.plan)


def convert(
    source: Any,
    output: str | os.PathLike[str],
    *,
    axes: str | None = None,
    overwrite: bool = False,
    client: Any = None,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> Conversion:
    """Write an image as OME-Zarr with a pyramid.

    Parameters
    ----------
    source : path, address, zarr.Array, dask array or numpy array
        What `segment` takes as well: TIFF, OME-TIFF, many TIFFs as a pattern (``"planes/img_{z}.tif"``), a whole
        slide, HDF5 (``"images.h5/raw"``), N5, Zarr.
    output : path or address
        Of the OME-Zarr, also on ``s3://``. What is there is refused, unless it is an unfinished conversion of the
        same image, which is continued; one of an array in memory starts again.
    axes : str, optional
        Axes of an array that does not say them.
    overwrite : bool
        Replace the Zarr that is there.
    client, scheduler, workers
        Who works, as for `segment`.
    progress : callable, optional
        Called with stage, pieces done, pieces in all.
    **settings
        As on the command line, e.g. ``ome_version="0.4"``, ``shard=8192``; see `tiledseg.config.ConvertConfig`.

    Returns
    -------
    Conversion

    Raises
    ------
    TiledsegError
        One sentence that says what is wrong, where, and what to do. What is done is kept: the same call continues.

    Notes
    -----
    Level 0 has the pixels of the source, bit for bit, in its dtype. Levels below it are made anew, also where the
    source has some: y and x are halved until both fit into one chunk; z as well from the level on at which pixels are
    as wide as planes are thick, while there are more than 64 planes. Sizes are rounded up; at an odd end the last
    pixel counts twice. Means of integers are rounded half to even. Chunks have checksums (0.5).
    """
    began = time.monotonic()
    config = ConvertConfig.of(**settings)
    image = calibrated(open_image(source, axes=axes), config)
    root = location(output).absolute()
    check_writable(root)
    _refuse_overlap(image, root)
    if not image.is_shippable and (client is not None or scheduler is not None or workers is not None):
        raise SettingsError(
            f"the {image.name} is in this process, which converts it; leave out client, scheduler and workers."
        )
    work = _Work(image, plan_of(image, root, config), config.missing_chunks)
    told = Progress(progress)
    n_tasks = len(work.pieces(0))
    with _marks_of(work, config, overwrite) as store:
        is_small = n_tasks <= FEW_PIECES or not image.is_shippable
        with connect(client, scheduler=scheduler, workers=workers, device="cpu", small=is_small) as executor:
            _run(work, store, executor, told)
    told.note_peak(peak_memory())
    kept = sum(told.kept.values())
    n_pieces = kept + sum(told.computed.values())
    return Conversion(root, time.monotonic() - began, n_pieces, kept, told.peak_memory)


def copy_piece(number: int, work: _Work) -> dict[str, Any]:
    """Task: write a piece of level 0."""
    region = work.pieces(0)[number]
    if work.missing_chunks == "refuse":
        parts = dict(zip(work.plan.axes, region, strict=True))
        channels = parts.get("c", slice(0, 1))
        labels = tuple(parts[axis] for axis in label_axes(work.image))
        refuse_missing(work.image, 0, labels, range(channels.start, channels.stop))
    pixels = work.image.read(0, region)
    with meter("write"):
        image_level(work.plan, 0)[region] = pixels
    return {"peak": peak_memory()}


def shrink_piece(number: int, work: _Work, level: int) -> dict[str, Any]:
    """Task: write a piece of a coarser level."""
    plan, region = work.plan, work.pieces(level)[number]
    shape, finer = plan.level_shape(level), plan.level_shape(level - 1)
    with meter("read"):
        pixels = np.asarray(image_level(plan, level - 1)[finer_region(region, shape, finer)])
    with meter("shrink"):
        pixels = shrink(pixels, shape, finer, plan.method)
    with meter("write"):
        image_level(plan, level)[region] = pixels
    return {"peak": peak_memory()}


def sample_channel(channel: int, plan: ImagePlan) -> tuple[float, float, float, float]:
    """Task: what viewers show of a channel, from chunks all over level 0; see `omezarr.writer.Window`."""
    kind = np.dtype(plan.dtype)
    low, top = (float(np.iinfo(kind).min), float(np.iinfo(kind).max)) if kind.kind in "ui" else (0.0, 1.0)
    if plan.channels == COLOURS and kind == np.uint8:
        return low, top, low, top
    array, found = image_level(plan, 0), []
    shape = tuple(1 if axis == "c" else n for axis, n in zip(plan.axes, plan.shape, strict=True))
    pieces = Pieces(plan.axes, shape, plan.level_chunks(0))
    # Spread evenly whatever the number of columns.
    numbers = {int(i * GOLDEN % 1 * len(pieces)) for i in range(SAMPLED_CHUNKS)}
    for number in sorted(numbers if len(pieces) > SAMPLED_CHUNKS else range(len(pieces))):
        at = zip(plan.axes, pieces[number], strict=True)
        region = tuple(slice(channel, channel + 1) if axis == "c" else part for axis, part in at)
        pixels = np.asarray(array[region]).ravel()
        found.append(pixels[:: max(1, pixels.size // SAMPLED_PIXELS)])
    values = np.concatenate(found).astype(np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return low, top, low, top
    start, end = (float(value) for value in np.percentile(values, SHOWN))
    if kind.kind == "f":
        low, top = float(values.min()), float(values.max())
    return low, max(top, low + 1), start, end if end > start else start + 1


def _run(work: _Work, store: DiskStore, executor: Executor, progress: Progress) -> None:
    """Write what is missing of the levels, then the metadata."""
    plan = work.plan
    counts = [len(work.pieces(level)) for level in range(plan.n_levels)]
    done = [store.done(f"level-{level}") for level in range(plan.n_levels)]
    progress.start("convert", sum(counts), sum(map(len, done)))
    for level, count in enumerate(counts):
        task, args = (copy_piece, ()) if level == 0 else (shrink_piece, (level,))
        todo = [number for number in range(count) if number not in done[level]]
        where = functools.partial(_where, work, level)
        for number, record in executor.stream(task, todo, work, *args, name="convert", where=where):
            store.mark(f"level-{level}", [number])
            progress.step(record["peak"])
    progress.stop()
    windows = dict(executor.stream(sample_channel, range(len(plan.channels)), plan, name="windows"))
    finish_image(plan, [windows[channel] for channel in range(len(plan.channels))])


def _where(work: _Work, level: int, number: int) -> str:
    """A piece, for messages."""
    return f"region {region_text(work.plan.axes, work.pieces(level)[number])} of level {level}"


def _refuse_overlap(image: Image, root: Location) -> None:
    """Refuse to write into what is read."""
    if not image.is_shippable or not isinstance(root, Path):
        return
    paths = [Path(path).resolve() for path in (image.name, getattr(image.source, "folder", image.name))]
    out = root.resolve()
    if any(out == path or out in path.parents or path in out.parents for path in paths):
        raise OutputError(f"{root} and the image {image.name} lie in each other; choose another place for the output.")


@contextlib.contextmanager
def _marks_of(work: _Work, config: ConvertConfig, overwrite: bool) -> Iterator[DiskStore]:
    """Marks of what is done, locked, with the arrays made; they go when all is done, or if nothing has begun."""
    root = work.plan.root
    folder = (root.parent if isinstance(root, Path) else Path.cwd()) / f"{root.name}.unfinished"
    store, is_done = DiskStore(folder), False
    try:
        with locked(folder):
            store.begin()
            _begin(work, store, config, overwrite)
            yield store
            is_done = True
            store.discard()
    finally:
        if is_done or not (folder / RECORD).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _begin(work: _Work, store: DiskStore, config: ConvertConfig, overwrite: bool) -> None:
    """Go on with what is there, or begin anew."""
    image, root, levels = work.image, work.plan.root, range(work.plan.n_levels)
    record = {"format": FORMAT, "source": _full_name(image), "digest": _digest(image, config), "output": str(root)}
    found = store.read_json(RECORD)
    is_same = found is not None and {**found, "has_arrays": True} == {**record, "has_arrays": True}
    if found is not None and is_same and not overwrite:
        if image.is_shippable and found["has_arrays"] and all(is_zarr(root / str(level)) for level in levels):
            return
        logger.info("%s: what an earlier call left cannot be continued; beginning again.", root)
    elif found is not None and not overwrite:
        raise OutputError(
            f"{root} is an unfinished conversion of {found.get('source')}, or of this image with other settings; give "
            "that command again, or --overwrite to begin anew."
        )
    elif found is None and root.exists() and (not root.is_dir() or any(root.iterdir())):
        if not overwrite:
            raise OutputError(f"{root} exists already; choose another place, or add --overwrite to replace it.")
        if not is_zarr(root) and not is_zarr(root / "0"):
            raise OutputError(f"{root} is no Zarr, so it is not replaced; delete it yourself or choose another place.")
    store.discard()
    store.begin()
    # First the record, so that what is in the output is known to be unfinished whenever this is killed.
    store.write_json(RECORD, {**record, "has_arrays": False})
    remove_tree(root)
    create_image(work.plan)
    store.write_json(RECORD, {**record, "has_arrays": True})
    _say_what_is_left(image)


def _full_name(image: Image) -> str:
    """What is read, wherever this runs."""
    return str(location(image.name).absolute()) if image.is_shippable else image.name


def _digest(image: Image, config: ConvertConfig) -> str:
    """Tells one conversion from another."""
    facts = {**image.describe(), "name": _full_name(image)}
    return digest(facts, getattr(image.source, "stamp", None), dataclasses.asdict(config))


def _say_what_is_left(image: Image) -> None:
    """Name what is beside the pixels in an OME-Zarr and is not converted."""
    group = image.writable_group
    if isinstance(group, Path) and (group / "labels").is_dir():
        logger.info("labels of %s are not converted with it.", image.name)
