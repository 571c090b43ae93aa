"""Train the default model `tiledseg-nuclei` on DSB2018 (BBBC038, public domain).

    TILEDSEG_DATA=... python scripts/train_nuclei.py --out tiledseg/networks/weights

Reads ``$TILEDSEG_DATA/dsb2018`` (``images/<id>.png``, ``labels/<id>.png``, ``index.csv``). An image
is held out for validation by `tiledseg.training.pairs.is_held_out`: the split is a rule, so it
cannot drift. Writes the state dict in float16 in the layout of Cellpose 1-3, and beside it a JSON
file with the linear map from style vector to log diameter and what was measured on the held-out
images. With ``--from`` training goes on from a checkpoint; with ``--steps 0`` it is left out and the
rest is done for that.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tiledseg.networks.unet import ResidualUNet
from tiledseg.training.fit import fit_network, fit_size
from tiledseg.training.pairs import Pair, is_held_out
from tiledseg.training.views import Example, example_of

WIDTHS = (2, 16, 32, 64, 128)
DIAM_MEAN = 17.0
N_WORST = 24
SHARES = {
    "fluorescence": 0.75,
    "histology-purple-on-purple": 0.1,
    "histology-purple-on-white": 0.1,
    "brightfield-dark-on-white": 0.05,
}


def rows_of(folder: Path, held_out: bool) -> list[dict[str, str]]:
    """Rows of the index on one side of the split; images without nuclei are left out."""
    rows = csv.DictReader((folder / "index.csv").open())
    return [row for row in rows if is_held_out(row["id"]) == held_out and int(row["n_nuclei"])]


def read_grey(folder: Path, row: dict[str, str]) -> np.ndarray:
    """An image, colours averaged."""
    image = np.asarray(Image.open(folder / "images" / f"{row['id']}.png"))
    return image if image.ndim == 2 else image[..., :3].mean(-1).astype(np.float32)


def read_labels(folder: Path, row: dict[str, str]) -> np.ndarray:
    """The labels of an image."""
    return np.asarray(Image.open(folder / "labels" / f"{row['id']}.png")).astype(np.int32)


def load(folder: Path) -> tuple[list[Example], np.ndarray]:
    """The training images, and how often each is seen: kinds by their share, large images oftener than small ones."""
    examples, kinds = [], []
    for row in rows_of(folder, held_out=False):
        image = read_grey(folder, row).astype(np.float32)
        low, high = np.percentile(image, [1, 99])
        pixels = (image - low) / max(high - low, 1e-3)
        pair = Pair(row["id"], pixels[None], read_labels(folder, row), float(row["median_diameter_px"]))
        examples.append(example_of(pair, DIAM_MEAN))
        kinds.append(row["kind"])
    # A large image holds more to learn than a small one, but not in proportion to its area.
    area = np.array([np.sqrt(example.fields[0].numel()) for example in examples])
    total = {kind: sum(a for a, k in zip(area, kinds, strict=True) if k == kind) for kind in SHARES}
    print(f"{len(examples)} training images", flush=True)
    return examples, np.array([SHARES[k] * a / total[k] for a, k in zip(area, kinds, strict=True)])


def evaluate(folder: Path, pictures: Path | None) -> dict[str, object]:
    """Mean AP per kind on the held-out images, with the diameter known and estimated; pictures of the worst."""
    import tiledseg
    from tiledseg.pictures import overview

    worst: list[tuple[float, str, np.ndarray, np.ndarray, np.ndarray]] = []
    results: dict[str, dict[str, list[list[float]]]] = {"known": {}, "estimated": {}}
    ratios: dict[str, list[float]] = {}
    for row in rows_of(folder, held_out=True):
        image, truth = read_grey(folder, row), read_labels(folder, row).astype(np.uint32)
        median = float(row["median_diameter_px"])
        for how, diameter in (("known", median), ("estimated", "auto")):
            found = tiledseg.segment(image, diameter=diameter)
            scores = tiledseg.compare(found.labels.compute(), truth).overall.ap
            results[how].setdefault(row["kind"], []).append(list(scores))
            if how == "estimated":
                worst.append((scores[0], row["id"], image, found.labels.compute(), truth))
                worst = sorted(worst, key=lambda entry: entry[:2])[:N_WORST]
                ratios.setdefault(row["kind"], []).append(found.report.diameter.value / median)
    for ap, name, image, labels, truth in worst if pictures is not None else ():
        for what, shown in (("found", labels), ("truth", truth)):
            overview(image, shown, pictures / f"{ap:.3f}-{name[:8]}-{what}.png")
    table: dict[str, object] = {
        how: {kind: {"images": len(rows), "ap": np.mean(rows, 0).round(3).tolist()} for kind, rows in kinds.items()}
        for how, kinds in results.items()
    }
    table["diameter within 10 %"] = {
        k: round(float(np.mean(np.abs(np.array(r) - 1) < 0.1)), 3) for k, r in ratios.items()
    }
    return table


def main() -> None:
    """Train, fit the size model, write the files, and measure what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the worst held-out images")
    parser.add_argument("--from", dest="start", type=Path, help="state dict to start from instead of random weights")
    options = parser.parse_args()
    folder = Path(os.environ["TILEDSEG_DATA"]) / "dsb2018"
    file = options.out / "tiledseg-nuclei.pt"
    examples, weights = load(folder)
    torch.manual_seed(options.seed)
    network = ResidualUNet(WIDTHS, DIAM_MEAN)
    if options.start is not None:
        network.load_state_dict(torch.load(options.start, weights_only=True))
    started, losses = time.time(), []

    def each_step(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 50 == 0:
            seconds = (time.time() - started) / step
            print(f"step {step} loss {np.mean(losses[-50:]):.4f} {seconds:.2f} s/step", flush=True)
        if step % 250 == 0:
            torch.save(network.state_dict(), file.with_suffix(".checkpoint"))

    if options.steps:
        how = {"steps": options.steps, "rate": options.rate, "seed": options.seed, "bfloat16": True}
        fit_network(network, examples, **how, weights=weights, each_step=each_step)
    network = network.eval().to(memory_format=torch.channels_last)
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    torch.save(state, file)
    size = dataclasses.asdict(fit_size(network, examples, options.seed))
    card = {"diam_mean": size.pop("diam_mean"), "size": size}
    file.with_suffix(".json").write_text(json.dumps(card))
    card["validation"] = evaluate(folder, options.pictures)
    file.with_suffix(".json").write_text(json.dumps(card))
    print(json.dumps(card["validation"], indent=1))


if __name__ == "__main__":
    main()
