"""Networks of Cellpose 4: the same flows as Cellpose itself gives with the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tiledseg.errors import ModelError
from tiledseg.networks.models import find_model
from tiledseg.networks.runner import Network


@pytest.mark.slow
def test_a_cpsam_file_gives_the_flows_it_gives_in_cellpose(tmp_path: Path) -> None:
    from cellpose.models import CellposeModel
    from cellpose.vit import CPSAM

    torch.manual_seed(5)
    path = tmp_path / "mine"
    net = CPSAM()
    for name, values in net.named_parameters():
        if "pos" in name:  # zero in a new network
            torch.nn.init.normal_(values, std=0.1)
    torch.save(net.state_dict(), path)
    del net
    # Cellpose puts 8 empty pixels round an image: with them it is one tile.
    image = np.random.default_rng(5).random((3, 240, 240), np.float32)
    tile = np.pad(image, ((0, 0), (8, 8), (8, 8)))

    model = find_model(str(path))
    assert (model.architecture, model.n_channels, model.tile, model.stride) == ("cpsam", 3, 256, 208)
    assert (model.diam_mean, model.size) == (30.0, None)
    output = Network(model, "cpu").predict(tile[None])[0][0, :, 8:-8, 8:-8]

    theirs = CellposeModel(gpu=False, pretrained_model=str(path), use_bfloat16=False)
    flows = theirs.eval(image, channel_axis=0, normalize=False, compute_masks=False)[1]
    np.testing.assert_allclose(5 * output[:2], flows[1], rtol=0, atol=1e-4 * np.abs(flows[1]).max())
    np.testing.assert_allclose(output[2], flows[2], rtol=0, atol=1e-4 * np.abs(flows[2]).max())
    assert np.ptp(output[2]) > 0.01


def test_a_file_of_cellpose_4_that_lacks_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellpose import vit

    class Small(torch.nn.Module):
        """Stands for the network of 300 million weights, with a few of its layers."""

        def __init__(self) -> None:
            super().__init__()
            self.out = torch.nn.Linear(2, 2)
            self.further = torch.nn.Linear(2, 2)
            self.W2 = torch.nn.Parameter(torch.zeros(2))

    monkeypatch.setattr(vit, "CPSAM", Small)
    state = Small().state_dict()
    del state["further.weight"]
    torch.save(state, tmp_path / "short")
    with pytest.raises(ModelError, match=r"short does not fit the network cpsam .* among them further\.weight"):
        Network(find_model(str(tmp_path / "short")), "cpu")


def test_what_a_file_holds_is_read_off_its_layers(tmp_path: Path) -> None:
    layers = {"W2": torch.zeros(2), "out.weight": torch.zeros(2)}
    for width, name in ((768, "cpdino-vitb"), (1024, "cpdino")):
        torch.save({**layers, "encoder.cls_token": torch.zeros(1, 1, width)}, tmp_path / name)
        model = find_model(str(tmp_path / name))
        assert (model.architecture, model.tile) == (name, 384)
    torch.save({f"module.{key}": value for key, value in layers.items()}, tmp_path / "parallel")
    assert find_model(str(tmp_path / "parallel")).architecture == "cpsam"
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ModelError, match="other is no network of Cellpose"):
        find_model(str(tmp_path / "other"))


def test_without_dinov3_it_says_so(tmp_path: Path) -> None:
    layers = {"W2": torch.zeros(2), "out.weight": torch.zeros(2), "encoder.cls_token": torch.zeros(1, 1, 1024)}
    torch.save(layers, tmp_path / "dino")
    with pytest.raises(ModelError, match="needs the package dinov3"):
        Network(find_model(str(tmp_path / "dino")), "cpu")
