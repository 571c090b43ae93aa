"""Which run a scratch folder belongs to: where things go, and what may change when it goes on.

A run is known by its image, its model, its device kind and every setting that changes the flows; or
by its image and the function that makes its labels. Going on with another one is refused by name.
Mask settings may change: their folder is named after them, so what an old task still writes never
meets what a new one reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .addresses import cleaned, without_credentials
from .cluster import Executor
from .config import Settings, digest
from .errors import OutputError, RemoteError, SettingsError
from .frames import image_region, label_axes, label_shape
from .images import Image, MemorySource, open_image
from .job import Job
from .lock import locked
from .networks.batches import fitting_batch, free_memory
from .omezarr import LabelsPlan, create_labels, labels_exist, plan_labels, remove_labels
from .remote import Location, RemotePath, location
from .segmenters import APPLICABLE
from .store import DiskStore, MemoryStore, Store
from .urls import is_remote
from .zarr_stores import zarr_store

__all__ = [
    "Place",
    "fingerprint",
    "in_batches",
    "is_shippable",
    "labels_folder",
    "place_of",
    "precision_begun_with",
    "reopen",
    "scratch_of",
    "shippable",
]

logger = logging.getLogger(__name__)

FORMAT = 6
"""Of the scratch; another number means that what is there cannot be continued."""

LARGE_ARRAY = 2**28
SMALL_IMAGE = 2**20
"""Pixels that are read before a run to know an image by."""
LABELS_RECORD = "masks.json"
MAY_CHANGE = {
    "block",
    "halo",
    "flow_threshold",
    "cellprob_threshold",
    "min_size",
    "max_size",
    "niter",
    "resample",
    "stitch_threshold",
    "stitch_gap",
    "flow3d_smooth",
}
NO_MATTER = {"device", "missing_chunks", "ome_zarr", "shard", "features", "csv", "polygons"}
MATTERS_TO_A_FUNCTION = {"channel", "combine", "stain", "name", "do_3d", "anisotropy", "region", "level", "mask"}


@dataclass(frozen=True)
class Place:
    """Where a run writes."""

    plan: LabelsPlan | None
    table: Location | None
    scratch: Path | None

    @property
    def store(self) -> Store:
        return MemoryStore() if self.scratch is None else DiskStore(self.scratch)


def place_of(image: Image, output: Any, scratch: Any, settings: Settings) -> Place:
    """Decide where labels, table and scratch go; writes nothing."""
    if output is None and not is_shippable(image):
        if scratch is not None:
            raise SettingsError("a scratch folder needs an output as well: labels of an array stay in memory.")
        if math.prod(image.shape) > LARGE_ARRAY:
            raise SettingsError(
                f"{image.name} of shape {image.shape} is too large to keep its labels in memory; give an output."
            )
        return Place(None, None, None)
    name = settings.publish.name
    where = None if output is None else location(output)
    plan = plan_labels(image, where, name, settings.publish.ome_zarr, settings.publish.shard)
    parent = _parent_of_scratch(plan, scratch)
    folder = parent / f"{plan.root.name}.{name}.tiledseg"
    return Place(plan, plan.root / "tables" / name / "table.parquet", folder)


def _parent_of_scratch(plan: LabelsPlan, scratch: Any) -> Path:
    """The folder in which the scratch lies: as given, else that of the output, of a remote one the present."""
    if scratch is None:
        beside = plan.root.parent
        return beside if isinstance(beside, Path) else Path.cwd()
    if is_remote(scratch):
        raise SettingsError(
            f"the scratch cannot lie at {without_credentials(str(scratch))}; give a folder that all workers reach "
            "(--scratch)."
        )
    return Path(scratch).absolute()


@contextlib.contextmanager
def scratch_of(place: Place) -> Iterator[Store]:
    """The scratch, locked; a folder made by a run that failed before anything was computed goes again."""
    store = place.store
    if not isinstance(store, DiskStore):
        yield store
        return
    is_new = not store.path.exists()
    with locked(store.path):
        try:
            store.begin()
            yield store
        except BaseException:
            if is_new and not _holds_results(store.path):
                if place.plan is not None and (store.path / LABELS_RECORD).exists():
                    remove_labels(place.plan)
                shutil.rmtree(store.path, ignore_errors=True)
            raise


def _holds_results(scratch: Path) -> bool:
    """Whether a survey, or with a function a block, is done."""
    return (scratch / "survey.json").exists() or any(scratch.glob("masks-*/masks.journal"))


def is_shippable(image: Image) -> bool:
    """Whether other processes can open the image."""
    return not isinstance(image.source, MemorySource)


def reopen(job: Job, place: Place, restart: bool) -> str:
    """Start the scratch or check that it is of the same run; returns the run's id."""
    store, plan = job.store, place.plan
    record = store.read_json("run.json")
    owned = plan is not None and record is not None and _owner(plan) == record["id"]
    if plan is not None and plan.path.exists() and labels_exist(plan) and not owned:
        raise OutputError(
            f"labels {plan.name!r} exist already at {plan.path}; choose another --name, or remove them first."
        )
    if restart and record is not None:
        if owned and plan is not None:
            remove_labels(plan)
        store.discard()
        record = None
    now = _described(job, plan)
    if record is None:
        if plan is not None and not isinstance(plan.root, Path):
            _check_remote(plan.root)
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


def precision_begun_with(store: Store) -> str | None:
    """The precision of the run that a scratch holds, None if it holds none."""
    record = store.read_json("run.json") or {}
    precision: str | None = record.get("settings", {}).get("precision")
    return precision


def in_batches(job: Job, executor: Executor) -> Job:
    """The job with the batch that its GPUs compute in: as the run began, else as fits the one with least free memory.

    Parameters
    ----------
    job : Job
        Its run has been opened, see `reopen`.
    executor : Executor
    """
    if job.segmenter is not None or job.device == "cpu":
        return job
    record = job.store.read_json("run.json") or {}
    if "batch" not in record:
        free = [n_bytes for n_bytes in executor.ask(free_memory) if n_bytes is not None]
        record["batch"] = fitting_batch(job.model, min(free, default=0))
        job.store.write_json("run.json", record)
        logger.info(
            "the network computes %d tiles at once: of the GPUs that work, %.1f GiB are free on the fullest.",
            record["batch"],
            min(free, default=0) / 2**30,
        )
    return dataclasses.replace(job, labeller=dataclasses.replace(job.model, batch=record["batch"]))


def _check_remote(root: RemotePath) -> None:
    """Refuse a remote store that cannot be written before anything is computed for it."""
    try:
        root.check_writable()
    except RemoteError as error:
        raise OutputError(f"labels cannot be written there: {error} Another place: -o.") from error


def _described(job: Job, plan: LabelsPlan | None) -> dict[str, Any]:
    """What may not change while a run goes on."""
    settings = {k: v for k, v in job.settings.flat().items() if k not in MAY_CHANGE | NO_MATTER}
    made_by: dict[str, Any]
    if job.segmenter is None:
        made_by = {"segmenter": None, "model file": job.model.sha256, "device": job.device}
    else:
        made_by = {"segmenter": f"{job.segmenter.name} {job.segmenter.identity}", "model file": None, "device": None}
        settings = {k: v if k in MATTERS_TO_A_FUNCTION else None for k, v in settings.items()}
    if job.mask is not None:
        settings["mask"] = fingerprint(job.mask.pixels)
    described = {
        "format": FORMAT,
        "image": fingerprint(job.image),
        **made_by,
        "ome_zarr": None if plan is None else plan.version,
        **settings,
    }
    # As it reads when it comes back from the scratch, which holds no passwords.
    reread: dict[str, Any] = json.loads(json.dumps(cleaned(described)))
    return reread


def _owner(plan: LabelsPlan) -> str | None:
    """Id of the run that made the labels at a place, None if it was not ours or there are none."""
    import zarr

    if not plan.path.exists():
        return None
    try:
        owner = zarr.open_group(zarr_store(plan.path), mode="r").attrs.get("tiledseg")
    except (OSError, ValueError, KeyError):
        return None
    return str(owner["run"]) if isinstance(owner, dict) and "run" in owner else None


def labels_folder(job: Job, place: Place, run_id: str) -> str:
    """The folder of the scratch for these mask settings; what others left, and published, goes."""
    may_change = MAY_CHANGE if job.segmenter is None else MAY_CHANGE & APPLICABLE
    kept = {k: v for k, v in job.settings.flat().items() if k in may_change}
    n_moments = 0 if job.segmenter is not None else len(job.found.moments)
    niter = [job.niter(moment) for moment in range(n_moments)]
    resolved = digest(kept, job.halo, niter, None if place.plan is None else str(place.plan.path))
    folder = f"masks-{resolved}"
    plan = place.plan
    if plan is None:
        job.store.create(f"{folder}/published", job.shape, job.shape, "uint32")
        return folder
    record = job.store.read_json(LABELS_RECORD) or {}
    before, shards = record.get("folder", folder), None if plan.shards is None else list(plan.shards)
    if before != folder:
        logger.info("mask settings changed: masks and what follows are computed again, flows are kept.")
    if before != folder or record.get("shards") != shards or not plan.path.exists():
        # Labels that were deleted by hand, or are to be stored in another way, are published again from the blocks
        # that are still there.
        for stage in ("publish-",) if before == folder else ("",):
            job.store.remove(f"{before}/{stage}")
        remove_labels(plan)
    job.store.write_json(LABELS_RECORD, {"folder": folder, "settings": kept, "shards": shards})
    version = importlib.metadata.version("tiledseg")
    create_labels(
        plan, attributes={"tiledseg": {"run": run_id, "version": version, "placement": plan.placement, **kept}}
    )
    return folder


def fingerprint(image: Image) -> str:
    """Hash of an image's shape, type and levels, and of its pixels; of a large one those in some small windows."""
    axes, shape = label_axes(image), label_shape(image)
    parts = [
        image.axes,
        image.shape,
        image.position,
        image.full_shape,
        str(image.dtype),
        [level.shape for level in image.levels],
        image.channels,
    ]
    content = hashlib.sha256()
    # Of a large picture 16 windows, of every further axis two planes.
    counts = [4 if axis in "yx" else 2 for axis in axes]
    sides = [64 if axis in "yx" else 1 for axis in axes]
    if math.prod(image.shape) <= SMALL_IMAGE:
        counts, sides = [1] * len(axes), list(shape)
    for at in itertools.product(*map(range, counts)):
        starts = [int((i + 0.5) * n / count) if count > 1 else 0 for i, n, count in zip(at, shape, counts, strict=True)]
        window = tuple(slice(s, min(s + side, n)) for s, side, n in zip(starts, sides, shape, strict=True))
        content.update(np.ascontiguousarray(image.read(0, image_region(image, window, None))).tobytes())
    return digest(parts, content.hexdigest())


def shippable(job: Job, executor: Executor) -> Job:
    """The job with what workers can open: an array or function of this process goes into the scratch."""
    image = job.image
    if executor.in_process:
        return job
    store = job.store
    if not isinstance(store, DiskStore):
        raise SettingsError("to segment an array on a cluster, say where the labels go: output=...")
    if job.segmenter is not None:
        job = dataclasses.replace(job, labeller=job.segmenter.pack(store))
    mask = job.mask
    if mask is not None and not is_shippable(mask.pixels):
        job = dataclasses.replace(job, mask=dataclasses.replace(mask, pixels=_stored(mask.pixels, store, "mask")))
    if is_shippable(image):
        return job
    # Zarr does not store chunks that are all zero: here they are known not to be lost.
    survey = dataclasses.replace(job.settings.survey, missing_chunks="fill")
    settings = dataclasses.replace(job.settings, survey=survey)
    return dataclasses.replace(job, image=_stored(image, store, "image"), settings=settings)


def _stored(image: Image, store: DiskStore, name: str) -> Image:
    """An image of this process that others can open: its level 0 in the scratch."""
    chunks = tuple(min(n, 1024) if axis in "yx" else 1 for n, axis in zip(image.shape, image.axes, strict=True))
    store.create(f"{name}.zarr", image.shape, chunks, str(image.dtype))
    copy = store.open(f"{name}.zarr")
    done = store.done(name)
    starts = list(itertools.product(*(range(0, n, c) for n, c in zip(image.shape, chunks, strict=True))))
    for i, start in enumerate(starts):
        if i not in done:
            region = tuple(slice(a, min(a + c, n)) for a, c, n in zip(start, chunks, image.shape, strict=True))
            copy[region] = image.read(0, region)
            store.mark(name, [i])
    stored = open_image(store.path / f"{name}.zarr", axes=image.axes, allow_bool=True)
    return dataclasses.replace(
        stored,
        name=image.name,
        spacing=image.spacing,
        units=image.units,
        translation=image.translation,
        channels=image.channels,
    )
