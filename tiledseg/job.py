"""What every stage is given, and what the survey found: small, picklable, the same in every task."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import Settings
from .displayed import Displayed
from .errors import SettingsError
from .frames import Extent, anisotropy_of, extent_of, label_shape
from .grid import BlockGrid, Index, Lattice, Region, WorkingGrid, enclosing, shift
from .images import Image
from .inputs import Input
from .mask import Mask
from .networks.models import Model
from .normalisation import Inverted, LocalRange, Normalisation, WholeRange
from .omezarr import LabelsPlan
from .remote import Location
from .segmenters import Segmenter
from .store import Store

__all__ = [
    "CELLPROB_FLOOR",
    "N_OUTPUTS",
    "Diameter",
    "Estimate",
    "Job",
    "Moment",
    "Sheet",
    "Surveyed",
    "block_of",
    "grid_of",
    "halo_of",
    "has_size_limits",
    "sheets_of",
]

CELLPROB_FLOOR = -8.0
"""The cell logit where the network was not asked; lower ones are raised to it."""

HALO_DIAMETERS = 2.0

BLOCK = {2: 2048, 3: 256}
"""Side of the blocks by the number of axes that objects extend along."""
BLOCK_STITCHED = 1024
PLANES_STITCHED = 32
"""Of a block where planes are stitched."""

N_OUTPUTS = 3
"""Of the network: flow along both axes of its plane, and the cell logit."""


def halo_of(settings: Settings, diameter: float | None) -> int:
    """Pixels read around a block for cells of this diameter, which need not be known if a halo is given."""
    masks = settings.masks
    if masks.halo != "auto":
        return int(masks.halo)
    if diameter is None:
        raise SettingsError("an automatic halo needs a diameter; give either.")
    # Whether planes of a cell are joined is decided by the cells that they touch, so these must be whole as well.
    return math.ceil((HALO_DIAMETERS + (1 if masks.stitch_threshold else 0)) * diameter)


def has_size_limits(job: Job) -> bool:
    """Whether objects are measured before they get a number: to drop large ones, or small ones put together."""
    return job.settings.masks.max_size > 0 or (job.extent.is_stitched and job.settings.masks.min_size > 0)


def block_of(settings: Settings, extent: Extent) -> int:
    """Side of the blocks in y and x."""
    block = settings.masks.block
    if block != "auto":
        return int(block)
    return BLOCK_STITCHED if extent.is_stitched else BLOCK[len(extent.objects)]


def grid_of(shape: Index, settings: Settings, extent: Extent, halo: int, anisotropy: float) -> BlockGrid:
    """The blocks of an image.

    Parameters
    ----------
    shape : tuple of int
        Pixels along the axes of `extent`.
    settings : Settings
    extent : Extent
    halo : int
        Pixels read around a block in y and x; along z as many as are as thick.
    anisotropy : float
        Thickness of a plane in pixels.
    """
    n, block = extent.n_object_frames, block_of(settings, extent)
    sides, halos = [1] * n + [block] * len(extent.objects), [0] * n + [halo] * len(extent.objects)
    if extent.is_stitched:
        # A plane is linked to the next, or over a missing one.
        sides[n], halos[n] = min(block, PLANES_STITCHED), 1 + settings.masks.stitch_gap
    elif extent.objects == "zyx":
        halos[n] = math.ceil(halo / anisotropy)
    return BlockGrid(shape, tuple(sides), tuple(halos))


@dataclass(frozen=True)
class Diameter(Displayed):
    """The one diameter of the whole image, in pixels of level 0.

    Attributes
    ----------
    value : float
        Used for the working grid.
    source : str
        ``"given"``, ``"estimated"``, or ``"default"`` where nothing was found to estimate it from.
    quartiles : (float, float)
        Of the objects found; the value twice if it was given.
    n_objects, n_windows : int
        What the estimate rests on.
    """

    value: float
    source: str
    quartiles: tuple[float, float]
    n_objects: int = 0
    n_windows: int = 0

    def times(self, pixel: float) -> Diameter:
        """The same in pixels of another size."""
        low, high = self.quartiles
        return dataclasses.replace(self, value=self.value * pixel, quartiles=(low * pixel, high * pixel))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Diameter)}


@dataclass(frozen=True, eq=False)
class Estimate(Diameter):
    """A diameter with the objects it rests on, to be looked at.

    Attributes
    ----------
    sizes : array of float64, shape (n,)
        Their diameters in pixels of level 0; empty if it was not estimated.
    """

    sizes: npt.NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(0), repr=False)


@dataclass(frozen=True)
class Moment:
    """What the survey found for all time points together, or for one.

    Attributes
    ----------
    percentiles : tuple of (float, float)
        Per input of the network the values that become 0 and 1: percentiles 1 and 99 without the empty parts.
    is_constant : bool
        All pixels of each input are equal: there is nothing to find.
    diameter : Diameter
    """

    percentiles: tuple[tuple[float, float], ...]
    is_constant: bool
    diameter: Diameter

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Moment:
        """From a document."""
        diameter = dict(document["diameter"], quartiles=tuple(document["diameter"]["quartiles"]))
        percentiles = tuple((low, high) for low, high in document["percentiles"])
        return cls(percentiles, document["is_constant"], Diameter(**diameter))


@dataclass(frozen=True)
class Surveyed:
    """What the survey found.

    Attributes
    ----------
    moments : tuple of Moment
        One for the whole image, or one for each time point.
    n_nonfinite : int
        Pixels that are NaN or infinite, taken as background.
    foreground_cell : tuple of float
        Size in pixels of level 0 of what one element of the foreground map covers, per axis of a region; empty if
        none was made.
    foreground_fraction : float
        Share of the map that may hold cells.
    normalisation_pitch : tuple of float
        Distance in pixels of level 0 of the points of the normalisation map, per axis of a region; empty if there is
        one pair of percentiles for all.
    normalisation_fields : tuple of tuple of (float, int)
        Along each of these axes, where fields begin, in pixels of level 0, and their first points of the map.
    """

    moments: tuple[Moment, ...]
    n_nonfinite: int
    foreground_cell: tuple[float, ...]
    foreground_fraction: float
    normalisation_pitch: tuple[float, ...] = ()
    normalisation_fields: tuple[tuple[tuple[float, int], ...], ...] = ()

    @property
    def diameter(self) -> Diameter:
        """The one of the whole image; of time points with one each, the largest."""
        return max((moment.diameter for moment in self.moments), key=lambda diameter: diameter.value)

    def to_json(self) -> dict[str, Any]:
        """As a document."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Surveyed:
        """From a document."""
        tuples = {key: tuple(document[key]) for key in ("foreground_cell", "normalisation_pitch")}
        moments = tuple(Moment.from_json(moment) for moment in document["moments"])
        fields = tuple(tuple((start, first) for start, first in axis) for axis in document["normalisation_fields"])
        return cls(**{**document, **tuples, "moments": moments, "normalisation_fields": fields})


@dataclass(frozen=True)
class Sheet:
    """Flows that one lattice holds: of all frames, or of those of one time point, and of one orientation of planes.

    Attributes
    ----------
    name : str
        Of the array in the scratch, of shape (*frames, *chunks of the lattice, 3, *piece): for each chunk the flow
        along both axes of the planes, and the cell logit above its floor.
    moment : int
        Of the survey.
    planes : (int, int)
        The axes of the planes that the network sees, among those of the flows.
    frames : tuple of int
        Number of frames along each axis that numbers them.
    first : tuple of int
        Which of all frames is the first of them.
    lattice : Lattice
    """

    name: str
    moment: int
    planes: tuple[int, int]
    frames: Index
    first: Index
    lattice: Lattice

    def frame_of(self, index: Index) -> Index:
        """The frame of the image that an index over the sheet's frames means."""
        return tuple(i + first for i, first in zip(index, self.first, strict=True))

    def index_of(self, frame: Index) -> Index:
        """The index over the sheet's frames of a frame of the image."""
        return tuple(i - first for i, first in zip(frame, self.first, strict=True))

    @property
    def chunk_counts(self) -> Index:
        """Chunks along each axis, frames first."""
        return (*self.frames, *self.lattice.chunk_counts)

    @property
    def array_shape(self) -> Index:
        """Of the array in the scratch."""
        return (*self.chunk_counts, N_OUTPUTS, *self.lattice.piece_shape)


def sheets_of(workings: Sequence[WorkingGrid], extent: Extent, shape: Index, tile: int, stride: int) -> list[Sheet]:
    """The flows of an image.

    Parameters
    ----------
    workings : sequence of WorkingGrid
        For every moment of the survey.
    extent : Extent
    shape : tuple of int
        Pixels of the image along the axes of `extent`.
    tile, stride : int
        Of the model.
    """
    n, sheets = len(extent.flows), []
    for moment, working in enumerate(workings):
        frames = shape[: extent.n_flow_frames]
        first = (0,) * len(frames)
        if len(workings) > 1:
            frames, first = (1, *frames[1:]), (moment, *first[1:])
        for planes in itertools.combinations(range(n), 2):
            thin = next((axis for axis in range(n) if axis not in planes), None)
            name = f"flows.zarr/{moment}/{''.join(extent.flows[axis] for axis in planes)}"
            sheets.append(Sheet(name, moment, planes, frames, first, Lattice(working.shape, tile, stride, thin)))
    return sheets


@dataclass(frozen=True)
class Job:
    """One run, as tasks see it.

    Attributes
    ----------
    image : Image
    inputs : tuple of Input
        What each input of the network shows; what a function is given.
    settings : Settings
    labeller : Model or Segmenter
        What finds cells: a network, with all five stages, or a function, with masks, stitch and publish.
    device : str
        ``"cpu"`` or ``"cuda"``, the same for all tasks of the network.
    store : Store
        The scratch.
    labels : str
        Folder of the scratch for what depends on the mask settings.
    plan : LabelsPlan or None
        Where labels are published; None keeps them in memory.
    table : Path, RemotePath or None
        Where the object table goes.
    surveyed : Surveyed or None
        None until the survey is done, and where a function finds cells.
    mask : Mask or None
        Where cells are sought; None for everywhere.
    """

    image: Image
    inputs: tuple[Input, ...]
    settings: Settings
    labeller: Model | Segmenter
    device: str
    store: Store
    labels: str = ""
    plan: LabelsPlan | None = None
    table: Location | None = None
    surveyed: Surveyed | None = None
    mask: Mask | None = None

    @property
    def extent(self) -> Extent:
        """Along which axes cells are sought."""
        return extent_of(self.image, self.settings)

    @property
    def shape(self) -> Index:
        """Shape of level 0 along the axes of a region."""
        return label_shape(self.image)

    @property
    def anisotropy(self) -> float:
        """Thickness of a plane in pixels of y and x; 1 if nothing is known of it."""
        return anisotropy_of(self.image, self.settings) or 1.0

    @property
    def model(self) -> Model:
        """The network; only stages that run it need it."""
        if not isinstance(self.labeller, Model):
            raise RuntimeError("labels are made by a function, there is no network")
        return self.labeller

    @property
    def segmenter(self) -> Segmenter | None:
        """The function that makes labels, None if a network does."""
        return self.labeller if isinstance(self.labeller, Segmenter) else None

    @property
    def diameter(self) -> Diameter | None:
        """As surveyed; with a function the one that was given, None if there was none."""
        if self.segmenter is None:
            return self.found.diameter
        given = self.settings.survey.diameter_px(self.image.spacing_um())
        return None if given is None else Diameter(given, "given", (given, given))

    @property
    def found(self) -> Surveyed:
        """The survey's result; a stage that needs it runs after the survey."""
        if self.surveyed is None:
            raise RuntimeError("the survey has not run")
        return self.surveyed

    def moment_of(self, frame: Index) -> int:
        """Which of the survey's moments a frame belongs to."""
        return frame[0] if len(self.found.moments) > 1 else 0

    def shown(self, moment: int) -> list[tuple[Input, Normalisation]]:
        """Each input of the network, with its pixel values that become 0 and 1."""
        found = self.found
        how: list[Normalisation] = [WholeRange(*pair) for pair in found.moments[moment].percentiles]
        if found.normalisation_pitch:
            maps = self.store.open("survey.zarr/normalisation")
            lattice = found.normalisation_pitch, found.normalisation_fields
            how = [LocalRange(maps, i, *lattice) for i in range(len(self.inputs))]
        if self.settings.survey.invert:
            how = [Inverted(single) for single in how]
        return list(zip(self.inputs, how, strict=True))

    def working(self, moment: int) -> WorkingGrid:
        """The working grid."""
        shape = self.shape[self.extent.n_flow_frames :]
        diameter = self.found.moments[moment].diameter.value
        return WorkingGrid.for_diameter(shape, diameter, self.model.diam_mean, self.anisotropy)

    @property
    def sheets(self) -> list[Sheet]:
        """The network's tiles."""
        workings = [self.working(moment) for moment in range(len(self.found.moments))]
        return sheets_of(workings, self.extent, self.shape, self.model.tile, self.model.stride)

    @property
    def halo(self) -> int:
        """Pixels read around a block in y and x."""
        return halo_of(self.settings, None if self.diameter is None else self.diameter.value)

    @property
    def blocks(self) -> BlockGrid:
        """The blocks of the mask stage."""
        return grid_of(self.shape, self.settings, self.extent, self.halo, self.anisotropy)

    def niter(self, moment: int) -> int:
        """Steps a pixel may take along the flow."""
        masks = self.settings.masks
        if masks.niter != "auto":
            return int(masks.niter)
        return max(1, round(200 / self.working(moment).scale[-1])) if masks.resample else 200

    def may_hold_cells(self, regions: Sequence[Region]) -> list[bool]:
        """Whether there may be cells in each of some neighbouring regions of level 0: the survey saw something, and
        they are not masked. A function is asked wherever nothing is masked."""
        may = self._rise_above_noise(regions)
        if self.mask is None or not any(may):
            return may
        return [is_seen and is_wanted for is_seen, is_wanted in zip(may, self.mask.touches(regions), strict=True)]

    def _rise_above_noise(self, regions: Sequence[Region]) -> list[bool]:
        """Whether the survey saw anything in each of some neighbouring regions."""
        if self.segmenter is not None:
            return [True] * len(regions)
        found = self.found
        frame = tuple(part.start for part in regions[0])
        if found.moments[self.moment_of(frame)].is_constant or not found.foreground_cell:
            return [not found.moments[self.moment_of(frame)].is_constant] * len(regions)
        in_cells = [
            tuple(slice(int(p.start / c), math.ceil(p.stop / c)) for p, c in zip(r, found.foreground_cell, strict=True))
            for r in regions
        ]
        around = enclosing(in_cells)
        foreground = self.store.open("survey.zarr/foreground")[around]
        origin = tuple(part.start for part in around)
        return [bool(foreground[shift(region, origin)].any()) for region in in_cells]
