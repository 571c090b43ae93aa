"""Any function from a block of pixels to labels in the place of the network.

A function is known to a run by its name and a hash of what it consists of, so that going on with
another one is refused. It travels to workers once, by way of the scratch, and is unpacked once per
process: a model that it carries is neither sent nor loaded for every block.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import pickle
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import Settings, digest
from .errors import SegmenterError, SettingsError
from .meters import metered
from .store import Store

__all__ = ["ALL_CHANNELS", "APPLICABLE", "Segmenter", "drop_small", "identity_of", "name_of", "segmenter_settings"]

Function = Callable[..., Any]
LabelArray = npt.NDArray[np.uint32]

ALL_CHANNELS = "all"
"""Value of the setting `channel` that gives a function every channel."""

APPLICABLE = {
    "channel",
    "combine",
    "stain",
    "diameter",
    "region",
    "level",
    "mask",
    "missing_chunks",
    "shard",
    "features",
    "csv",
    "polygons",
    "do_3d",
    "anisotropy",
    "stitch_threshold",
    "stitch_gap",
    "block",
    "halo",
    "min_size",
    "max_size",
    "name",
    "ome_zarr",
}
"""Settings that a run with a function has; all others are the network's."""

MAX_ID = 2**32 - 1
PACKED = "segmenter"


def segmenter_settings(values: dict[str, Any]) -> Settings:
    """Settings of a run whose labels a function makes; those of the network are refused.

    Raises
    ------
    SettingsError
        If a setting is given that only the network and its masks have, or neither halo nor diameter.
    """
    # A function's labels are taken as they are unless a smallest size is asked for.
    settings = Settings.of(**{"min_size": 0, **values})
    foreign = sorted(set(values) - APPLICABLE)
    if foreign:
        raise SettingsError(
            f"{', '.join(foreign)} cannot be given with a segmenter, only with the network and its masks; "
            f"leave {'it' if len(foreign) == 1 else 'them'} out."
        )
    if settings.masks.halo == "auto" and settings.survey.diameter_given() is None:
        raise SettingsError(
            "a segmenter needs to know how far to read around a block; give halo in pixels, at least the size of "
            "the largest objects, or diameter, of which it takes two."
        )
    return settings


@dataclass(frozen=True)
class Segmenter:
    """A function and what is known of it.

    Attributes
    ----------
    name : str
        Module and qualified name.
    identity : str
        Hash of what it consists of, see `identity_of`.
    takes_all_channels : bool
        Whether it is given shape (c, *spatial) instead of (*spatial).
    function : callable or None
        None where only its name and where it is packed travel.
    packed : str
        Hash of the function as packed in the scratch, ``""`` before it is.
    """

    name: str
    identity: str
    takes_all_channels: bool
    function: Function | None
    packed: str = ""

    @classmethod
    def of(cls, function: Any, takes_all_channels: bool = False) -> Segmenter:
        """Describe a function.

        Raises
        ------
        SettingsError
            If it cannot be called.
        """
        if not callable(function):
            raise SettingsError(
                f"segmenter must be a function from a block of pixels to labels, not {type(function).__name__}."
            )
        return cls(name_of(function), identity_of(function), takes_all_channels, function)

    def pack(self, store: Store) -> Segmenter:
        """Leave the function in the scratch for workers; what is returned travels without it.

        Raises
        ------
        SettingsError
            If it cannot be sent to other processes.
        """
        import cloudpickle

        try:
            payload = cloudpickle.dumps(self.function)
        except Exception as error:
            raise SettingsError(
                f"segmenter {self.name} cannot be sent to workers ({type(error).__name__}: {error}); let it make "
                "inside itself what cannot be pickled."
            ) from error
        store.save(PACKED, np.frombuffer(payload, np.uint8))
        return dataclasses.replace(self, function=None, packed=hashlib.sha256(payload).hexdigest())

    @metered("function")
    def label(self, pixels: npt.NDArray[Any], where: str, store: Store) -> LabelArray:
        """Labels of a region.

        Parameters
        ----------
        pixels : array, shape (*spatial) or (c, *spatial)
            As the image stores them; the function may write into it.
        where : str
            Block and region, for messages.
        store : Store
            Where the function is packed, if it does not travel.

        Returns
        -------
        labels : array of uint32, shape (*spatial)
            1..n in the order of the function's ids, 0 background.

        Raises
        ------
        SegmenterError
            If the function fails or returns something else than labels.
        """
        function = self.function or _unpacked(self.name, self.packed, store)
        shape = pixels.shape[1:] if self.takes_all_channels else pixels.shape
        try:
            labels = function(pixels)
        except Exception as error:
            raise SegmenterError(
                f"segmenter {self.name} failed in {where} with {type(error).__name__}: {error}; correct it and run "
                "again, with restart=True if blocks are done."
            ) from error
        wrong = _what_is_wrong(labels, shape)
        if wrong:
            raise SegmenterError(
                f"segmenter {self.name} returned {wrong} for {where}; return an array of shape {shape} with whole "
                f"numbers from 0 (background) to {MAX_ID}."
            )
        return _compact(np.asarray(labels))


_unpacking = threading.Lock()
_functions: dict[str, Function] = {}


def _unpacked(name: str, packed: str, store: Store) -> Function:
    """The function that was packed, unpacked once per process; the one of an earlier run is let go."""
    with _unpacking:
        if packed not in _functions:
            _functions.clear()
            try:
                _functions[packed] = pickle.loads(store.load(PACKED).tobytes())
            except Exception as error:
                raise SegmenterError(
                    f"segmenter {name} cannot be loaded by a worker ({type(error).__name__}: {error}); install there "
                    "what it needs."
                ) from error
        return _functions[packed]


def _what_is_wrong(labels: Any, shape: tuple[int, ...]) -> str:
    """What a function returned instead of labels of this shape; empty if it is labels."""
    if not isinstance(labels, np.ndarray):
        # Arrays of other libraries may lie on a GPU or be lazy: converting them is for the function to do.
        return "None" if labels is None else f"a {type(labels).__name__}"
    if labels.shape != shape:
        return f"an array of shape {labels.shape}"
    if labels.dtype.kind not in "iu":
        return f"an array of {labels.dtype}"
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    if low < 0:
        return f"the id {low}"
    return f"the id {high}" if high > MAX_ID else ""


def _compact(labels: npt.NDArray[Any]) -> LabelArray:
    """Number the ids that occur from 1, in their order: tables then grow with the block, not with the ids."""
    largest = int(labels.max(initial=0))
    if largest > labels.size:
        ids, index = np.unique(labels, return_inverse=True)
        return (index.reshape(labels.shape) + int(ids[0] != 0)).astype(np.uint32)
    occurs = np.zeros(largest + 1, np.uint32)
    occurs[labels] = 1
    occurs[0] = 0
    result: LabelArray = np.cumsum(occurs, dtype=np.uint32)[labels]
    return result


def drop_small(labels: LabelArray, min_size: int) -> LabelArray:
    """Labels without the objects of fewer pixels; the others keep their ids.

    Parameters
    ----------
    labels : array of uint32, shape (*spatial)
        Labels 1..n, 0 background.
    min_size : int
        Pixels an object must have.

    Returns
    -------
    labels : array of uint32, shape (*spatial)
    """
    if min_size <= 1:
        return labels
    sizes = np.bincount(labels.ravel())
    result: LabelArray = np.where(sizes >= min_size, np.arange(sizes.size), 0).astype(np.uint32)[labels]
    return result


def name_of(function: Any) -> str:
    """Module and qualified name of a function, or of the class of a callable object."""
    if isinstance(function, functools.partial):
        return f"partial({name_of(function.func)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    module = getattr(named, "__module__", None)
    return f"{module}.{named.__qualname__}" if module else str(named.__qualname__)


def identity_of(function: Any) -> str:
    """Hash of what a function consists of, the same in every process.

    Parameters
    ----------
    function : callable
        Functions, lambdas, closures, bound methods, `functools.partial`, objects with ``__call__``.

    Returns
    -------
    identity : str
        Of the source where it can be had, else of the compiled code (always for lambdas, whose source
        is the line they stand on); of defaults, arguments of partials, captured variables and
        attributes, as far as they are numbers, text, arrays, containers of these, or functions.

    Notes
    -----
    Not seen: globals and functions of modules that the function uses, the content of other objects
    (a loaded model counts by its class only), and functions compiled in other languages but for their
    name.
    """
    return digest(_parts(function, set()))


def _parts(value: Any, seen: set[int]) -> Any:
    """What of a value counts for the identity, ready for JSON."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Path | np.generic):
        return [type(value).__name__, str(value)]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return [str(value.dtype), list(value.shape), content]
    if id(value) in seen:
        return "again"
    seen = seen | {id(value)}
    if isinstance(value, list | tuple):
        return [_parts(item, seen) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(digest(_parts(item, seen)) for item in value)
    if isinstance(value, dict):
        return sorted([digest(_parts(key, seen)), digest(_parts(item, seen))] for key, item in value.items())
    if callable(value):
        return [name_of(value), *(_parts(part, seen) for part in _pieces(value))]
    return name_of(type(value))


def _pieces(function: Any) -> list[Any]:
    """Of a callable, its code and the values it carries."""
    if isinstance(function, functools.partial):
        return [function.func, function.args, function.keywords]
    if isinstance(function, types.MethodType):
        return [function.__func__, function.__self__ if callable(function.__self__) else _vars_of(function.__self__)]
    if isinstance(function, types.FunctionType):
        captured = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        return [_source_of(function), function.__defaults__, function.__kwdefaults__, captured]
    if hasattr(function, "__wrapped__"):
        return [function.__wrapped__]
    if isinstance(function, type | types.BuiltinFunctionType | np.ufunc):
        return []
    return [_source_of(type(function)), type(function).__call__, _vars_of(function)]


def _vars_of(value: Any) -> dict[str, Any]:
    """Attributes of an object that has any."""
    return dict(getattr(value, "__dict__", {}))


def _is_filled(cell: types.CellType) -> bool:
    """Whether a captured variable has a value yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _source_of(named: Any) -> Any:
    """Source text, or code in pieces where there is none; None for what is compiled."""
    try:
        if named.__name__ != "<lambda>":
            return inspect.getsource(named)
    except (OSError, TypeError):
        pass
    code = getattr(named, "__code__", None)
    return None if code is None else _code_parts(code)


def _code_parts(code: types.CodeType) -> list[Any]:
    """Instructions, names and constants; functions defined inside count as constants."""
    constants = [_code_parts(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code, list(code.co_names), constants]
