"""The registry of models: which names are known, where their files lie, what they expect."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ModelError

__all__ = ["KNOWN_MODELS", "Model", "SizeModel", "find_model"]

WEIGHTS = Path(__file__).parent / "weights"
KNOWN_MODELS = ("tiledseg-nuclei",)

TILE = 224
STRIDE = 184
"""About tile / 1.2, and a multiple of the network's total pooling of 8."""


@dataclass(frozen=True)
class SizeModel:
    """Linear map from style vector to log diameter, as Cellpose 1-3 has it.

    ``diameter = exp(A . (style - smean) + log(diam_mean) + ymean)``
    """

    A: tuple[float, ...]
    smean: tuple[float, ...]
    diam_mean: float
    ymean: float

    def diameter(self, style: npt.NDArray[np.float32]) -> float:
        """Diameter in pixels of the tile that gave this style, at least 5."""
        log = float(np.dot(self.A, style - np.array(self.smean))) + np.log(self.diam_mean) + self.ymean
        return max(5.0, float(np.exp(log)))


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
    tile, stride : int
        The lattice.
    n_channels : int
        Input channels of the network.
    size : SizeModel or None
        For a first guess of the diameter.
    """

    name: str
    path: Path
    sha256: str
    diam_mean: float
    n_channels: int = 2
    tile: int = TILE
    stride: int = STRIDE
    size: SizeModel | None = None


def find_model(name: str) -> Model:
    """Describe a model given by name or file.

    Raises
    ------
    ModelError
        If the name is not known and no such file exists, or the file is no U-Net of Cellpose 1-3.
    """
    path = WEIGHTS / f"{name}.pt" if name in KNOWN_MODELS else Path(name)
    if not path.is_file():
        raise ModelError(
            f"unknown model {name!r}; known are {', '.join(KNOWN_MODELS)}, or give the path of a model file."
        )
    return _describe(name, path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _describe(name: str, path: Path, _modified: int) -> Model:
    """Read what a model's file says, once per process and state of the file."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    facts = path.with_suffix(".json")
    if name in KNOWN_MODELS:
        card = json.loads(facts.read_text())
        size = SizeModel(
            tuple(card["size"]["A"]), tuple(card["size"]["smean"]), card["diam_mean"], card["size"]["ymean"]
        )
        return Model(name, path, sha256, card["diam_mean"], size=size)
    from .unet import read_state

    state = read_state(path)
    return Model(name, path.resolve(), sha256, float(state["diam_mean"]))
