"""The training loop, and the size model that belongs to the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.size import SizeModel
from ..networks.unet import ResidualUNet
from .views import N_TARGETS, Example, appearance, geometry

__all__ = ["fit_network", "fit_size"]

BATCH = 12
CROP_IN_DIAMETERS = 7.5
SCALES = (0.7, 1.4)
FLOW_FACTOR = 5.0  # networks give five times the unit flow
LARGEST_GRADIENT = 5.0

SIZE_VIEWS = 6
SIZE_IN_DIAMETERS = 13.2
SIZE_SCALES = (0.33, 3.0)
RIDGE = 1e-3


def _side(diameters: float, diam_mean: float) -> int:
    """Side of a view in pixels: a multiple of the network's pooling."""
    return round(diameters * diam_mean / 8) * 8


def _scale(rng: np.random.Generator, scales: tuple[float, float]) -> float:
    return math.exp(rng.uniform(math.log(scales[0]), math.log(scales[1])))


def _batch(
    examples: Sequence[Example], weights: npt.NDArray[np.float64], network: ResidualUNet, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Random inputs (n, channels, side, side) and targets (n, 3, side, side)."""
    diam_mean = float(network.diam_mean)
    side = _side(CROP_IN_DIAMETERS, diam_mean)
    inputs = torch.zeros(BATCH, network.widths[0], side, side)
    targets = torch.zeros(BATCH, N_TARGETS, side, side)
    for i, k in enumerate(rng.choice(len(examples), BATCH, p=weights)):
        example = examples[k]
        fields = geometry(example, rng, diam_mean / example.diameter * _scale(rng, SCALES), side)
        for target, field in zip(inputs[i], fields[:-N_TARGETS], strict=False):
            target[:] = appearance(field, rng)
        targets[i] = fields[-N_TARGETS:]
    return inputs, targets


def fit_network(
    network: ResidualUNet,
    examples: Sequence[Example],
    *,
    steps: int,
    rate: float,
    seed: int = 0,
    weights: npt.NDArray[np.float64] | None = None,
    device: str = "cpu",
    bfloat16: bool = False,
    each_step: Callable[[int, float], None] | None = None,
) -> None:
    """Adapt a network, in place; it is left on the CPU, ready to predict.

    Parameters
    ----------
    network : ResidualUNet
    examples : sequence of Example
        Held in memory.
    steps : int
        Batches of 12 views each.
    rate : float
        Largest learning rate; it rises to it in a tenth of the steps and then falls to nothing.
    seed : int
        The same seed gives the same weights, up to rounding.
    weights : array of float64, shape (examples,), optional
        How often each is seen; default equally often.
    device : str
        ``"cpu"`` or ``"cuda"``.
    bfloat16 : bool
        Compute in half the precision: faster where the hardware has it.
    each_step : callable, optional
        Called with the number of the step and its loss.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    share = np.ones(len(examples)) if weights is None else weights
    share = share / share.sum()
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        inputs, targets = (part.to(device) for part in _batch(examples, share, network, rng))
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            output, _ = network(inputs.to(memory_format=torch.channels_last))
        output = output.float()
        loss = 0.5 * F.mse_loss(output[:, :2], FLOW_FACTOR * targets[:, :2])
        loss = loss + F.binary_cross_entropy_with_logits(output[:, 2], targets[:, 2])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        if each_step is not None:
            each_step(step, loss.item())
    network.to("cpu").eval()


def fit_size(network: ResidualUNet, examples: Sequence[Example], seed: int = 0) -> SizeModel:
    """Ridge regression from style vector to log diameter, on views of the examples at random scales.

    Parameters
    ----------
    network : ResidualUNet
        Ready to predict.
    examples : sequence of Example
    seed : int

    Returns
    -------
    size : SizeModel
    """
    rng = np.random.default_rng(seed + 1)
    diam_mean = float(network.diam_mean)
    side = _side(SIZE_IN_DIAMETERS, diam_mean)
    styles, logs = [], []
    for example in examples:
        for _ in range(SIZE_VIEWS):
            scale = _scale(rng, SIZE_SCALES)
            fields = geometry(example, rng, scale * diam_mean / example.diameter, side)[:-N_TARGETS]
            tile = torch.zeros(1, network.widths[0], side, side)
            tile[0, : len(fields)] = fields
            with torch.inference_mode():
                _, style = network(tile.to(memory_format=torch.channels_last))
            styles.append(style[0].numpy())
            logs.append(math.log(scale))
    x, y = np.array(styles, np.float64), np.array(logs)
    smean, ymean = x.mean(axis=0), float(y.mean())
    centred = x - smean
    gram = centred.T @ centred + RIDGE * len(x) * x.var() * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (y - ymean))
    return SizeModel(tuple(weights.round(6).tolist()), tuple(smean.round(6).tolist()), diam_mean, round(ymean, 6))
