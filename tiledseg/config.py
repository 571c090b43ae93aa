"""Settings: one frozen dataclass per stage, the single source for command line and Python.

Each field carries its help text and checks itself on construction, so a value that reaches a stage
is a valid one. The command line is generated from these fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from .errors import SettingsError
from .urls import is_remote

__all__ = [
    "CHANNEL_SETTINGS",
    "ConvertConfig",
    "FlowsConfig",
    "MasksConfig",
    "PublishConfig",
    "Settings",
    "SurveyConfig",
    "digest",
]

logger = logging.getLogger(__name__)

SHAPES = "shapes:"
POLYGONS = {
    "geojson": "geojson",
    ".geojson": "geojson",
    ".json": "geojson",
    "geoparquet": "geoparquet",
    ".parquet": "geoparquet",
    ".geoparquet": "geoparquet",
}
"""What outlines are written as, by what was asked for or the end of the file's name."""
CHANNEL_SETTINGS = frozenset({"channel", "nuclear_channel", "combine", "chan", "chan2", "stain"})
"""Settings that say which pixels a network is shown."""


def _option(default: Any, help_text: str, metavar: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with what the command line shows of it."""
    return dataclasses.field(default=default, metadata={"help": help_text, "metavar": metavar, "choices": choices})


def _number(name: str, value: object, low: float, high: float, integer: bool = False) -> float:
    """`value` as a finite number in [low, high]; a SettingsError that names the setting otherwise."""
    kind = "a whole number" if integer else "a number"
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool) or (integer and number != int(number)):
        raise SettingsError(f"{name} must be {kind}, not {value!r}.")
    if not low <= number <= high:
        limit = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise SettingsError(f"{name} must be {limit}, not {value!r}.")
    return number


def _whole(name: str, value: object, low: float, high: float = math.inf) -> int:
    return int(_number(name, value, low, high, integer=True))


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(f"{name} must be {' or '.join(choices)}, not {value!r}.")


@dataclass(frozen=True)
class SurveyConfig:
    """What the whole image is asked before any cell is sought."""

    channel: str | int | tuple[str | int, ...] | None = _option(
        None,
        "channel to segment, by name or index from 0; 'grey' for the mean of all; several with commas between them "
        "are combined (default: the first)",
        "C",
    )
    nuclear_channel: str | int | tuple[str | int, ...] | None = _option(
        None, "channel of the nuclei, for networks that were trained with one, given like channel", "C"
    )
    combine: str = _option(
        "max", "what several channels become: the largest of their values, or the mean", choices=("max", "mean")
    )
    chan: int | None = _option(
        None,
        "channel to segment in Cellpose's numbers, in place of channel: 0 grey, 1 red (the first), 2 green, 3 blue",
        "N",
    )
    chan2: int = _option(0, "nuclear channel in Cellpose's numbers, beside chan: 0 none, 1 red, 2 green, 3 blue", "N")
    stain: str = _option(
        "none",
        "unmix this stain from the red, green and blue of a histological section and segment it; the colours are "
        "the image's three channels, or those that channel lists",
        choices=("none", "hematoxylin", "eosin", "dab"),
    )
    invert: bool = _option(False, "show the network the negative: for cells that are dark on a bright background")
    diameter: str | float = _option(
        "auto",
        "diameter of the cells: 'auto' estimates one for the whole image, a number is pixels of the "
        "full-size image, '12um' is micrometres, 'shapes:FILE' the mean of shapes drawn round cells in napari (.csv), "
        "ImageJ (.roi, .zip) or QuPath (.geojson)",
        "auto|PX|12um|shapes:FILE",
    )
    foreground: str = _option(
        "auto",
        "'auto' skips tiles and blocks in which nothing rises above the noise, 'off' skips none",
        choices=("auto", "off"),
    )
    normalize: str = _option(
        "global",
        "'global' takes one pair of percentiles for the whole image, 'local' a smooth map of them, for uneven "
        "light or stain",
        choices=("global", "local"),
    )
    per_time: bool = _option(
        False, "normalise and scale every time point by itself, for cells that grow or fade; default is one for all"
    )
    region: str | None = _option(
        None,
        "segment this part of the image only, in pixels of the full-size image, e.g. z=0:50,y=1000:3000; the labels "
        "have its size and lie in its place",
        "z=A:B,y=A:B",
    )
    level: int = _option(
        0,
        "level of the pyramid to segment, and the size of the labels; diameter and sizes stay in pixels of the "
        "full-size image. At any level the network reads the one that is just fine enough for it",
        "N",
    )
    mask: str | None = _option(
        None,
        "an array of any resolution, not 0 where cells are to be sought: OME-Zarr, Zarr or TIFF",
        "PATH",
    )
    missing_chunks: str = _option(
        "refuse",
        "what to do where the image lacks chunks: 'refuse' stops and names one, 'fill' reads them as the "
        "fill value, for images written without their empty chunks",
        choices=("refuse", "fill"),
    )

    def __post_init__(self) -> None:
        for name in ("channel", "nuclear_channel"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _one_of("combine", self.combine, ("max", "mean"))
        _one_of("stain", self.stain, ("none", "hematoxylin", "eosin", "dab"))
        _whole("level", self.level, 0)
        self._check_numbers()
        self._measure_shapes()
        self.diameter_given()
        _one_of("foreground", self.foreground, ("auto", "off"))
        _one_of("normalize", self.normalize, ("global", "local"))
        _one_of("missing_chunks", self.missing_chunks, ("refuse", "fill"))

    def _check_numbers(self) -> None:
        """Check channels in Cellpose's numbers."""
        object.__setattr__(self, "chan2", _whole("chan2", self.chan2, 0))
        if self.chan is None:
            if self.chan2:
                raise SettingsError("chan2 counts beside chan; give chan as well, or nuclear_channel instead.")
            return
        object.__setattr__(self, "chan", _whole("chan", self.chan, 0))
        if self.channel is not None or self.nuclear_channel is not None or self.stain != "none":
            raise SettingsError("chan takes the place of channel, nuclear_channel and stain; give it or them.")
        if self.chan == 0 and self.chan2:
            raise SettingsError("chan 0 is the mean of all channels, beside which there is no chan2; give chan 1 to 3.")

    def _measure_shapes(self) -> None:
        """Put a number in the place of drawn shapes: a file of them, or a napari Shapes layer."""
        text = str(self.diameter).strip()
        is_layer = hasattr(self.diameter, "shape_type")
        if not is_layer and not text.startswith(SHAPES):
            return
        from .shapes import diameter_of_layer, diameter_of_shapes

        where = "the layer" if is_layer else text.removeprefix(SHAPES)
        found, n_shapes = diameter_of_layer(self.diameter) if is_layer else diameter_of_shapes(where)
        object.__setattr__(self, "diameter", round(found, 2))
        logger.info("diameter %.2f px is the mean of %d shapes in %s.", found, n_shapes, where)

    def diameter_given(self) -> tuple[float, str] | None:
        """The diameter and its unit, ``"px"`` or ``"um"``; None if it is to be estimated."""
        text = str(self.diameter).strip()
        if text == "auto":
            return None
        match = re.fullmatch(r"(.*?)\s*(px|um|µm|μm)?", text)
        value, unit = (match.group(1), match.group(2) or "px") if match else (text, "px")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise SettingsError(
                f"diameter must be 'auto', a positive number of pixels, micrometres like '12um', or shapes:FILE, "
                f"not {text!r}."
            )
        return number, "px" if unit == "px" else "um"

    def diameter_px(self, spacing_um: tuple[float, ...] | None) -> float | None:
        """The given diameter in pixels of level 0, None if it is to be estimated.

        Raises
        ------
        SettingsError
            If it is given in micrometres and the image does not say its pixel size.
        """
        given = self.diameter_given()
        if given is None or given[1] == "px":
            return given and given[0]
        if spacing_um is None:
            raise SettingsError(
                f"diameter {self.diameter} is in micrometres but the image does not say its pixel size; "
                "give the diameter in pixels."
            )
        return given[0] / spacing_um[-1]


@dataclass(frozen=True)
class FlowsConfig:
    """How the network is run."""

    model: str = _option("tiledseg-nuclei", "model name or file", "M")
    device: str = _option(
        "auto", "'auto' takes a GPU if there is one; 'cuda' insists on it", choices=("auto", "cpu", "cuda")
    )
    precision: str = _option(
        "auto",
        "of the network: 'bfloat16' is up to twice as fast where the hardware computes in it, and moves some outlines "
        "by a pixel; 'auto' is float32, but bfloat16 for transformers where every GPU that works has it, and what a "
        "run began with when it goes on",
        choices=("auto", "float32", "bfloat16"),
    )
    tile_overlap: str | float = _option(
        "auto",
        "by how much the network's tiles overlap: 1 + 2 X times as many lie along an axis as would side by side; "
        "more smooths over cells that a tile cuts, and takes longer; 'auto' is 0.05 for the default model, for which "
        "more does not help, and 0.1, as in Cellpose, for others",
        "auto|X",
    )
    augment: bool = _option(
        False,
        "ask the network with tiles that overlap by half, every second one mirrored, and average: "
        "steadier outlines, for nearly three times as many tiles; tile_overlap does not count then",
    )
    do_3d: bool = _option(
        False,
        "seek cells in three dimensions: the network sees the planes YX, ZX and ZY, and flows are followed in all",
    )
    anisotropy: str | float = _option(
        "auto",
        "thickness of a plane in pixels of y and x, with do_3d: 'auto' is what the pixel sizes say",
        "auto|X",
    )

    def __post_init__(self) -> None:
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("precision", self.precision, ("auto", "float32", "bfloat16"))
        if self.tile_overlap != "auto":
            object.__setattr__(self, "tile_overlap", _number("tile_overlap", self.tile_overlap, 0.05, 0.45))
        if self.anisotropy != "auto":
            object.__setattr__(self, "anisotropy", _number("anisotropy", self.anisotropy, 0.02, 50))


@dataclass(frozen=True)
class MasksConfig:
    """How flows become labels. May change between runs: only masks and what follows are redone."""

    block: str | int = _option(
        "auto",
        "side of the blocks in pixels; the labels do not depend on it. 'auto' is 2048 in planes, 256 in volumes, and "
        "1024 in 32 planes where planes are stitched",
        "auto|PX",
    )
    halo: str | int = _option(
        "auto",
        "pixels read around a block: 'auto' is two diameters, and more where a cell reaches the edge",
        "auto|PX",
    )
    flow_threshold: float = _option(
        0.4,
        "largest disagreement between an object's shape and the network's flow (the model match threshold of Cellpose "
        "in napari); higher keeps more, 0 keeps all; not in 3D",
        "X",
    )
    cellprob_threshold: float = _option(0.0, "cell logit above which a pixel may be part of a cell", "X")
    min_size: int = _option(15, "smallest object in pixels of the full-size image (voxels of a volume)", "PX")
    max_size: int = _option(0, "largest object in pixels of the full-size image; 0 keeps all", "PX")
    niter: str | int = _option(
        "auto",
        "steps a pixel may take along the flow: 'auto' is 200 in units of the network's grid",
        "auto|N",
    )
    stitch_threshold: float | None = _option(
        None,
        "seek cells plane by plane, and join those of successive planes that overlap by this share (IoU); 0 joins none",
        "X",
    )
    stitch_gap: int = _option(
        0, "1 joins planes of a cell over one in which it is missing, where none is joined between", "N"
    )
    flow3d_smooth: float = _option(0.0, "smooth flows in 3D with a Gaussian of this many pixels", "PX")
    resample: bool = _option(
        True,
        "follow the flows at full size (smooth outlines) or on the network's grid (faster if cells are large)",
    )

    def __post_init__(self) -> None:
        if self.block != "auto":
            object.__setattr__(self, "block", _whole("block", self.block, 16))
        if self.halo != "auto":
            object.__setattr__(self, "halo", _whole("halo", self.halo, 0))
            if self.block != "auto" and int(self.halo) > int(self.block):
                raise SettingsError(
                    f"block {self.block} is smaller than the halo {self.halo}; give a block of at least "
                    f"{self.halo} (--block {self.halo}) or a smaller halo."
                )
        _number("flow_threshold", self.flow_threshold, 0, math.inf)
        _number("cellprob_threshold", self.cellprob_threshold, -7, 100)
        _whole("min_size", self.min_size, 0)
        _whole("max_size", self.max_size, 0)
        if 0 < self.max_size < self.min_size:
            raise SettingsError(
                f"max_size {self.max_size} is below min_size {self.min_size}, so nothing would be left."
            )
        if self.stitch_threshold is not None:
            object.__setattr__(self, "stitch_threshold", _number("stitch_threshold", self.stitch_threshold, 0, 1))
        _whole("stitch_gap", self.stitch_gap, 0, 1)
        _number("flow3d_smooth", self.flow3d_smooth, 0, 100)
        if self.niter != "auto":
            object.__setattr__(self, "niter", _whole("niter", self.niter, 1, 1_000_000))


@dataclass(frozen=True)
class PublishConfig:
    """What is written."""

    name: str = _option("cells", "name of the label image", "NAME")
    ome_zarr: str | None = _option(
        None, "version of OME-Zarr to write (default: that of the image, else 0.5)", choices=("0.4", "0.5")
    )
    shard: bool = _option(
        False,
        "put the chunks of the labels together, 16 million pixels in a file: a sixteenth of the files, an eighth of a "
        "volume's; OME-Zarr 0.5 only",
    )
    features: bool = _option(
        False, "measure shapes as well, as scikit-image does: eccentricity, perimeter, solidity, ...; takes longer"
    )
    csv: bool = _option(False, "write the table as CSV, too")
    polygons: str | None = _option(
        None,
        "write the outlines of the objects, for QuPath ('geojson') or GeoPandas ('geoparquet'), beside the table or "
        "to a .geojson or .parquet file",
        "geojson|geoparquet|FILE",
    )

    @property
    def polygons_kind(self) -> str | None:
        """``"geojson"`` or ``"geoparquet"``, None if there are to be none."""
        if self.polygons is None:
            return None
        return POLYGONS.get(PurePath(self.polygons).suffix.lower() or self.polygons)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", str(self.name)):
            raise SettingsError(
                f"label name {self.name!r} must consist of letters, digits, '.', '_' and '-', and not start with '.'."
            )
        if self.ome_zarr is not None:
            _one_of("ome_zarr", self.ome_zarr, ("0.4", "0.5"))
        if self.polygons is not None:
            object.__setattr__(self, "polygons", os.fspath(self.polygons))
            if self.polygons not in POLYGONS and not is_remote(self.polygons):
                # Workers may run in another folder.
                object.__setattr__(self, "polygons", os.path.abspath(self.polygons))
        if self.polygons is not None and self.polygons_kind is None:
            raise SettingsError(
                f"polygons must be 'geojson', 'geoparquet', or a file that ends in .geojson or .parquet, "
                f"not {self.polygons!r}."
            )


@dataclass(frozen=True)
class Settings:
    """All settings of a run that can change its result."""

    survey: SurveyConfig = SurveyConfig()
    flows: FlowsConfig = FlowsConfig()
    masks: MasksConfig = MasksConfig()
    publish: PublishConfig = PublishConfig()

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """Settings from flat keywords; those not given keep their default.

        Raises
        ------
        SettingsError
            If a keyword is unknown or a value is out of range.
        """
        stages: dict[str, type] = {
            "survey": SurveyConfig,
            "flows": FlowsConfig,
            "masks": MasksConfig,
            "publish": PublishConfig,
        }
        home = {f.name: stage for stage, kind in stages.items() for f in dataclasses.fields(kind)}
        parts: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
        _refuse_unknown(values, home)
        for name, value in values.items():
            parts[home[name]][name] = value
        return cls(**{stage: kind(**parts[stage]) for stage, kind in stages.items()})

    def flat(self) -> dict[str, Any]:
        """All settings by name."""
        return {k: v for f in dataclasses.fields(self) for k, v in dataclasses.asdict(getattr(self, f.name)).items()}


@dataclass(frozen=True)
class ConvertConfig:
    """How an image is written."""

    ome_version: str = _option("0.5", "version of OME-Zarr to write", choices=("0.4", "0.5"))
    chunk: int | None = _option(
        None, "side of a chunk along y and x (default: 1024 in pictures, 256 in volumes, of at most 32 planes)", "PX"
    )
    shard: int | None = _option(
        None,
        "side along y and x of files that hold many chunks, for disks that dislike many files; a multiple of the "
        "chunk, OME-Zarr 0.5 only (default: a file per chunk)",
        "PX",
    )
    downsample: str = _option(
        "mean",
        "how levels are made: 'mean' of 2 pixels along each axis, of integers rounded half to even; 'nearest' for "
        "images of labels",
        choices=("mean", "nearest"),
    )
    pixel_size: str | float | None = _option(
        None,
        "size of a pixel in micrometres, in place of what the image says: of y and x, or of axes by name",
        "UM|z=UM,y=UM,x=UM",
    )
    missing_chunks: str = _option(
        "refuse",
        "what to do where a Zarr lacks chunks: 'refuse' stops and names one, 'fill' reads them as the fill value",
        choices=("refuse", "fill"),
    )

    def __post_init__(self) -> None:
        _one_of("ome_version", self.ome_version, ("0.4", "0.5"))
        _one_of("downsample", self.downsample, ("mean", "nearest"))
        _one_of("missing_chunks", self.missing_chunks, ("refuse", "fill"))
        for name in ("chunk", "shard"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _whole(name, getattr(self, name), 16))
        if self.shard is not None and self.ome_version == "0.4":
            raise SettingsError("OME-Zarr 0.4 has no shards; leave out --shard, or write 0.5.")
        self.sizes_um("zyx")

    def sizes_um(self, axes: str) -> dict[str, float]:
        """The given size of a pixel per axis; empty if none is given.

        Raises
        ------
        SettingsError
            If it cannot be read, or names an axis that is not among these.
        """
        if self.pixel_size is None:
            return {}
        text = str(self.pixel_size)
        parts = [part.strip() for part in (text if "=" in text else f"y={text},x={text}").split(",")]
        named = dict(part.split("=", 1) for part in parts if "=" in part)
        if len(named) != len(parts) or not set(named) <= set(axes):
            raise SettingsError(
                f"pixel_size {self.pixel_size!r} cannot be read; give one number, or one per axis of "
                f"{', '.join(axes)}, e.g. --pixel-size z=2,y=0.5,x=0.5."
            )
        sizes = {axis: _number("pixel_size", size, 0, 1e6) for axis, size in named.items()}
        if 0 in sizes.values():
            raise SettingsError("pixel_size must be more than 0.")
        return sizes

    @classmethod
    def of(cls, **values: Any) -> ConvertConfig:
        """From keywords; those not given keep their default.

        Raises
        ------
        SettingsError
            If a keyword is unknown or a value is out of range.
        """
        _refuse_unknown(values, [field.name for field in dataclasses.fields(cls)])
        return cls(**values)


def _refuse_unknown(values: dict[str, Any], known: Collection[str]) -> None:
    """Refuse a setting that there is not."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}."
            raise SettingsError(f"unknown setting {name!r}; {hint}")


def digest(*values: object) -> str:
    """Short hash of JSON-able values, for names of things that depend on them."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
