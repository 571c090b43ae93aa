"""The transformers of Cellpose 4, built by Cellpose itself."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ModelError
from .attention import fuse_attention
from .models import Model
from .states import load_state

__all__ = ["transformer_of"]

NOT_WEIGHTS = {"diam_mean", "diam_labels"}
"""May be missing in a file: they say what the network was trained for, and change nothing."""


def transformer_of(model: Model) -> Any:
    """The network of a model file of Cellpose 4, in float32; cpsam without its matrix of scores.

    Raises
    ------
    ModelError
        If Cellpose 4 is not installed, or what the network is made of, or if the file's layers do not fit.
    """
    net = _empty(model)
    found = net.load_state_dict(load_state(model.path), strict=False)
    wrong = sorted({*found.missing_keys, *found.unexpected_keys} - NOT_WEIGHTS)
    if wrong:
        raise ModelError(
            f"model file {model.path} does not fit the network {model.architecture} of the installed Cellpose: "
            f"{len(wrong)} layers are missing or unknown, among them {wrong[0]}."
        )
    if model.architecture == "cpsam":
        fuse_attention(net)
    return net


def _empty(model: Model) -> Any:
    """The network before it has weights."""
    try:
        from cellpose import vit
    except ImportError as error:
        raise ModelError(
            f"model {model.name} is a network of Cellpose 4, which is not installed ({error}); install it with "
            "pip install 'tiledseg[cellpose]'."
        ) from error
    if model.architecture == "cpsam":
        with torch.device("meta"):  # drawing random weights takes seconds
            net = vit.CPSAM()
        return net.to_empty(device="cpu")
    with torch.device("cpu"):
        try:
            return vit.CPDINO(model_name="vitb" if model.architecture == "cpdino-vitb" else "vitl")
        except NameError as error:
            raise ModelError(
                f"model {model.name} needs the package dinov3, which is not installed; see Cellpose's documentation."
            ) from error
