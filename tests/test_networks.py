"""The network's layout, the model that ships, and model files that are not what they claim."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tiledseg.errors import ModelError
from tiledseg.networks import fused
from tiledseg.networks.fused import FusedConv, can_fuse
from tiledseg.networks.models import WEIGHTS, find_model
from tiledseg.networks.runner import Network, load_network
from tiledseg.networks.size import SizeModel
from tiledseg.networks.unet import ResidualUNet, fuse_for_cpu, prepare_to_predict, read_state, unet_of


def random_tiles(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 2, 224, 224)).astype(np.float32)


def test_layers_are_named_and_shaped_as_in_cellpose_3() -> None:
    state = ResidualUNet().state_dict()
    shapes = {
        "downsample.down.res_down_0.conv.conv_0.2.weight": (32, 2, 3, 3),
        "downsample.down.res_down_0.proj.1.weight": (32, 2, 1, 1),
        "downsample.down.res_down_3.conv.conv_3.0.running_mean": (256,),
        "upsample.up.res_up_3.conv.conv_0.2.weight": (256, 256, 3, 3),
        "upsample.up.res_up_0.conv.conv_1.conv.2.weight": (32, 32, 3, 3),
        "upsample.up.res_up_0.conv.conv_3.full.weight": (32, 256),
        "upsample.up.res_up_1.proj.1.weight": (64, 128, 1, 1),
        "output.2.weight": (3, 32, 1, 1),
        "diam_mean": (1,),
        "diam_labels": (1,),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert sum(value.numel() for value in ResidualUNet().parameters()) == pytest.approx(6.6e6, rel=0.01)


def test_the_model_that_ships_is_small_and_half_as_wide() -> None:
    model = find_model("tiledseg-nuclei")
    assert model.path.stat().st_size < 8e6
    assert model.diam_mean == 17.0
    assert model.size is not None
    state = torch.load(model.path, weights_only=True)
    assert state["output.2.weight"].shape == (3, 16, 1, 1)
    assert state["output.2.weight"].dtype == torch.float16


def test_the_model_card_tells_the_figures_of_the_training_script() -> None:
    facts = json.loads((WEIGHTS / "tiledseg-nuclei.json").read_text())["validation"]
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    for how in ("known", "estimated"):
        for kind in facts[how].values():
            assert " / ".join(f"{ap:.3f}" for ap in kind["ap"]) in card


@pytest.mark.parametrize("is_trained", [True, False])
def test_preparing_a_network_changes_outputs_by_rounding_only(is_trained: bool) -> None:
    torch.manual_seed(3)
    path = find_model("tiledseg-nuclei").path
    net = unet_of(read_state(path), path) if is_trained else ResidualUNet((2, 8, 16, 24, 32))
    if not is_trained:
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                torch.nn.init.normal_(module.weight)
                torch.nn.init.normal_(module.bias)
    net.eval()
    tiles = torch.randn(2, 2, 96, 96)
    with torch.inference_mode():
        before = net(tiles)
    prepare_to_predict(net)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    with torch.inference_mode():
        after = net(tiles)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4 * float(old.abs().max()))


@pytest.mark.parametrize("widths", [(2, 16, 32, 64, 128), (2, 8, 16, 24, 32), (1, 5, 7, 11)])
def test_fused_convolutions_give_the_same_bits(widths: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    net = ResidualUNet(widths).eval()
    prepare_to_predict(net)
    faster = copy.deepcopy(net)
    fuse_for_cpu(faster)
    n_fused = sum(isinstance(module, FusedConv) for module in faster.modules())
    assert n_fused == (7 * (len(widths) - 1) if can_fuse() else 0)
    tiles = torch.randn(3, widths[0], 96, 112)
    with ThreadPoolExecutor(2) as pool:
        plain, *found = pool.map(lambda net: passed(net, tiles), [net, faster, faster, faster])
    for again in found:
        assert all(map(torch.equal, again, plain))


def passed(net: ResidualUNet, tiles: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        last = torch.channels_last
        return list(net.to(memory_format=last)(tiles.to(memory_format=last)))


def test_where_torch_lacks_the_operators_convolutions_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tiles = find_model("tiledseg-nuclei"), random_tiles(1)
    expected = Network(model, "cpu").predict(tiles)
    monkeypatch.setattr(fused, "_ops", object())
    can_fuse.cache_clear()
    plain = Network(model, "cpu")
    can_fuse.cache_clear()
    assert not any(isinstance(module, FusedConv) for module in plain._passes._net.modules())
    assert all(map(np.array_equal, plain.predict(tiles), expected))


def test_a_tile_gives_the_same_bits_in_any_company_and_thread() -> None:
    network = load_network(find_model("tiledseg-nuclei"), "cpu")
    tiles = random_tiles(4)
    together, styles = network.predict(tiles)
    alone = np.concatenate([network.predict(tile[None])[0] for tile in tiles])
    with ThreadPoolExecutor(4) as pool:
        beside = np.concatenate([output for output, _ in pool.map(network.predict, [t[None] for t in tiles])])
    torch.set_num_threads(2)
    threaded, _ = network.predict(tiles)
    assert np.array_equal(together, alone)
    assert np.array_equal(together, beside)
    assert np.array_equal(together, threaded)
    np.testing.assert_allclose(np.linalg.norm(styles, axis=1), 1, rtol=1e-5)


def test_a_network_is_loaded_once_per_process() -> None:
    model = find_model("tiledseg-nuclei")
    assert load_network(model, "cpu") is load_network(find_model("tiledseg-nuclei"), "cpu")


def test_a_file_of_cellpose_1_to_3_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(ResidualUNet(diam_mean=30.0).state_dict(), tmp_path / "mine")
    model = find_model(str(tmp_path / "mine"))
    assert model.diam_mean == 30.0
    output, style = Network(model, "cpu").predict(random_tiles(1))
    assert output.shape == (1, 3, 224, 224)
    assert style.shape == (1, 256)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_a_model_file_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"diam_mean": Evil(tmp_path / "touched")}, tmp_path / "evil")
    with pytest.raises(ModelError, match=r"evil cannot be read as weights"):
        find_model(str(tmp_path / "evil"))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04broken"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(ModelError, match=r"broken cannot be read as weights; give a model file of Cellpose"):
        read_state(tmp_path / "broken")


def test_a_state_dict_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ModelError, match="not a residual U-Net"):
        read_state(tmp_path / "other")
    state = ResidualUNet().state_dict()
    del state["upsample.up.res_up_0.proj.1.weight"]
    torch.save(state, tmp_path / "short")
    with pytest.raises(ModelError, match="lacks layers"):
        Network(find_model(str(tmp_path / "short")), "cpu")


def test_the_size_model_is_cellposes_formula() -> None:
    size = SizeModel((0.5, -1.0), (0.1, 0.2), 17.0, 0.3)
    style = np.array([0.6, 0.8], np.float32)
    expected = np.exp(0.5 * 0.5 - 1.0 * 0.6 + np.log(17) + 0.3)
    assert size.diameter(style) == pytest.approx(expected, rel=1e-6)
    assert SizeModel((0.0,), (0.0,), 17.0, -9.0).diameter(style[:1]) == 5.0
