"""A file of the scratch that is damaged: which piece is computed again.

What a disk error, a crash of a file server or a hand has spoilt is found when it is read: by checksums, by lengths, by
files that are missing. The piece that the file belongs to is then no longer counted as done, so that the run, started
again, computes that piece to the same bits and goes on; what was made of it before stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import PurePosixPath

import numpy as np

from .errors import ScratchError
from .grid import Index
from .job import Job, Surveyed

__all__ = ["forget"]

STAGES = {
    "objects": "masks",
    "links": "masks",
    "sizes": "masks",
    "pairs": "seams",
    "agreement": "seams",
    "measured": "publish-levels-0",
}
"""Of a folder of arrays, one for each piece, the stage that writes them."""
CHUNK = re.compile(r"/c[./](\d+(?:[./]\d+)*)$")
"""A file of an array, also as it was called when every index was a folder."""
DOCUMENTS = {"survey.json", "masks.json", "stitch.json"}
"""Made anew from what the pieces left."""


def forget(job: Job, error: ScratchError) -> ScratchError:
    """Take back the done-mark of the piece that a damaged file belongs to.

    Parameters
    ----------
    job : Job
        Whose scratch it is.
    error : ScratchError
        Names the file.

    Returns
    -------
    error : ScratchError
        That says what to do now.
    """
    path, store = PurePosixPath(error.file), job.store
    if path.name in DOCUMENTS or path.name == "zarr.json":
        store.remove(error.file)
    elif path.parts[0] == "survey.zarr":
        store.remove("survey.json")
        store.unmark("survey", store.done("survey"))
    elif path.parent.name == "ids":
        store.remove(str(path.parent.parent / "stitch.json"))
    else:
        piece = _chunk_of_flows(job, path) if path.parts[0] == "flows.zarr" else _piece_of_labels(path)
        if piece is None:
            return error
        store.unmark(piece[0], [piece[1]])
        # A chunk that is written in part is read before.
        store.remove(error.file)
    folder, file, why, _ = error.args
    return ScratchError(folder, file, why, "run the same command again: only what is lost is computed again.")


def _chunk_of_flows(job: Job, path: PurePosixPath) -> tuple[str, int] | None:
    """The stage, and the piece that a file of the flows holds."""
    document = job.store.read_json("survey.json")
    if document is None:
        return None
    before = 0
    for sheet in dataclasses.replace(job, surveyed=Surveyed.from_json(document)).sheets:
        if PurePosixPath(sheet.name) in path.parents:
            index = _chunk_index(path)[: len(sheet.chunk_counts)]
            return "flows", before + int(np.ravel_multi_index(index, sheet.chunk_counts))
        before += math.prod(sheet.chunk_counts)
    return None


def _piece_of_labels(path: PurePosixPath) -> tuple[str, int] | None:
    """The stage and the piece that wrote a file in a folder of labels."""
    if len(path.parts) < 3 or not path.parts[0].startswith("masks-"):
        return None
    folder, kind = path.parts[:2]
    if kind == "labels.zarr":
        return f"{folder}/masks", _chunk_index(path)[0]
    return (f"{folder}/{STAGES[kind]}", int(path.stem)) if kind in STAGES else None


def _chunk_index(path: PurePosixPath) -> Index:
    """Which chunk of its array a file holds."""
    found = CHUNK.search(str(path))
    if found is None:
        raise ValueError(f"{path} is no chunk of an array")
    return tuple(map(int, re.split("[./]", found[1])))
