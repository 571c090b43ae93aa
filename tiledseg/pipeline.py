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

from . import flows, masks, publish, stitch, survey
from .addresses import without_credentials
from .cluster import Crew, Executor, connect, crew_of, resolve_device
from .config import MasksConfig, Settings
from .errors import OutputError, ScratchError, SettingsError
from .frames import Extent, anisotropy_of, extent_of, label_shape
from .grid import WorkingGrid
from .images import Image, at_level, at_region, open_image, parse_region
from .inputs import Input, inputs_of, inputs_text
from .job import Diameter, Job, Surveyed, grid_of, halo_of
from .ledger import Ledger
from .mask import Mask, open_mask
from .networks.models import Model, find_model
from .networks.runner import computes_in_bfloat16, precision_of, torch_threads_kept
from .omezarr import labels_exist, level_array
from .pictures import histogram
from .preflight import Preflight
from .progress import Listener, Progress
from .reach import in_order
from .remote import Location
from .repair import forget
from .report import Report, report_of, write_report
from .runs import Place, in_batches, is_shippable, labels_folder, place_of, reopen, scratch_of, shippable
from .segmenters import ALL_CHANNELS, Segmenter, segmenter_settings
from .store import DiskStore, MemoryStore, Store

__all__ = ["Report", "Segmentation", "estimate_diameter", "preview", "segment"]

logger = logging.getLogger(__name__)

FEW_BLOCKS = 4
HALF_A_TILE = 0.5
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Segmentation:
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
    """

    report: Report
    path: Location | None
    table_path: Location | None
    report_path: Location | None
    _job: Job = dataclasses.field(repr=False)

    @functools.cached_property
    def labels(self) -> Any:
        """Labels of level 0, a dask.array.Array of uint32; axes of the image without the channel.

        Lazy where they are on disk.
        """
        import dask.array

        job = self._job
        if job.plan is not None:
            return dask.array.from_zarr(level_array(job.plan, 0))
        labels = job.store.open(f"{job.labels}/published")
        return dask.array.from_array(labels, chunks="auto", name=False)

    @property
    def table(self) -> Any:
        """The object table, a pyarrow.Table (``.to_pandas()`` for a data frame)."""
        if self.table_path is None:
            return publish.table_of(self._job)
        import pyarrow.parquet

        place = self.table_path
        return pyarrow.parquet.ParquetFile(place if isinstance(place, Path) else BytesIO(place.read_bytes())).read()


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
    progress: Listener | None = None,
    **settings: Any,
) -> Segmentation:
    """Label every cell of an image.

    Parameters
    ----------
    image : path, address, zarr.Array, dask array or numpy array
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
    view = _view_of(image, axes, asked)
    opened, chosen = view.image, view.settings
    inputs, labeller = _labeller_of(opened, chosen, segmenter)
    place = place_of(opened, output, scratch, chosen)
    _check_geometry(labeller, chosen, opened)
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
            labeller, chosen = _in_precision(labeller, chosen, device, executor, store)
        job = Job(opened, inputs, chosen, labeller, device, store, mask=view.mask)
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
        with Ledger(store, executor.totals, executor.troubles.quarantined, progress) as ledger:
            try:
                job, facts = _run(job, preflight, run_id, executor, ledger.progress)
            except ScratchError as error:
                raise forget(job, error) from error
            parameters = {**asked.flat(), "mask": chosen.survey.mask}
            report = report_of(job, executor, ledger, facts, parameters, view.pixel, place.scratch)
        path = None if place.plan is None else place.plan.path
        page = write_report(report, job, {"labels": str(path), "table": str(place.table)})
        return Segmentation(report, path, place.table, page, job)


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
    place = preflight.place
    with torch_threads_kept(), _kernels(job, executor) as are_ready:
        job = dataclasses.replace(job, table=place.table, plan=place.plan)
        if job.segmenter is None:
            job = dataclasses.replace(job, surveyed=survey.run(job, executor, progress))
            _check_geometry(job.labeller, job.settings, job.image, job.found.diameter.value)
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
    return job, facts


@dataclass(frozen=True)
class _View:
    """What of an image is segmented.

    Attributes
    ----------
    image : Image
        The region and the level that were asked for.
    settings : Settings
        With sizes in pixels of that level.
    mask : Mask or None
    pixel : float
        Width of a pixel of that level in pixels of the full-size image.
    """

    image: Image
    settings: Settings
    mask: Mask | None
    pixel: float


def _view_of(source: Any, axes: str | None, settings: Settings) -> _View:
    """Open an image, as far as it is to be segmented."""
    image, survey, masks = open_image(source, axes=axes), settings.survey, settings.masks
    if survey.region is not None:
        image = at_region(image, parse_region(survey.region, image.axes))
    extent = extent_of(image, settings)
    _check_volume(image, settings, extent)
    scale = dict.fromkeys(image.spatial_axes, 1.0)
    if survey.level:
        full, image = image, at_level(image, survey.level)
        scale = dict(zip(image.spatial_axes, full.levels[survey.level].scale, strict=True))
        if len(extent.flows) == 3:
            thickness = (anisotropy_of(full, settings) or 1.0) * scale["z"] / scale["x"]
            settings = dataclasses.replace(settings, flows=dataclasses.replace(settings.flows, anisotropy=thickness))
    given, pixel = survey.diameter_given(), scale["x"]
    n_pixels = math.prod(scale[axis] for axis in extent.objects)
    if given is not None and given[1] == "px":
        survey = dataclasses.replace(survey, diameter=given[0] / pixel)
    sizes = {name: round(getattr(masks, name) / n_pixels) for name in ("min_size", "max_size")}
    if masks.max_size:
        sizes["max_size"] = max(1, sizes["max_size"])
    settings = dataclasses.replace(settings, survey=survey, masks=dataclasses.replace(masks, **sizes))
    if survey.mask is None:
        return _View(image, settings, None, pixel)
    mask = open_mask(survey.mask, image)
    settings = dataclasses.replace(settings, survey=dataclasses.replace(survey, mask=mask.pixels.name))
    return _View(image, settings, mask, pixel)


def _check_volume(image: Image, settings: Settings, extent: Extent) -> None:
    """Refuse settings of volumes and time series that do nothing; say what is taken for granted."""
    flows, masks, defaults = settings.flows, settings.masks, MasksConfig()
    is_3d = len(extent.flows) == 3
    if settings.survey.per_time and "t" not in image.axes:
        raise SettingsError(f"per_time is for time series, and {image.name} has axes {image.axes!r}; leave it out.")
    if not flows.do_3d and (flows.anisotropy != "auto" or masks.flow3d_smooth):
        name = "anisotropy" if flows.anisotropy != "auto" else "flow3d_smooth"
        raise SettingsError(f"{name} counts in 3D only; give do_3d (--do-3d) as well, or leave it out.")
    if is_3d and masks.flow_threshold != defaults.flow_threshold:
        raise SettingsError("flow_threshold does not count in 3D, where shapes are not checked; leave it out.")
    if (flows.do_3d or masks.stitch_threshold) and not extent.objects.startswith("z"):
        logger.info("%s has a single plane: cells are sought in two dimensions.", image.name)
    if is_3d and anisotropy_of(image, settings) is None:
        logger.warning(
            "%s does not say how thick its planes are: they are taken to be as thick as pixels are wide; "
            "give --anisotropy.",
            image.name,
        )


def _labeller_of(
    image: Image, settings: Settings, segmenter: Callable[[Any], Any] | None = None
) -> tuple[tuple[Input, ...], Model | Segmenter]:
    """What is shown of the image, and what finds the cells; a channel taken for want of a word is named."""
    survey = settings.survey
    if segmenter is None:
        model = _model_of(settings)
        inputs = inputs_of(image, survey, model.n_inputs, f"model {model.name}")
        _say_what_is_shown(image, settings, inputs)
        return inputs, model
    if survey.channel == ALL_CHANNELS and ALL_CHANNELS not in image.channels:
        every = tuple(Input((i,)) for i in range(image.n_channels))
        return every, Segmenter.of(segmenter, takes_all_channels=True)
    inputs = inputs_of(image, survey, 1, "a segmenter")
    _say_what_is_shown(image, settings, inputs)
    return inputs, Segmenter.of(segmenter)


def _say_what_is_shown(image: Image, settings: Settings, inputs: tuple[Input, ...]) -> None:
    """Name what is taken of several channels for want of a word."""
    survey = settings.survey
    if image.n_channels > 1 and survey.channel is None and survey.chan is None:
        logger.info(
            "%s has channels %s; taking %s, another with --channel.",
            image.name,
            ", ".join(image.channels),
            inputs_text(image, inputs),
        )


def _model_of(settings: Settings) -> Model:
    """The network, with its tiles as far apart as the settings say."""
    flows = settings.flows
    return find_model(flows.model, HALF_A_TILE if flows.augment else flows.tile_overlap)


def _in_precision(
    model: Model | Segmenter, settings: Settings, device: str, executor: Executor, store: Store
) -> tuple[Model | Segmenter, Settings]:
    """A network, and the settings, with the precision that all who work compute in."""
    if not isinstance(model, Model):
        return model, settings
    precision = settings.flows.precision
    if precision == "auto":
        # A run that goes on elsewhere goes on in what it began with.
        began_with = (store.read_json("run.json") or {}).get("settings", {}).get("precision")
        precision = began_with if began_with in PRECISIONS else "auto"
    what = "CPU" if device == "cpu" else "GPU"
    have = [it for it in executor.ask(functools.partial(computes_in_bfloat16, device)) if it is not None]
    if precision == "auto":
        precision = precision_of(model, device, all(have))
        if any(have) and precision != precision_of(model, device, True):
            logger.info("not every worker's %s computes in bfloat16: the network computes in float32 on all.", what)
    if precision == "bfloat16" and not all(have):
        logger.warning("this %s does not compute in bfloat16: the network would be faster in float32.", what)
    flows = dataclasses.replace(settings.flows, precision=precision)
    return dataclasses.replace(model, precision=precision), dataclasses.replace(settings, flows=flows)


def _n_blocks(image: Image, settings: Settings) -> int:
    return grid_of(label_shape(image), settings, extent_of(image, settings), 0, 1.0).n_blocks


def _check_geometry(
    labeller: Model | Segmenter, settings: Settings, image: Image, diameter: float | None = None
) -> None:
    """Refuse a diameter and blocks that do not go together; without a diameter, what can be told."""
    value = diameter or settings.survey.diameter_px(image.spacing_um())
    if value is None:
        return
    shape, extent = label_shape(image), extent_of(image, settings)
    anisotropy = anisotropy_of(image, settings) or 1.0
    if isinstance(labeller, Model):
        WorkingGrid.for_diameter(shape[extent.n_flow_frames :], value, labeller.diam_mean, anisotropy)
    halo, block = halo_of(settings, value), settings.masks.block
    if block == "auto":
        return
    if int(block) < halo and any(
        int(block) < n for n, axis in zip(shape, extent.axes, strict=True) if axis in extent.objects
    ):
        times = "two" if halo == math.ceil(2 * value) else "three"
        raise SettingsError(
            f"block {block} is smaller than the halo of {halo} px ({times} diameters of {value:g} px); "
            f"give --block {halo} or more."
        )


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
    progress: Listener | None = None,
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
    view = _view_of(image, axes, chosen)
    opened, chosen = view.image, view.settings
    inputs, model = _labeller_of(opened, chosen)
    with connect(small=True) as executor, torch_threads_kept():
        device, store = executor.device(chosen.flows.device), MemoryStore()
        model, chosen = _in_precision(model, chosen, device, executor, store)
        job = Job(opened, inputs, chosen, model, device, store, mask=view.mask)
        moments = survey.run(job, executor, Progress(progress)).moments
        moment = max(range(len(moments)), key=lambda i: moments[i].diameter.value)
        found = moments[moment].diameter.times(view.pixel)
        if picture is not None:
            if found.source != "estimated":
                raise SettingsError(
                    f"there is no histogram to draw: the diameter is {found.source}, not estimated from objects."
                )
            sizes = job.store.load(survey.sizes_name(moment))
            histogram(sizes * view.pixel, Path(picture), found.value, found.quartiles)
        return found


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
) -> dict[str, Any]:
    """What `segment` would do and what it would need, without doing it.

    Parameters
    ----------
    image, output, client, scheduler, workers, security, scratch, axes, settings
        As for `segment`.
    measure : bool
        Measure for a few seconds how fast this machine is, and foretell how long the run takes.

    Returns
    -------
    plan : dict
        ``image`` as opened; ``channel``; where ``labels``, ``table`` and ``scratch`` would go and the
        ``state`` of what is there; ``diameter_source``: ``"given"``, ``"estimated"`` or ``"default"`` by an
        earlier run that is to be continued, or ``"assumed"``: the model's own, until the survey has run; then
        all that `preflight.Needs` tells; ``seconds`` of the stages that take longest, if measured; and
        ``refused``, why it cannot fit, None if it can.
    """
    chosen = Settings.of(**settings)
    view = _view_of(image, axes, chosen)
    opened, chosen = view.image, view.settings
    inputs, model = _labeller_of(opened, chosen)
    place = place_of(opened, output, scratch, chosen)
    _check_geometry(model, chosen, opened)
    is_small = _n_blocks(opened, chosen) <= FEW_BLOCKS or not is_shippable(opened)
    crew = _crew({"client": client, "scheduler": scheduler, "workers": workers, "security": security}, chosen, is_small)
    device = "cpu" if chosen.flows.device == "cpu" else resolve_device("auto")
    diameter = _expected_diameter(opened, chosen, _model_of(chosen), place)
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
    return {
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


def _expected_diameter(image: Image, settings: Settings, model: Model, place: Place) -> Diameter:
    """The diameter as given, as an earlier run found it, or assumed to be the model's own."""
    given = settings.survey.diameter_px(image.spacing_um())
    if given is not None:
        return Diameter(given, "given", (given, given))
    document = place.store.read_json("survey.json")
    if document is not None:
        return Surveyed.from_json(document).diameter
    return Diameter(model.diam_mean, "assumed", (model.diam_mean,) * 2)
