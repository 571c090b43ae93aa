"""The order of the stages, what a resumed run may change, and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import flows, masks, publish, stitch, survey
from .cluster import Executor, connect, peak_memory
from .config import Settings, digest
from .errors import OutputError, SettingsError
from .images import Image, MemorySource, channel_index, open_image
from .job import Diameter, Job
from .networks.models import find_model
from .omezarr import LabelsPlan, create_labels, labels_exist, level_array, plan_labels, remove_labels
from .progress import Listener, Progress
from .store import DiskStore, MemoryStore, Store
from .working import plane_axes, plane_region, plane_shape

__all__ = ["Report", "Segmentation", "estimate_diameter", "preview", "segment"]

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the scratch; another number means that what is there cannot be continued."""

FEW_BLOCKS = 4
LARGE_ARRAY = 2**28
MAY_CHANGE = {"block", "halo", "flow_threshold", "cellprob_threshold", "min_size", "niter", "resample"}
NO_MATTER = {"device", "missing_chunks", "ome_zarr"}


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes
    ----------
    n_objects : int
        Labels are 1..n_objects.
    diameter : Diameter
        Used, and its spread.
    percentiles : (float, float)
        Pixel values that became 0 and 1 for the network.
    n_blocks, n_skipped_blocks : int
        Blocks, and those in which nothing rises above the noise.
    n_cut_by_halo : int
        Objects that reach past the halo of a block: a larger halo would see them whole.
    n_pairs, n_exact_pairs : int
        Objects that two blocks saw, and how many of them both saw as the same pixels.
    n_nonfinite : int
        Pixels that are NaN or infinite, taken as background.
    n_tiles, n_skipped_tiles : int
        Network tiles computed by this call, and those skipped as empty.
    seconds : dict of str to float
        Per stage, of this call.
    computed, kept : dict of str to int
        Pieces per stage computed by this call, and kept from an earlier one.
    peak_memory : int
        Bytes: the sum over all processes of the most each had resident.
    device, workers : str
        What did the work.
    scratch : str or None
        Folder kept for changed mask settings.
    """

    n_objects: int
    diameter: Diameter
    percentiles: tuple[float, float]
    n_blocks: int
    n_skipped_blocks: int
    n_cut_by_halo: int
    n_pairs: int
    n_exact_pairs: int
    n_nonfinite: int
    n_tiles: int
    n_skipped_tiles: int
    seconds: dict[str, float]
    computed: dict[str, int]
    kept: dict[str, int]
    peak_memory: int
    device: str
    workers: str
    scratch: str | None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Segmentation:
    """The result of a run.

    Attributes
    ----------
    labels : dask.array.Array of uint32
        Labels of level 0, axes of the image without the channel; lazy where they are on disk.
    report : Report
    path : Path or None
        Folder of the published label image.
    table_path : Path or None
        The object table on disk.
    """

    labels: Any
    report: Report
    path: Path | None
    table_path: Path | None
    _job: Job = dataclasses.field(repr=False)

    @property
    def table(self) -> Any:
        """The object table, a pyarrow.Table (``.to_pandas()`` for a data frame)."""
        if self.table_path is None:
            return publish.table_of(self._job)
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.table_path).read()


@dataclass(frozen=True)
class _Place:
    """Where a run writes."""

    plan: LabelsPlan | None
    table: Path | None
    scratch: Path | None

    @property
    def store(self) -> Store:
        return MemoryStore() if self.scratch is None else DiskStore(self.scratch)


def segment(
    image: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    client: Any = None,
    scheduler: str | None = None,
    workers: int | None = None,
    scratch: str | os.PathLike[str] | None = None,
    restart: bool = False,
    axes: str | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> Segmentation:
    """Label every cell of an image.

    Parameters
    ----------
    image : path, zarr.Array, dask array or numpy array
        OME-Zarr, Zarr or TIFF by path; axes ``yx``, also with c, and t and z of length 1.
    output : path, optional
        OME-Zarr to hold the labels, as ``labels/<name>``. Default: the image itself if it is an
        OME-Zarr that can be written; for arrays, none: labels stay in memory.
    client : distributed.Client or cluster, optional
        Where to work. Default: this process for images of a few blocks, else processes made here.
    scheduler : str, optional
        Address or scheduler file of a running Dask scheduler.
    workers : int, optional
        Number of processes to make here.
    scratch : path, optional
        Folder for what is in between, reachable by all workers. Default: beside the output.
    restart : bool
        Discard what an earlier run left there, with the labels it published.
    axes : str, optional
        Axes of an array that does not say them.
    progress : callable, optional
        Called with stage, pieces done, pieces in all.
    **settings
        As on the command line, e.g. ``diameter=12.5``, ``name="nuclei"``; see `tiledseg.config`.

    Returns
    -------
    Segmentation

    Raises
    ------
    TiledsegError
        One sentence that says what is wrong, where, and what to do. What is done is kept: the same
        call continues.
    """
    chosen = Settings.of(**settings)
    opened = open_image(image, axes=axes)
    plane_axes(opened)
    channel = channel_index(opened, chosen.survey.channel)
    place = _place(opened, output, scratch, chosen)
    _check_halo(chosen, opened)
    is_small = _n_blocks(opened, chosen) <= FEW_BLOCKS or not _is_shippable(opened)
    told = Progress(progress)
    with _scratch_of(place) as store, connect(
        client, scheduler=scheduler, workers=workers, device=chosen.flows.device, small=is_small
    ) as executor:
        job = Job(opened, channel, chosen, find_model(chosen.flows.model), executor.device(chosen.flows.device), store)
        run_id = _reopen(job, place, restart)
        job = dataclasses.replace(job, image=_shippable(job, executor))
        return _run(job, place, run_id, executor, told)


def _run(job: Job, place: _Place, run_id: str, executor: Executor, progress: Progress) -> Segmentation:
    """The five stages."""
    with _torch_threads(executor.in_process):
        _warm_up(job)
        found = survey.run(job, executor, progress)
        job = dataclasses.replace(job, surveyed=found, table=place.table, plan=place.plan)
        _check_block(job)
        job = dataclasses.replace(job, labels=_labels_folder(job, place, run_id))
        tiles = flows.run(job, executor, progress)
        masks.run(job, executor, progress)
        facts = stitch.run(job, executor, progress)
        publish.run(job, executor, progress)
    progress.note_peak(peak_memory())
    progress.stop()
    report = Report(
        diameter=found.diameter,
        percentiles=found.percentiles,
        n_nonfinite=found.n_nonfinite,
        n_tiles=tiles["n_tiles"],
        n_skipped_tiles=tiles["n_skipped"],
        seconds=progress.seconds,
        computed=progress.computed,
        kept=progress.kept,
        peak_memory=progress.peak_memory,
        device=job.device,
        workers=executor.description,
        scratch=None if place.scratch is None else str(place.scratch),
        **facts,
    )
    path = None if place.plan is None else place.plan.path
    return Segmentation(_lazy_labels(job), report, path, place.table, job)


def _lazy_labels(job: Job) -> Any:
    """Level 0 as a dask array."""
    import dask.array

    if job.plan is not None:
        return dask.array.from_zarr(level_array(job.plan, 0))
    labels = job.store.open(f"{job.labels}/published")
    shape = [n for n, axis in zip(job.image.shape, job.image.axes, strict=True) if axis != "c"]
    return dask.array.from_array(labels.reshape(shape), chunks="auto")


def _place(image: Image, output: Any, scratch: Any, settings: Settings) -> _Place:
    """Decide where labels, table and scratch go; writes nothing."""
    if output is None and not _is_shippable(image):
        if scratch is not None:
            raise SettingsError("a scratch folder needs an output as well: labels of an array stay in memory.")
        if math.prod(image.shape) > LARGE_ARRAY:
            raise SettingsError(
                f"{image.name} of shape {image.shape} is too large to keep its labels in memory; give an output."
            )
        return _Place(None, None, None)
    name = settings.publish.name
    plan = plan_labels(image, None if output is None else Path(output), name, settings.publish.ome_zarr)
    folder = Path(scratch) if scratch is not None else plan.root.parent / f"{plan.root.name}.{name}.tiledseg"
    return _Place(plan, plan.root / "tables" / name / "table.parquet", folder.absolute())


@contextlib.contextmanager
def _scratch_of(place: _Place) -> Iterator[Store]:
    """The scratch; a folder made by a run that failed before anything was computed goes again."""
    is_new = place.scratch is not None and not place.scratch.exists()
    try:
        yield place.store
    except BaseException:
        if is_new and place.scratch is not None and not (place.scratch / "survey.json").exists():
            shutil.rmtree(place.scratch, ignore_errors=True)
        raise


def _is_shippable(image: Image) -> bool:
    """Whether other processes can open the image."""
    return not isinstance(image.source, MemorySource)


def _n_blocks(image: Image, settings: Settings) -> int:
    return math.prod(-(-n // settings.masks.block) for n in plane_shape(image))


def _check_halo(settings: Settings, image: Image) -> None:
    """Refuse a diameter that is wrong before anything is made."""
    given = settings.survey.diameter_px(image.spacing_um())
    if given is not None:
        from .grid import WorkingGrid

        model = find_model(settings.flows.model)
        WorkingGrid.for_diameter(plane_shape(image), given, model.diam_mean)


def _check_block(job: Job) -> None:
    """Refuse blocks that are smaller than their halo."""
    block = job.settings.masks.block
    if block < job.halo and any(block < n for n in job.shape):
        raise SettingsError(
            f"block {block} is smaller than the halo of {job.halo} px (two diameters of "
            f"{job.found.diameter.value:g}); give --block {job.halo} or more."
        )


def _reopen(job: Job, place: _Place, restart: bool) -> str:
    """Start the scratch or check that it is of the same run; returns the run's id."""
    store, plan = job.store, place.plan
    record = store.read_json("run.json")
    owned = plan is not None and record is not None and _owner(plan) == record["id"]
    if plan is not None and labels_exist(plan) and not owned:
        raise OutputError(
            f"labels {plan.name!r} exist already at {plan.path}; choose another --name, or remove them first."
        )
    if restart and record is not None:
        if owned and plan is not None:
            remove_labels(plan)
        store.remove("")
        record = None
    now = {
        "format": FORMAT,
        "image": fingerprint(job.image),
        "model file": job.model.sha256,
        "device": job.device,
        "ome_zarr": None if plan is None else plan.version,
        **{k: v for k, v in job.settings.flat().items() if k not in MAY_CHANGE | NO_MATTER},
    }
    if record is None:
        record = {"id": uuid.uuid4().hex, "settings": now}
        store.write_json("run.json", record)
    changed = [k for k in now if record["settings"].get(k) != now[k]]
    if changed:
        differences = "; ".join(f"{k} was {record['settings'].get(k)!r} and is now {now[k]!r}" for k in changed)
        raise SettingsError(
            f"{place.scratch} holds a run with other settings: {differences}; use the same again, or --restart "
            "to discard it."
        )
    return str(record["id"])


def _owner(plan: LabelsPlan) -> str | None:
    """Id of the run that made the labels at a place, None if it was not ours or there are none."""
    import zarr

    if not plan.path.exists():
        return None
    attributes = dict(zarr.open_group(plan.path, mode="r").attrs)
    owner = attributes.get("tiledseg")
    return str(owner["run"]) if isinstance(owner, dict) and "run" in owner else None


def _labels_folder(job: Job, place: _Place, run_id: str) -> str:
    """The folder of the scratch for these mask settings; what others left, and published, goes."""
    kept = {k: v for k, v in job.settings.flat().items() if k in MAY_CHANGE}
    resolved = digest(kept, job.halo, job.niter, None if place.plan is None else str(place.plan.path.absolute()))
    folder = f"masks-{resolved}"
    plan = place.plan
    if plan is None:
        job.store.create(f"{folder}/published", job.shape, job.shape, "uint32")
        return folder
    before = (job.store.read_json("masks.json") or {}).get("folder", folder)
    if before != folder:
        logger.info("mask settings changed: masks and what follows are computed again, flows are kept.")
    if before != folder or not plan.path.exists():
        # Labels that were deleted by hand are published again from the blocks that are still there.
        for stage in ("publish-",) if before == folder else ("",):
            job.store.remove(f"{before}/{stage}")
        remove_labels(plan)
    job.store.write_json("masks.json", {"folder": folder, "settings": kept})
    create_labels(plan, attributes={"tiledseg": {"run": run_id, **kept}})
    return folder


def fingerprint(image: Image) -> str:
    """Hash of an image's shape, type and levels, and of the pixels in 16 small windows of it."""
    shape = plane_shape(image)
    parts = [image.axes, image.shape, str(image.dtype), [level.shape for level in image.levels], image.channels]
    content = hashlib.sha256()
    for at in itertools.product(range(4), repeat=len(shape)):
        starts = [int((i + 0.5) * n / 4) for i, n in zip(at, shape, strict=True)]
        window = tuple(slice(s, min(s + 64, n)) for s, n in zip(starts, shape, strict=True))
        content.update(np.ascontiguousarray(image.read(0, plane_region(image, window, None))).tobytes())
    return digest(parts, content.hexdigest())


def _shippable(job: Job, executor: Executor) -> Image:
    """The image as workers can open it: an array of this process is written into the scratch."""
    image = job.image
    if executor.in_process or _is_shippable(image):
        return image
    if not isinstance(job.store, DiskStore):
        raise SettingsError("to segment an array on a cluster, say where the labels go: output=...")
    chunks = tuple(min(n, 1024) if axis in "yx" else 1 for n, axis in zip(image.shape, image.axes, strict=True))
    job.store.create("image.zarr", image.shape, chunks, str(image.dtype))
    copy = job.store.open("image.zarr")
    done = job.store.done("image")
    starts = list(itertools.product(*(range(0, n, c) for n, c in zip(image.shape, chunks, strict=True))))
    for i, start in enumerate(starts):
        if i not in done:
            region = tuple(slice(a, min(a + c, n)) for a, c, n in zip(start, chunks, image.shape, strict=True))
            copy[region] = image.read(0, region)
            job.store.mark("image", [i])
    stored = open_image(job.store.path / "image.zarr", axes=image.axes)
    return dataclasses.replace(
        stored, name=image.name, spacing=image.spacing, units=image.units, channels=image.channels
    )


def _warm_up(job: Job) -> None:
    """Compile the kernels once, before workers would each do it."""
    from .dynamics import warm_up

    if isinstance(job.store, DiskStore):
        warm_up()


@contextlib.contextmanager
def _torch_threads(in_process: bool) -> Iterator[None]:
    """Give torch its threads back after working in this process."""
    if not in_process:
        yield
        return
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def estimate_diameter(
    image: Any,
    *,
    axes: str | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> Diameter:
    """Estimate the one diameter of an image's cells, in this process; writes nothing.

    Parameters
    ----------
    image, axes, progress, settings
        As for `segment`.

    Returns
    -------
    Diameter
        In pixels of level 0, with quartiles and the number of objects it rests on.
    """
    chosen = Settings.of(**settings)
    opened = open_image(image, axes=axes)
    plane_axes(opened)
    channel = channel_index(opened, chosen.survey.channel)
    with connect(small=True) as executor, _torch_threads(executor.in_process):
        device = executor.device(chosen.flows.device)
        job = Job(opened, channel, chosen, find_model(chosen.flows.model), device, MemoryStore())
        return survey.run(job, executor, Progress(progress)).diameter


def preview(
    image: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    scratch: str | os.PathLike[str] | None = None,
    axes: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What `segment` would do, without doing it.

    Returns
    -------
    plan : dict
        ``image`` as opened; ``channel``; ``blocks``; where ``labels`` and ``scratch`` would go; with a
        diameter given or known from an earlier run also ``tiles``, ``working_shape`` and ``halo``.
    """
    chosen = Settings.of(**settings)
    opened = open_image(image, axes=axes)
    plane_axes(opened)
    channel = channel_index(opened, chosen.survey.channel)
    place = _place(opened, output, scratch, chosen)
    _check_halo(chosen, opened)
    facts: dict[str, Any] = {
        "image": opened.describe(),
        "channel": opened.channels[channel],
        "n_blocks": _n_blocks(opened, chosen),
        "labels": None if place.plan is None else str(place.plan.path),
        "table": None if place.table is None else str(place.table),
        "scratch": None if place.scratch is None else str(place.scratch),
    }
    given = chosen.survey.diameter_px(opened.spacing_um())
    if given is not None:
        model = find_model(chosen.flows.model)
        known = survey.Surveyed((0.0, 1.0), False, 0, (), 1.0, Diameter(given, "given", (given, given)))
        job = Job(opened, channel, chosen, model, "cpu", MemoryStore(), surveyed=known)
        facts.update(
            diameter=given, halo=job.halo, n_tiles=job.lattice.n_tiles, working_shape=list(job.working.shape)
        )
    return facts
