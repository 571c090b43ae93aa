"""What a run did and what it cost, of this call and of all calls on the same scratch; written beside the table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .addresses import cleaned
from .cluster import Executor, peak_memory
from .disk import write_whole
from .flows import n_inexact_tiles
from .inputs import inputs_text
from .job import Diameter, Job, Moment
from .ledger import Ledger, Work
from .page import page_of
from .remote import Location
from .stitch import PICTURE
from .store import disk_errors

__all__ = ["Report", "report_of", "write_report"]

STAGES = ("survey", "flows", "masks", "stitch", "publish")
PACKAGES = ("tiledseg", "numpy", "numba", "scipy", "torch", "zarr", "dask", "distributed", "cellpose")


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
    n_inexact_tiles : int
        Tiles, of all calls, computed in batches that were halved for want of memory on a GPU, if that may have changed
        their last bits; 0 wherever labels are bit for bit those of any other run.
    per_block : dict or None
        Objects that reach into a block: the ``fewest`` and the ``most``, the number of ``blocks`` along each axis, and
        how many of them an element of the picture in ``report.html`` puts ``together``; None if an earlier version
        stitched the blocks.
    kept : dict of str to int
        Pieces per stage kept from an earlier call.
    quarantined : tuple of str
        Pieces that earlier calls set aside because they failed whenever tried, and why; now they are done.
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
    n_inexact_tiles: int
    per_block: dict[str, Any] | None
    kept: dict[str, int]
    quarantined: tuple[str, ...]
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
        **{field.name: getattr(work, field.name) for field in dataclasses.fields(Work)},
        segmenter=None if job.segmenter is None else job.segmenter.name,
        diameter=None if job.diameter is None else job.diameter.times(pixel),
        percentiles=moments[0].percentiles if len(moments) == 1 else None,
        per_time=moments if len(moments) > 1 else (),
        n_nonfinite=0 if found is None else found.n_nonfinite,
        n_inexact_tiles=n_inexact_tiles(job.store),
        kept=progress.kept,
        quarantined=ledger.quarantined,
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
    n_at_once = crew.n_network * crew.n_on_gpu or crew.n_workers * crew.n_threads
    return {"cpu": executor.totals.of("flows").seconds.get("network", 0.0) / (seconds * n_at_once)}


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


def write_report(report: Report, job: Job, links: dict[str, str]) -> Location | None:
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
    page : Path, RemotePath or None
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
        _write(folder / name, text.encode())
    return folder / "report.html"


def _write(place: Location, content: bytes) -> None:
    """Write a file of the output."""
    if isinstance(place, Path):
        with disk_errors(place):
            write_whole(place, lambda file: file.write(content), place.parent)
    else:
        place.upload(content)
