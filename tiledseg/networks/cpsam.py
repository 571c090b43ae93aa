"""Cellpose-SAM: the image encoder of Segment Anything with small patches, and a readout of their pixels.

A file of Cellpose 4 loads into it as it is: the module names (``encoder.blocks.0.attn.qkv``...) are fixed by those
files, not by taste, and every size is read off them. It needs neither Cellpose nor segment-anything, whose imports
take longer than the weights.

References
----------
Pachitariu, Rariden and Stringer (2025), "Cellpose-SAM: superhuman generalization for cellular segmentation", bioRxiv;
Kirillov et al. (2023), "Segment Anything", arXiv:2304.02643, for the encoder; Li et al. (2022), "Exploring Plain
Vision Transformer Backbones for Object Detection", arXiv:2203.16527, for its neck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import PositionedAttention

__all__ = ["CellposeSAM"]

EPS = 1e-6
"""Of normalisations."""
N_STYLE = 256
"""Entries of a style vector in Cellpose 4, where it means nothing."""

Shapes = Mapping[str, Sequence[int]]


class CellposeSAM(nn.Module):
    """The network of ``cpsam`` files; call `settle` once it has its weights.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Of the tensors of a state dict by their keys.

    Raises
    ------
    KeyError
        If a layer is missing that says how large the network is.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.encoder = _Encoder(shapes)
        n_features, n_values = shapes["encoder.neck.2.weight"][0], shapes["W2"][0]
        self.out = nn.Conv2d(n_features, n_values, 1)
        self.W2 = nn.Parameter(torch.zeros(*shapes["W2"]), requires_grad=False)

    def settle(self) -> None:
        """Derive from the weights what is the same for all tiles."""
        for module in self.modules():
            if isinstance(module, PositionedAttention):
                module.settle()

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network; without gradients.

        Parameters
        ----------
        tiles : Tensor, shape (n, channels, b, b)

        Returns
        -------
        output : Tensor, shape (n, 3, b, b)
            Five times the unit flow along y and x, and the cell logit.
        style : Tensor, shape (n, 256)
            Zeros.
        """
        values = self.out(self.encoder(tiles))
        output = F.conv_transpose2d(values, self.W2, stride=self.W2.shape[-1])
        return output, output.new_zeros((len(tiles), N_STYLE))


class _Encoder(nn.Module):
    """From tiles to features of their patches, which all see each other in every block."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        width, n_channels, height, breadth = shapes["encoder.patch_embed.proj.weight"]
        _, rows, columns, _ = shapes["encoder.pos_embed"]
        n_features = shapes["encoder.neck.0.weight"][0]
        patch = (height, breadth)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(n_channels, width, patch, patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, columns, width))
        n_blocks = sum(key.endswith(".norm1.weight") for key in shapes)
        within = [{key: shapes[f"encoder.blocks.{i}.{key}"] for key in _Block.READ} for i in range(n_blocks)]
        self.blocks = nn.ModuleList(_Block(width, (rows, columns), sizes) for sizes in within)
        self.neck = nn.Sequential(
            nn.Conv2d(width, n_features, 1, bias=False),
            _NormOfChannels(n_features, eps=EPS),
            nn.Conv2d(n_features, n_features, 3, padding=1, bias=False),
            _NormOfChannels(n_features, eps=EPS),
        )

    def forward(self, tiles: Tensor) -> Tensor:
        # In the order of their axes, as layers read them; otherwise each of them copies them first.
        features = self.patch_embed["proj"](tiles).permute(0, 2, 3, 1).contiguous() + self.pos_embed
        for block in self.blocks:
            features = block(features)
        out: Tensor = self.neck(features.permute(0, 3, 1, 2))
        return out


class _Block(nn.Module):
    """Attention and a perceptron, each added to what it is given."""

    READ = ("attn.rel_pos_h", "attn.rel_pos_w", "mlp.lin1.weight")
    """Tensors that say how large a block is."""

    def __init__(self, width: int, grid: tuple[int, int], shapes: Shapes) -> None:
        super().__init__()
        (n_rows, n_entries), (n_columns, _), (n_hidden, _) = (shapes[key] for key in self.READ)
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = PositionedAttention(width, width // n_entries, grid, (n_rows, n_columns))
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = _Perceptron(width, n_hidden)

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.attn(self.norm1(features))
        out: Tensor = features + self.mlp(self.norm2(features))
        return out


class _Perceptron(nn.Module):
    """Two layers, for each patch by itself."""

    def __init__(self, width: int, n_hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(width, n_hidden), nn.Linear(n_hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.lin2(F.gelu(self.lin1(features)))
        return out


class _NormOfChannels(nn.LayerNorm):
    """Normalises over the channels of features that have them first."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
