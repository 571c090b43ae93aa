"""The order of the stages, and what a resumed run may change."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import flows, masks, publish, stitch, survey
from .addresses import without_credentials
from .cluster import Crew, Executor, connect, crew_of, resolve_device
from .config import Settings
from .diameters import sizes_name
from .displayed import Displayed, place_text
from .errors import OutputError, ScratchError, SettingsError
from .exports import check_flat
from .frames import extent_of, label_axes, label_shape
from .images import Image, open_image
from .inputs import inputs_text
from .job import Diameter, Estimate, Job, Surveyed, grid_of
from .ledger import Ledger
from .live import told
from .networks.models import Model
from .networks.runner import computes_in_bfloat16, precision_of, torch_threads_kept
from .omezarr import labels_exist, level_array
from .opening import Part, check_geometry, in_precision, labeller_of, model_of, part_of
from .pictures import histogram
from .preflight import Preflight, size_text
from .progress import Listener, Progress
from .reach import in_order
from .remote import Location
from .repair import forget
from .report import Report, report_of, write_report
from .runs import (
    Place,
    in_batches,
    is_shippable,
    labels_folder,
    place_of,
    precision_begun_with,
    reopen,
    scratch_of,
    shippable,
)
from .segmenters import segmenter_settings
from .store import DiskStore, MemoryStore
from .table import table_of
from .viewing import View, scene_of

__all__ = ["Plan", "Report", "Segmentation", "estimate_diameter", "preview", "segment"]

logger = logging.getLogger(__name__)

FEW_BLOCKS = 4
MANY_FILES = 20_000
"""From here on file systems, and those who copy them, begin to suffer."""


@dataclass(frozen=True, repr=False)
class Segmentation(Displayed):
    """The result of a run.

    Attributes
    ----------
    report : Report
    path : Path, RemotePath or None
        Folder of the published label image.
    table_path : Path, RemotePath or None
        The object table, where it is stored.
    report_path : Path, RemotePath or None
        The report as a page for browsers; ``report.json`` beside it has the same figures.
    job : Job
        The run as its stages saw it.
    part : Part
        What of the image was asked for, and how.
    """

    report: Report
    path: Location | None
    table_path: Location | None
    report_path: Location | None
    job: Job
    part: Part

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"at {place_text(self.path)}"
        return f"<Segmentation of {self.job.image.name}: {self.report.n_objects:,} objects, labels {where}>"

    @property
    def image(self) -> Image:
        """What was segmented: the image, or the region and level of it that were asked for."""
        return self.job.image

    def open_labels(self) -> Image:
        """The labels with all their levels, as an image of the axes without c."""
        if self.path is None:
            return open_image(self.job.store.open(f"{self.job.labels}/published"), axes=self.job.extent.axes)
        return open_image(str(self.path))

    @functools.cached_property
    def labels(self) -> Any:
        """Labels of level 0, a dask.array.Array of uint32; axes of the image without the channel.

        Lazy where they are on disk.
        """
        import dask.array

        job = self.job
        if job.plan is not None:
            return dask.array.from_zarr(level_array(job.plan, 0))
        labels = job.store.open(f"{job.labels}/published")
        return dask.array.from_array(labels, chunks="auto", name=False)

    @property
    def exports(self) -> dict[str, Location]:
        """What else was asked for: where ``"csv"``, and ``"geojson"`` or ``"geoparquet"`` are."""
        return dict(publish.exports_of(self.job))

    @property
    def table(self) -> Any:
        """The object table, a pyarrow.Table (``.to_pandas()`` for a data frame)."""
        place = self.table_path
        return (
            table_of(self.job, self.job.settings.publish.features) if place is None else self._table_file(place).read()
        )

    def _table_file(self, place: Location) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(place if isinstance(place, Path) else BytesIO(place.read_bytes()))

    def object_sizes(self, n_most: int) -> tuple[npt.NDArray[np.float64], int]:
        """Diameters of objects as circles, or of volumes as balls.

        Parameters
        ----------
        n_most : int
            Of more objects some row groups of the table are read, as far apart as they can be.

        Returns
        -------
        sizes : array of float64, shape (n,)
            In pixels of what was segmented; of thick planes in their y and x.
        n_objects : int
            In all.
        """
        n, is_flat = self.report.n_objects, len(self.job.extent.objects) == 2
        name = "area" if is_flat else "volume"
        if self.table_path is None:
            pixels = self.table[name].to_numpy()
        else:
            file = self._table_file(self.table_path)
            groups = range(file.num_row_groups)
            n_groups = max(1, len(groups) * n_most // max(n, 1))
            pixels = file.read_row_groups(groups[:: -(-len(groups) // n_groups) or 1], columns=[name])[name].to_numpy()
        if is_flat:
            return 2 * np.sqrt(pixels / math.pi), n
        return np.cbrt(6 * pixels * self.job.anisotropy / math.pi), n

    def view(self, port: int = 0) -> View:
        """The labels over what was segmented, in the browser; in Jupyter the result shows itself.

        Parameters
        ----------
        port : int
            On loopback; 0 takes a free one.

        Returns
        -------
        View
            ``.url`` is the address, ``.open()`` opens the browser.

        Raises
        ------
        SettingsError
            If neuroglancer is not installed, or the port is taken.
        """
        image, plan = self.job.image, self.job.plan
        if plan is not None:
            labels = open_image(str(plan.path))
            return View(scene_of(plan.root.name, image, [(plan.name, labels)]), port)
        keep = [at for at, axis in enumerate(image.axes) if axis != "c"]
        labels = dataclasses.replace(
            open_image(self.labels, axes=label_axes(image)),
            spacing=tuple(image.spacing[at] for at in keep),
            translation=tuple(image.translation[at] for at in keep),
            units=tuple(image.units[at] for at in keep),
        )
        return View(scene_of(image.name, image, [(self.job.settings.publish.name, labels)]), port)


def segment(
    image: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    segmenter: Callable[[Any], Any] | None = None,
    client: Any = None,
    scheduler: str | None = None,
    workers: int | None = None,
    security: Any = None,
    scratch: str | os.PathLike[str] | None = None,
    restart: bool = False,
    axes: str | None = None,
    progress: Listener | bool | None = None,
    **settings: Any,
) -> Segmentation:
    """Label every cell of an image.

    Parameters
    ----------
    image : path, address, Image, zarr.Array, dask array or numpy array
        OME-Zarr, Zarr or TIFF by path, the first two also by address (``s3://``, ``http://``, ``https://``); axes
        ``yx`` or ``zyx``, also with c and t. Of a volume say how cells are sought: ``do_3d=True``, or
        ``stitch_threshold``.
    output : path or address, optional
        OME-Zarr to hold the labels, as ``labels/<name>``, also on ``s3://``. Default: the image itself if it is
        an OME-Zarr that can be written; for arrays, none: labels stay in memory.
    segmenter : callable, optional
        A function that finds the cells in place of the network, see Notes.
    client : distributed.Client or cluster, optional
        Where to work. Default: processes made here, one for every four cores or one per GPU; this process
        where that is one, or the image has a few blocks only.
    scheduler : str, optional
        Address or scheduler file of a running Dask scheduler.
    workers : int, optional
        Number of processes to make here, also if it is one.
    security : distributed.Security, optional
        Certificates for a scheduler behind TLS; without, those that Dask's configuration names.
    scratch : path, optional
        Folder for what is in between, reachable by all workers. Default: beside the output; of a remote one the
        present folder, but a cluster that was given wants to be told.
    restart : bool
        Discard what an earlier run left there, with the labels it published.
    axes : str, optional
        Axes of an array that does not say them.
    progress : callable or bool, optional
        Called with stage, pieces done, pieces in all; or whether to show them. Default: shown in a Jupyter notebook.
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

    Notes
    -----
    `segmenter` is called with the pixels of a block and its halo: an array of shape (*spatial) of the
    chosen channel, or (c, *spatial) of all with ``channel="all"``, in the image's own type. It returns
    whole numbers of shape (*spatial), 0 for background; ids may have gaps. Survey and network do not
    run and their settings are refused. Give ``halo``, at least the size of the largest objects, or
    ``diameter``: the halo is then two of these, and more where an object reaches the edge.
    ``min_size`` is 0 unless given. Labels of neighbouring blocks are linked where they overlap by half;
    they do not depend on the blocks if the function finds an object whatever lies beyond the halo:
    normalise by fixed values, not by those of the block. The report says how well blocks agreed.

    The function is called by several threads at once, on the CPU workers made here; for one that uses
    GPUs, or is not safe with threads, give a client with one thread per worker. A run goes on only
    with the same function, known by its name, source and captured values (`segmenters.identity_of`).

    Examples
    --------
    >>> def nuclei(pixels):
    ...     from scipy import ndimage
    ...     from skimage.segmentation import watershed
    ...     mask = ndimage.gaussian_filter(pixels.astype(float), 2) > 500
    ...     distance = ndimage.distance_transform_edt(mask)
    ...     seeds = ndimage.label(distance > 5)[0]
    ...     return watershed(-distance, seeds, mask=mask)
    >>> segment("slide.ome.zarr", segmenter=nuclei, diameter=30)  # doctest: +SKIP
    """
    asked = Settings.of(**settings) if segmenter is None else segmenter_settings(settings)
    part = part_of(image, axes, asked)
    opened, chosen = part.image, part.settings
    inputs, labeller = labeller_of(opened, chosen, segmenter)
    place = place_of(opened, output, scratch, chosen)
    check_geometry(labeller, chosen, opened)
    _check_outputs(opened, chosen, place)
    if scratch is None:
        _say_where_scratch_is(place, client is not None or scheduler is not None)
    is_small = _n_blocks(opened, chosen) <= FEW_BLOCKS or not is_shippable(opened)
    device = chosen.flows.device if segmenter is None else "cpu"
    with (
        scratch_of(place) as store,
        connect(
            client, scheduler=scheduler, workers=workers, device=device, small=is_small, security=security
        ) as executor,
    ):
        if segmenter is None:
            device = executor.device(device)
            began_with = None if restart else precision_begun_with(store)
            labeller, chosen = in_precision(labeller, chosen, device, executor, began_with)
        job = Job(opened, inputs, chosen, labeller, device, store, mask=part.mask)
        preflight = Preflight(opened, inputs, chosen, labeller, place, executor.crew, device)
        given = chosen.survey.diameter_px(opened.spacing_um())
        preflight.settled(given).check(given)
        run_id = reopen(job, place, restart)
        job = in_batches(job, executor)
        if segmenter is None and device == "cpu" and chosen.flows.device == "auto":
            logger.info("no GPU found: the network runs on the CPU.")
        if executor.dashboard is not None:
            logger.info("Dask shows what it does at %s", without_credentials(executor.dashboard))
        job = shippable(job, executor)
        with (
            told(progress) as listener,
            Ledger(store, executor.totals, executor.troubles.quarantined, listener) as ledger,
        ):
            try:
                job, facts = _run(job, preflight, run_id, executor, ledger.progress)
            except ScratchError as error:
                raise forget(job, error) from error
            parameters = {**asked.flat(), "mask": chosen.survey.mask}
            report = report_of(job, executor, ledger, facts, parameters, part.pixel, place.scratch)
        path = None if place.plan is None else place.plan.path
        page = write_report(report, job, {"labels": str(path), "table": str(place.table)})
        return Segmentation(report, path, place.table, page, job, part)


class Plan(dict[str, Any], Displayed):
    """What a run would do, see `preview`; shows itself in Jupyter."""

    def __repr__(self) -> str:
        would = f"{self['n_blocks']:,} blocks, {self['n_tiles']:,} tiles, {size_text(self['memory_bytes'])} of memory"
        return f"<Plan for {self['image']['name']}: {'refused' if self['refused'] else would}>"


def _say_where_scratch_is(place: Place, is_elsewhere: bool) -> None:
    """Where labels are remote, nothing is beside them: name the folder, or want one that workers reach as well."""
    if place.plan is None or isinstance(place.plan.root, Path):
        return
    if is_elsewhere:
        raise SettingsError(
            f"labels go to {place.plan.root}, where workers cannot keep what is in between; give a folder that all of "
            "them reach (--scratch)."
        )
    logger.info("what is in between goes to %s, another place with --scratch.", place.scratch)


def _run(
    job: Job, preflight: Preflight, run_id: str, executor: Executor, progress: Progress
) -> tuple[Job, dict[str, Any]]:
    """The five stages, the first two for a network only; the job as it ended, and what the stitcher tells."""
    place, image = preflight.place, job.image
    job = dataclasses.replace(job, image=image.for_a_run())
    if job.segmenter is None and not job.store.done("flows"):
        executor.ask(functools.partial(flows.begin_loading, job.model, job.device))
    with torch_threads_kept(), _kernels(job, executor) as are_ready:
        job = dataclasses.replace(job, table=place.table, plan=place.plan)
        if job.segmenter is None:
            job = dataclasses.replace(job, surveyed=survey.run(job, executor, progress))
            check_geometry(job.labeller, job.settings, job.image, job.found.diameter.value)
        known = None if job.diameter is None else job.diameter.value
        preflight = preflight.settled(known)
        preflight.check(known)
        masks_settings = dataclasses.replace(job.settings.masks, block=preflight.settings.masks.block)
        job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, masks=masks_settings))
        job = dataclasses.replace(job, labels=labels_folder(job, place, run_id))
        mask_tasks = masks.tasks_of(job, progress, begin=are_ready)
        if job.segmenter is None:
            executor.work(*in_order(job, flows.tasks_of(job, progress), mask_tasks))
        else:
            executor.work(mask_tasks)
        facts = stitch.run(job, executor, progress)
        publish.run(job, executor, progress)
    return dataclasses.replace(job, image=image), facts


def _n_blocks(image: Image, settings: Settings) -> int:
    return grid_of(label_shape(image), settings, extent_of(image, settings), 0, 1.0).n_blocks


def _check_outputs(image: Image, settings: Settings, place: Place) -> None:
    """Refuse files that cannot be written; say what to do about labels of very many."""
    wanted = settings.publish
    if place.plan is None:
        for name in ("shard", "csv", "polygons"):
            if getattr(wanted, name):
                raise SettingsError(f"{name} is about files, and labels of an array stay in memory; give an output.")
        return
    if wanted.polygons is not None:
        check_flat(extent_of(image, settings).objects, wanted.name)
    n_files = place.plan.n_files
    if n_files > MANY_FILES and place.plan.shards is None and place.plan.version != "0.4":
        logger.info("the labels will be up to %d files; --shard puts them together in far fewer.", n_files)


@contextlib.contextmanager
def _kernels(job: Job, executor: Executor) -> Iterator[Callable[[], None]]:
    """Compile the kernels of the masks, or load them; gives what waits until they are there.

    For other processes before they work, since each would compile them; in this one beside survey and network.
    """
    from .dynamics import warm_up

    if job.segmenter is not None or not isinstance(job.store, DiskStore):
        yield lambda: None
        return
    with ThreadPoolExecutor(1, "tiledseg-kernels") as beside:
        warming = beside.submit(warm_up, len(job.extent.flows))
        if not executor.in_process:
            warming.result()
        yield warming.result


def estimate_diameter(
    image: Any,
    *,
    picture: str | os.PathLike[str] | None = None,
    axes: str | None = None,
    progress: Listener | bool | None = None,
    **settings: Any,
) -> Diameter:
    """Estimate the one diameter of an image's cells, in this process; writes nothing but a picture.

    Parameters
    ----------
    image, axes, progress, settings
        As for `segment`.
    picture : path, optional
        PNG to write with a histogram of the objects that the estimate rests on.

    Returns
    -------
    Diameter
        In pixels of level 0, with quartiles and the number of objects it rests on.

    Raises
    ------
    TiledsegError
        As for `segment`; also if a picture is asked for and too few objects were found to draw one.
    """
    chosen = Settings.of(**settings)
    if chosen.masks.stitch_threshold is None and not chosen.flows.do_3d:
        # The diameter is measured plane by plane in any case.
        chosen = dataclasses.replace(chosen, masks=dataclasses.replace(chosen.masks, stitch_threshold=0))
    part = part_of(image, axes, chosen)
    opened, chosen = part.image, part.settings
    inputs, model = labeller_of(opened, chosen)
    with connect(small=True) as executor, torch_threads_kept(), told(progress) as listener:
        device, store = executor.device(chosen.flows.device), MemoryStore()
        model, chosen = in_precision(model, chosen, device, executor)
        job = Job(opened, inputs, chosen, model, device, store, mask=part.mask)
        moments = survey.run(job, executor, Progress(listener)).moments
        moment = max(range(len(moments)), key=lambda i: moments[i].diameter.value)
        found = moments[moment].diameter.times(part.pixel)
        is_estimated = found.source == "estimated"
        sizes = job.store.load(sizes_name(moment)) * part.pixel if is_estimated else np.zeros(0)
        if picture is not None:
            if not is_estimated:
                raise SettingsError(
                    f"there is no histogram to draw: the diameter is {found.source}, not estimated from objects."
                )
            histogram(sizes, Path(picture), found.value, found.quartiles)
        return Estimate(**found.as_dict(), sizes=sizes)


def _state(place: Place) -> str:
    """What `segment` would find where it writes."""
    if place.scratch is not None and (place.scratch / "run.json").exists():
        return "an earlier run, to be continued or refused"
    if place.plan is not None and place.plan.path.exists() and labels_exist(place.plan):
        return "labels of that name, so segment would refuse"
    return "nothing yet"


def _crew(who: dict[str, Any], settings: Settings, small: bool) -> Crew:
    """Who would work; nothing is started for it."""
    if who["client"] is None and who["scheduler"] is None:
        return crew_of(who["workers"], settings.flows.device, small)
    with connect(**who) as executor:
        return executor.crew


def preview(
    image: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    client: Any = None,
    scheduler: str | None = None,
    workers: int | None = None,
    security: Any = None,
    scratch: str | os.PathLike[str] | None = None,
    axes: str | None = None,
    measure: bool = False,
    **settings: Any,
) -> Plan:
    """What `segment` would do and what it would need, without doing it.

    Parameters
    ----------
    image, output, client, scheduler, workers, security, scratch, axes, settings
        As for `segment`.
    measure : bool
        Measure for a few seconds how fast this machine is, and foretell how long the run takes.

    Returns
    -------
    plan : Plan
        A dict, which shows itself in Jupyter: ``image`` as opened; ``channel``; where ``labels``, ``table`` and
        ``scratch`` would go and the ``state`` of what is there; ``diameter_source``: ``"given"``, ``"estimated"`` or
        ``"default"`` by an earlier run that is to be continued, or ``"assumed"``: the model's own, until the survey
        has run; then all that `preflight.Needs` tells; ``seconds`` of the stages that take longest, if measured; and
        ``refused``, why it cannot fit, None if it can.
    """
    chosen = Settings.of(**settings)
    part = part_of(image, axes, chosen)
    opened, chosen = part.image, part.settings
    inputs, model = labeller_of(opened, chosen)
    place = place_of(opened, output, scratch, chosen)
    check_geometry(model, chosen, opened)
    _check_outputs(opened, chosen, place)
    is_small = _n_blocks(opened, chosen) <= FEW_BLOCKS or not is_shippable(opened)
    crew = _crew({"client": client, "scheduler": scheduler, "workers": workers, "security": security}, chosen, is_small)
    device = "cpu" if chosen.flows.device == "cpu" else resolve_device("auto")
    diameter = _expected_diameter(opened, chosen, model_of(chosen), place)
    precision = chosen.flows.precision
    if isinstance(model, Model):
        here = precision_of(model, device, bool(computes_in_bfloat16(device)))
        model = dataclasses.replace(model, precision=here if precision == "auto" else precision)
    preflight = Preflight(opened, inputs, chosen, model, place, crew, device).settled(diameter.value)
    refused = None
    try:
        preflight.check(None if diameter.source == "assumed" else diameter.value)
    except (SettingsError, OutputError) as error:
        refused = str(error)
    facts = {
        "image": opened.describe(),
        "channel": inputs_text(opened, inputs),
        "labels": None if place.plan is None else str(place.plan.path),
        "table": None if place.table is None else str(place.table),
        "scratch": None if place.scratch is None else str(place.scratch),
        "state": _state(place),
        "diameter_source": diameter.source,
        **preflight.needs(diameter.value).as_dict(),
        "seconds": preflight.seconds(diameter.value) if measure else {},
        "refused": refused,
    }
    return Plan(facts)


def _expected_diameter(image: Image, settings: Settings, model: Model, place: Place) -> Diameter:
    """The diameter as given, as an earlier run found it, or assumed to be the model's own."""
    given = settings.survey.diameter_px(image.spacing_um())
    if given is not None:
        return Diameter(given, "given", (given, given))
    document = place.store.read_json("survey.json")
    if document is not None:
        return Surveyed.from_json(document).diameter
    return Diameter(model.diam_mean, "assumed", (model.diam_mean,) * 2)
