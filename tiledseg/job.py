"""What every stage is given, and what the survey found: small, picklable, the same in every task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Settings
from .errors import SettingsError
from .grid import BlockGrid, Index, Lattice, Region, WorkingGrid, enclosing, shift
from .images import Image
from .inputs import Input
from .networks.models import Model
from .normalisation import Inverted, LocalRange, Normalisation, WholeRange
from .omezarr import LabelsPlan
from .planes import plane_shape
from .segmenters import Segmenter
from .store import Store

__all__ = ["Diameter", "Job", "Surveyed", "halo_of"]

CELLPROB_FLOOR = -8.0
"""The cell logit where the network was not asked; lower ones are raised to it."""

HALO_DIAMETERS = 2.0


def halo_of(settings: Settings, diameter: float | None) -> int:
    """Pixels read around a block for cells of this diameter, which need not be known if a halo is given."""
    halo = settings.masks.halo
    if halo != "auto":
        return int(halo)
    if diameter is None:
        raise SettingsError("an automatic halo needs a diameter; give either.")
    return math.ceil(HALO_DIAMETERS * diameter)


@dataclass(frozen=True)
class Diameter:
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


@dataclass(frozen=True)
class Surveyed:
    """What the survey found.

    Attributes
    ----------
    percentiles : tuple of (float, float)
        Per input of the network the values that become 0 and 1: percentiles 1 and 99 of the whole image
        without its empty parts.
    is_constant : bool
        All pixels of each input are equal: there is nothing to find.
    n_nonfinite : int
        Pixels that are NaN or infinite, taken as background.
    foreground_cell : tuple of float
        Size in pixels of level 0 of what one element of the foreground map covers; empty if none
        was made.
    foreground_fraction : float
        Share of the map that may hold cells.
    diameter : Diameter
    normalisation_pitch : tuple of float
        Distance in pixels of level 0 of the points of the normalisation map; empty if there is one pair
        of percentiles for all.
    """

    percentiles: tuple[tuple[float, float], ...]
    is_constant: bool
    n_nonfinite: int
    foreground_cell: tuple[float, ...]
    foreground_fraction: float
    diameter: Diameter
    normalisation_pitch: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a document."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Surveyed:
        """From a document."""
        diameter = dict(document["diameter"], quartiles=tuple(document["diameter"]["quartiles"]))
        tuples = {key: tuple(document[key]) for key in ("foreground_cell", "normalisation_pitch")}
        percentiles = tuple((low, high) for low, high in document["percentiles"])
        return cls(**{**document, **tuples, "percentiles": percentiles, "diameter": Diameter(**diameter)})


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
    table : Path or None
        Where the object table goes.
    surveyed : Surveyed or None
        None until the survey is done, and where a function finds cells.
    """

    image: Image
    inputs: tuple[Input, ...]
    settings: Settings
    labeller: Model | Segmenter
    device: str
    store: Store
    labels: str = ""
    plan: LabelsPlan | None = None
    table: Path | None = None
    surveyed: Surveyed | None = None

    @property
    def shape(self) -> Index:
        """Shape of level 0 along the axes cells extend along."""
        return plane_shape(self.image)

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

    @property
    def shown(self) -> list[tuple[Input, Normalisation]]:
        """Each input of the network, with its pixel values that become 0 and 1."""
        found = self.found
        how: list[Normalisation] = [WholeRange(*pair) for pair in found.percentiles]
        if found.normalisation_pitch:
            maps = self.store.open("survey.zarr/normalisation")
            how = [LocalRange(maps, i, found.normalisation_pitch) for i in range(len(self.inputs))]
        if self.settings.survey.invert:
            how = [Inverted(single) for single in how]
        return list(zip(self.inputs, how, strict=True))

    @property
    def working(self) -> WorkingGrid:
        """The working grid."""
        return WorkingGrid.for_diameter(self.shape, self.found.diameter.value, self.model.diam_mean)

    @property
    def lattice(self) -> Lattice:
        """The network's tiles."""
        return Lattice(self.working.shape, self.model.tile, self.model.stride)

    @property
    def halo(self) -> int:
        """Pixels read around a block."""
        return halo_of(self.settings, None if self.diameter is None else self.diameter.value)

    @property
    def blocks(self) -> BlockGrid:
        """The blocks of the mask stage."""
        n = len(self.shape)
        return BlockGrid(self.shape, (self.settings.masks.block,) * n, (self.halo,) * n)

    @property
    def niter(self) -> int:
        """Steps a pixel may take along the flow."""
        masks = self.settings.masks
        if masks.niter != "auto":
            return int(masks.niter)
        return max(1, round(200 / min(self.working.scale))) if masks.resample else 200

    def may_hold_cells(self, regions: Sequence[Region]) -> list[bool]:
        """Whether the survey saw anything in each of some neighbouring regions of level 0, given in its
        pixels; a function is asked everywhere."""
        if self.segmenter is not None:
            return [True] * len(regions)
        found = self.found
        if found.is_constant or not found.foreground_cell:
            return [not found.is_constant] * len(regions)
        in_cells = [
            tuple(slice(int(p.start / c), math.ceil(p.stop / c)) for p, c in zip(r, found.foreground_cell, strict=True))
            for r in regions
        ]
        around = enclosing(in_cells)
        foreground = self.store.open("survey.zarr/foreground")[around]
        origin = tuple(part.start for part in around)
        return [bool(foreground[shift(region, origin)].any()) for region in in_cells]
