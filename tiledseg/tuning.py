"""Trying mask settings on a region: the network is asked once, masks are made again for every change.

The flows are those of a run, or are computed for the region alone on the lattice of the whole image, after a survey of
the whole image. So what is seen is what a run gives there, bit for bit, and not what it would give for a cut-out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import flows, masks, survey
from .canvas import Picture
from .changes import changes_between, draw_changes
from .cluster import connect
from .config import MasksConfig, Settings
from .displayed import Displayed
from .errors import ImageError, SettingsError
from .frames import label_axes
from .grid import Region, region_shape, region_text
from .images import at_region, open_image
from .job import Job, Surveyed
from .live import in_notebook, told
from .looks import look_at
from .networks.runner import torch_threads_kept
from .opening import Part, check_geometry, in_precision, labeller_of, part_of
from .pipeline import Segmentation
from .progress import Listener, Progress
from .quicklook import chosen_bounds, ground_of
from .reach import Reach
from .runs import in_batches
from .store import DiskStore

__all__ = ["TUNABLE", "Tuned", "Tuner", "tune"]

TUNABLE = ("flow_threshold", "cellprob_threshold", "min_size", "max_size", "niter", "resample", "flow3d_smooth")
SIDE = {2: 1024, 3: 192}
"""Of the region that is taken if none is given, by the number of axes that flows are followed along."""
MOST_PIXELS = 2**24
MAX_SIDE = 700


@dataclass(frozen=True, eq=False)
class Tuned(Displayed):
    """What some settings give in the region of a tuner.

    Attributes
    ----------
    picture : Picture
        Outlines: unchanged ones grey, what is gained blue, lost orange, of another shape yellow; of a volume in its
        middle plane.
    labels : array of uint32, shape of the region along the axes of labels
        As a run gives them there, but numbered 1..n.
    settings : dict
        That differ from the defaults, for `segment`.
    n_objects, n_before : int
        Objects now, and with the settings that the tuner began with.
    n_gained, n_lost, n_changed : int
        Of now without a counterpart before (IoU 0.5), of before without one now, and those with one of clearly
        another shape (IoU below 0.8).
    """

    picture: Picture
    labels: npt.NDArray[np.uint32] = dataclasses.field(repr=False)
    settings: dict[str, Any]
    n_objects: int
    n_before: int
    n_gained: int
    n_lost: int
    n_changed: int

    def __repr__(self) -> str:
        return (
            f"<Tuned: {self.n_objects:,} objects, {self.n_gained:,} gained, {self.n_lost:,} lost, "
            f"{self.n_changed:,} changed in shape>"
        )


class Tuner(Displayed):
    """Makes masks of a region again with other settings; see `tune`.

    Call it with the settings to change, from those that it began with: ``tuner(flow_threshold=0.6)`` gives a `Tuned`.
    In Jupyter it shows sliders, if ipywidgets are there.

    Attributes
    ----------
    region : tuple of slice
        Along the axes of the labels.
    shown : Tuned
        The last that was made.
    """

    def __init__(self, job: Job, part: Part, region: Region, channels: Any = None) -> None:
        self.region, self._job, self._part = region, job, part
        bounds = dict(zip(job.extent.axes, ((p.start, p.stop) for p in region), strict=True))
        self._look = look_at(at_region(job.image, bounds), channels=channels, labels=False)
        if "z" in bounds:
            middle = (bounds["z"][1] - bounds["z"][0]) // 2
            look = {**self._look.bounds, "z": (middle, middle + 1)}
            self._look = dataclasses.replace(self._look, bounds=look)
        where = f"{job.image.name}, {region_text(job.extent.axes, region)}"
        self._ground = dataclasses.replace(ground_of(self._look, None, MAX_SIDE), caption=where)
        self._before = self._labels(part.asked.masks)
        self.shown = self._tuned(part.asked.masks, self._before)

    def __repr__(self) -> str:
        sides = " x ".join(map(str, region_shape(self.region)))
        return f"<Tuner of {sides} pixels of {self._job.image.name}: {self.shown.n_objects:,} objects>"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of what is shown that differ from the defaults: ``segment(image, **tuner.settings)``."""
        return self.shown.settings

    @property
    def tunable(self) -> tuple[str, ...]:
        """Settings that can be changed here."""
        if len(self._job.extent.flows) == 3:
            return tuple(name for name in TUNABLE if name != "flow_threshold")
        # How large an object of several planes is, one plane does not tell.
        hidden = {"flow3d_smooth", *(("min_size", "max_size") if self._job.extent.is_stitched else ())}
        return tuple(name for name in TUNABLE if name not in hidden)

    @property
    def start(self) -> MasksConfig:
        """The settings that it began with."""
        return self._part.asked.masks

    def __call__(self, **changed: Any) -> Tuned:
        """Make the masks with some settings changed from those that the tuner began with.

        Parameters
        ----------
        **changed
            Of `tunable`, as for `segment`.

        Raises
        ------
        SettingsError
            If another setting is given, or a value is out of range.
        """
        foreign = [name for name in changed if name not in self.tunable]
        if foreign:
            raise SettingsError(
                f"{', '.join(foreign)} cannot be tuned on this region, only {', '.join(self.tunable)}; give other "
                "settings to tune()."
            )
        wanted = dataclasses.replace(self.start, **changed)
        self.shown = self._tuned(wanted, self._labels(wanted))
        return self.shown

    @functools.cached_property
    def widget(self) -> Any:
        """Sliders and picture, of ipywidgets.

        Raises
        ------
        SettingsError
            If ipywidgets are not installed.
        """
        if importlib.util.find_spec("ipywidgets") is None:
            raise SettingsError('sliders need ipywidgets; install them with: pip install -e ".[notebook]"')
        from .knobs import panel

        return panel(self)

    def _labels(self, wanted: MasksConfig) -> npt.NDArray[np.uint32]:
        """The labels of the region."""
        sized = dataclasses.replace(self._part.at_level(wanted), block=self._job.settings.masks.block)
        job = dataclasses.replace(self._job, settings=dataclasses.replace(self._job.settings, masks=sized))
        with connect(small=True) as executor:
            ((_, labels),) = executor.stream(masks.label_region, [0], self.region, job, name="masks")
        found: npt.NDArray[np.uint32] = labels
        return found

    def _tuned(self, wanted: MasksConfig, labels: npt.NDArray[np.uint32]) -> Tuned:
        """Compare, count and draw."""
        changes, pixels = changes_between(self._before, labels), self._ground.pixels.copy()
        axes = label_axes(self._look.image)
        before, now = (self._ground.labels(self._look, open_image(of, axes=axes)) for of in (self._before, labels))
        draw_changes(pixels, before, now, changes)
        counts = {f"n_{name}": n for name, n in changes.counts.items()}
        return Tuned(
            picture=self._ground.finished(pixels, self._look.image),
            labels=labels,
            settings=_given(dataclasses.replace(self._part.asked, masks=wanted)),
            n_objects=int(labels.max(initial=0)),
            n_before=int(self._before.max(initial=0)),
            **counts,
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:  # noqa: ARG002
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if in_notebook() and importlib.util.find_spec("ipywidgets") is not None:
            bundle = {**self.widget._repr_mimebundle_(), **bundle}
        return bundle


def tune(
    source: Any,
    region: str | None = None,
    *,
    channels: Any = None,
    axes: str | None = None,
    progress: Listener | bool | None = None,
    **settings: Any,
) -> Tuner:
    """Try mask settings on a region of an image or a result, in this process.

    Parameters
    ----------
    source : Segmentation, or what `segment` takes as image
        Of a result the flows are taken from its scratch, so the network is not asked. Of an image the whole is
        surveyed, and the network asked for the region.
    region : str, optional
        As for `segment`, in pixels of what is or was segmented; of one plane where cells are sought plane by plane, and
        of one time point. Default: 1024² in the middle, or 192³ of a volume.
    channels : str, int or sequence of these, optional
        To be shown, as for `show`.
    axes : str, optional
        Axes of an array that does not say them.
    progress : callable or bool, optional
        As for `segment`, of an image.
    **settings
        To begin with, as for `segment`; not for a result, which has its own.

    Returns
    -------
    Tuner
        Shows sliders in Jupyter; also a function of the settings.

    Raises
    ------
    TiledsegError
        As for `segment`; also if a result has no flows.

    Examples
    --------
    >>> tuner = tune("slide.ome.zarr", "y=1000:2000,x=1000:2000")  # doctest: +SKIP
    >>> tuner(flow_threshold=0.6)  # doctest: +SKIP
    >>> segment("slide.ome.zarr", **tuner.settings)  # doctest: +SKIP
    """
    if isinstance(source, Segmentation):
        if settings:
            raise SettingsError(
                f"{', '.join(settings)}: a result has its own settings; change them by calling the tuner, or give "
                "the image in place of the result."
            )
        return Tuner(_job_of(source), source.part, _region_of(source.job, region), channels)
    part = part_of(source, axes, Settings.of(**settings))
    job, folder = _prepared(part, region, progress)
    tuner = Tuner(job, part, _region_of(job, region), channels)
    weakref.finalize(tuner, shutil.rmtree, folder, ignore_errors=True)
    return tuner


def _job_of(result: Segmentation) -> Job:
    """The run of a result, if its flows are still there."""
    job = result.job
    if job.segmenter is not None:
        raise SettingsError(f"labels by the function {job.segmenter.name} have no flows to tune; call it instead.")
    scratch = result.report.scratch
    is_there = scratch is None or Path(scratch).is_dir()
    document = job.store.read_json("survey.json") if is_there else None
    if document is None or Surveyed.from_json(document) != job.found:
        raise SettingsError(
            f"the scratch of this result ({scratch}) is gone or of another run; give the image in place of the result."
        )
    return job


def _region_of(job: Job, text: str | None) -> Region:
    """The region along the axes of the labels: as given, or in the middle."""
    image, extent, is_flat = job.image, job.extent, len(job.extent.flows) == 2
    planes: dict[str, int | str | None] = {}
    if not is_flat:
        # All planes of the region are worked on together.
        planes["z"] = "max"
    if text is None:
        side = SIDE[len(extent.flows)]
        starts = [
            max(0, (n - side) // 2) if axis in extent.flows else n // 2
            for axis, n in zip(extent.axes, job.shape, strict=True)
        ]
        return tuple(
            slice(start, min(n, start + (side if axis in extent.flows else 1)))
            for axis, start, n in zip(extent.axes, starts, job.shape, strict=True)
        )
    bounds, _ = chosen_bounds(image, text, planes)
    region = tuple(slice(*bounds[axis]) for axis in extent.axes)
    n_pixels = math.prod(region_shape(region))
    if n_pixels > MOST_PIXELS:
        raise ImageError(
            f"a region of {n_pixels:,} pixels is too large to see changes at once; give one of at most "
            f"{MOST_PIXELS:,}, such as 1024 x 1024."
        )
    return region


def _prepared(part: Part, region: str | None, progress: Listener | bool | None) -> tuple[Job, Path]:
    """A job whose survey is done, and its flows under a region; and the folder of its scratch."""
    inputs, model = labeller_of(part.image, part.settings)
    check_geometry(model, part.settings, part.image)
    folder = Path(tempfile.mkdtemp(prefix="tiledseg-tune-"))
    with contextlib.ExitStack() as on_error:
        on_error.callback(shutil.rmtree, folder, ignore_errors=True)
        store = DiskStore(folder / "scratch")
        store.begin()
        with connect(small=True) as executor, torch_threads_kept(), told(progress) as listener:
            device = executor.device(part.settings.flows.device)
            model, chosen = in_precision(model, part.settings, device, executor)
            job = in_batches(Job(part.image, inputs, chosen, model, device, store, mask=part.mask), executor)
            where, shown = _region_of(job, region), Progress(listener)
            job = dataclasses.replace(job, surveyed=survey.run(job, executor, shown))
            check_geometry(model, job.settings, job.image, job.found.diameter.value)
            chunks = sorted(Reach(job).under(masks.block_around(job, where)))
            tasks = dataclasses.replace(
                flows.tasks_of(job, shown), items=iter(chunks), begin=lambda: shown.start("flows", len(chunks), 0)
            )
            executor.work(tasks)
        on_error.pop_all()
    return job, folder


def _given(settings: Settings) -> dict[str, Any]:
    """Settings that are not the defaults."""
    found, defaults = {}, Settings()
    for stage in dataclasses.fields(settings):
        mine, usual = getattr(settings, stage.name), getattr(defaults, stage.name)
        for field in dataclasses.fields(mine):
            value, default = getattr(mine, field.name), getattr(usual, field.name)
            if type(value) is not type(default) or value != default:
                found[field.name] = value
    return found
