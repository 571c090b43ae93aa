"""What the run that made the labels wrote down: in its report, and block by block in its scratch if that is there.

Both are files that others may have changed. The scratch counts only if it is that of the run that made the labels,
and what does not read as it should counts as not there.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RemoteError, ScratchError
from ..grid import Index
from ..remote import Location, read_file
from ..store import DiskStore
from .subject import Subject

__all__ = ["Blocks", "Records", "records_of"]

logger = logging.getLogger(__name__)

MAP_SIDE = 128
MOST_BLOCKS = 10_000_000
PLACES = 8
FOLDER = re.compile(r"masks-[0-9a-f]+")
WHOLE = ("n_objects", "n_blocks", "n_pairs", "n_exact_pairs", "n_seam", "n_seam_linked", "n_cut_by_halo")

Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Blocks:
    """What the scratch tells of single blocks; those of all frames and planes together, and neighbours where many.

    Attributes
    ----------
    agreement : array of float64, shape (y, x)
        Of the labels that cross a border of a block there, the share that the other block saw as well; NaN where none
        do.
    n_cut : array of int64, shape (y, x)
        Objects that reach past the halo.
    places : list of (tuple of int, int)
        Blocks with most of those: where their core starts, and how many.
    """

    agreement: Counts
    n_cut: npt.NDArray[np.int64]
    places: list[tuple[Index, int]]


@dataclass(frozen=True)
class Records:
    """What a run told.

    Attributes
    ----------
    report : dict
        What is used of its report; empty if there is none.
    blocks : Blocks or None
        None if its scratch is gone.
    why : str
        Why something is not there, for people; empty if all is.
    """

    report: dict[str, Any]
    blocks: Blocks | None
    why: str


def records_of(subject: Subject, scratch: Path | None = None) -> Records:
    """Read what the run left.

    Parameters
    ----------
    subject : Subject
    scratch : Path, optional
        Its scratch. Default: where the report says it is.

    Returns
    -------
    records : Records
    """
    document = None if subject.table_folder is None else _document(subject.table_folder / "report.json")
    if document is None:
        return Records({}, None, "there is no report of a run beside these labels")
    report = {key: document[key] for key in WHOLE if _is_count(document.get(key))}
    block = document.get("block")
    place = scratch or (Path(document["scratch"]) if isinstance(document.get("scratch"), str) else None)
    if place is None or not (place / "run.json").is_file():
        return Records(report, None, "the scratch of the run, which knows it block by block, is not there any more")
    try:
        return Records(report, _blocks_of(DiskStore(place), subject, block), "")
    except (ScratchError, ValueError, IndexError) as error:
        logger.debug("scratch %s is not used: %s", place, error)
        return Records(report, None, "the scratch is not, or no longer, that of the run that made these labels")


def _document(place: Location) -> dict[str, Any] | None:
    """A JSON object, None where there is none that can be read."""
    try:
        found = read_file(place)
        document = None if found is None else json.loads(found[0])
    except (ValueError, OSError, RecursionError, RemoteError) as error:
        logger.warning("%s cannot be read (%s): what the run told is left out.", place, error)
        return None
    return document if isinstance(document, dict) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _blocks_of(store: DiskStore, subject: Subject, block: Any) -> Blocks:
    """Read the records of all blocks.

    Raises
    ------
    ValueError
        If they are not those of the labels.
    """
    made_by, masks = store.read_json("run.json") or {}, store.read_json("masks.json") or {}
    folder, run = masks.get("folder"), subject.run.get("run")
    if run is None or made_by.get("id") != run or not isinstance(folder, str) or not FOLDER.fullmatch(folder):
        raise ValueError("of another run")
    shape = subject.shape
    if not isinstance(block, list) or len(block) != len(shape) or not all(_is_count(n) and n for n in block):
        raise ValueError("the report does not say how large blocks were")
    counts = tuple(-(-n // side) for n, side in zip(shape, block, strict=True))
    n_blocks = math.prod(counts)
    if n_blocks > MOST_BLOCKS:
        raise ValueError(f"{n_blocks} blocks")
    together = [-(-n // MAP_SIDE) for n in counts[-2:]]
    size = tuple(-(-n // k) for n, k in zip(counts[-2:], together, strict=True))
    seam, linked, cut = (np.zeros(size, np.int64) for _ in range(3))
    worst: list[tuple[Index, int]] = []
    for position in range(n_blocks):
        index = tuple(int(i) for i in np.unravel_index(position, counts))
        at = index[-2] // together[0], index[-1] // together[1]
        *_, n_seam, n_linked = _numbers(store.load, f"{folder}/agreement/{position}", 5)
        n_cut = int(_numbers(store.view, f"{folder}/objects/{position}", 2)[0])
        seam[at], linked[at], cut[at] = seam[at] + int(n_seam), linked[at] + int(n_linked), cut[at] + n_cut
        if n_cut:
            worst = sorted([*worst, (index, n_cut)], key=lambda one: (-one[1], one[0]))[:PLACES]
    share = np.where(seam > 0, linked / np.maximum(seam, 1), np.nan)
    places = [(tuple(i * side for i, side in zip(index, block, strict=True)), n) for index, n in worst]
    return Blocks(share, cut, places)


def _numbers(load: Callable[[str], npt.NDArray[Any]], name: str, fewest: int) -> npt.NDArray[Any]:
    """The first numbers of a record."""
    values = load(name)
    if values.ndim != 1 or values.size < fewest or values.dtype.kind not in "iuf":
        raise ValueError(f"{name} holds something else")
    return values[:fewest]
