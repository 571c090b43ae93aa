"""Segmentations in environments of their own: what to start, what comes back."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from images import Example
from process import Measured, run_measured
from report import THRESHOLDS

import tiledseg
from tiledseg.networks.models import find_model
from tiledseg.omezarr import write_image

HERE = Path(__file__).parent
MODEL = "tiledseg-nuclei"


@dataclass(frozen=True)
class Bench:
    """What all runs on an image share.

    Attributes
    ----------
    example : Example
    folder : Path
        For images, weights and results.
    block, cores : int
        The same for all.
    pythons : mapping of str to Path or None
        Interpreter of each peer's environment, None if there is none.
    gpu : bool
        Whether contrib may use one.
    """

    example: Example
    folder: Path
    block: int
    cores: int
    pythons: Mapping[str, Path | None]
    gpu: bool = False


def prepare(bench: Bench) -> None:
    """Write the image in every form that is read, and the weights as Cellpose 3 reads them.

    Kernels are compiled into numba's cache, as they are from a user's second run on.
    """
    import torch

    from tiledseg.dynamics import warm_up
    from tiledseg.networks.unet import read_state

    warm_up()

    folder, image = bench.folder, bench.example.image
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "image.npy", image)
    chunks = tuple(min(bench.block, n) for n in image.shape)
    plain = zarr.create_array(
        folder / "image.zarr", shape=image.shape, chunks=chunks, dtype=image.dtype, zarr_format=2, overwrite=True
    )
    plain[:] = image
    shutil.rmtree(folder / "image.ome.zarr", ignore_errors=True)
    write_image(folder / "image.ome.zarr", image, axes="yx")
    torch.save(read_state(find_model(MODEL).path), folder / "weights.pt")


def _widths() -> list[int]:
    """Channels of the default network, the input first."""
    from tiledseg.networks.unet import read_state

    state = read_state(find_model(MODEL).path)
    first = "downsample.down.res_down_{}.conv.conv_0.2.weight"
    widths, depth = [int(state[first.format(0)].shape[1])], 0
    while first.format(depth) in state:
        widths.append(int(state[first.format(depth)].shape[0]))
        depth += 1
    return widths


def run_tiledseg(folder: Path, image: Path, options: Mapping[str, Any], cores: int) -> tuple[Measured, dict[str, Any]]:
    """Segment an image on disk by the command line, from nothing; returns also tiledseg's report."""
    for name in ("out.ome.zarr", "out.ome.zarr.cells.tiledseg"):
        shutil.rmtree(folder / name, ignore_errors=True)
    output = folder / "out.ome.zarr"
    command = [sys.executable, "-m", "tiledseg.cli", "segment", str(image), "-o", str(output)]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    package = Path(tiledseg.__file__).parents[1]
    measured = run_measured(command, folder, cores=cores, env={"PYTHONPATH": str(package)})
    report = output / "tables" / "cells" / "report.json"
    return measured, json.loads(report.read_text()) if report.exists() else {}


def tiledseg_labels(folder: Path) -> Any:
    """What `run_tiledseg` published, at full size."""
    return zarr.open_array(folder / "out.ome.zarr" / "labels" / "cells" / "0", mode="r")


def contrib_file() -> Path | None:
    """The file of `cellpose.contrib.distributed_segmentation` of the Cellpose installed here, None without."""
    found = importlib.util.find_spec("cellpose")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    files = [Path(folder) / "contrib" / "distributed_segmentation.py" for folder in folders]
    return next((file for file in files if file.exists()), None)


def run_peer(bench: Bench, peer: str, python: Path) -> tuple[Measured, Any]:
    """Run a peer on the prepared image; returns its labels too, None if it failed."""
    folder = bench.folder
    result = folder / f"{peer}{'.npy' if peer == 'untiled' else '.zarr'}"
    if result.is_dir():
        shutil.rmtree(result)
    result.unlink(missing_ok=True)
    image = bench.example.image
    job = {
        "image": str(folder / "image.npy"),
        "zarr": str(folder / "image.zarr"),
        "weights": str(folder / "weights.pt"),
        "widths": _widths(),
        "result": str(result),
        "diameter": bench.example.diameter,
        "percentiles": [float(value) for value in np.percentile(image, (1, 99))],
        "block": bench.block,
        "cores": bench.cores,
        "gpu": bench.gpu,
    }
    file = folder / f"{peer}.json"
    file.write_text(json.dumps(job))
    # Peers that run tiles side by side get one thread for each; HOME, because Cellpose writes logs there.
    env = {"HOME": str(folder), "OMP_NUM_THREADS": str(bench.cores if peer == "untiled" else 1)}
    if (file_of_contrib := contrib_file()) is not None:
        env["PYTHONPATH"] = str(file_of_contrib.parent)
    measured = run_measured(
        [str(python), str(HERE / "peer_runs.py"), peer, str(file)], folder, cores=bench.cores, env=env
    )
    if measured.code != 0 or not result.exists():
        return measured, None
    if peer == "untiled":
        return measured, np.load(result)
    found = zarr.open(result, mode="r")
    return measured, found if isinstance(found, zarr.Array) else found["labels"]


def row_of(bench: Bench, who: str) -> dict[str, Any]:
    """Run tiledseg or a peer on the prepared image and score it: one row of a table."""
    row: dict[str, Any] = {"image": bench.example.name, "who": who}
    if who.startswith("tiledseg"):
        options: dict[str, Any] = {"diameter": bench.example.diameter, "block": bench.block}
        if who == "tiledseg-bf16":
            options["precision"] = "bfloat16"
        measured, _ = run_tiledseg(bench.folder, bench.folder / "image.ome.zarr", options, bench.cores)
        labels = tiledseg_labels(bench.folder) if measured.code == 0 else None
    else:
        python = bench.pythons.get("patchworks" if who == "patchworks" else "cellpose")
        if python is None:
            return {**row, "note": "no environment given"}
        if who == "contrib" and contrib_file() is None:
            return {**row, "note": "cellpose 4 is not installed beside tiledseg; install tiledseg[test]"}
        measured, labels = run_peer(bench, who, python)
    if labels is None:
        return {**row, "seconds": measured.seconds, **measured.failure}
    scores = tiledseg.compare(labels, bench.example.truth, thresholds=THRESHOLDS, block=bench.block)
    seams, elsewhere = scores.at_seams, scores.elsewhere
    return {
        **row,
        "seconds": measured.seconds,
        "GiB": measured.total_peak / 2**30,
        "GiB at once": measured.together_peak / 2**30,
        "objects": scores.overall.n_predicted,
        "AP": scores.overall.ap,
        "at seams": seams and _recall(seams.n_true_positive[1], seams.n_truth),
        "elsewhere": elsewhere and _recall(elsewhere.n_true_positive[1], elsewhere.n_truth),
        "n at seams": seams and seams.n_truth,
        "cut": scores.n_cut,
    }


def _recall(n_found: int, n_truth: int) -> float:
    """Share of the true objects that were found."""
    return n_found / n_truth if n_truth else float("nan")
