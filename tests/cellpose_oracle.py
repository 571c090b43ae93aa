"""The default network through Cellpose's own functions, untiled and normalised as in a run of ours; its stitching."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tiledseg
from tiledseg.networks.models import find_model
from tiledseg.networks.runner import load_network

Labels = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]


class _Net:
    """Our network as Cellpose calls one."""

    def __init__(self) -> None:
        import torch

        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._network = load_network(find_model("tiledseg-nuclei"), "cpu")

    def eval(self) -> None:
        """Nothing to do."""

    def __call__(self, tiles: Any) -> tuple[Any, Any]:
        import torch

        output, _ = self._network.predict(tiles.numpy())
        output[:, :-1] *= 5
        return torch.from_numpy(output), torch.zeros((len(output), 256))


def _shown(image: npt.NDArray[Any], report: tiledseg.Report) -> Floats:
    """What the network is shown, channels last, the second empty."""
    assert report.percentiles is not None
    low, high = report.percentiles[0]
    values = (image.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.stack([values, np.zeros_like(values)], axis=-1)


def _scale(report: tiledseg.Report) -> float:
    assert report.diameter is not None
    return find_model("tiledseg-nuclei").diam_mean / report.diameter.value


def labels_3d(image: npt.NDArray[Any], report: tiledseg.Report, anisotropy: float = 1.0) -> Labels:
    """Cellpose's 3D labels of a volume, shape (z, y, x)."""
    core = pytest.importorskip("cellpose.core")
    dynamics = pytest.importorskip("cellpose.dynamics")
    transforms = pytest.importorskip("cellpose.transforms")
    import torch

    scale = _scale(report)
    shape = tuple(max(1, round(n * s)) for n, s in zip(image.shape, (scale * anisotropy, scale, scale), strict=True))
    resized = transforms.resize_image_3d(_shown(image, report), shape)
    output, _ = core.run_3D(_Net(), resized, bsize=find_model("tiledseg-nuclei").tile)
    full = transforms.resize_image_3d(output, image.shape)
    masks = dynamics.resize_and_compute_masks(
        np.ascontiguousarray(full[..., :-1].transpose(3, 0, 1, 2)),
        np.ascontiguousarray(full[..., -1]),
        niter=round(200 / scale),
        do_3D=True,
        device=torch.device("cpu"),
    )
    return np.asarray(masks).astype(np.uint32)


def stitched_planes(planes: npt.NDArray[Any], threshold: float) -> Labels:
    """What Cellpose makes of planes with labels of their own, shape (z, y, x)."""
    utils = pytest.importorskip("cellpose.utils")
    from_one = np.stack(
        [np.unique(np.append(0, plane), return_inverse=True)[1][1:].reshape(plane.shape) for plane in planes]
    )
    stitched = utils.stitch3D(from_one.astype(np.uint32), stitch_threshold=threshold)
    return np.asarray(utils.fill_holes_and_remove_small_masks(stitched, min_size=15)).astype(np.uint32)


def matched_share(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], iou: float) -> float:
    """Of the objects of the one that has more, how many are matched at an IoU."""
    score = tiledseg.compare(np.asarray(ours), theirs, thresholds=(iou,)).overall
    return score.n_true_positive[0] / max(score.n_truth, score.n_predicted)
