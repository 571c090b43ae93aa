"""`tiledseg demo`: a real tissue section and a synthetic slide with known truth, no download."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import OutputError
from .omezarr import write_image
from .pictures import overview
from .pipeline import Segmentation, segment
from .progress import Listener
from .scoring import compare
from .slides import synthetic_slide

__all__ = ["run_demo"]

SIDE = 4096
BLOCK = 1024
SPACING_UM = 0.5


def run_demo(
    folder: Path,
    *,
    side: int = SIDE,
    progress: Listener | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Segment both images into a folder and score the synthetic one.

    Parameters
    ----------
    folder : Path
        For the images, their labels and pictures; what an earlier demo left there is replaced.
    side : int
        Of the synthetic slide in pixels.
    progress : callable, optional
        As for `segment`.
    say : callable, optional
        Called with each line of text of the demo.

    Returns
    -------
    facts : dict
        Objects, scores and paths.
    """
    tell = say or (lambda _: None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror}; choose another folder with -o.") from error
    tissue = _tissue(folder, progress, tell)
    slide = _slide(folder, side, progress, tell)
    tell("")
    tell('Look at the pictures, or at an image with its labels in the browser (pip install -e ".[view]"):')
    tell(f"    tiledseg view {folder / 'slide.ome.zarr'}")
    return {"tissue": tissue, "slide": slide}


def _fresh(path: Path, name: str) -> Path:
    """The path, with what an earlier demo left there removed."""
    for leftover in (path, path.parent / f"{path.name}.{name}.tiledseg"):
        if leftover.exists():
            shutil.rmtree(leftover)
    return path


def nuclear_stain(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """The haematoxylin of an RGB picture of a stained section, as fluorescence would show it.

    Parameters
    ----------
    picture : array of uint8, shape (y, x, 3)

    Returns
    -------
    stain : array of uint16, shape (y, x)
    """
    from scipy.ndimage import gaussian_filter
    from skimage.color import rgb2hed

    # Unmixing sharpens the blocks that JPEG left in the colours: a light blur takes them away.
    stain = gaussian_filter(rgb2hed(picture)[..., 0], 1.0)
    low, high = np.percentile(stain, [0.1, 99.9])
    scaled: npt.NDArray[np.uint16] = (np.clip((stain - low) / (high - low), 0, 1) * 60000).astype(np.uint16)
    return scaled


def _tissue(folder: Path, progress: Listener | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """The real image."""
    from skimage.data import immunohistochemistry

    tell("A real image: a tissue section (immunohistochemistry of scikit-image), nuclear stain unmixed.")
    picture = immunohistochemistry()
    path = _fresh(folder / "tissue.ome.zarr", "nuclei")
    write_image(path, nuclear_stain(picture), axes="yx")
    found = segment(path, name="nuclei", progress=progress)
    overview(picture, found.labels.compute(), folder / "tissue.png")
    tell(f"  {found.report.n_objects} nuclei, diameter {_diameter(found)}; picture {folder / 'tissue.png'}")
    return {
        "n_objects": found.report.n_objects,
        "labels": str(found.path),
        "picture": str(folder / "tissue.png"),
    }


def _slide(folder: Path, side: int, progress: Listener | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """The synthetic image: as one block, then in blocks, from the same flows."""
    tell("")
    tell(f"A synthetic slide of {side} x {side} pixels with touching nuclei and known truth.")
    image, truth = synthetic_slide((side, side))
    path = _fresh(folder / "slide.ome.zarr", "cells")
    write_image(path, image, axes="yx", spacing_um=(SPACING_UM, SPACING_UM))
    whole = segment(path, block=side, progress=progress).labels.compute()
    found = segment(path, block=BLOCK, progress=progress)
    labels = found.labels.compute()
    scores = compare(labels, truth, block=BLOCK)
    is_same = bool(np.array_equal(labels, whole))
    tell(f"  {found.report.n_objects} nuclei of {scores.overall.n_truth}, diameter {_diameter(found)}")
    for name, score in (
        ("overall", scores.overall),
        ("at seams", scores.at_seams),
        ("elsewhere", scores.elsewhere),
    ):
        if score is not None:
            values = ", ".join(f"{ap:.3f} at IoU {t:g}" for t, ap in zip(score.thresholds, score.ap, strict=True))
            tell(f"  average precision {name + ':':<10} {values} ({score.n_truth} nuclei)")
    tell(f"  true nuclei cut at a seam of the {BLOCK} px blocks: {scores.n_cut}")
    tell(f"  the same as one block of {side} px, bit for bit: {'yes' if is_same else 'NO'}")
    detail = tuple(slice(max(0, min(n, side) - 300), min(side, n + 300)) for n in (BLOCK, BLOCK))
    overview(image, labels, folder / "slide.png")
    overview(image, labels, folder / "slide-detail.png", window=(detail[0], detail[1]))
    tell(f"  pictures {folder / 'slide.png'} and {folder / 'slide-detail.png'} (where four blocks meet)")
    return {
        "n_objects": found.report.n_objects,
        "scores": scores.as_dict(),
        "same_as_one_block": is_same,
        "labels": str(found.path),
        "table": str(found.table_path),
    }


def _diameter(found: Segmentation) -> str:
    diameter = found.report.diameter
    if diameter is None:
        return "none"
    low, high = diameter.quartiles
    return f"{diameter.value:.1f} px (quartiles {low:.1f} and {high:.1f})"
