"""Model files: state dicts of Cellpose's networks, which are not trusted.

Which network a file holds is read off its keys. Files of Cellpose 1-3 hold residual U-Nets, those of Cellpose 4
transformers.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError

__all__ = ["architecture_of", "describe_state", "load_state"]

UNET_KEYS = {"diam_mean", "output.2.weight", "downsample.down.res_down_0.conv.conv_0.2.weight"}
TRANSFORMER_KEYS = {"W2", "out.weight"}
DINO_KEY = "encoder.cls_token"
VITB_WIDTH = 768
PARALLEL = "module."
"""What torch's DataParallel puts before every key."""
DEFAULT_DIAMETER = 30.0
"""That Cellpose 4's networks are trained for; older files of them do not say it."""


def load_state(path: Path) -> dict[str, Any]:
    """The tensors of a model file, mapped into memory; nothing but tensors is unpickled.

    Raises
    ------
    ModelError
        If the file is no state dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"model file {path} cannot be read as weights; give a model file of Cellpose.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"model file {path} holds something else than named tensors; give a model file of Cellpose.")
    return {str(key).removeprefix(PARALLEL): value for key, value in state.items()}


def _can_be_mapped(path: Path) -> bool:
    """Whether it is a zip file; those that torch wrote before 1.6 are not."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def architecture_of(state: dict[str, Any]) -> str | None:
    """Name of the network a state dict belongs to, None if it is none of Cellpose's."""
    if state.keys() >= UNET_KEYS:
        return "unet"
    if not state.keys() >= TRANSFORMER_KEYS:
        return None
    if DINO_KEY not in state:
        return "cpsam"
    return "cpdino-vitb" if state[DINO_KEY].shape[-1] == VITB_WIDTH else "cpdino"


def describe_state(path: Path) -> tuple[str, float]:
    """Name of the network in a file, and the diameter in pixels of the cells it wants to see.

    Raises
    ------
    ModelError
        If the file is no network of Cellpose.
    """
    state = load_state(path)
    architecture = architecture_of(state)
    if architecture is None:
        raise ModelError(f"model file {path} is no network of Cellpose: its layers have other names.")
    diam_mean = state.get("diam_mean")
    return architecture, DEFAULT_DIAMETER if diam_mean is None else float(diam_mean.reshape(-1)[0])
