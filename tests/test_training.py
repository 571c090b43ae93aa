"""Training on users' images: what is read, what is written, and that something is learned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import tiledseg
from tiledseg.cli import main
from tiledseg.config import SurveyConfig
from tiledseg.errors import ImageError, ModelError, OutputError, SettingsError, TiledsegError
from tiledseg.networks.models import find_model
from tiledseg.networks.unet import ResidualUNet
from tiledseg.omezarr import write_image
from tiledseg.training.pairs import is_held_out, read_pairs
from tiledseg.training.views import example_of, geometry

DIAMETER = 30


def rings(seed: int, side: int = 256) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Cells of which only the membrane is stained: bright rings, dark within, that touch each other."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.uint16)
    light = np.zeros((side, side))
    places = rng.permutation([(a, b) for a in range(18, side - 10, 32) for b in range(18, side - 10, 32)])
    for label, (cy, cx) in enumerate(places + rng.integers(-2, 3, places.shape), 1):
        distance = np.hypot(y - cy, x - cx)
        labels[(distance < DIAMETER / 2) & (labels == 0)] = label
        light += np.exp(-((distance - DIAMETER / 2 + 2) ** 2) / 4)
    picture = rng.poisson(1000 * gaussian_filter(light, 0.7) + 200)
    return picture.astype(np.uint16), labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images with labels, as Cellpose wants them."""
    path = tmp_path_factory.mktemp("rings")
    for seed in range(6):
        picture, labels = rings(seed)
        tifffile.imwrite(path / f"cells{seed}.tif", picture, metadata={"axes": "YX"})
        tifffile.imwrite(path / f"cells{seed}_masks.tif", labels, metadata={"axes": "YX"})
    return path


def pairs_of(path: Path, n_inputs: int = 1, labels: str | None = None, **channels: Any) -> list[Any]:
    return list(read_pairs(path, SurveyConfig(**channels), n_inputs, labels=labels))


def test_a_folder_as_cellpose_has_it_is_read(folder: Path) -> None:
    pairs = pairs_of(folder)
    assert [pair.name for pair in pairs] == [f"cells{i}" for i in range(6)]
    for pair in pairs:
        picture, labels = rings(int(pair.name[-1]))
        low, high = np.percentile(picture, [1, 99])
        np.testing.assert_allclose(pair.pixels[0], (picture - low) / (high - low), atol=1e-3)
        assert np.array_equal(pair.labels > 0, labels > 0)
        assert pair.diameter == pytest.approx(DIAMETER, rel=0.1)


@pytest.mark.parametrize("name", ["labels", "masks"])
def test_two_folders_of_png_are_read(tmp_path: Path, name: str) -> None:
    picture, labels = rings(0)
    for sub in ("images", name):
        (tmp_path / sub).mkdir()
    colours = np.stack([np.zeros_like(picture), picture, picture], axis=-1)
    Image.fromarray((colours // 16).astype(np.uint8)).save(tmp_path / "images" / "a.png")
    indexed = Image.fromarray(labels.astype(np.uint8))
    indexed.putpalette(np.random.default_rng(0).integers(0, 255, 768).tolist())
    indexed.save(tmp_path / name / "a.png")
    (pair,) = pairs_of(tmp_path, channel=1)
    assert pair.labels.max() == len(np.unique(labels)) - 1
    first, second = pairs_of(tmp_path, n_inputs=2, chan=2, chan2=1)[0].pixels
    assert np.array_equal(first, pair.pixels[0])
    assert not second.any()


def test_windows_of_an_ome_zarr_are_read(tmp_path: Path) -> None:
    picture, labels = (np.tile(part, (3, 3)) for part in rings(0))
    labels = labels.copy()
    labels[:512, :512] = 0
    path = tmp_path / "slide.ome.zarr"
    write_image(path, picture, axes="yx")
    tiledseg.segment(path, segmenter=lambda _: labels, halo=0, name="drawn")
    assert len(pairs_of(path)) == 3
    tiledseg.segment(path, segmenter=lambda _: (labels > 0).astype(np.uint8), halo=0, name="other")
    with pytest.raises(ImageError, match="give one"):
        pairs_of(path)
    pairs = pairs_of(path, labels="drawn")
    assert sorted(pair.name for pair in pairs) == ["0-512", "512-0", "512-512"]
    assert len({pair.diameter for pair in pairs}) == 1
    for pair in pairs:
        y, x = (int(start) for start in pair.name.split("-"))
        window = np.s_[y : y + 512, x : x + 512]
        assert np.array_equal(pair.labels > 0, labels[window] > 0)
        assert pair.labels.max() == len(np.unique(labels[window])) - 1
        assert np.corrcoef(pair.pixels[0].ravel(), picture[window].ravel())[0, 1] > 0.9999


def test_large_cells_are_reduced_without_a_shift() -> None:
    """The centre of mass of an example's mask lies where that of its picture lies, whatever the factor."""
    for diameter in (30, 40, 55, 75, 110):
        y, x = np.mgrid[:400, :400]
        inside = np.hypot(y - 200.0, x - 190.0) < diameter / 2
        pair = pairs_like(inside.astype(np.float32), inside.astype(np.int32), diameter)
        example = example_of(pair, 17.0)
        assert example.diameter <= 34
        picture, mask = example.fields[0].numpy(), example.fields[-1].numpy()
        where = np.indices(mask.shape)
        for axis in (0, 1):
            middles = [(where[axis] * field).sum() / field.sum() for field in (picture, mask)]
            assert middles[0] == pytest.approx(middles[1], abs=0.2)


def pairs_like(pixels: Any, labels: Any, diameter: float) -> Any:
    from tiledseg.training.pairs import Pair

    return Pair("x", pixels[None], labels, float(diameter))


def test_views_turn_the_flow_with_the_picture() -> None:
    """In every view the flow points to the middle of the only cell."""
    y, x = np.mgrid[:120, :120]
    inside = np.hypot(y - 60.0, x - 60.0) < 17
    example = example_of(pairs_like(inside.astype(np.float32), inside.astype(np.int32), 34.0), 17.0)
    rng = np.random.default_rng(0)
    for _ in range(8):
        fields = geometry(example, rng, 1.0, 96).numpy()
        mask = fields[-1] > 0
        where = np.indices(mask.shape)
        middle = [(where[axis] * mask).sum() / mask.sum() for axis in (0, 1)]
        inward = np.stack([m - where[axis] for axis, m in enumerate(middle)])
        far = mask & (np.hypot(*inward) > 4)
        cosine = (fields[1:3] * inward).sum(axis=0)[far] / np.hypot(*inward)[far]
        assert cosine.min() > 0.8


@pytest.mark.slow
def test_it_learns_and_the_file_is_a_model(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert {is_held_out(f"cells{i}") for i in range(6)} == {True, False}
    file = tmp_path / "rings"
    assert main(["train", str(folder), "-o", str(file), "--steps", "40", "--rate", "0.001"]) == 0
    told = capsys.readouterr().out
    assert "learned from" in told
    model = find_model(str(file))
    assert (model.architecture, model.diam_mean) == ("unet", 17.0)
    assert model.size is not None
    assert not list(tmp_path.glob("*.partial"))
    picture, labels = rings(99)
    before, after = (
        tiledseg.compare(tiledseg.segment(picture, diameter=DIAMETER, model=name).labels.compute(), labels).overall.ap
        for name in ("tiledseg-nuclei", str(file))
    )
    assert after[0] > 0.9
    assert after[1] > before[1] + 0.3


@pytest.mark.slow
def test_what_an_interrupted_training_learned_can_be_gone_on_from(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "model"
    command = ["train", str(folder), "-o", str(file), "--steps", "100000"]
    code = f"import sys; from tiledseg.cli import main; sys.exit(main({command!r}))"
    # A shell that runs the tests in the background has its children ignore the signal.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, preexec_fn=heed) as running:
        told = b""
        while b"train" not in told or b" 2/" not in told:
            told += running.stderr.read(1)  # type: ignore[union-attr]
        running.send_signal(signal.SIGINT)
        told += running.stderr.read()  # type: ignore[union-attr]
    assert running.returncode == 130
    assert b"interrupted; give the .partial beside the model file to --from" in told
    assert not file.exists()
    report = tiledseg.train(folder, file, start=f"{file}.partial", steps=1)
    assert report.start == f"{file}.partial"
    assert not Path(f"{file}.partial").exists()


@pytest.mark.slow
def test_the_report_scores_both_models_and_the_same_seed_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    reports = [tiledseg.train(folder, tmp_path / name, steps=3, seed=5) for name in ("a", "b")]
    states = [torch.load(tmp_path / name, weights_only=True) for name in ("a", "b")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert reports[0].n_images + reports[0].n_held_out == 6
    assert reports[0].ap_before is not None
    assert reports[0].ap_after is not None
    assert reports[0].ap_before == reports[1].ap_before


def test_a_wide_file_loads_in_cellpose_3(tmp_path: Path, folder: Path) -> None:
    python = os.environ.get("TILEDSEG_CELLPOSE3")
    if not python:
        pytest.skip("TILEDSEG_CELLPOSE3 does not name the interpreter of an environment with cellpose 3.1.1.3")
    torch.manual_seed(0)
    torch.save(ResidualUNet().state_dict(), tmp_path / "start")
    tiledseg.train(folder, tmp_path / "wide", start=str(tmp_path / "start"), steps=1)
    asked = (
        "import sys, numpy as np; from cellpose import models;"
        "net = models.CellposeModel(gpu=False, pretrained_model=sys.argv[1]);"
        "size = models.SizeModel(net, pretrained_size=sys.argv[1] + '_size.npy');"
        "style = np.random.default_rng(0).normal(size=256);"
        "print(net.diam_mean, net.diam_labels, size._size_estimation(style))"
    )
    done = subprocess.run([python, "-c", asked, tmp_path / "wide"], check=True, capture_output=True, text=True)
    diam_mean, diam_labels, theirs = (float(word) for word in done.stdout.split()[-3:])
    assert diam_mean == 30
    assert diam_labels == pytest.approx(DIAMETER, rel=0.1)
    size = find_model(str(tmp_path / "wide")).size
    assert size is not None
    assert size.diameter(np.random.default_rng(0).normal(size=256)) == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, SettingsError, "steps must be at least 1"),
        ({"rate": 2.0}, SettingsError, "rate between 0 and 1"),
        ({"start": "no-such-model"}, ModelError, "unknown model"),
        ({"nuclear_channel": 1}, SettingsError, "takes a single channel"),
        ({"invert": True, "normalize": "local"}, SettingsError, "invert, normalize cannot be given for training"),
        ({"output": "missing/model"}, OutputError, "folder that does not exist"),
        ({"output": "cells0.tif"}, OutputError, "exists already"),
    ],
)
def test_bad_input_is_refused_before_anything_is_learned(
    folder: Path, settings: dict[str, Any], error: type[TiledsegError], message: str
) -> None:
    output = folder / settings.pop("output", "model")
    with pytest.raises(error, match=message):
        tiledseg.train(folder, output, **settings)
    assert not (folder / "model").exists()


def test_data_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no images with labels"):
        pairs_of(tmp_path)
    with pytest.raises(ImageError, match="is no folder"):
        pairs_of(tmp_path / "nothing")
    picture, labels = rings(0)
    tifffile.imwrite(tmp_path / "a.tif", picture)
    tifffile.imwrite(tmp_path / "a_masks.tif", labels[:100])
    with pytest.raises(ImageError, match="have shape"):
        pairs_of(tmp_path)
    tifffile.imwrite(tmp_path / "a_masks.tif", picture.astype(np.float32))
    with pytest.raises(ImageError, match="holds no labels"):
        pairs_of(tmp_path)
    tifffile.imwrite(tmp_path / "a_masks.tif", np.zeros_like(labels))
    with pytest.raises(ImageError, match="no image of"):
        tiledseg.train(tmp_path, tmp_path / "model")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "b_masks.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="no readable PNG"):
        pairs_of(tmp_path)
