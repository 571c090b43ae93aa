"""Results to measure and export: labels that are drawn, published in many small regions by a real run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tiledseg
from tiledseg.omezarr import write_image

Labels = npt.NDArray[np.uint32]


def drawn_labels(shape: tuple[int, ...], seed: int = 0) -> Labels:
    """Objects of all kinds side by side: round ones of any size, with holes, in parts, thin, of one pixel, at edges."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint32)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    n = max(12, int(np.prod(shape)) // 900)
    for i in range(1, n + 1):
        centre = rng.uniform(0, shape)
        off = np.linalg.norm((grid - centre) / rng.uniform(0.6, 1.4, len(shape)), axis=-1)
        radius = rng.choice([0.7, 3, 6, 11])
        inside = off < radius
        if i % 3 == 0:
            inside &= off > radius / 2.5  # a ring
        if i % 4 == 0:
            inside &= grid[..., -1] % 5 != 2  # in stripes, which are parts
        if i % 5 == 0:
            inside &= rng.random(shape) < 0.7  # with holes that touch at corners
        labels[inside] = i
    return labels


def small_regions(monkeypatch: pytest.MonkeyPatch, region: int = 48, chunk: int = 16) -> None:
    """Publish in regions and chunks that a small picture has many of."""
    groups = importlib.import_module("tiledseg.omezarr.groups")
    monkeypatch.setattr(importlib.import_module("tiledseg.omezarr.labels"), "_CHUNK", chunk)
    monkeypatch.setattr(importlib.import_module("tiledseg.regions"), "REGION", region)
    for axis, n in (("z", 4), ("y", chunk), ("x", chunk)):
        monkeypatch.setitem(groups._CHUNK_VOLUME, axis, n)
    monkeypatch.setattr(groups, "_SHARD_PIXELS", 64**2)


def as_drawn(pixels: npt.NDArray[Any]) -> Labels:
    """A segmenter for images whose first channel is what is to be found."""
    return np.nan_to_num(pixels).astype(np.uint32)


def published(
    path: Path,
    labels: Labels,
    axes: str,
    *,
    others: tuple[npt.NDArray[Any], ...] = (),
    spacing_um: tuple[float, ...] | None = None,
    **settings: Any,
) -> tiledseg.Segmentation:
    """Run on labels that are drawn, as the first channel of an image; one block, whatever the regions."""
    image = np.stack([labels.astype(others[0].dtype if others else np.uint16), *others], axes.count("t"))
    with_channel = axes[: axes.count("t")] + "c" + axes[axes.count("t") :]
    if not (path / "image.ome.zarr").exists():
        names = ["drawn", *(f"c{i}" for i in range(len(others)))]
        write_image(path / "image.ome.zarr", image, axes=with_channel, spacing_um=spacing_um, channels=names, chunk=64)
    return tiledseg.segment(
        path / "image.ome.zarr", path / "out.ome.zarr", segmenter=as_drawn, halo=0, block=4096, min_size=0, **settings
    )
