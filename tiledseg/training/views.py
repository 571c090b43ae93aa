"""What a network is shown in training: turned, mirrored, scaled and differently lit views of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter
from torch import Tensor

from ..heat import label_flows
from .pairs import Pair

__all__ = ["N_TARGETS", "Example", "appearance", "example_of", "geometry"]

N_TARGETS = 3  # flow along y and x, mask
LARGEST = 2.0  # diameters of the network's: larger cells are reduced


@dataclass(frozen=True)
class Example:
    """An image to learn from.

    Attributes
    ----------
    name : str
    fields : Tensor of float32, shape (inputs + 3, y, x)
        Inputs, flow along y and x in unit length, mask.
    diameter : float
        Median diameter of its objects in pixels of the fields.
    """

    name: str
    fields: Tensor
    diameter: float


def example_of(pair: Pair, diam_mean: float) -> Example:
    """An example with its targets, reduced so that its cells are at most twice as large as the network wants them."""
    pixels, labels = pair.pixels, pair.labels
    factor = max(1, int(pair.diameter // (LARGEST * diam_mean)) + 1)
    if factor > 1:
        # Means over an odd number of pixels round those whose labels are kept: neither is shifted.
        kept = slice(factor // 2, None, factor)
        side = factor // 2 * 2 + 1
        pixels = np.stack([uniform_filter(plane, side, mode="nearest")[kept, kept] for plane in pixels])
        labels = np.ascontiguousarray(labels[kept, kept])
    fields = np.concatenate([pixels, label_flows(labels), (labels > 0)[None]]).astype(np.float32)
    return Example(pair.name, torch.from_numpy(fields), pair.diameter / factor)


def geometry(example: Example, rng: np.random.Generator, scale: float, side: int) -> Tensor:
    """A turned, mirrored and scaled view of an example's fields, shape (inputs + 3, side, side)."""
    height, width = example.fields.shape[1:]
    angle = rng.uniform(0, 2 * np.pi)
    flip = rng.choice([-1.0, 1.0])
    turn = np.array([[np.cos(angle), -np.sin(angle) * flip], [np.sin(angle), np.cos(angle) * flip]])
    at = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    out = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1)
    reach = np.minimum(side / 2 / scale, np.array([height, width]) / 2)
    centre = rng.uniform(reach, np.array([height, width]) - reach)
    source = out @ torch.tensor(turn.T / scale, dtype=torch.float32) + torch.tensor(centre, dtype=torch.float32)
    grid = torch.stack([(2 * source[..., 1] + 1) / width - 1, (2 * source[..., 0] + 1) / height - 1], -1)
    fields = F.grid_sample(example.fields[None], grid[None], align_corners=False)[0]
    n = len(fields) - N_TARGETS
    flow = torch.einsum("ij,jyx->iyx", torch.tensor(turn.T, dtype=torch.float32), fields[n : n + 2])
    mask = fields[-1] > 0.5
    fields[n : n + 2] = torch.where(mask, flow / (flow.norm(dim=0) + 1e-6), 0.0)
    fields[-1] = mask
    return fields


def appearance(image: Tensor, rng: np.random.Generator) -> Tensor:
    """One input with another contrast, gamma, inversion, blur, background gradient and noise; shape (side, side)."""
    side = image.shape[0]
    if rng.random() < 0.15:
        image = 1 - image
    if rng.random() < 0.5:
        image = image.clamp(0, 1.5) ** float(np.exp(rng.uniform(-0.6, 0.6)))
    if rng.random() < 0.3:
        slope = torch.linspace(-1, 1, side)
        image = image + rng.uniform(-0.15, 0.15) * slope[:, None] + rng.uniform(-0.15, 0.15) * slope[None]
    if rng.random() < 0.3:
        sigma = rng.uniform(0.4, 1.5)
        at = torch.arange(-4, 5, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (at / sigma) ** 2)
        kernel = kernel / kernel.sum()
        image = F.conv2d(image[None, None], kernel[None, None, :, None], padding=(4, 0))
        image = F.conv2d(image, kernel[None, None, None, :], padding=(0, 4))[0, 0]
    image = image * float(np.exp(rng.uniform(-0.5, 0.35))) + rng.uniform(-0.1, 0.1)
    if rng.random() < 0.5:
        noise = rng.normal(0, rng.uniform(0, 0.12), image.shape).astype(np.float32)
        image = image + torch.from_numpy(noise)
    return image
