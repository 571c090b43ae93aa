"""Against Cellpose's own functions on the whole image with the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

import tiledseg
from tiledseg.networks.models import find_model
from tiledseg.networks.runner import load_network
from tiledseg.slides import synthetic_slide

from .cellpose_oracle import labels_3d, matched_share

# Of torch, when Cellpose builds its sparse histogram.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


def cellpose_labels(image: npt.NDArray[Any], diameter: float) -> npt.NDArray[np.uint32]:
    """The same network through Cellpose's normalisation, tiling, blending and dynamics."""
    dynamics = pytest.importorskip("cellpose.dynamics")
    transforms = pytest.importorskip("cellpose.transforms")
    import torch

    model = find_model("tiledseg-nuclei")
    rescale = model.diam_mean / diameter
    shape = image.shape
    scaled = transforms.normalize99(image.astype(np.float32), lower=1, upper=99)
    resized = transforms.resize_image(scaled, rsz=rescale, no_channels=True)
    both = np.stack([resized, np.zeros_like(resized)])
    pad = [(0, 0), (8, 8 + -both.shape[1] % 16), (8, 8 + -both.shape[2] % 16)]
    padded = np.pad(both, pad)
    tiles, ysub, xsub, height, width = transforms.make_tiles(padded, bsize=224, augment=False, tile_overlap=0.1)
    tiles = tiles.reshape(-1, 2, 224, 224)
    output, _ = load_network(model, "cpu").predict(tiles.astype(np.float32))
    output[:, :2] *= 5
    blended = transforms.average_tiles(output, ysub, xsub, height, width)
    inner = blended[:, 8 : 8 + resized.shape[0], 8 : 8 + resized.shape[1]]
    full = transforms.resize_image(inner.transpose(1, 2, 0), shape[0], shape[1]).transpose(2, 0, 1)
    masks = dynamics.compute_masks(
        np.ascontiguousarray(full[:2]),
        np.ascontiguousarray(full[2]),
        niter=round(200 / rescale),
        cellprob_threshold=0.0,
        flow_threshold=0.4,
        min_size=15,
        device=torch.device("cpu"),
    )
    masks = masks[0] if isinstance(masks, tuple) else masks
    return np.asarray(masks).astype(np.uint32)


@pytest.mark.parametrize(
    ("shape", "diameter"),
    [((640, 700), 24.0), ((500, 500), 17.0), pytest.param((1024, 1024), 40.0, marks=pytest.mark.slow)],
)
def test_agrees_with_cellpose_on_a_slide(shape: tuple[int, int], diameter: float) -> None:
    image, _ = synthetic_slide(shape, diameter=diameter, seed=5)
    ours = tiledseg.segment(image, diameter=diameter, block=256).labels.compute()
    assert ours.max() > 50
    assert matched_share(ours, cellpose_labels(image, diameter), 0.8) >= 0.98


def test_agrees_with_cellpose_on_a_real_image(data: Path) -> None:
    image = tifffile.imread(data / "mosaic_fluo" / "image.tif")[500:1524, 300:1324]
    ours = tiledseg.segment(image, diameter=27.4, block=300).labels.compute()
    assert ours.max() > 50
    assert matched_share(ours, cellpose_labels(image, 27.4), 0.8) >= 0.98


@pytest.mark.slow
def test_agrees_with_cellpose_in_3d_on_a_real_embryo(data: Path) -> None:
    image = tifffile.imread(data / "qcanet_3d" / "8_cell_stage_image.tif")
    found = tiledseg.segment(image, axes="zyx", diameter="auto", do_3d=True, anisotropy=1.0)
    assert matched_share(found.labels, labels_3d(image, found.report), 0.7) >= 0.97
