"""From flows to labels: tiledseg against Cellpose 4 on the same flows and the same cores.

    TILEDSEG_DATA=... python scripts/bench/masks.py [--toy] [--save FILE]

Images of 2048 x 2048: flows of the true outlines of a dense synthetic slide, and flows of the default
network on four windows of a real mosaic, in its corners. Both sides are given float32 flows at full size and the
steps, thresholds and smallest size that Cellpose would take, both are warm, and the better of some runs
counts. Average precision on the mosaic is that of all its windows together: in one of them a single
object of 1 700 decides which side is ahead at IoU 0.9. Takes five minutes on two cores, nearly all of
them Cellpose's.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from images import Example, mosaic_corners, synthetic
from report import THRESHOLDS, Table, Target, finish, parser

import tiledseg
from tiledseg import flows, survey
from tiledseg.cluster import connect
from tiledseg.config import Settings
from tiledseg.cores import Cores
from tiledseg.dynamics import compute_masks
from tiledseg.grid import interpolate
from tiledseg.heat import label_flows
from tiledseg.images import open_image
from tiledseg.inputs import Input
from tiledseg.job import Job
from tiledseg.masks import read_flows
from tiledseg.networks.models import find_model
from tiledseg.networks.runner import torch_threads_kept
from tiledseg.progress import Progress
from tiledseg.store import MemoryStore

Floats = npt.NDArray[np.float32]

LOGIT = 5.0
LIMITS = {"synthetic": 30.0, "mosaic_fluo": 20.0}
"""How many times faster than Cellpose."""
NITER = 200
FLOW_THRESHOLD = 0.4
MIN_SIZE = 15


def true_flows(example: Example) -> tuple[Floats, Floats]:
    """Unit flows and logits of the true outlines."""
    truth = example.truth.astype(np.int32)
    return label_flows(truth), np.where(truth > 0, LOGIT, -LOGIT).astype(np.float32)


def network_flows(example: Example) -> tuple[Floats, Floats, int]:
    """Unit flows and logits of the default network at full size, and the steps Cellpose would take."""
    settings, model = Settings.of(diameter=example.diameter), find_model("tiledseg-nuclei")
    with connect(small=True) as executor, torch_threads_kept():
        job = Job(open_image(example.image), (Input((0,)),), settings, model, executor.device("cpu"), MemoryStore())
        job = dataclasses.replace(job, surveyed=survey.run(job, executor, Progress(None)))
        flows.run(job, executor, Progress(None))
    working = job.working(0)
    values = read_flows(job, (), tuple(slice(0, n) for n in working.shape))
    positions = [(working.from_image(0, n, axis), working.shape[axis], 0) for axis, n in enumerate(job.shape)]
    full = np.ascontiguousarray(interpolate(values, positions))
    return full[:-1], full[-1], job.niter(0)


def cellpose_masks(unit_flows: Floats, cellprob: Floats, niter: int) -> npt.NDArray[Any]:
    """Cellpose's labels; it takes flows of five times unit length."""
    import torch
    from cellpose import dynamics

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks")  # torch, of Cellpose's sparse histogram
        labels = dynamics.resize_and_compute_masks(
            unit_flows * 5,
            cellprob,
            niter=niter,
            flow_threshold=FLOW_THRESHOLD,
            min_size=MIN_SIZE,
            device=torch.device("cpu"),
        )
    return np.asarray(labels)


def our_masks(n_threads: int) -> Callable[[Floats, Floats, int], npt.NDArray[Any]]:
    """The labels of tiledseg, on so many cores."""
    cores = Cores(n_threads)

    def make(unit_flows: Floats, cellprob: Floats, niter: int) -> npt.NDArray[Any]:
        with cores.task():
            return compute_masks(
                unit_flows, cellprob, niter=niter, flow_threshold=FLOW_THRESHOLD, min_size=MIN_SIZE, cores=cores
            )

    return make


def best_of(
    make: Callable[[Floats, Floats, int], npt.NDArray[Any]], n_runs: int, values: tuple[Floats, Floats, int]
) -> tuple[float, npt.NDArray[Any]]:
    """Seconds of the quickest of some runs, and the labels."""
    taken = []
    for _ in range(n_runs):
        start = time.perf_counter()
        labels = make(*values)
        taken.append(time.perf_counter() - start)
    return min(taken), labels


def measure(example: Example, values: tuple[Floats, Floats, int], n_runs: int, n_threads: int) -> dict[str, Any]:
    """A row of the table: both sides on the same flows."""
    ours_of = our_masks(n_threads)
    corner = (slice(0, 256), slice(0, 256))
    unit_flows, cellprob, niter = values
    for make in (ours_of, cellpose_masks):
        make(np.ascontiguousarray(unit_flows[:, *corner]), np.ascontiguousarray(cellprob[corner]), niter)
    ours_s, ours = best_of(ours_of, n_runs, values)
    theirs_s, theirs = best_of(cellpose_masks, n_runs, values)
    scores = [tiledseg.compare(labels, example.truth, thresholds=THRESHOLDS).overall for labels in (ours, theirs)]
    return {
        "image": example.name,
        "cells": scores[0].n_truth,
        "niter": niter,
        "Cellpose s": theirs_s,
        "tiledseg s": ours_s,
        "ratio": theirs_s / ours_s,
        "AP Cellpose": scores[1].ap,
        "AP tiledseg": scores[0].ap,
        "found Cellpose": _counts(scores[1]),
        "found tiledseg": _counts(scores[0]),
    }


def _counts(scores: Any) -> dict[str, Any]:
    """What average precision is made of."""
    return {"n_true_positive": list(scores.n_true_positive), "n_all": scores.n_truth + scores.n_predicted}


def _joint_ap(rows: Sequence[dict[str, Any]], side: str, threshold: int) -> float:
    """Average precision over the objects of several rows."""
    n_found = sum(row[f"found {side}"]["n_true_positive"][threshold] for row in rows)
    return n_found / (sum(row[f"found {side}"]["n_all"] for row in rows) - n_found)


def targets_of(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """What the rows are held against."""
    targets = []
    for start, limit in LIMITS.items():
        of_image = [row for row in rows if row["image"].startswith(start)]
        for row in of_image:
            targets.append(Target(f"{row['image']}: times faster than Cellpose", row["ratio"], limit))
        if of_image:
            ours, theirs = (_joint_ap(of_image, side, THRESHOLDS.index(0.9)) for side in ("tiledseg", "Cellpose"))
            targets.append(Target(f"{start}: AP at 0.9 beside Cellpose's", ours, theirs))
    return targets


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge; returns the exit code."""
    import torch

    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=1, metavar="N", help="runs of each side, of which the best counts")
    made.add_argument("--threads", type=int, default=2, metavar="N", help="threads of both sides")
    made.add_argument("--only", choices=tuple(LIMITS), help="one of the two images")
    options = made.parse_args(arguments)
    side, n_runs = (192, 1) if options.toy else (2048, options.runs)
    torch.set_num_threads(options.threads)
    columns = {"image": 22, "cells": 7, "niter": 7, "Cellpose s": 12, "tiledseg s": 12, "ratio": 8}
    table = Table({**columns, "AP Cellpose": 23, "AP tiledseg": 23})
    if options.only != "mosaic_fluo":
        example = synthetic(side)
        table.add(measure(example, (*true_flows(example), NITER), n_runs, options.threads))
    if options.only != "synthetic":
        for example in mosaic_corners(side):
            table.add(measure(example, network_flows(example), n_runs, options.threads))
    return finish(targets_of(table.rows), table.rows, toy=options.toy, path=options.save)


if __name__ == "__main__":
    sys.exit(main())
