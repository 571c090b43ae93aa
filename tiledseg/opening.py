"""What of an image is segmented, and by what: from what the user gives to what the stages need."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cluster import Executor
from .config import MasksConfig, Settings
from .errors import SettingsError
from .frames import Extent, anisotropy_of, extent_of, label_shape
from .grid import WorkingGrid
from .images import Image, at_level, at_region, open_image, parse_region
from .inputs import Input, inputs_of, inputs_text
from .job import halo_of
from .mask import Mask, open_mask
from .networks.models import Model, find_model
from .networks.runner import computes_in_bfloat16, precision_of
from .segmenters import ALL_CHANNELS, Segmenter

__all__ = ["Part", "check_geometry", "in_precision", "labeller_of", "model_of", "part_of"]

logger = logging.getLogger(__name__)

HALF_A_TILE = 0.5
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Part:
    """What of an image is segmented.

    Attributes
    ----------
    image : Image
        The region and the level that were asked for.
    asked : Settings
        As they were given.
    settings : Settings
        With sizes in pixels of that level.
    mask : Mask or None
    pixel : float
        Width of a pixel of that level in pixels of the full-size image.
    n_pixels : float
        Pixels of the full-size image in one of that level, along the axes of objects.
    """

    image: Image
    asked: Settings
    settings: Settings
    mask: Mask | None
    pixel: float
    n_pixels: float

    def at_level(self, masks: MasksConfig) -> MasksConfig:
        """Mask settings with sizes in pixels of the level in place of the full-size image."""
        sizes = {name: round(getattr(masks, name) / self.n_pixels) for name in ("min_size", "max_size")}
        if masks.max_size:
            sizes["max_size"] = max(1, sizes["max_size"])
        return dataclasses.replace(masks, **sizes)


def part_of(source: Any, axes: str | None, asked: Settings) -> Part:
    """Open an image, as far as it is to be segmented."""
    image, survey, settings = open_image(source, axes=axes), asked.survey, asked
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
    if given is not None and given[1] == "px":
        survey = dataclasses.replace(survey, diameter=given[0] / pixel)
    mask = None if survey.mask is None else open_mask(survey.mask, image)
    if mask is not None:
        survey = dataclasses.replace(survey, mask=mask.pixels.name)
    part = Part(image, asked, settings, mask, pixel, math.prod(scale[axis] for axis in extent.objects))
    settings = dataclasses.replace(settings, survey=survey, masks=part.at_level(settings.masks))
    return dataclasses.replace(part, settings=settings)


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


def labeller_of(
    image: Image, settings: Settings, segmenter: Callable[[Any], Any] | None = None
) -> tuple[tuple[Input, ...], Model | Segmenter]:
    """What is shown of the image, and what finds the cells; a channel taken for want of a word is named."""
    survey = settings.survey
    if segmenter is None:
        model = model_of(settings)
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


def model_of(settings: Settings) -> Model:
    """The network, with its tiles as far apart as the settings say."""
    flows = settings.flows
    given = None if flows.tile_overlap == "auto" else float(flows.tile_overlap)
    return find_model(flows.model, HALF_A_TILE if flows.augment else given)


def in_precision(
    model: Model | Segmenter, settings: Settings, device: str, executor: Executor, began_with: str | None = None
) -> tuple[Model | Segmenter, Settings]:
    """A network, and the settings, with the precision that all compute in; a run goes on in what it began with."""
    if not isinstance(model, Model):
        return model, settings
    precision = settings.flows.precision
    if precision == "auto":
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


def check_geometry(
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
