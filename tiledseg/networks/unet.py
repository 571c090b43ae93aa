"""The residual U-Net with style vector, in the layout of layers and keys of Cellpose 1-3.

A file trained by Cellpose 1, 2 or 3 loads into :class:`ResidualUNet` as it is, and a full-width
file written from it loads there. The module names (``downsample.down.res_down_0.conv.conv_0``...)
are therefore fixed by those files, not by taste.

References
----------
Stringer et al. (2021), "Cellpose: a generalist algorithm for cellular segmentation",
Nature Methods 18, 100-106.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .fused import FusedConv, can_fuse
from .states import architecture_of, load_state

__all__ = ["ResidualUNet", "fuse_for_cpu", "prepare_to_predict", "read_state", "unet_of"]


class _NormReluConv(nn.Sequential):
    """Normalisation, ReLU and convolution; the result is added to other features if there are any."""

    def __init__(self, n_in: int, n_out: int, size: int) -> None:
        norm, conv = nn.BatchNorm2d(n_in, eps=1e-5, momentum=0.05), nn.Conv2d(n_in, n_out, size, padding=size // 2)
        super().__init__(norm, nn.ReLU(inplace=True), conv)

    def forward(self, features: Tensor, onto: Tensor | None = None) -> Tensor:
        norm, relu, conv = self
        features = relu(norm(features))
        out: Tensor
        if isinstance(conv, FusedConv):
            out = conv(features, onto)
            return out
        out = conv(features)
        if onto is None:
            return out
        return onto + out if torch.is_grad_enabled() else onto.add_(out)


def _norm_conv(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(n_in, eps=1e-5, momentum=0.05), nn.Conv2d(n_in, n_out, 1))


class _DownBlock(nn.Module):
    """Two residual pairs of convolutions."""

    def __init__(self, n_in: int, n_out: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        for i in range(4):
            self.conv.add_module(f"conv_{i}", _NormReluConv(n_in if i == 0 else n_out, n_out, size))
        self.proj = _norm_conv(n_in, n_out)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.conv[1](self.conv[0](features), self.proj(features))
        out = self.conv[3](self.conv[2](out), out)
        return out


class _Downsample(nn.Module):
    """The contracting path; returns the features of every depth."""

    def __init__(self, widths: tuple[int, ...], size: int) -> None:
        super().__init__()
        self.down = nn.Sequential()
        for i in range(len(widths) - 1):
            self.down.add_module(f"res_down_{i}", _DownBlock(widths[i], widths[i + 1], size))
        self.maxpool = nn.MaxPool2d(2, 2)

    def forward(self, tiles: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for i, block in enumerate(self.down):
            features.append(block(tiles if i == 0 else self.maxpool(features[-1])))
        return features


class _StyleConv(nn.Module):
    """A convolution whose input is shifted by a linear map of the style vector."""

    def __init__(self, n_in: int, n_out: int, n_style: int, size: int) -> None:
        super().__init__()
        self.conv = _NormReluConv(n_in, n_out, size)
        self.full = nn.Linear(n_style, n_out)

    def forward(
        self, style: Tensor, features: Tensor, skip: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        if skip is not None:
            features = features + skip
        out: Tensor = self.conv(self._shifted(features, self.full(style)[:, :, None, None]), onto)
        return out

    def _shifted(self, features: Tensor, shift: Tensor) -> Tensor:
        return features + shift


class _ScaledStyleConv(_StyleConv):
    """The same with its normalisation in the sum: the map of the style is scaled and shifted for it."""

    scale: Tensor

    def __init__(self, conv: _StyleConv) -> None:
        nn.Module.__init__(self)
        self.conv, self.full = conv.conv, conv.full
        scale, shift = _scale_and_shift(self.conv[0])
        self.conv[0] = nn.Identity()
        self.full.weight *= scale[:, None]
        self.full.bias.mul_(scale).add_(shift)
        self.register_buffer("scale", scale[:, None, None])

    def _shifted(self, features: Tensor, shift: Tensor) -> Tensor:
        return torch.addcmul(shift, features, self.scale)


class _Scaled(nn.Module):
    """A normalisation by what is known, in half the time that torch's own takes on a CPU."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        for name, values in zip(("scale", "shift"), _scale_and_shift(norm), strict=True):
            self.register_buffer(name, values[:, None, None])

    def forward(self, features: Tensor) -> Tensor:
        return torch.addcmul(self.shift, features, self.scale)


class _UpBlock(nn.Module):
    """Two residual pairs of convolutions, three of the four shifted by the style vector."""

    def __init__(self, n_in: int, n_out: int, n_style: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        self.conv.add_module("conv_0", _NormReluConv(n_in, n_out, size))
        for i in range(1, 4):
            self.conv.add_module(f"conv_{i}", _StyleConv(n_out, n_out, n_style, size))
        self.proj = _norm_conv(n_in, n_out)

    def forward(self, features: Tensor, skip: Tensor, style: Tensor) -> Tensor:
        conv = self.conv
        out: Tensor = conv[1](style, conv[0](features), skip, self.proj(features))
        out = conv[3](style, conv[2](style, out), onto=out)
        return out


class _Upsample(nn.Module):
    """The expanding path."""

    def __init__(self, widths: tuple[int, ...], size: int) -> None:
        super().__init__()
        self.upsampling: nn.Module = nn.Upsample(scale_factor=2, mode="nearest")
        self.up = nn.Sequential()
        for i in range(1, len(widths)):
            self.up.add_module(f"res_up_{i - 1}", _UpBlock(widths[i], widths[i - 1], widths[-1], size))

    def forward(self, style: Tensor, features: list[Tensor]) -> Tensor:
        out: Tensor = self.up[-1](features[-1], features[-1], style)
        for i in range(len(self.up) - 2, -1, -1):
            out = self.up[i](self.upsampling(out), features[i], style)
        return out


class ResidualUNet(nn.Module):
    """Residual U-Net with style vector.

    Parameters
    ----------
    widths : tuple of int
        Channels of the input and of each depth, ``(2, 32, 64, 128, 256)`` in Cellpose 1-3.
    diam_mean : float
        Diameter in pixels of the cells the network wants to see.
    n_out : int
        Output channels: flow per axis, then the cell logit.
    """

    def __init__(
        self, widths: tuple[int, ...] = (2, 32, 64, 128, 256), diam_mean: float = 30.0, n_out: int = 3
    ) -> None:
        super().__init__()
        self.widths = widths
        self.downsample = _Downsample(widths, 3)
        self.upsample = _Upsample((*widths[1:], widths[-1]), 3)
        self.output = _NormReluConv(widths[1], n_out, 1)
        self.diam_mean = nn.Parameter(torch.ones(1) * diam_mean, requires_grad=False)
        self.diam_labels = nn.Parameter(torch.ones(1) * diam_mean, requires_grad=False)

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Parameters
        ----------
        tiles : Tensor of float32, shape (n, widths[0], b, b)
            Normalised tiles; ``b`` a multiple of ``2 ** (len(widths) - 2)``.

        Returns
        -------
        output : Tensor, shape (n, n_out, b, b)
            Flow along y and x, times 5, and the cell logit.
        style : Tensor, shape (n, widths[-1])
            Mean of the deepest features over space, of unit length.
        """
        features = self.downsample(tiles)
        style = features[-1].mean(dim=(-2, -1))
        style = style / style.pow(2).sum(dim=1, keepdim=True).sqrt()
        output: Tensor = self.output(self.upsample(style, features))
        return output, style


def prepare_to_predict(net: ResidualUNet) -> None:
    """Rearrange a network so that it computes the same with less.

    Outputs change by rounding only. The network can no longer be trained, nor its state be saved as a
    model file. Three things are done:

    - Batch normalisation is folded into the convolution before or after it where nothing lies between:
      half of these layers go.
    - Other normalisations become a product and a sum, and where a style is added one with that.
    - What follows an upsampling by repetition is done before it. Normalisation, ReLU and projection see
      a quarter of the pixels; a convolution of 3 x 3 repeated pixels is a transposed convolution of
      the pixels themselves with 16 weights for 4 outputs instead of 36.

    Parameters
    ----------
    net : ResidualUNet
        Changed in place; its running statistics count, as in ``eval()``.
    """
    downs: Any = net.downsample.down  # torch's modules know their children by name only
    ups: Any = net.upsample.up
    with torch.no_grad():
        for down in downs:
            down.proj = _fold_into_next(*down.proj)
            for first, second in ((0, 1), (2, 3)):
                _fold_into_previous(down.conv[first][2], down.conv[second])
        for up in ups:
            up.proj = _fold_into_next(*up.proj)
            # The style is added between the two: its map is scaled as well.
            scale = _fold_into_previous(up.conv[2].conv[2], up.conv[3].conv)
            up.conv[3].full.weight *= scale[:, None]
            up.conv[3].full.bias *= scale
            for i in (1, 2):
                up.conv[i] = _ScaledStyleConv(up.conv[i])
            up.conv[0][0] = _Scaled(up.conv[0][0])
        for down in downs:
            for i in (0, 2):
                down.conv[i][0] = _Scaled(down.conv[i][0])
        net.output[0] = _Scaled(net.output[0])
        for up in ups[:-1]:
            up.proj = nn.Sequential(up.proj, net.upsample.upsampling)
            up.conv[0][2] = _with_upsampling(up.conv[0][2])
        net.upsample.upsampling = nn.Identity()


def fuse_for_cpu(net: ResidualUNet) -> None:
    """Let convolutions do the ReLU or the sum that follows, where this process can: the same bits, sooner.

    Parameters
    ----------
    net : ResidualUNet
        After `prepare_to_predict`, in float32, for tiles whose channels are the last axis in memory; changed in place.
    """
    if not can_fuse():
        return
    downs: Any = net.downsample.down
    ups: Any = net.upsample.up
    for down in downs:
        for first, second in ((0, 1), (2, 3)):
            down.conv[first][2] = FusedConv(down.conv[first][2], relu=True)
            down.conv[second][1] = nn.Identity()
            down.conv[second][2] = FusedConv(down.conv[second][2])
    for up in ups:
        for i in (1, 2, 3):
            up.conv[i].conv[2] = FusedConv(up.conv[i].conv[2])


def _with_upsampling(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """A transposed convolution that repeats every pixel 2 x 2 times and then convolves by 3 x 3."""
    both = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 4, stride=2, padding=1)
    # Weight t of a row reaches copy c of a pixel at place c + 2 - t of the transposed row.
    weight = torch.zeros((*both.weight.shape,), dtype=torch.float64)
    for row, column, y, x in itertools.product((0, 1), (0, 1), range(3), range(3)):
        weight[:, :, row + 2 - y, column + 2 - x] += conv.weight[:, :, y, x].T
    both.weight.copy_(weight)
    if both.bias is not None and conv.bias is not None:
        both.bias.copy_(conv.bias)
    return both


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What a normalisation multiplies by, then adds."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _fold_into_next(norm: Any, conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution of one pixel that does what both did."""
    scale, shift = _scale_and_shift(norm)
    if conv.bias is not None:
        conv.bias += (conv.weight * shift[None, :, None, None]).sum(dim=(1, 2, 3))
    conv.weight *= scale[None, :, None, None]
    return conv


def _fold_into_previous(conv: nn.Conv2d, following: nn.Sequential) -> Tensor:
    """Let a convolution do what the normalisation at the head of the following layers did; its scale."""
    scale, shift = _scale_and_shift(following[0])
    conv.weight *= scale[:, None, None, None]
    if conv.bias is not None:
        conv.bias.mul_(scale).add_(shift)
    following[0] = nn.Identity()
    return scale


def read_state(path: Path) -> dict[str, Any]:
    """The state dict of a residual U-Net, as float32.

    Raises
    ------
    ModelError
        If the file is not a state dict of tensors with the keys of Cellpose 1-3.
    """
    state = load_state(path)
    if architecture_of(state) != "unet":
        raise ModelError(f"model file {path} is not a residual U-Net in the layout of Cellpose 1-3.")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def unet_of(state: dict[str, Any], path: Path) -> ResidualUNet:
    """The network of a state dict, as wide and deep as its weights say.

    Raises
    ------
    ModelError
        If layers are missing or do not fit; names the file.
    """
    net = ResidualUNet(_widths(state), n_out=int(state["output.2.weight"].shape[0]))
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"model file {path} lacks layers of the residual U-Net of Cellpose 1-3.") from error
    return net


def _widths(state: dict[str, Any]) -> tuple[int, ...]:
    """Channels of the input and of each depth, read off the weights."""
    first = "downsample.down.res_down_0.conv.conv_0.2.weight"
    widths = [int(state[first].shape[1])]
    while (key := f"downsample.down.res_down_{len(widths) - 1}.conv.conv_0.2.weight") in state:
        widths.append(int(state[key].shape[0]))
    return tuple(widths)
