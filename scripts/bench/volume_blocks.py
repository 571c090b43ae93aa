"""A volume of touching cells with exact flows through the stages, in blocks of several sizes and as a whole.

    python scripts/bench/volume_blocks.py [--side 512] [--blocks 96,128,256] [--toy] [--save FILE]

The flows of the drawn cells are stored as the network's would be, blended from tiles of all three orientations; then
masks, stitch and publish run for every size of block. Prints objects, pixels that differ from the whole, pairs of
blocks that saw an object differently, true objects that are cut at a block's edge, and seconds. The whole of 512 x 512
x 512 takes some 10 GB.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from report import Table, Target, finish, parser

import tiledseg
from tiledseg import flows, masks, publish, stitch
from tiledseg.cluster import ThreadExecutor, n_cores
from tiledseg.config import Settings
from tiledseg.dynamics import warm_up
from tiledseg.grid import overlap, shift
from tiledseg.heat import label_flows
from tiledseg.images import open_image
from tiledseg.inputs import Input
from tiledseg.job import Diameter, Job, Moment, Sheet, Surveyed
from tiledseg.networks.models import find_model
from tiledseg.progress import Progress
from tiledseg.store import DiskStore
from tiledseg.volumes import label_volume

SPACING = 34.0
"""Of the cells, pixels."""
LOGIT = 3.0


def fill(job: Job, sheet: Sheet, values: npt.NDArray[np.float32]) -> None:
    """Store the flows of one orientation as the network's: its share of each component, tile by tile."""
    lattice = sheet.lattice
    job.store.create(
        sheet.name, sheet.array_shape, (1,) * len(sheet.chunk_counts) + (3, *lattice.piece_shape), "float16"
    )
    array = job.store.open(sheet.name)
    everything = tuple(slice(0, n) for n in lattice.shape)
    for chunk in lattice.chunks():
        outputs = []
        for tile in lattice.tiles_of(chunk):
            region = lattice.tile_region(tile)
            inside = overlap(region, everything)
            filled = np.zeros((3, *lattice.sides), np.float32)
            if inside is not None:
                here = shift(inside, tuple(p.start for p in region))
                for target, component in zip(filled, (*sheet.planes, -1), strict=True):
                    target[here] = values[component][inside] / 2
            outputs.append(([tile], filled.reshape(1, 3, lattice.tile, lattice.tile)))
        array[chunk] = flows.process_block(outputs, lattice, lattice.piece_region(chunk))


def labelled(job: Job, block: int) -> tuple[npt.NDArray[np.uint32], dict[str, Any], float]:
    """Labels for a size of block, what stitching counted, and seconds."""
    chosen = dataclasses.replace(job.settings.masks, block=block)
    folder = f"masks-{block}"
    job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, masks=chosen), labels=folder)
    # Planes are written by one task each.
    job.store.create(f"{folder}/published", job.shape, (1, *job.shape[1:]), "uint32")
    executor, start = ThreadExecutor(n_cores()), time.perf_counter()
    masks.run(job, executor, Progress(None))
    facts = stitch.run(job, executor, Progress(None))
    publish.run(job, executor, Progress(None))
    seconds = time.perf_counter() - start
    labels = np.asarray(job.store.open(f"{folder}/published")[:])
    job.store.remove(folder)
    return labels, facts, seconds


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, judge; returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--side", type=int, default=512, metavar="N", help="of the volume, pixels")
    made.add_argument("--blocks", default="96,128,256", metavar="N,N", help="sides of the blocks")
    options = made.parse_args(arguments)
    side = 100 if options.toy else options.side
    truth = label_volume((side,) * 3, spacing=SPACING, seed=1)
    n_cells = int(truth.max())
    values = np.concatenate(
        [label_flows(truth.astype(np.int32)), np.where(truth > 0, LOGIT, -LOGIT).astype(np.float32)[None]]
    )
    warm_up(3)
    targets, rows = [], []
    table = Table({"block": 7, "blocks": 7, "cells": 7, "objects": 8, "differ": 8, "unlike": 7, "cut": 5, "s": 8})
    with tempfile.TemporaryDirectory() as folder:
        model = dataclasses.replace(find_model("tiledseg-nuclei"), diam_mean=SPACING)
        config = Settings.of(diameter=SPACING, do_3d=True)
        image = open_image(np.broadcast_to(np.zeros(1, np.uint8), truth.shape), axes="zyx")
        found = Surveyed((Moment(((0.0, 1.0),), False, Diameter(SPACING, "given", (SPACING,) * 2)),), 0, (), 1.0)
        job = Job(image, (Input((0,)),), config, model, "cpu", DiskStore(Path(folder)), surveyed=found)
        for sheet in job.sheets:
            fill(job, sheet, values)
        del values
        whole = None
        for block in itertools.chain([side], sorted(map(int, options.blocks.split(",")), reverse=True)):
            labels, facts, seconds = labelled(job, block)
            whole = labels if whole is None else whole
            n_cut = tiledseg.compare(labels, truth, block=block).n_cut or 0 if block < side else 0
            row = {
                "block": block,
                "blocks": facts["n_blocks"],
                "cells": n_cells,
                "objects": facts["n_objects"],
                "differ": int((labels != whole).sum()),
                "unlike": facts["n_pairs"] - facts["n_exact_pairs"] + facts["n_cut_by_halo"],
                "cut": n_cut,
                "s": seconds,
            }
            table.add(row)
            rows.append(row)
            targets += [Target(f"block {block}: {of}", row[of], 0, False) for of in ("differ", "unlike", "cut")]
    return finish(targets, rows, toy=options.toy, path=options.save)


if __name__ == "__main__":
    sys.exit(main())
