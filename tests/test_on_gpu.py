"""What only a GPU can show: passes that are replayed, and runs in which it is shared."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import tiledseg
from tiledseg.networks.batches import Passes
from tiledseg.networks.models import find_model
from tiledseg.networks.runner import Network
from tiledseg.networks.unet import ResidualUNet, prepare_to_predict

from .conftest import Slide
from .test_attention import small_cpsam

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


def nets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, torch.dtype, tuple[int, int, int]]]:
    """Networks, the type they compute in, and the shape of their tiles."""
    torch.manual_seed(0)
    unet = ResidualUNet((2, 8, 16, 32)).eval()
    prepare_to_predict(unet)
    _, cpsam = small_cpsam(monkeypatch, depth=2)
    return [(unet, torch.float32, (2, 224, 224)), (cpsam, torch.bfloat16, (3, 256, 256))]


def test_replayed_passes_give_the_bits_of_launched_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for net, dtype, shape in nets(monkeypatch):
        passes = Passes(net, "cuda", {"dtype": dtype}, 4, shape)
        assert passes._recorded is not None
        batches = [torch.randn(4, *shape) for _ in range(5)]
        # All are begun before the first is waited for: none may overwrite another's results.
        replayed = [results() for results in [passes.begin(batch) for batch in batches]]
        passes._recorded = None
        for batch, found in zip(batches, replayed, strict=True):
            launched = passes.begin(batch)()
            assert all(torch.equal(one, other) for one, other in zip(found, launched, strict=True))
            assert float(launched[0].std()) > 0


def test_a_gpu_computes_what_a_cpu_computes() -> None:
    model = find_model("tiledseg-nuclei")
    tiles = np.random.default_rng(0).random((3, model.n_channels, model.tile, model.tile), np.float32)
    here = Network(model, "cpu").predict(tiles)
    there = Network(dataclasses.replace(model, batch=2), "cuda").predict(tiles)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * float(np.abs(one).max()))


def test_whoever_works_on_a_gpu_the_labels_are_the_same(slide: Slide, tmp_path: Path) -> None:
    found = {}
    for name, options in {
        "here": {"block": 512},
        "large": {"block": 1024},
        "workers": {"block": 256, "workers": 2},
        "all": {"block": 512, "workers": 1},
    }.items():
        result = tiledseg.segment(
            slide[0], tmp_path / f"{name}.ome.zarr", axes="yx", diameter=24.0, device="cuda", **options
        )
        assert result.report.device == "cuda"
        assert all(0 < share <= 1 for share in result.report.busy.values())
        found[name] = zarr.open_array(tmp_path / f"{name}.ome.zarr" / "labels" / "cells" / "0", mode="r")[:]
    assert found["here"].max() > 0
    assert all(np.array_equal(labels, found["here"]) for labels in found.values())
