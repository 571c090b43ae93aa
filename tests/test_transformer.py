"""Networks of Cellpose 4: the same flows as Cellpose itself gives with the same file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tiledseg.errors import ModelError
from tiledseg.networks.cpsam import CellposeSAM
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


def a_small_cpsam(n_blocks: int = 1, width: int = 8) -> CellposeSAM:
    """cpsam with a few of its layers, and random weights."""
    positions = dict.fromkeys(("attn.rel_pos_h", "attn.rel_pos_w"), (7, 4))
    block = {**positions, "norm1.weight": (width,), "mlp.lin1.weight": (9, width)}
    shapes = {
        "W2": (12, 3, 2, 2),
        "encoder.patch_embed.proj.weight": (width, 3, 2, 2),
        "encoder.pos_embed": (1, 4, 4, width),
        "encoder.neck.0.weight": (5, width, 1, 1),
        "encoder.neck.2.weight": (5, 5, 3, 3),
    }
    for i in range(n_blocks):
        shapes |= {f"encoder.blocks.{i}.{key}": shape for key, shape in block.items()}
    return CellposeSAM(shapes)


def wrong_file(lacks: str, has: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    state = a_small_cpsam().state_dict()
    return {key: torch.zeros(has.get(key, tuple(values.shape))) for key, values in state.items() if key != lacks}


@pytest.mark.parametrize(
    ("lacks", "has", "said"),
    [
        ("encoder.blocks.0.attn.qkv.bias", {}, r"1 layers are missing or unknown, among them .*\.qkv\.bias"),
        ("encoder.blocks.0.attn.rel_pos_h", {}, r"layers are missing, among them .*\.rel_pos_h"),
        ("encoder.pos_embed", {}, r"layers are missing, among them encoder\.pos_embed"),
        ("", {"encoder.blocks.0.attn.rel_pos_h": (7, 0)}, r"its layers have other shapes"),
        ("", {"encoder.pos_embed": (16, 8)}, r"its layers have other shapes"),
        ("", {"out.bias": (13,)}, r"size mismatch for out\.bias"),
    ],
)
def test_a_file_of_cellpose_4_with_other_layers_is_refused(
    tmp_path: Path, lacks: str, has: dict[str, tuple[int, ...]], said: str
) -> None:
    torch.save(wrong_file(lacks, has), tmp_path / "short")
    with pytest.raises(ModelError, match=f"short does not fit the network cpsam: {said}"):
        Network(find_model(str(tmp_path / "short")), "cpu")


def test_cpsam_needs_neither_cellpose_nor_what_it_is_made_of(tmp_path: Path) -> None:
    torch.save(a_small_cpsam(n_blocks=2).state_dict(), tmp_path / "small")
    code = (
        "import sys, torch; from tiledseg.networks.models import find_model;"
        "from tiledseg.networks.transformer import transformer_of; torch.set_grad_enabled(False);"
        f"out, style = transformer_of(find_model({str(tmp_path / 'small')!r})).eval()(torch.zeros(2, 3, 8, 8));"
        "print(*out.shape, *style.shape, {'cellpose', 'segment_anything', 'torchvision'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "2 3 8 8 2 256 set()"


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
