"""Memory of one task of each stage, for the factors of `tiledseg.preflight`.

    python scripts/bench/memory.py [--side 2048] [--diameter 17] [--blocks 512,1024,2048]
    python scripts/bench/memory.py --volume do_3d --side 208 --blocks 104,140
    python scripts/bench/memory.py --volume stitch --side 400 --blocks 128,256

Segments a dense synthetic slide, or a volume of as many planes (64 to stitch), in this process, once per block size,
then runs one task of each stage alone and prints the most memory it took above what the process had before (Linux:
the high-water mark of /proc is reset before each), beside what preflight projects. Exit code 1 if a task took more.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiledseg
from tiledseg import flows, masks, pipeline, publish, stitch, survey
from tiledseg.cluster import Crew
from tiledseg.job import Job
from tiledseg.omezarr import write_image
from tiledseg.preflight import MIB, Preflight
from tiledseg.runs import place_of
from tiledseg.slides import synthetic_slide
from tiledseg.table import write_table
from tiledseg.volumes import label_volume, render_volume


def status_bytes(key: str) -> int:
    """A size in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_of(function: Callable[..., Any], *args: Any) -> int:
    """Memory a call takes at most, above what the process has before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    function(*args)
    return status_bytes("VmHWM") - before


def measure(job: Job) -> dict[str, int]:
    """Peak of one task per stage; of the block in the middle, which has a halo all round."""
    middle = job.blocks.number(tuple((n - 1) // 2 for n in job.blocks.counts))
    return {
        "survey": peak_of(survey.survey_region, 0, job),
        "flows": peak_of(flows.compute_chunk, 0, job),
        "masks": peak_of(masks.label_block, middle, job),
        "stitch": max(peak_of(stitch.match_block, 0, job), peak_of(stitch.merge, 0, job)),
        "publish": max(peak_of(publish.paint_region, 0, job, range(job.plan.n_levels)), peak_of(write_table, 0, job)),
    }


def main() -> int:
    """Measure and compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--diameter", type=float, default=17.0)
    parser.add_argument("--blocks", default="512,1024,2048")
    parser.add_argument("--volume", choices=("do_3d", "stitch"))
    options = parser.parse_args()
    pipeline.FEW_BLOCKS = sys.maxsize  # all in this process
    is_within = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.ome.zarr"
        how: dict[str, Any] = {}
        if options.volume is None:
            picture, _ = synthetic_slide((options.side, options.side), diameter=options.diameter, seed=1)
            write_image(path, picture, axes="yx")
        else:
            how = {"do_3d": True} if options.volume == "do_3d" else {"stitch_threshold": 0.25}
            shape = (options.side if options.volume == "do_3d" else 64, options.side, options.side)
            picture = render_volume(label_volume(shape, spacing=options.diameter, seed=1), seed=1)
            write_image(path, picture, axes="zyx", spacing_um=(1.0, 1.0, 1.0), chunk=128)
        del picture
        for block in map(int, options.blocks.split(",")):
            output = Path(folder) / f"{block}.zarr"
            job = tiledseg.segment(path, output, diameter=options.diameter, block=block, **how).job
            crew = Crew(1, 1, in_process=True)
            place = place_of(job.image, output, None, job.settings)
            flight = Preflight(job.image, job.inputs, job.settings, job.labeller, place, crew)
            # A block that no cell makes look further has its halo once.
            once = dataclasses.replace(job.settings.masks, halo=job.halo)
            alone = dataclasses.replace(flight, settings=dataclasses.replace(job.settings, masks=once))
            projected = alone.needs(options.diameter).task_bytes
            measured = measure(job)
            is_within &= all(measured[stage] <= projected[stage] for stage in measured)
            for stage, peak in measured.items():
                print(
                    f"block {block:5d}  {stage:8s} {peak / MIB:6.0f} MiB, projected {projected[stage] / MIB:6.0f} MiB"
                )
    return 0 if is_within else 1


if __name__ == "__main__":
    sys.exit(main())
