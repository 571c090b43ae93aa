"""How close estimated diameters come to the true median: on validation images and on rescaled mosaics.

    TILEDSEG_DATA=... python scripts/bench/diameter.py

Reads ``dsb2018`` (the images that the default model's training held out) and ``mosaic_fluo``, which is rescaled by
0.5, 1, 2 and 4: by means of pixels down, by cubic interpolation up. The true median is that of all nuclei and, in
brackets, of those that the edge of the image does not cut: a cut nucleus has an area, but no diameter.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from scipy.ndimage import zoom

import tiledseg
from tiledseg.objects import object_extents
from tiledseg.training.pairs import is_held_out
from tiledseg.working import box_mean

TOLERANCE = 0.1
SCALES = (0.5, 1, 2, 4)


def medians(labels: np.ndarray) -> tuple[float, float]:
    """Median diameter of all objects, and of those that the image's edge does not cut; NaN if there are none."""
    boxes, areas = object_extents(labels, int(labels.max()))
    is_whole = (boxes[:, 0] > 0).all(axis=1) & (boxes[:, 1] < labels.shape).all(axis=1)
    diameters = 2 * np.sqrt(areas / np.pi)
    there = areas > 0
    return tuple(float(np.median(diameters[k])) if k.any() else np.nan for k in (there, there & is_whole))


def validation(folder: Path, model: str) -> dict[str, np.ndarray]:
    """Per kind of image, the ratio of the estimate to both medians, shape (images, 2)."""
    ratios: dict[str, list[list[float]]] = {}
    for row in csv.DictReader((folder / "index.csv").open()):
        if not is_held_out(row["id"]) or not int(row["n_nuclei"]):
            continue
        image = np.asarray(Image.open(folder / "images" / f"{row['id']}.png"))
        image = image if image.ndim == 2 else image[..., :3].mean(-1).astype(np.float32)
        labels = np.asarray(Image.open(folder / "labels" / f"{row['id']}.png")).astype(np.int32)
        found = tiledseg.estimate_diameter(image, model=model).value
        ratios.setdefault(row["kind"], []).append([found / median for median in medians(labels)])
    return {kind: np.array(rows) for kind, rows in ratios.items()}


def rescaled(image: np.ndarray, scale: float) -> np.ndarray:
    """The image at another size."""
    if scale < 1:
        return box_mean(image.astype(np.float32), (round(1 / scale),) * 2)
    return image if scale == 1 else zoom(image.astype(np.float32), scale, order=3)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiledseg-nuclei")
    options = parser.parse_args()
    data = Path(os.environ["TILEDSEG_DATA"])
    found = validation(data / "dsb2018", options.model)
    for kind, ratios in [*found.items(), ("all", np.concatenate(list(found.values())))]:
        within = (np.abs(ratios - 1) <= TOLERANCE).mean(axis=0)
        middle = np.nanmedian(ratios, axis=0)
        print(
            f"{kind:<28}{len(ratios):>4} images   within 10 % {within[0]:.0%} ({within[1]:.0%})"
            f"   median ratio {middle[0]:.3f} ({middle[1]:.3f})"
        )
    image = tifffile.imread(data / "mosaic_fluo" / "image.tif")
    truth = medians(tifffile.imread(data / "mosaic_fluo" / "labels.tif").astype(np.int32))[0]
    for scale in SCALES:
        value = tiledseg.estimate_diameter(rescaled(image, scale), model=options.model).value
        true = truth * scale
        print(f"mosaic_fluo x {scale:<4} true {true:6.2f} px, estimated {value:6.2f}, ratio {value / true:.3f}")


if __name__ == "__main__":
    main()
