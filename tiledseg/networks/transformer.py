"""The transformers of Cellpose 4: cpsam is built here, cpdino by Cellpose itself."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ModelError
from .cpsam import CellposeSAM
from .models import Model
from .states import load_state

__all__ = ["transformer_of"]

NOT_WEIGHTS = {"diam_mean", "diam_labels"}
"""May be missing in a file, or in the network: they say what it was trained for, and change nothing."""


def transformer_of(model: Model) -> Any:
    """The network of a model file of Cellpose 4, in float32.

    Raises
    ------
    ModelError
        If the file's layers do not fit, or if Cellpose 4 is needed and not installed, or what the network is made of.
    """
    state = load_state(model.path)
    net = _empty_cpsam(model, state) if model.architecture == "cpsam" else _empty_cpdino(model)
    try:
        found = net.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of tensors of other shapes
        raise _does_not_fit(model, str(error).strip().splitlines()[-1].strip()) from error
    wrong = sorted({*found.missing_keys, *found.unexpected_keys} - NOT_WEIGHTS)
    if wrong:
        raise _does_not_fit(model, f"{len(wrong)} layers are missing or unknown, among them {wrong[0]}.")
    if isinstance(net, CellposeSAM):
        net.settle()
    return net


def _empty_cpsam(model: Model, state: dict[str, Any]) -> CellposeSAM:
    """The network before it has weights."""
    try:
        with torch.device("meta"):  # drawing random weights takes seconds
            net = CellposeSAM({key: tuple(values.shape) for key, values in state.items()})
    except KeyError as error:
        raise _does_not_fit(model, f"layers are missing, among them {error.args[0]}.") from error
    except (ValueError, ZeroDivisionError) as error:
        raise _does_not_fit(model, "its layers have other shapes.") from error
    return net.to_empty(device="cpu")


def _empty_cpdino(model: Model) -> Any:
    """The same, as Cellpose has it."""
    try:
        from cellpose import vit
    except ImportError as error:
        raise ModelError(
            f"model {model.name} is a network of Cellpose 4, which is not installed ({error}); install it with "
            "pip install 'tiledseg[cellpose]'."
        ) from error
    with torch.device("cpu"):
        try:
            return vit.CPDINO(model_name="vitb" if model.architecture == "cpdino-vitb" else "vitl")
        except NameError as error:
            raise ModelError(
                f"model {model.name} needs the package dinov3, which is not installed; see Cellpose's documentation."
            ) from error


def _does_not_fit(model: Model, why: str) -> ModelError:
    """What to say of a file that is another network than it seems."""
    return ModelError(f"model file {model.path} does not fit the network {model.architecture}: {why}")
