"""What a run did and what it cost, of this call and of all calls on the same scratch; written beside the table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from .addresses import cleaned
from .cluster import Executor, peak_memory
from .errors import OutputError
from .inputs import inputs_text
from .job import Diameter, Job, Moment
from .meters import OTHER_THREADS, Totals
from .page import page_of
from .progress import Listener, Progress
from .stitch import PICTURE
from .store import Store, disk_errors

__all__ = ["Ledger", "Report", "Work", "report_of", "write_report"]

TOTALS = "totals.json"
"""Of the scratch: what all calls on it have cost."""
SAVE_EVERY_S = 10.0
STAGES = ("survey", "flows", "masks", "stitch", "publish")
PACKAGES = ("tiledseg", "numpy", "numba", "scipy", "torch", "zarr", "dask", "distributed", "cellpose")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What was done and what it cost, in one call or several.

    Attributes
    ----------
    wall_seconds : float
        From before the first stage to after the last.
    seconds : dict of str to float
        Per stage; together more than `wall_seconds` if stages run at the same time.
    computed : dict of str to int
        Pieces per stage.
    n_tiles, n_skipped_tiles : int
        Network tiles computed, and those skipped as empty; 0 without a network.
    task_seconds : dict of str to float
        By kind of work: what the threads of tasks spent on it, waiting for disks and devices included.
    cpu_seconds : dict of str to float
        By kind of work: what they computed meanwhile. Zarr (which compresses) and torch also compute in threads of
        their own, of which no kind is known: these, and what the processes did beside tasks, are an entry of
        their own.
    busy_seconds : dict of str to float
        Per GPU: how long a forward pass was under way in the flows stage; empty on the CPU.
    bytes_read, bytes_written : int or None
        What processes had the system read and write while tasks ran in them, from its caches too
        (``/proc/self/io``); None if the system does not tell.
    retries : int
        What was done again because a worker died or a store did not answer.
    """

    wall_seconds: float
    seconds: dict[str, float]
    computed: dict[str, int]
    n_tiles: int
    n_skipped_tiles: int
    task_seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    busy_seconds: dict[str, float]
    bytes_read: int | None
    bytes_written: int | None
    retries: int

    @classmethod
    def of(cls, wall_seconds: float, progress: Progress, totals: Totals) -> Self:
        """What was done up to now."""
        whole, flows = totals.whole(), totals.of("flows")
        beside = max(0.0, whole.process_seconds - sum(whole.cpu_seconds.values()))
        # No task, no bytes; a task of which none are known had no system to tell.
        unknown = None if whole.process_seconds else 0
        return cls(
            wall_seconds=wall_seconds,
            seconds=progress.seconds_so_far(),
            computed=dict(progress.computed),
            n_tiles=whole.counts.get("n_tiles", 0),
            n_skipped_tiles=whole.counts.get("n_skipped_tiles", 0),
            task_seconds=_largest_first(whole.seconds),
            cpu_seconds={**_largest_first(whole.cpu_seconds), OTHER_THREADS: beside},
            busy_seconds=flows.busy_seconds,
            bytes_read=whole.counts.get("bytes_read", unknown),
            bytes_written=whole.counts.get("bytes_written", unknown),
            retries=whole.counts.get("retries", 0),
        )

    def plus(self, other: Work) -> Work:
        """Both together; what one of them does not know is not known of both."""
        parts = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in _FIELDS}
        return Work(**{name: _sum(*both) for name, both in parts.items()})

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """From a document."""
        return cls(**document)


_FIELDS = dataclasses.fields(Work)


def _sum(one: Any, other: Any) -> Any:
    """The sum of numbers, or of those in dicts key by key."""
    if one is None or other is None:
        return None
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in [*one, *(k for k in other if k not in one)]}
    return one + other


def _largest_first(values: dict[str, float]) -> dict[str, float]:
    """Sorted by value."""
    return dict(sorted(values.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, kw_only=True)
class Report(Work):
    """What a run did. What it shares with `Work` is of this call; `whole_run` is of all calls.

    Attributes
    ----------
    n_objects : int
        Labels are 1..n_objects.
    segmenter : str or None
        Name of the function that made the labels, None if a network did.
    diameter : Diameter or None
        Used, and its spread; of time points with one each the largest; None if a function made the labels and only a
        halo was given.
    percentiles : tuple of (float, float) or None
        Per input of the network the pixel values that became 0 and 1; None without one, and with one for each time
        point.
    per_time : tuple of Moment
        Diameter and percentiles of every time point, if each has its own.
    n_too_large : int
        Objects left out because they exceed ``max_size``.
    n_blocks, n_skipped_blocks : int
        Blocks, and those in which nothing rises above the noise.
    n_cut_by_halo : int
        Objects that reach past the halo of a block: a larger halo would see them whole.
    n_pairs, n_exact_pairs : int
        Objects that two blocks saw, and how many of them both saw as the same pixels.
    mean_iou : float
        Intersection over union of the two views of such an object, on average; 1 if there are none.
    n_seam, n_seam_linked : int
        Labels that cross the border between two blocks, counted in each of the two, and how many of
        them the other block saw as well. Those it did not see are cut at the border.
    n_nonfinite : int
        Pixels that are NaN or infinite, taken as background; 0 with a function, which is given them.
    per_block : dict or None
        Objects that reach into a block: the ``fewest`` and the ``most``, the number of ``blocks`` along each axis, and
        how many of them an element of the picture in ``report.html`` puts ``together``; None if an earlier version
        stitched the blocks.
    kept : dict of str to int
        Pieces per stage kept from an earlier call.
    quarantined : tuple of (str, int)
        Stage and number of pieces that could not be computed and were left out.
    tiles_per_second : float or None
        Of the flows stage; None if no tile was computed.
    pixels_per_second : dict of str to float
        Per stage that computed anything: pixels of the image that its pieces stand for, by its seconds. Under ``"all"``
        the same of all stages, if this call did everything.
    busy : dict of str to float
        Per GPU the share of the flows stage in which a forward pass was under way; under ``"cpu"``, if there is
        none, the network's share of what the threads of all workers could have done. Empty if no tile was computed.
    peak_memory : int
        Bytes: the sum over all processes of the most each had resident.
    peaks : dict of str to int
        The same per process, by its number.
    device : str or None
        Where the network ran; None without one.
    workers : str
        What did the work.
    scratch : str or None
        Folder kept for changed mask settings.
    image : dict
        Name, axes, shape, dtype, pixel size in micrometres and channels.
    channel : str
        What was shown to the network or the function.
    model : dict or None
        Name, kind, precision and SHA-256 of the model file; None without a network.
    parameters : dict
        All settings as they were given.
    block, halo : tuple of int
        Pixels along the axes of the labels, as used.
    versions : dict of str to str
        Of this package, what it computes with, Python and the operating system; here, not on workers elsewhere.
    ended : str
        Date and time.
    n_calls : int
        Calls that worked on this scratch, this one included.
    whole_run : Work
        Of all these calls, whatever their mask settings; of one that was killed all but the last seconds.
    """

    n_objects: int
    segmenter: str | None
    diameter: Diameter | None
    percentiles: tuple[tuple[float, float], ...] | None
    per_time: tuple[Moment, ...]
    n_too_large: int
    n_blocks: int
    n_skipped_blocks: int
    n_cut_by_halo: int
    n_pairs: int
    n_exact_pairs: int
    mean_iou: float
    n_seam: int
    n_seam_linked: int
    n_nonfinite: int
    per_block: dict[str, Any] | None
    kept: dict[str, int]
    quarantined: tuple[tuple[str, int], ...]
    tiles_per_second: float | None
    pixels_per_second: dict[str, float]
    busy: dict[str, float]
    peak_memory: int
    peaks: dict[str, int]
    device: str | None
    workers: str
    scratch: str | None
    image: dict[str, Any]
    channel: str
    model: dict[str, Any] | None
    parameters: dict[str, Any]
    block: tuple[int, ...]
    halo: tuple[int, ...]
    versions: dict[str, str]
    ended: str
    n_calls: int
    whole_run: Work

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, without passwords and tokens in addresses."""
        document: dict[str, Any] = cleaned(dataclasses.asdict(self))
        return document


class Ledger:
    """Adds up what a call costs, and in the scratch what all calls on it have cost.

    Parameters
    ----------
    store : Store
        The scratch.
    totals : Totals
        Of the executor that works.
    listener : callable, optional
        Of the progress.
    """

    def __init__(self, store: Store, totals: Totals, listener: Listener | None = None) -> None:
        self._store, self._totals, self._listener = store, totals, listener
        document = store.read_json(TOTALS)
        self._before = None if document is None else Work.from_json(document["work"])
        self.n_calls = 1 + (0 if document is None else int(document["n_calls"]))
        self.progress = Progress(self._tell)
        self._began = self._saved = time.monotonic()

    def work(self) -> Work:
        """Of this call up to now."""
        return Work.of(time.monotonic() - self._began, self.progress, self._totals)

    def whole_run(self) -> Work:
        """Of all calls up to now."""
        return self.work() if self._before is None else self._before.plus(self.work())

    def save(self) -> None:
        """Keep what is known by now."""
        work = dataclasses.asdict(self.whole_run())
        self._store.write_json(TOTALS, {"n_calls": self.n_calls, "work": work})
        self._saved = time.monotonic()

    def _tell(self, stage: str, done: int, total: int) -> None:
        """A piece ended: time to save now and then, for a run that is killed cannot."""
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save()
        if self._listener is not None:
            self._listener(stage, done, total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # If something failed, it may be the disk: what is told is the first error.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OutputError):
            self.save()


def report_of(
    job: Job,
    executor: Executor,
    ledger: Ledger,
    facts: dict[str, Any],
    parameters: dict[str, Any],
    pixel: float,
    scratch: Path | None,
) -> Report:
    """The report of a run that has ended.

    Parameters
    ----------
    job : Job
    executor : Executor
        Who worked.
    ledger : Ledger
    facts : dict
        From `stitch.run`.
    parameters : dict
        Settings as they were given.
    pixel : float
        Width of a pixel of the image in pixels of the full-size image.
    scratch : Path or None
    """
    progress, found = ledger.progress, job.surveyed
    progress.note_peak(peak_memory())
    progress.stop()
    moments = () if found is None else found.moments
    moments = tuple(dataclasses.replace(moment, diameter=moment.diameter.times(pixel)) for moment in moments)
    work = ledger.work()
    described = job.image.describe()
    return Report(
        **{field.name: getattr(work, field.name) for field in _FIELDS},
        segmenter=None if job.segmenter is None else job.segmenter.name,
        diameter=None if job.diameter is None else job.diameter.times(pixel),
        percentiles=moments[0].percentiles if len(moments) == 1 else None,
        per_time=moments if len(moments) > 1 else (),
        n_nonfinite=0 if found is None else found.n_nonfinite,
        kept=progress.kept,
        quarantined=(),
        tiles_per_second=work.n_tiles / work.seconds["flows"] if work.n_tiles else None,
        pixels_per_second=_pixels_per_second(work, progress.kept, math.prod(job.shape)),
        busy=_busy(work, executor) if work.n_tiles else {},
        peak_memory=progress.peak_memory,
        peaks={str(process): peak for process, peak in progress.peaks.items()},
        device=job.device if job.segmenter is None else None,
        workers=executor.description,
        scratch=None if scratch is None else str(scratch),
        image={key: described[key] for key in ("name", "axes", "shape", "dtype", "spacing_um", "channels")},
        channel=inputs_text(job.image, job.inputs),
        model=None if job.segmenter is not None else _model_facts(job),
        parameters={name: _plain(value) for name, value in parameters.items()},
        block=job.blocks.block,
        halo=job.blocks.halo,
        versions=_versions(),
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
        n_calls=ledger.n_calls,
        whole_run=ledger.whole_run(),
        **{"per_block": None, **facts},
    )


def _pixels_per_second(work: Work, kept: dict[str, int], n_pixels: int) -> dict[str, float]:
    """Per stage, and of all if nothing was kept."""
    rates = {}
    for stage in STAGES:
        n = work.computed.get(stage, 0)
        if n:
            rates[stage] = n_pixels * n / (n + kept[stage]) / max(work.seconds[stage], 1e-9)
    if not any(kept.values()):
        rates["all"] = n_pixels / work.wall_seconds
    return rates


def _busy(work: Work, executor: Executor) -> dict[str, float]:
    """Share of the flows stage in which devices were at work."""
    seconds = work.seconds["flows"]
    if work.busy_seconds:
        return {device: at_work / seconds for device, at_work in work.busy_seconds.items()}
    crew = executor.crew
    return {
        "cpu": executor.totals.of("flows").seconds.get("network", 0.0) / (seconds * crew.n_workers * crew.n_threads)
    }


def _model_facts(job: Job) -> dict[str, Any]:
    """The network by its name and file."""
    model = job.model
    return {name: getattr(model, name) for name in ("name", "architecture", "precision", "sha256")}


def _plain(value: Any) -> Any:
    """A setting as JSON has it: an array by its name."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@functools.cache
def _versions() -> dict[str, str]:
    """Of what is installed here."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_report(report: Report, job: Job, links: dict[str, str]) -> Path | None:
    """Write ``report.json`` and ``report.html`` beside the table.

    Parameters
    ----------
    report : Report
    job : Job
        Of the run.
    links : dict of str to str
        What was written, and where.

    Returns
    -------
    page : Path or None
        The page; None if the labels stay in memory.

    Raises
    ------
    OutputError
        If they cannot be written.
    """
    if job.table is None:
        return None
    folder = job.table.parent
    facts = {**cleaned(links), **report.as_dict()}
    picture = None if report.per_block is None else job.store.load(f"{job.labels}/{PICTURE}")
    for name, text in (("report.json", json.dumps(facts, indent=1)), ("report.html", page_of(facts, picture))):
        with disk_errors(folder / name):
            draft = folder / f"{name}.partial"
            draft.write_text(text, encoding="utf-8")
            draft.replace(folder / name)
    return folder / "report.html"
