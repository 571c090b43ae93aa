"""Models by name and by file: what Cellpose 3 makes of the same files, size models, and the store they come from."""

from __future__ import annotations

import dataclasses
import http.server
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tiledseg import survey
from tiledseg.cli import main
from tiledseg.cluster import connect
from tiledseg.config import Settings
from tiledseg.errors import ModelError
from tiledseg.images import open_image
from tiledseg.inputs import inputs_of
from tiledseg.job import Job
from tiledseg.networks import fetch
from tiledseg.networks.models import KNOWN_MODELS, find_model, list_models
from tiledseg.networks.runner import Network
from tiledseg.networks.size import read_size_model
from tiledseg.networks.unet import ResidualUNet
from tiledseg.progress import Progress
from tiledseg.store import MemoryStore
from tiledseg.working import read_tile

REFERENCE = Path(__file__).parent / "cellpose3_reference.py"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files made by cellpose 3.1.1.3, and its answers."""
    python = os.environ.get("TILEDSEG_CELLPOSE3")
    if not python:
        pytest.skip("TILEDSEG_CELLPOSE3 does not name the interpreter of an environment with cellpose 3.1.1.3")
    folder = tmp_path_factory.mktemp("cellpose3")
    subprocess.run([python, REFERENCE, folder], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", ["random", "trained"])
def test_a_network_of_cellpose_3_gives_what_it_gives_there(reference: Path, name: str) -> None:
    model = find_model(str(reference / name))
    expected = np.load(reference / f"{name}.npz")
    output, style = Network(model, "cpu").predict(expected["tiles"])
    assert len(output) == 20
    output[:, :-1] *= 5  # ours are in unit length
    scale = np.abs(expected["output"]).max()
    np.testing.assert_allclose(output / scale, expected["output"] / scale, rtol=0, atol=1e-4)
    np.testing.assert_allclose(style, expected["style"], rtol=0, atol=1e-4)


def test_a_size_model_of_cellpose_3_gives_the_diameters_it_gives_there(reference: Path) -> None:
    size = find_model(str(reference / "trained")).size
    expected = np.load(reference / "trained.npz")
    assert size is not None
    found = [size.diameter(style) for style in expected["style"]]
    np.testing.assert_allclose(found, expected["diameters"], rtol=1e-3)
    assert np.ptp(found) > 0.01


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize(("chan", "chan2"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_channels_by_number_are_shown_as_cellpose_3_does(reference: Path, chan: int, chan2: int, invert: bool) -> None:
    expected = np.load(reference / "inputs.npz")
    colours, pair = expected["colours"], expected[f"{chan}-{chan2}-{invert}"]
    image = open_image(colours, axes="yxc")
    settings = Settings.of(model=str(reference / "random"), chan=chan, chan2=chan2, invert=invert, diameter=30.0)
    model = find_model(settings.flows.model)
    inputs = inputs_of(image, settings.survey, model.n_inputs, "model")
    with connect(small=True) as executor:
        job = Job(image, inputs, settings, model, "cpu", MemoryStore())
        job = dataclasses.replace(job, surveyed=survey.run(job, executor, Progress(None)))
    region = tuple(slice(0, n) for n in job.working(0).shape)
    values = read_tile(image, job.shown(0), job.working(0), (), region)
    assert len(values) == (2 if chan2 else 1)
    for found, theirs in zip(values, pair, strict=False):
        np.testing.assert_allclose(found, theirs, atol=1e-5)
    if not chan2 and not invert:
        assert not pair[1].any()


def size_file(path: Path, **changes: object) -> Path:
    """A size model as Cellpose 3 saves it."""
    values = {"A": np.array([0.5, -1.0]), "smean": np.array([0.1, 0.2]), "diam_mean": 17.0, "ymean": np.float64(0.3)}
    np.save(path, {**values, **changes}, allow_pickle=True)
    return path


def test_a_size_model_is_read(tmp_path: Path) -> None:
    size = read_size_model(size_file(tmp_path / "size.npy"))
    assert size.A == (0.5, -1.0)
    assert size.smean == (0.1, 0.2)
    assert (size.diam_mean, size.ymean) == (17.0, 0.3)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("where", ["A", "hidden"])
def test_a_size_model_cannot_run_code(tmp_path: Path, where: str) -> None:
    path = size_file(tmp_path / "evil.npy", **{where: Evil(tmp_path / "touched")})
    with pytest.raises(ModelError, match=r"evil\.npy cannot be read \(it asks for"):
        read_size_model(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x09\x00v\x00{}",
        pickle.dumps({"A": 1.0}),
    ],
)
def test_bytes_that_are_no_size_model_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "size.npy").write_bytes(content)
    with pytest.raises(ModelError, match=r"size\.npy cannot be read"):
        read_size_model(tmp_path / "size.npy")


def test_a_damaged_size_model_is_refused_at_every_byte(tmp_path: Path) -> None:
    """Whatever byte is changed, the file is read or refused; nothing else comes out."""
    content = size_file(tmp_path / "size.npy").read_bytes()
    outcomes = set()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        (tmp_path / "damaged.npy").write_bytes(bytes(damaged))
        try:
            read_size_model(tmp_path / "damaged.npy")
            outcomes.add("read")
        except ModelError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_size_model_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="3 weights for a mean style of 2"):
        read_size_model(size_file(tmp_path / "size.npy", A=np.zeros(3)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of models."""
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path / "models"))
    for variable in ("CELLPOSE3_MODELS_URL", "CELLPOSE4_MODELS_URL"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "models"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a server on this machine offers as Cellpose's store."""
    path = tmp_path / "store"
    path.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("CELLPOSE3_MODELS_URL", f"http://127.0.0.1:{server.server_port}/models")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield path / "models"
        server.shutdown()


def test_a_named_model_is_fetched_once_with_its_size_model(folder: Path, store: Path) -> None:
    store.mkdir()
    torch.save(ResidualUNet(diam_mean=17.0).state_dict(), store / "nucleitorch_0")
    size_file(store / "size_nucleitorch_0.npy")
    model = find_model("nuclei")
    assert model.path == (folder / "nucleitorch_0").resolve()
    assert model.diam_mean == 17.0
    assert model.size is not None
    (store / "nucleitorch_0").unlink()
    assert find_model("nuclei") == model


def test_a_model_that_the_store_lacks_is_one_sentence(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "RETRIES", 1)
    store.mkdir()
    with pytest.raises(ModelError, match=r"cyto3 could not be fetched .* or put the file into"):
        find_model("cyto3")
    assert not list(folder.glob("cyto3*"))


def test_without_a_store_it_says_where_the_file_belongs(folder: Path) -> None:
    with pytest.raises(ModelError, match="CELLPOSE3_MODELS_URL") as error:
        find_model("cyto2")
    assert str(folder) in str(error.value)
    assert "cyto2torch_0" in str(error.value)


def test_models_are_listed_with_licence_and_whether_they_are_here(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir()
    (folder / "cyto3").touch()
    listed = {model["name"]: model for model in list_models()}
    assert listed.keys() == KNOWN_MODELS.keys()
    assert [name for name, model in listed.items() if model["is_here"]] == ["tiledseg-nuclei", "cyto3"]
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    for name, model in listed.items():
        assert name in printed
        assert model["licence"] in printed


def test_output_that_nobody_reads_to_its_end_is_no_error() -> None:
    command = [sys.executable, "-m", "tiledseg.cli", "models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
