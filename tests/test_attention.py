"""cpsam, with attention without its matrix of scores: what Cellpose's own forward pass gives."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tiledseg.networks.attention import PositionedAttention
from tiledseg.networks.cpsam import CellposeSAM


def small_cpsam(monkeypatch: pytest.MonkeyPatch, depth: int, n_heads: int = 16) -> tuple[Any, Any]:
    """Cellpose's network with few of its 24 layers, or heads, and random weights; and ours with the same."""
    from cellpose import vit
    from segment_anything.modeling.image_encoder import ImageEncoderViT

    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        depth=depth,
        embed_dim=64 * n_heads,
        num_heads=n_heads,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(1,),
    )
    for name, values in encoder.named_parameters():
        if "pos" in name:  # nothing in a new network
            torch.nn.init.normal_(values, std=0.3)
        elif ".norm" in name or ("neck" in name and values.ndim == 1):  # ones and zeros
            values.data += 0.3 * torch.randn(values.shape)
    sam = torch.nn.Module()
    sam.image_encoder = encoder
    monkeypatch.setattr(vit, "sam_model_registry", {"vit_l": lambda _: sam})
    theirs = vit.CPSAM().eval()
    state = theirs.state_dict()
    ours = CellposeSAM({key: tuple(values.shape) for key, values in state.items()}).eval()
    assert ours.load_state_dict(state, strict=False).missing_keys == []
    ours.settle()
    return theirs, ours


def test_cpsam_gives_what_it_gives_in_cellpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers: positions of windows are stored for other distances than those of the whole."""
    theirs, ours = small_cpsam(monkeypatch, depth=2, n_heads=4)
    assert {len(block.attn.rel_pos_h) for block in theirs.encoder.blocks} == {27, 127}
    tiles = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        expected = theirs(tiles)[0]
        found = ours(tiles)[0]
        size = expected.abs().max()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(size))
        half, our_half = (net.to(torch.bfloat16)(tiles.bfloat16())[0].float() for net in (theirs, ours))
    # Both are rounded to three figures again and again; ours is no further from the truth than theirs.
    assert (our_half - half).abs().max() < 0.03 * size
    assert (our_half - expected).square().mean() < 1.3 * (half - expected).square().mean()


@pytest.mark.parametrize(("grid", "width", "n_heads"), [((4, 6), 12, 2), ((5, 3), 21, 3), ((1, 1), 8, 1)])
def test_any_grid_and_size_of_head(grid: tuple[int, int], width: int, n_heads: int) -> None:
    from segment_anything.modeling.image_encoder import Attention

    torch.manual_seed(1)
    theirs = Attention(width, n_heads, use_rel_pos=True, input_size=(4, 4))
    for values in (theirs.rel_pos_h, theirs.rel_pos_w):
        torch.nn.init.normal_(values)
    ours = PositionedAttention(width, n_heads, grid, (7, 7))
    ours.load_state_dict(theirs.state_dict())
    ours.settle()
    features = torch.randn(3, *grid, width)
    with torch.inference_mode():
        torch.testing.assert_close(ours(features), theirs(features))
