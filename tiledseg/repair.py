"""A file of the scratch that is damaged: which piece is computed again.

What a disk error, a crash of a file server or a hand has spoilt is found when it is read: by checksums, by lengths, by
files that are missing. The piece that the file belongs to is then no longer counted as done, so that the run, started
again, computes that piece to the same bits and goes on; what was made of it before stays as it is.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath

import numpy as np

from .errors import ScratchError
from .grid import Index
from .job import Job

__all__ = ["forget"]

STAGES = {
    "objects": "masks",
    "links": "masks",
    "sizes": "masks",
    "pairs": "seams",
    "agreement": "seams",
    "measured": "publish-0",
}
"""Of a folder of arrays, one for each piece, the stage that writes them."""
DOCUMENTS = {"survey.json", "masks.json", "stitch.json"}
"""Made anew from what the pieces left."""


def forget(job: Job, error: ScratchError) -> ScratchError:
    """Take back the done-mark of the piece that a damaged file belongs to.

    Parameters
    ----------
    job : Job
        Whose scratch it is, with the folder of its labels.
    error : ScratchError
        Names the file.

    Returns
    -------
    error : ScratchError
        That says what to do now.
    """
    path = PurePosixPath(error.file)
    if path.name in DOCUMENTS or path.name == "zarr.json":
        job.store.remove(error.file)
    elif path.parts[0] == "survey.zarr":
        job.store.remove("survey.json")
        job.store.unmark("survey", job.store.done("survey"))
    elif path.parent == PurePosixPath(job.labels, "ids"):
        job.store.remove(f"{job.labels}/stitch.json")
    else:
        piece = _piece_of(job, path)
        if piece is None:
            return error
        job.store.unmark(piece[0], [piece[1]])
    folder, file, why, _ = error.args
    return ScratchError(folder, file, why, "run the same command again: only what is lost is computed again.")


def _piece_of(job: Job, path: PurePosixPath) -> tuple[str, int] | None:
    """The stage and the piece that wrote a file, None if that is not known."""
    before = 0
    for sheet in job.sheets if job.segmenter is None and job.surveyed is not None else ():
        if PurePosixPath(sheet.name) in path.parents:
            index = _chunk_index(path)[: len(sheet.chunk_counts)]
            return "flows", before + int(np.ravel_multi_index(index, sheet.chunk_counts))
        before += math.prod(sheet.chunk_counts)
    if job.labels and PurePosixPath(job.labels) in path.parents:
        kind = path.relative_to(job.labels).parts[0]
        if kind == "labels.zarr":
            return f"{job.labels}/masks", _chunk_index(path)[0]
        if kind in STAGES:
            return f"{job.labels}/{STAGES[kind]}", int(path.stem)
    return None


def _chunk_index(path: PurePosixPath) -> Index:
    """Which chunk of its array a file holds."""
    return tuple(int(part) for part in path.parts[path.parts.index("c") + 1 :])
