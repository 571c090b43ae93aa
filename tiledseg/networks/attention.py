"""The attention of cpsam without its matrix of scores.

Segment-anything adds to the score of query ``(h, w)`` and key ``(i, j)`` what the query says of their distance along
rows and along columns, ``R(h, w, i) + C(h, w, j)``. With 1024 patches in 16 heads these scores are by far the largest
thing that the network makes, and a mask that held the sums would be as large. But a sum over products makes them as
well: give the query ``R(h, w, :)`` and ``C(h, w, :)`` as further entries, and the key ones where they are ``i`` and
``j``, zeros elsewhere. Then there is no mask, and torch's fused kernels never hold more than a corner of the scores.
In cpsam a head has 64 entries and the patches 32 rows and columns: 128, a size that these kernels are made for.

References
----------
Kirillov et al. (2023), "Segment Anything", arXiv:2304.02643; Li et al. (2022), "MViTv2: Improved Multiscale Vision
Transformers for Classification and Detection", CVPR, for the decomposed positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PositionedAttention", "fuse_attention"]

WHOLE = 8
"""Entries of a head are filled up to a multiple of it, as fused kernels want it."""


class PositionedAttention(nn.Module):
    """Attention between all patches of a tile with decomposed relative positions; weights of segment-anything.

    Parameters
    ----------
    attention : Module
        Of segment-anything, of which it takes the layers ``qkv`` and ``proj``, the number of heads, and the positions
        ``rel_pos_h`` and ``rel_pos_w``.
    grid : (int, int)
        Rows and columns of patches in a tile.
    """

    along_rows: Tensor
    along_columns: Tensor
    places: Tensor

    def __init__(self, attention: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        rows, columns = grid
        self.qkv, self.proj = attention.qkv, attention.proj
        self.n_heads: int = attention.num_heads
        self.n_entries: int = attention.proj.in_features // self.n_heads
        places = torch.cat([torch.eye(rows).repeat_interleave(columns, 0), torch.eye(columns).repeat(rows, 1)], 1)
        self.register_buffer("along_rows", _by_distance(attention.rel_pos_h.detach(), rows))
        self.register_buffer("along_columns", _by_distance(attention.rel_pos_w.detach(), columns))
        self.register_buffer("places", F.pad(places, (0, -(self.n_entries + rows + columns) % WHOLE)))

    def forward(self, features: Tensor) -> Tensor:
        """Attend.

        Parameters
        ----------
        features : Tensor, shape (n, rows, columns, width)

        Returns
        -------
        attended : Tensor, same shape
        """
        n, rows, columns, width = features.shape
        per_head = self.qkv(features).view(n, rows * columns, 3, self.n_heads, self.n_entries)
        query, key, value = per_head.permute(2, 0, 3, 1, 4)
        there = query.unflatten(2, (rows, columns))
        by_row = torch.einsum("nmhwc,hck->nmhwk", there, self.along_rows).flatten(2, 3)
        by_column = torch.einsum("nmhwc,wck->nmhwk", there, self.along_columns).flatten(2, 3)
        more = self.places.shape[-1]
        query = torch.cat([query * self.n_entries**-0.5, by_row, by_column], -1)
        if more > rows + columns:
            query = F.pad(query, (0, more - rows - columns))
        key = torch.cat([key, self.places.expand(n, self.n_heads, -1, -1)], -1)
        # The kernels want values as long as the keys are.
        attended = F.scaled_dot_product_attention(query, key, F.pad(value, (0, more)), scale=1.0)
        together = attended[..., : self.n_entries].transpose(1, 2).reshape(n, rows, columns, width)
        out: Tensor = self.proj(together)
        return out


def _by_distance(positions: Tensor, side: int) -> Tensor:
    """What to multiply a query at a place with to get its term for a key at another, shape (place, entries, other).

    Stored positions are for distances of another grid if its side was another: then they are interpolated.
    """
    n_distances = 2 * side - 1
    if len(positions) != n_distances:
        positions = F.interpolate(positions.float().T[None], size=n_distances, mode="linear")[0].T
    place = torch.arange(side)
    return positions[place[:, None] - place[None, :] + side - 1].transpose(1, 2).contiguous()


def fuse_attention(net: Any) -> None:
    """Let a cpsam network attend without a matrix of scores, in place; outputs change by rounding only.

    Parameters
    ----------
    net : Module
        Of `cellpose.vit`. Its state can no longer be saved as a model file.
    """
    rows, columns = (int(n) for n in net.encoder.pos_embed.shape[1:3])
    for block in net.encoder.blocks:
        block.attn = PositionedAttention(block.attn, (rows, columns))
