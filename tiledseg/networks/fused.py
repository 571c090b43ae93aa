"""Convolutions on a CPU that do what follows them in the same pass through memory, with weights laid out beforehand.

torch reaches these operators of oneDNN through its compiler, which needs a C++ compiler and half a minute; they are
called here as the code it writes does. They give the bits of one step after the other: where this torch lacks them, or
they do not, convolutions are left as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FusedConv", "can_fuse"]

_ops: Any = torch.ops.mkldnn
_ALONG = [1, 1]
"""Stride and dilation."""


class FusedConv(nn.Module):
    """A convolution with ReLU after it, or a sum.

    Parameters
    ----------
    conv : Conv2d
        Of stride 1, in float32. Its weights are laid out at the first pass and must not change any more.
    relu : bool
        Whether ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._padding = list(conv.padding)
        self._after = "relu" if relu else "none"
        self._packed: Tensor | None = None

    def forward(self, features: Tensor, onto: Tensor | None = None) -> Tensor:
        """Convolve.

        Parameters
        ----------
        features : Tensor of float32, shape (n, c, y, x)
            Channels are the last axis in memory.
        onto : Tensor, shape of the output, optional
            The result is added to it, in its place.
        """
        if self._packed is None:  # several threads may come here: all get the same
            self._packed = _ops._reorder_convolution_weight(
                self.weight, self._padding, _ALONG, _ALONG, 1, list(features.shape)
            )
        given = (features, self._packed, self.bias, self._padding, _ALONG, _ALONG, 1)
        out: Tensor
        if onto is None:
            out = _ops._convolution_pointwise(*given, self._after, [], "")
        else:
            out = _ops._convolution_pointwise_.binary(onto, *given, "add", 1.0, None, [], None)
        return out


@functools.cache
def can_fuse() -> bool:
    """Whether this process's torch and CPU have these operators, and they give the bits of one step after the other."""
    draw = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    tiles, onto = (
        torch.randn(1, n, 32, 32, generator=draw).contiguous(memory_format=torch.channels_last) for n in (8, 16)
    )
    with torch.inference_mode():
        plain = conv(tiles)
        try:
            with_relu, added = FusedConv(conv, relu=True)(tiles), FusedConv(conv)(tiles, onto.clone())
        except (AttributeError, RuntimeError):
            return False
        return torch.equal(with_relu, F.relu(plain)) and torch.equal(added, onto + plain)
