"""The attention of cpsam without its matrix of scores.

Segment-anything adds to the score of query ``(h, w)`` and key ``(i, j)`` what the query says of their distance along
rows and along columns, ``R(h, w, i) + C(h, w, j)``. With 1024 patches in 16 heads these scores are by far the largest
thing that the network makes, and a mask that held the sums would be as large. But a sum over products makes them as
well: give the query ``R(h, w, :)`` and ``C(h, w, :)`` as further entries, and the key ones where they are ``i`` and
``j``, zeros elsewhere. Then there is no mask, and torch's fused kernels never hold more than a corner of the scores.
In cpsam a head has 64 entries and the patches 32 rows and columns: 128, a size that these kernels are made for.

What a query says of all distances is one product of matrices. ``R(h, w, :)`` is a part of it that begins one place
earlier in every row of patches, so it is seen in place by its strides.

References
----------
Kirillov et al. (2023), "Segment Anything", arXiv:2304.02643; Li et al. (2022), "MViTv2: Improved Multiscale Vision
Transformers for Classification and Detection", CVPR, for the decomposed positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PositionedAttention"]

WHOLE = 8
"""Entries of a head are filled up to a multiple of it, as fused kernels want it."""


class PositionedAttention(nn.Module):
    """Attention between all patches of a tile with decomposed relative positions; weights of segment-anything.

    Parameters
    ----------
    width : int
        Entries of a patch.
    n_heads : int
    grid : (int, int)
        Rows and columns of patches in a tile.
    n_stored : (int, int)
        Distances along rows and columns for which the weights have positions.
    """

    distances: Tensor
    places: Tensor

    def __init__(self, width: int, n_heads: int, grid: tuple[int, int], n_stored: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.n_heads, self.n_entries = grid, n_heads, width // n_heads
        self.scale: float = self.n_entries**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(n, self.n_entries)) for n in n_stored)

    def settle(self) -> None:
        """Derive from the weights, once they are there, what is the same for all tiles."""
        rows, columns = self.grid
        places = torch.cat([torch.eye(rows).repeat_interleave(columns, 0), torch.eye(columns).repeat(rows, 1)], 1)
        more = rows + columns - (self.n_entries + rows + columns) % -WHOLE
        self.register_buffer("places", F.pad(places, (0, more - rows - columns)), persistent=False)
        positions = (self.rel_pos_h.detach(), self.rel_pos_w.detach())
        distances = torch.cat([_by_distance(of, n) for of, n in zip(positions, self.grid, strict=True)], 1)
        # Queries are scaled before they are multiplied with it.
        filled_up = F.pad(distances / self.scale, (0, -distances.shape[1] % WHOLE))
        self.register_buffer("distances", filled_up, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Attend, once `settle` was called; without gradients.

        Parameters
        ----------
        features : Tensor, shape (n, rows, columns, width)

        Returns
        -------
        attended : Tensor, same shape
        """
        rows, columns = self.grid
        shape = (len(features), rows * columns, 3, self.n_heads, self.n_entries)
        query, key, value = self.qkv(features).view(shape).unbind(2)
        query, key = self._long_query(query), self._long_key(key)
        if not features.is_cuda:
            # The fused kernel of CPUs wants values as long as keys.
            value = F.pad(value, (0, self.places.shape[-1]))
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=1.0
        )
        together = attended.transpose(1, 2)[..., : self.n_entries].reshape(features.shape)
        out: Tensor = self.proj(together)
        return out

    def _long_query(self, query: Tensor) -> Tensor:
        """Queries, scaled, and what they say of each row and column; shape (n, patches, heads, entries)."""
        rows, columns = self.grid
        long = self._long(query)
        scaled = torch.mul(query, self.scale, out=long[..., : self.n_entries])
        said = scaled.flatten(0, 2) @ self.distances
        shape = (len(query), rows, columns, self.n_heads)
        n, row, column, head, _ = said.view(*shape, -1).stride()
        more = long.view(*shape, -1)[..., self.n_entries :]
        more[..., :rows] = said.as_strided((*shape, rows), (n, row - 1, column, head, 1), rows - 1)
        first = 2 * rows - 1 + columns - 1
        more[..., rows : rows + columns] = said.as_strided((*shape, columns), (n, row, column - 1, head, 1), first)
        more[..., rows + columns :] = 0
        return long

    def _long_key(self, key: Tensor) -> Tensor:
        """Keys, and their places; shape (n, patches, heads, entries)."""
        long = self._long(key)
        long[..., : self.n_entries] = key
        long[..., self.n_entries :] = self.places[:, None]
        return long

    def _long(self, entries: Tensor) -> Tensor:
        """Room for queries or keys with further entries."""
        return entries.new_empty((*entries.shape[:3], self.n_entries + self.places.shape[-1]))


def _by_distance(positions: Tensor, side: int) -> Tensor:
    """What to multiply a query with to get its term for a key at each distance, shape (entries, 2 * side - 1).

    The distance counts from the key to the query, the largest first. Stored positions are for distances of another
    grid if its side was another: then they are interpolated.
    """
    n_distances = 2 * side - 1
    if len(positions) != n_distances:
        positions = F.interpolate(positions.float().T[None], size=n_distances, mode="linear")[0].T
    return positions.flip(0).T
