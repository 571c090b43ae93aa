"""The registry of models: which names are known, where their files lie, what they expect."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .fetch import fetch
from .size import SizeModel, read_size_model

__all__ = ["KNOWN_MODELS", "KnownModel", "Model", "find_model", "list_models", "model_folder"]

WEIGHTS = Path(__file__).parent / "weights"

POOLING = 8
"""Tiles start at multiples of it: the total pooling of a U-Net, and the patch of a transformer."""

TILE_OVERLAP = 0.1
"""Cellpose's."""


@dataclass(frozen=True)
class Architecture:
    """A kind of network.

    Attributes
    ----------
    name : str
        ``"unet"``, ``"cpsam"``, ``"cpdino"`` or ``"cpdino-vitb"``.
    n_channels : int
        Input channels.
    tile : int
        Side of a tile in working pixels.
    """

    name: str
    n_channels: int
    tile: int


ARCHITECTURES = {
    kind.name: kind
    for kind in (
        Architecture("unet", 2, 224),
        Architecture("cpsam", 3, 256),
        Architecture("cpdino", 3, 384),
        Architecture("cpdino-vitb", 3, 384),
    )
}

OURS = "BSD-3-Clause, trained on public-domain images"
THEIRS = "BSD-3-Clause, trained on images under CC-BY-NC"


@dataclass(frozen=True)
class KnownModel:
    """A model that has a name.

    Attributes
    ----------
    name : str
    purpose : str
        What it is for.
    licence : str
        Of the weights.
    store : str
        Who has the file: ``"tiledseg"`` (it comes with the package), ``"cellpose3"`` or ``"cellpose4"``.
    file, size_file : str
        Names in the folder of models; no size model if empty.
    n_inputs : int or None
        How many of the network's input channels were trained on; None for all.
    tile_overlap : float
        By how much tiles overlap where nobody asks for more, see `find_model`.
    """

    name: str
    purpose: str
    licence: str
    store: str
    file: str
    size_file: str = ""
    n_inputs: int | None = None
    tile_overlap: float = TILE_OVERLAP

    @property
    def path(self) -> Path:
        """Where the file is, or belongs."""
        return (WEIGHTS if self.store == "tiledseg" else model_folder()) / self.file


KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            "tiledseg-nuclei",
            "nuclei in fluorescence and histology, small and fast on a CPU",
            OURS,
            "tiledseg",
            "tiledseg-nuclei.pt",
            n_inputs=1,
            tile_overlap=0.05,  # on held-out images and the mosaic as precise as with 0.1, for a seventh fewer tiles
        ),
        KnownModel(
            "cyto3",
            "cells of many kinds",
            THEIRS,
            "cellpose3",
            "cyto3",
            "size_cyto3.npy",
        ),
        KnownModel(
            "cyto2",
            "cells, trained with images of users",
            THEIRS,
            "cellpose3",
            "cyto2torch_0",
            "size_cyto2torch_0.npy",
        ),
        KnownModel("cyto", "cells, the first model", THEIRS, "cellpose3", "cytotorch_0", "size_cytotorch_0.npy"),
        KnownModel("nuclei", "nuclei", THEIRS, "cellpose3", "nucleitorch_0", "size_nucleitorch_0.npy", n_inputs=1),
        KnownModel("cpsam_v2", "cells and nuclei of any size; wants a GPU", THEIRS, "cellpose4", "cpsam_v2"),
        KnownModel("cpsam", "the first version of cpsam_v2", THEIRS, "cellpose4", "cpsam"),
        KnownModel("cpdino", "as cpsam_v2, on DINOv3 (package dinov3)", THEIRS, "cellpose4", "cpdino"),
        KnownModel("cpdino-vitb", "a smaller cpdino", THEIRS, "cellpose4", "cpdino-vitb"),
    )
}


@dataclass(frozen=True)
class Model:
    """A model and what the stages need to know of it.

    Attributes
    ----------
    name : str
        As the user gave it.
    path : Path
        File of the state dict.
    sha256 : str
        Of that file: part of a run's fingerprint.
    diam_mean : float
        Diameter in working pixels.
    architecture : str
        Which kind of network the file holds, a key of `ARCHITECTURES`.
    n_channels : int
        Input channels of the network.
    n_inputs : int
        How many of them may show something; the others are zero.
    tile, stride : int
        The lattice, in working pixels.
    size : SizeModel or None
        For a first guess of the diameter.
    precision : str
        ``"float32"`` or ``"bfloat16"``: what the network computes in.
    batch : int or None
        Tiles that a GPU computes at once, the same throughout a run; None where nobody has chosen.
    """

    name: str
    path: Path
    sha256: str
    diam_mean: float
    architecture: str
    n_channels: int
    n_inputs: int
    tile: int
    stride: int
    size: SizeModel | None = None
    precision: str = "float32"
    batch: int | None = None


def model_folder() -> Path:
    """Cellpose's own folder of models: ``CELLPOSE_LOCAL_MODELS_PATH``, else ``.cellpose/models`` at home."""
    given = os.environ.get("CELLPOSE_LOCAL_MODELS_PATH")
    return Path(given) if given else Path.home() / ".cellpose" / "models"


def list_models() -> Iterator[dict[str, Any]]:
    """What is known of every model that has a name, and whether its file is here; fetches nothing."""
    for model in KNOWN_MODELS.values():
        yield {
            "name": model.name,
            "purpose": model.purpose,
            "licence": model.licence,
            "path": str(model.path),
            "is_here": model.path.is_file(),
        }


def find_model(name: str, tile_overlap: float | None = None) -> Model:
    """Describe a model given by name or file.

    A named model that is not here is fetched from Cellpose's store into Cellpose's folder of models, with its size
    model. The size model of a file lies beside it, with ``_size.npy`` at the end, as Cellpose writes it.

    Parameters
    ----------
    name : str
        A key of `KNOWN_MODELS`, or the path of a file.
    tile_overlap : float, optional
        Tiles lie ``tile / (1 + 2 * tile_overlap)`` apart, as in Cellpose, but at whole steps of the network; 0.5 is
        half a tile. Default: the model's own.

    Raises
    ------
    ModelError
        If the name is not known and no such file exists, if it cannot be fetched, or if the file is no network of
        Cellpose.
    """
    known = KNOWN_MODELS.get(name)
    if known is None:
        path = Path(name)
        if not path.is_file():
            raise ModelError(
                f"unknown model {name!r}; known are {', '.join(KNOWN_MODELS)}, or give the path of a model file."
            )
        size = path.with_name(f"{path.name}_size.npy")
        size_path = size if size.is_file() else None
        return _describe(name, path, path.stat().st_mtime_ns, size_path, None, tile_overlap or TILE_OVERLAP)
    size_path = model_folder() / known.size_file if known.size_file else None
    for needed in (known.path, size_path):
        if needed is not None and not needed.is_file():
            fetch(known.store, needed)
    overlap = tile_overlap or known.tile_overlap
    return _describe(name, known.path, known.path.stat().st_mtime_ns, size_path, known.n_inputs, overlap)


@functools.lru_cache(maxsize=8)
def _describe(
    name: str, path: Path, _modified: int, size_path: Path | None, n_inputs: int | None, tile_overlap: float
) -> Model:
    """Read what a model's file says, once per process and state of the file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    facts = path.with_suffix(".json")
    if path.parent == WEIGHTS:
        card = json.loads(facts.read_text())
        size: SizeModel | None = SizeModel(
            tuple(card["size"]["A"]), tuple(card["size"]["smean"]), card["diam_mean"], card["size"]["ymean"]
        )
        kind, diam_mean = ARCHITECTURES["unet"], float(card["diam_mean"])
    else:
        from .states import describe_state

        architecture, diam_mean = describe_state(path)
        kind = ARCHITECTURES[architecture]
        size = None if size_path is None else read_size_model(size_path)
        path = path.resolve()
    stride = int(kind.tile / (1 + 2 * tile_overlap)) // POOLING * POOLING
    n_inputs = kind.n_channels if n_inputs is None else n_inputs
    return Model(name, path, sha256, diam_mean, kind.name, kind.n_channels, n_inputs, kind.tile, stride, size)
