"""Size models: from the style vector of a tile to the diameter of its cells, as Cellpose 1-3 has it."""

from __future__ import annotations

import math
import pickle
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import ModelError

__all__ = ["SizeModel", "read_size_model"]

SMALLEST = 5.0
"""Diameters are not estimated below, in pixels."""

UNREADABLE = (
    pickle.UnpicklingError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    OverflowError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
)
"""What the pickle module and numpy raise on bytes that are no pickle of a dict of numbers."""


@dataclass(frozen=True)
class SizeModel:
    """Linear map from style vector to log diameter.

    ``diameter = exp(A . (style - smean) + log(diam_mean) + ymean)``, at least 5 pixels.

    Attributes
    ----------
    A, smean : tuple of float
        Weights, and the mean style; as long as the style vector.
    diam_mean : float
        Diameter in pixels that cells have on the network's grid.
    ymean : float
        Mean of the logarithm.
    """

    A: tuple[float, ...]
    smean: tuple[float, ...]
    diam_mean: float
    ymean: float

    def diameter(self, style: npt.NDArray[np.float32]) -> float:
        """Diameter in pixels of the cells of the tile that gave this style."""
        log = float(np.dot(self.A, style - np.array(self.smean))) + math.log(self.diam_mean) + self.ymean
        return max(SMALLEST, math.exp(log))


class _Dtype:
    """Stands for ``numpy.dtype``: a kind of number and its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])

    def values_of(self, data: bytes) -> npt.NDArray[np.float64]:
        """The numbers that some bytes are."""
        if not re.fullmatch(r"[fiu][1248]", self.code) or self.order not in "<>=|":
            raise ValueError(f"numbers of the kind {self.code!r}")
        return np.frombuffer(data, np.dtype(self.order.replace("|", "<") + self.code)).astype(np.float64)


class _Array:
    """Stands for ``numpy.ndarray``: its content, as a list or as numbers in a row."""

    content: Any = None

    def __setstate__(self, state: Any) -> None:
        _, _, dtype, _, data = state
        self.content = dtype.values_of(data) if isinstance(data, bytes) else list(data)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, data: bytes) -> float:
    return float(dtype.values_of(data)[0])


def _encode(text: str, _: str) -> bytes:
    return text.encode("latin1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
} | {
    (module, name): stand_in
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")  # of numpy 1 and 2
    for name, stand_in in (("_reconstruct", _reconstruct), ("scalar", _scalar))
}
"""What a pickled dict of numbers and arrays asks for. numpy's own constructors trust what they are given, so that
a made-up array can point anywhere in memory."""


class _Numbers(pickle.Unpickler):
    """Unpickles arrays and numbers; anything else a file asks for is refused before it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a number nor an array")
        return STAND_INS[module, name]


def read_size_model(path: Path) -> SizeModel:
    """Read a size model of Cellpose 1-3, a ``.npy`` file with a pickled dict.

    Parameters
    ----------
    path : Path
        The file. It is not trusted: only arrays and numbers are unpickled.

    Raises
    ------
    ModelError
        If the file is no such dict, or asks for anything but arrays and numbers.
    """
    try:
        with path.open("rb") as file:
            values = _object_of(file)
        found = SizeModel(
            tuple(_row(values["A"]).tolist()),
            tuple(_row(values["smean"]).tolist()),
            float(_row(values["diam_mean"])[0]),
            float(_row(values["ymean"])[0]),
        )
    except UNREADABLE as error:
        raise ModelError(
            f"size model {path} cannot be read ({error}); give the file that belongs to the network, or remove it "
            "to have the diameter estimated without one."
        ) from error
    if len(found.A) != len(found.smean):
        raise ModelError(f"size model {path} has {len(found.A)} weights for a mean style of {len(found.smean)}.")
    return found


def _row(value: Any) -> npt.NDArray[np.float64]:
    """A number or an array as a row of finite numbers."""
    row = np.asarray(value.content if isinstance(value, _Array) else value, np.float64).ravel()
    if not (row.size and np.isfinite(row).all()):
        raise ValueError("numbers are missing or not finite")
    return row


def _object_of(file: BinaryIO) -> Any:
    """The one Python object of a ``.npy`` file."""
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"version {version} of the npy format")
    shape, _, dtype = read_header[version](file)
    if not dtype.hasobject or shape != ():
        raise ValueError(f"an array of {dtype} of shape {shape} instead of a dict")
    return _Numbers(file).load().content[0]
