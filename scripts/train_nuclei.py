"""Train the default model `tiledseg-nuclei` on DSB2018 (BBBC038, public domain).

    TILEDSEG_DATA=... python scripts/train_nuclei.py --out tiledseg/networks/weights

Reads ``$TILEDSEG_DATA/dsb2018`` (``images/<id>.png``, ``labels/<id>.png``, ``index.csv``). An image
is held out for validation when the SHA-256 of its id is divisible by 5: the split is a rule, so it
cannot drift. Writes the state dict in float16 in the layout of Cellpose 1-3, and beside it a JSON
file with the linear map from style vector to log diameter and what was measured on the held-out
images. With ``--weights`` training is left out and the rest is done for a checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import uniform_filter

from tiledseg.heat import label_flows
from tiledseg.networks.unet import ResidualUNet

WIDTHS = (2, 16, 32, 64, 128)
DIAM_MEAN = 17.0
CROP = 128
BATCH = 12
SIZE_VIEWS = 6
SIZE_SIDE = 224


@dataclass
class Example:
    """One training image with its targets, reduced so that its nuclei are at most 34 px."""

    name: str
    kind: str
    fields: torch.Tensor  # (4, y, x): normalised intensity, flow y, flow x, mask
    diameter: float


def is_validation(name: str) -> bool:
    """Whether the split's rule holds this image out."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0


def read_image(path: Path) -> np.ndarray:
    """Grey float32 image, scaled so that percentiles 1 and 99 are 0 and 1."""
    image = np.asarray(Image.open(path)).astype(np.float32)
    if image.ndim == 3:
        image = image[..., :3].mean(-1)
    low, high = np.percentile(image, [1, 99])
    return (image - low) / max(high - low, 1e-3)


def load(folder: Path, validation: bool) -> list[Example]:
    """The images of one side of the split."""
    examples = []
    for row in csv.DictReader((folder / "index.csv").open()):
        if is_validation(row["id"]) != validation or int(row["n_nuclei"]) == 0:
            continue
        image = read_image(folder / "images" / f"{row['id']}.png")
        labels = np.asarray(Image.open(folder / "labels" / f"{row['id']}.png")).astype(np.int32)
        diameter = float(row["median_diameter_px"])
        factor = int(diameter // (2 * DIAM_MEAN)) + 1 if diameter > 2 * DIAM_MEAN else 1
        if factor > 1:
            # Means over an odd number of pixels round those whose labels are kept: neither is shifted.
            kept = slice(factor // 2, None, factor)
            image = uniform_filter(image, factor // 2 * 2 + 1, mode="nearest")[kept, kept]
            labels = np.ascontiguousarray(labels[kept, kept])
        fields = np.concatenate([image[None], label_flows(labels), (labels > 0)[None]])
        examples.append(Example(row["id"], row["kind"], torch.from_numpy(fields.astype(np.float32)), diameter / factor))
    return examples


def geometry(example: Example, rng: np.random.Generator, scale: float, side: int = CROP) -> torch.Tensor:
    """A rotated, flipped and scaled view of an example's fields, shape (4, side, side)."""
    height, width = example.fields.shape[1:]
    angle = rng.uniform(0, 2 * np.pi)
    flip = rng.choice([-1.0, 1.0])
    turn = np.array([[np.cos(angle), -np.sin(angle) * flip], [np.sin(angle), np.cos(angle) * flip]])
    at = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    out = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1)
    reach = np.minimum(side / 2 / scale, np.array([height, width]) / 2)
    centre = rng.uniform(reach, np.array([height, width]) - reach)
    source = out @ torch.tensor(turn.T / scale, dtype=torch.float32) + torch.tensor(centre, dtype=torch.float32)
    grid = torch.stack([(2 * source[..., 1] + 1) / width - 1, (2 * source[..., 0] + 1) / height - 1], -1)
    fields = F.grid_sample(example.fields[None], grid[None], align_corners=False)[0]
    flow = torch.einsum("ij,jyx->iyx", torch.tensor(turn.T, dtype=torch.float32), fields[1:3])
    mask = fields[3] > 0.5
    fields[1:3] = torch.where(mask, flow / (flow.norm(dim=0) + 1e-6), 0.0)
    fields[3] = mask
    return fields


def appearance(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Contrast, gamma, inversion, blur, background gradient and noise."""
    if rng.random() < 0.15:
        image = 1 - image
    if rng.random() < 0.5:
        image = image.clamp(0, 1.5) ** float(np.exp(rng.uniform(-0.6, 0.6)))
    if rng.random() < 0.3:
        slope = torch.linspace(-1, 1, CROP)
        image = image + rng.uniform(-0.15, 0.15) * slope[:, None] + rng.uniform(-0.15, 0.15) * slope[None]
    if rng.random() < 0.3:
        sigma = rng.uniform(0.4, 1.5)
        at = torch.arange(-4, 5, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (at / sigma) ** 2)
        kernel = kernel / kernel.sum()
        image = F.conv2d(image[None, None], kernel[None, None, :, None], padding=(4, 0))
        image = F.conv2d(image, kernel[None, None, None, :], padding=(0, 4))[0, 0]
    image = image * float(np.exp(rng.uniform(-0.5, 0.35))) + rng.uniform(-0.1, 0.1)
    if rng.random() < 0.5:
        noise = rng.normal(0, rng.uniform(0, 0.12), image.shape).astype(np.float32)
        image = image + torch.from_numpy(noise)
    return image


def batch(examples: list[Example], weights: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random network inputs (n, 2, CROP, CROP) and targets (n, 3, CROP, CROP)."""
    inputs = torch.zeros(BATCH, 2, CROP, CROP)
    targets = torch.zeros(BATCH, 3, CROP, CROP)
    for i, k in enumerate(rng.choice(len(examples), BATCH, p=weights)):
        example = examples[k]
        fields = geometry(example, rng, DIAM_MEAN / example.diameter * np.exp(rng.uniform(np.log(0.7), np.log(1.4))))
        inputs[i, 0] = appearance(fields[0], rng)
        targets[i] = fields[1:]
    return inputs.to(memory_format=torch.channels_last), targets


def train(folder: Path, steps: int, out: Path, seed: int, start: Path | None, rate: float) -> ResidualUNet:
    """Train from random or given weights; a checkpoint every 250 steps."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    examples = load(folder, validation=False)
    share = {
        "fluorescence": 0.75,
        "histology-purple-on-purple": 0.1,
        "histology-purple-on-white": 0.1,
        "brightfield-dark-on-white": 0.05,
    }
    counts = {kind: sum(e.kind == kind for e in examples) for kind in share}
    # A large image holds more to learn than a small one, but not in proportion to its area.
    area = np.array([np.sqrt(e.fields[0].numel()) for e in examples])
    total = {kind: sum(a for a, e in zip(area, examples, strict=True) if e.kind == kind) for kind in share}
    weights = np.array([share[e.kind] * a / total[e.kind] for a, e in zip(area, examples, strict=True)])
    print(f"{len(examples)} training images {counts}", flush=True)
    network = ResidualUNet(WIDTHS, DIAM_MEAN)
    if start is not None:
        network.load_state_dict(torch.load(start, weights_only=True))
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    started, losses = time.time(), []
    for step in range(1, steps + 1):
        inputs, targets = batch(examples, weights / weights.sum(), rng)
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = network(inputs)
        output = output.float()
        loss = 0.5 * F.mse_loss(output[:, :2], 5 * targets[:, :2])
        loss = loss + F.binary_cross_entropy_with_logits(output[:, 2], targets[:, 2])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(
                f"step {step} loss {np.mean(losses[-50:]):.4f} {(time.time() - started) / step:.2f} s/step",
                flush=True,
            )
        if step % 250 == 0:
            torch.save(network.state_dict(), out.with_suffix(".checkpoint"))
    return network


def fit_size(network: ResidualUNet, folder: Path, seed: int) -> dict[str, object]:
    """Ridge regression from style vector to log diameter, on training images at random scales."""
    rng = np.random.default_rng(seed + 1)
    styles, targets = [], []
    for example in load(folder, validation=False):
        for _ in range(SIZE_VIEWS):
            diameter = DIAM_MEAN * np.exp(rng.uniform(np.log(0.33), np.log(3)))
            view = geometry(example, rng, diameter / example.diameter, SIZE_SIDE)
            tiles = torch.zeros(1, 2, SIZE_SIDE, SIZE_SIDE)
            tiles[0, 0] = view[0]
            with torch.inference_mode():
                _, style = network(tiles.to(memory_format=torch.channels_last))
            styles.append(style[0].numpy())
            targets.append(np.log(diameter / DIAM_MEAN))
    x, y = np.array(styles, np.float64), np.array(targets)
    smean, ymean = x.mean(0), y.mean()
    gram = (x - smean).T @ (x - smean) + 1e-3 * len(x) * np.eye(x.shape[1]) * x.var()
    weights = np.linalg.solve(gram, (x - smean).T @ (y - ymean))
    error = np.abs((x - smean) @ weights + ymean - y)
    print(f"size model: median error {np.median(error):.3f} in log diameter", flush=True)
    return {"A": weights.round(6).tolist(), "smean": smean.round(6).tolist(), "ymean": round(float(ymean), 6)}


def evaluate(folder: Path) -> dict[str, object]:
    """Mean AP per kind on the held-out images, with the diameter known and estimated."""
    import tiledseg

    results: dict[str, dict[str, list[list[float]]]] = {"known": {}, "estimated": {}}
    ratios: dict[str, list[float]] = {}
    for row in csv.DictReader((folder / "index.csv").open()):
        if not is_validation(row["id"]) or int(row["n_nuclei"]) == 0:
            continue
        image = np.asarray(Image.open(folder / "images" / f"{row['id']}.png"))
        image = image if image.ndim == 2 else image[..., :3].mean(-1).astype(np.float32)
        truth = np.asarray(Image.open(folder / "labels" / f"{row['id']}.png")).astype(np.uint32)
        median = float(row["median_diameter_px"])
        for how, diameter in (("known", median), ("estimated", "auto")):
            found = tiledseg.segment(image, diameter=diameter)
            scores = tiledseg.compare(found.labels.compute(), truth).overall.ap
            results[how].setdefault(row["kind"], []).append(list(scores))
            if how == "estimated":
                ratios.setdefault(row["kind"], []).append(found.report.diameter.value / median)
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--from", dest="start", type=Path, help="state dict to start from instead of random weights")
    parser.add_argument("--weights", type=Path, help="state dict to use instead of training")
    options = parser.parse_args()
    folder = Path(os.environ["TILEDSEG_DATA"]) / "dsb2018"
    file = options.out / "tiledseg-nuclei.pt"
    if options.weights:
        network = ResidualUNet(WIDTHS, DIAM_MEAN)
        network.load_state_dict(torch.load(options.weights, weights_only=True))
    else:
        network = train(folder, options.steps, file, options.seed, options.start, options.rate)
    network = network.eval().to(memory_format=torch.channels_last)
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    torch.save(state, file)
    card = {"diam_mean": DIAM_MEAN, "steps": options.steps, "seed": options.seed}
    card["size"] = fit_size(network, folder, options.seed)
    file.with_suffix(".json").write_text(json.dumps(card))
    card["validation"] = evaluate(folder)
    file.with_suffix(".json").write_text(json.dumps(card))
    print(json.dumps(card["validation"], indent=1))


if __name__ == "__main__":
    main()
