"""Fine-tune a network on a user's images and write a model file."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cluster import resolve_device
from ..config import CHANNEL_SETTINGS, SurveyConfig
from ..errors import ImageError, ModelError, OutputError, SettingsError
from ..live import told
from ..networks.models import find_model
from ..networks.runner import computes_in_bfloat16
from ..networks.unet import ResidualUNet, read_state, unet_of
from ..pipeline import segment
from ..progress import Listener
from ..scoring import compare
from .fit import fit_network, fit_size
from .pairs import Pair, is_held_out, read_pairs
from .views import Example, example_of

__all__ = ["TrainingReport", "train"]

logger = logging.getLogger(__name__)

PARTIAL_EVERY = 100
ENOUGH_TO_HOLD_OUT = 5


@dataclass(frozen=True)
class TrainingReport:
    """What was learned.

    Attributes
    ----------
    model, size_model : str
        The files that were written.
    start : str
        The model it began with.
    n_images, n_held_out : int
        Images, or windows of one, that were learned from, and that were held out.
    n_objects : int
        Objects in all of them.
    diameter : float
        Median of the objects' diameters in pixels.
    loss : float
        Mean of the last tenth of the steps.
    ap_before, ap_after : tuple of float or None
        Mean average precision at IoU 0.5, 0.75 and 0.9 on what was held out, with the diameter estimated, by the
        model it began with and by the new one; None if nothing was held out.
    """

    model: str
    size_model: str
    start: str
    n_images: int
    n_held_out: int
    n_objects: int
    diameter: float
    loss: float
    ap_before: tuple[float, ...] | None
    ap_after: tuple[float, ...] | None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def train(
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    start: str = "tiledseg-nuclei",
    steps: int = 1000,
    rate: float = 5e-4,
    seed: int = 0,
    labels: str | None = None,
    axes: str | None = None,
    device: str = "auto",
    progress: Listener | bool | None = None,
    **channels: Any,
) -> TrainingReport:
    """Fine-tune a residual U-Net on images with labels, and write it with its size model.

    Parameters
    ----------
    data : path
        Folder of images and labels, or an OME-Zarr with labels; see `training.pairs.read_pairs`.
    output : path
        Model file to write; its size model lies beside it, with ``_size.npy`` at the end. Give the file to ``--model``.
        One of full width (trained from ``cyto3`` and the like) loads in Cellpose 1-3 as well.
    start : str
        Model to begin with, by name or file: a residual U-Net.
    steps : int
        Batches of 12 views to learn from.
    rate : float
        Largest learning rate.
    seed : int
        The same seed gives the same model on the same machine.
    labels : str, optional
        Name of the labels in an OME-Zarr, if it has several.
    axes : str, optional
        Axes of images that do not say them.
    device : str
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    progress : callable or bool, optional
        Called with ``"train"``, steps done, steps in all; or whether to show them. Default: shown in a Jupyter
        notebook.
    **channels
        Which channels, as for `segment`: ``channel``, ``nuclear_channel``, ``combine``, ``stain``, ``chan``, ``chan2``.

    Returns
    -------
    TrainingReport

    Raises
    ------
    TiledsegError
        One sentence that says what is wrong, where, and what to do.

    Notes
    -----
    One image in five is held out, by a hash of its name, if there are at least five. All images are held in memory.
    It computes in bfloat16 where the CPU or GPU does, as the default model was trained, else in float32.
    What was learned so far lies in ``<output>.partial`` meanwhile, and can be given as `start`.
    """
    file = Path(output).absolute()
    _refuse(file, steps, rate, channels)
    model = find_model(start)
    if model.architecture != "unet":
        raise ModelError(f"model {start} is a transformer, which is not trained here; give a U-Net, such as cyto3.")
    survey = SurveyConfig(**channels)
    pairs = list(read_pairs(Path(data), survey, model.n_inputs, labels=labels, axes=axes))
    learned, held_out = _split(pairs, Path(data))
    network = unet_of(read_state(model.path), model.path)
    diameter = float(np.median([pair.diameter for pair in pairs]))
    network.diam_labels.data.fill_(diameter)
    where = resolve_device(device)
    if (device, where) == ("auto", "cpu"):
        logger.info("no GPU found: training runs on the CPU.")
    before = _precision(start, held_out, where)
    examples = [example_of(pair, model.diam_mean) for pair in learned]
    partial = file.with_name(f"{file.name}.partial")
    is_half = bool(computes_in_bfloat16(where))
    how: dict[str, Any] = {"steps": steps, "rate": rate, "seed": seed, "device": where, "bfloat16": is_half}
    losses = _fit(network, examples, partial, how, progress)
    size_file = _write(network, file, fit_size(network, examples, seed))
    partial.unlink(missing_ok=True)
    return TrainingReport(
        model=str(file),
        size_model=str(size_file),
        start=start,
        n_images=len(learned),
        n_held_out=len(held_out),
        n_objects=sum(int(pair.labels.max()) for pair in pairs),
        diameter=diameter,
        loss=float(np.mean(losses[-max(1, steps // 10) :])),
        ap_before=before,
        ap_after=_precision(str(file), held_out, where),
    )


def _refuse(file: Path, steps: int, rate: float, channels: dict[str, Any]) -> None:
    """Say what cannot be done before any image is read."""
    if steps < 1 or not 0 < rate < 1:
        raise SettingsError(f"steps must be at least 1 and rate between 0 and 1, not {steps} and {rate}.")
    foreign = sorted(set(channels) - CHANNEL_SETTINGS)
    if foreign:
        raise SettingsError(
            f"{', '.join(foreign)} cannot be given for training, only {', '.join(sorted(CHANNEL_SETTINGS))}; leave "
            f"{'it' if len(foreign) == 1 else 'them'} out."
        )
    if not file.parent.is_dir():
        raise OutputError(f"model file {file} lies in a folder that does not exist; choose another.")
    for written in (file, _size_file(file)):
        if written.exists():
            raise OutputError(f"model file {written} exists already; choose another.")


def _fit(
    network: ResidualUNet,
    examples: list[Example],
    partial: Path,
    how: dict[str, Any],
    progress: Listener | bool | None,
) -> list[float]:
    """Train a network, keeping what it has learned so far in a file; the loss of every step."""
    losses: list[float] = []
    with told(progress) as listener:

        def each_step(step: int, loss: float) -> None:
            losses.append(loss)
            if step % PARTIAL_EVERY == 0:
                torch.save(network.state_dict(), partial)
            if listener is not None:
                listener("train", step, how["steps"])

        try:
            fit_network(network, examples, **how, each_step=each_step)
        except KeyboardInterrupt:
            torch.save(network.state_dict(), partial)
            raise
    return losses


def _split(pairs: list[Pair], data: Path) -> tuple[list[Pair], list[Pair]]:
    """What to learn from, and what to hold out."""
    if not pairs:
        raise ImageError(f"no image of {data} has objects in its labels; give some to learn from.")
    held_out = [pair for pair in pairs if is_held_out(pair.name)]
    if len(pairs) < ENOUGH_TO_HOLD_OUT or len(held_out) in (0, len(pairs)):
        logger.info("%d images are too few to hold some out: the new model is not scored.", len(pairs))
        return pairs, []
    return [pair for pair in pairs if not is_held_out(pair.name)], held_out


def _size_file(file: Path) -> Path:
    """Where the size model of a model file lies."""
    return file.with_name(f"{file.name}_size.npy")


def _write(network: ResidualUNet, file: Path, size: Any) -> Path:
    """Write the model file and its size model, as Cellpose 1-3 writes them."""
    size_file = _size_file(file)
    values = {
        "A": np.array(size.A, np.float32),
        "smean": np.array(size.smean, np.float32),
        "diam_mean": size.diam_mean,
        "ymean": size.ymean,
    }
    try:
        torch.save(network.state_dict(), file)
        np.save(size_file, values, allow_pickle=True)  # type: ignore[arg-type]
    except OSError as error:
        raise OutputError(f"cannot write {file} ({error.strerror}); choose another folder.") from error
    return size_file


def _precision(model: str, pairs: list[Pair], device: str) -> tuple[float, ...] | None:
    """Mean average precision of a model on some images."""
    if not pairs:
        return None
    scores = []
    for pair in pairs:
        nuclear = 1 if len(pair.pixels) > 1 else None
        found = segment(
            pair.pixels, axes="cyx", channel=0, nuclear_channel=nuclear, model=model, device=device, progress=False
        )
        scores.append(compare(found.labels.compute(), pair.labels).overall.ap)
    return tuple(np.mean(scores, axis=0).round(4).tolist())
