"""Every command of the README runs: here on small data of the same names, or in the test that is named for it.

A new command is run by itself in a folder that holds the files of `workspace`. What cannot be run so (a bucket, a batch
system, a thousand steps of training) is a line in `ELSEWHERE`, with the test that runs it or its like.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import io
import json
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.ndimage
import tifffile

import tiledseg
from tiledseg.cli import main
from tiledseg.cli.parser import EXPORTS, make_parser
from tiledseg.networks.models import find_model
from tiledseg.omezarr import open_labels, write_image
from tiledseg.slides import synthetic_slide

from .test_formats import write_svs

HOME = Path(__file__).parents[1]
README = (HOME / "README.md").read_text(encoding="utf-8")

PROGRAMS = ("tiledseg ", "python ", "pytest", "pip ", "napari ", "jupyter ", "ssh ", "apt ")
"""A block of code that begins with one of these holds commands, and so does text in backticks."""
PRINTED = ("objects      6,798",)
"""First lines of blocks that show what is printed."""

ELSEWHERE = {
    "tiledseg demo": "test_demo.py::test_the_demo_scores_what_it_found",
    "tiledseg segment s3://bucket/slide.ome.zarr": "test_remote.py::test_labels_and_table_go_into_the_image",
    "tiledseg segment https://host/slide.ome.zarr -o s3://bucket/out.ome.zarr": (
        "test_remote.py::test_labels_and_table_go_into_the_image"
    ),
    "tiledseg cluster slurm -c cluster.toml -- segment slide.ome.zarr -o out.ome.zarr": (
        "test_slurm.py::test_jobs_are_cancelled_and_the_labels_are_those_of_a_local_run"
    ),
    "tiledseg train FOLDER -o mymodel --from cyto3": (
        "test_training.py::test_it_learns_and_the_file_is_a_model"  # cyto3 itself is not here
    ),
    "tiledseg view out.ome.zarr": (
        "test_view.py::test_the_command_prints_the_address_and_serves_until_it_is_interrupted"
    ),
    "tiledseg view out.ome.zarr --image slide.tif": "test_view.py::test_labels_of_any_file_lie_over_an_image",
    "tiledseg view out.ome.zarr --napari": "test_viewers.py::test_napari_shows_labels_over_the_image",
    "napari slide.tif": "test_napari_widget.py::test_image_on_disk_is_segmented_beside_it",
    "tiledseg view out.ome.zarr --port 8765": (
        "test_view.py::test_it_listens_on_loopback_only_and_on_the_port_that_was_asked_for"
    ),
}
"""Commands that another test runs, or the same on other data."""

SMALLER = {"z=100:160,y=500:1500,x=500:1500": "z=:6,y=1:64,x=:70", "PREDICTED": "a.ome.zarr", "TRUTH": "labels.tif"}
SMALLER |= {"y=1000:1400,x=2000:2400": "y=10:90,x=20:120", "y=1000:2000,x=2000:3000": "y=:200,x=:220"}
"""Words of commands and code, and what stands for them in the small data."""

OTHERS = {
    "--resources": "dask worker",
    "--nthreads": "dask worker",
    "--slow": "pytest",
    "--nbmake": "pytest",
    "--help": "every command",
}
"""Options that are not ours, and whose they are."""


def blocks() -> Iterator[tuple[str, list[str]]]:
    """Blocks of code: the language of a fenced one, else nothing, and the lines."""
    for fence in re.finditer(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        yield fence[1], fence[2].splitlines()
    plain = re.sub(r"^```\w*\n.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    for block in re.finditer(r"(?:^    .*\n)+", plain, re.MULTILINE):
        yield "", [line[4:] for line in block[0].splitlines()]


def without_comment(line: str) -> str:
    return re.sub(r"\s+#.*$", "", line).strip()


def commands() -> list[str]:
    """All commands, of blocks and in backticks, each once."""
    found: list[str] = []
    for language, lines in blocks():
        if language in ("", "bash", "sh", "console") and lines[0].startswith(PROGRAMS):
            for line in lines:
                found += [part.strip() for part in without_comment(line).split("&&")]
    found += [text for text in re.findall(r"`([^`\n]+)`", README) if text.startswith(PROGRAMS)]
    return sorted(set(found))


def python_blocks() -> list[str]:
    return ["\n".join(lines) + "\n" for language, lines in blocks() if language == "python"]


@functools.cache
def defined_in(file: str) -> frozenset[str]:
    """Functions that a file of tests defines."""
    tree = ast.parse((HOME / "tests" / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def is_run(command: str) -> bool:
    """Whether a command is run here."""
    words = shlex.split(command)
    return words[0] == "tiledseg" and len(words) > 2 and command not in ELSEWHERE and words[-1] != "--help"


def test_every_block_of_code_is_known() -> None:
    for language, lines in blocks():
        assert language in ("", "python", "bash", "sh", "console", "toml", "json"), language
        if language == "":
            assert lines[0].startswith((*PROGRAMS, *PRINTED)), f"neither commands nor what is printed: {lines[0]}"
            if lines[0].startswith(PROGRAMS):
                assert all(line.startswith(PROGRAMS) for line in lines), lines


def test_commands_are_found() -> None:
    found = commands()
    assert len(found) > 25
    assert "tiledseg segment slide.tif -o out.ome.zarr --channel DAPI --diameter 12um" in found
    assert "tiledseg demo" in found
    assert len(python_blocks()) >= 2


@pytest.mark.parametrize("command", [command for command in commands() if not is_run(command)])
def test_what_is_not_run_here_is_run_by_another_test(command: str) -> None:
    words = shlex.split(command)
    if command in ELSEWHERE:
        file, _, name = ELSEWHERE[command].partition("::")
        assert name in defined_in(file)
    elif "install" in words:
        # CI begins with this very installation, and the extras are known.
        assert words[-2:] == ["-e", words[-1]]
        extras = set(re.findall(r"\[(.*)\]", words[-1]))
        known = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {extra for listed in extras for extra in listed.split(",")} <= set(known)
        assert 'python -m pip install --quiet -e ".[test]"' in (HOME / ".ci" / "run").read_text()
    elif words[0] == "pytest":
        assert all((HOME / word).exists() for word in words[1:] if not word.startswith("-"))
    elif words[0] == "python":
        script = Path(words[1])
        assert (HOME / script).is_file()
        tests = [path.read_text(encoding="utf-8") for path in (HOME / "tests").glob("test_*.py")]
        assert any("bench" in text and re.search(rf'"{script.stem}(\.py)?"', text) for text in tests)
    else:
        assert words[0] == "tiledseg", f"no test runs {command!r}: see ELSEWHERE"
        assert words[1] in subcommands(), command
        if len(words) == 2:
            is_tested = any(f'"{words[1]}"' in path.read_text() for path in (HOME / "tests").glob("test_*.py"))
            assert is_tested, f"no test runs {command!r}"


def test_nothing_in_the_tables_is_left_over() -> None:
    assert set(ELSEWHERE) <= set(commands())
    assert set(OTHERS) <= set(re.findall(r"--[a-z0-9-]+", README))
    assert all(any(word in code for code in (*commands(), *python_blocks())) for word in SMALLER)


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    actions = make_parser()._subparsers
    assert actions is not None
    choices: Any = actions._group_actions[0].choices
    return dict(choices)


def test_every_option_that_is_named_is_one() -> None:
    options = {
        option for parser in subcommands().values() for action in parser._actions for option in action.option_strings
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README))
    assert named - options - set(OTHERS) == set()


def test_every_command_that_is_there_is_named() -> None:
    named = {words[1] for words in map(shlex.split, commands()) if words[0] == "tiledseg"}
    assert set(subcommands()) <= named


# Running them.


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data under the names that the README uses."""
    folder = tmp_path_factory.mktemp("readme")
    image, truth = synthetic_slide((210, 230), diameter=20.0, seed=1)
    um = {"spacing_um": (0.5, 0.5)}
    write_image(folder / "slide.ome.zarr", image, axes="yx", chunk=128, **um)
    channels = np.stack([image[::-1], image])
    metadata = {
        "axes": "CYX",
        "Channel": {"Name": ["GFP", "DAPI"]},
        **{f"PhysicalSize{axis}{unit}": value for axis in "XY" for unit, value in (("", 0.5), ("Unit", "µm"))},
    }
    tifffile.imwrite(folder / "slide.tif", channels, ome=True, metadata=metadata, tile=(64, 64))
    tifffile.imwrite(folder / "image.tif", image, tile=(64, 64))
    write_svs(folder / "slide.svs", np.repeat((image / image.max() * 255).astype(np.uint8)[..., None], 3, axis=2))
    with h5py.File(folder / "images.h5", "w") as file:
        file["raw"] = image[None].repeat(2, axis=0)
    (folder / "planes").mkdir()
    for t, z in np.ndindex(2, 2):
        tifffile.imwrite(folder / "planes" / f"t{t}_z{z}.tif", image[:60, :70])
    for name in ("labels.tif", "cells.tif"):
        tifffile.imwrite(folder / name, truth, tile=(64, 64))
    # Large cells make few planes on the network's grid.
    cells = synthetic_slide((64, 70), diameter=36.0, seed=1, density=1.0)[0]
    planes = np.stack([cells * share for share in (0.7, 0.9, 1, 1, 0.9, 0.7)]).astype(np.uint16)
    for name, axes, pixels in (("embryo", "zyx", planes), ("stack", "zyx", planes[:3]), ("series", "tyx", planes[:2])):
        write_image(folder / f"{name}.ome.zarr", pixels, axes=axes, chunk=64)
    for name in ("a", "b", "out"):
        tiledseg.segment(image, folder / f"{name}.ome.zarr", axes="yx", diameter=20.0)
    shutil.copy(HOME / "notebooks" / "cluster" / "slurm.toml", folder / "cluster.toml")
    weights = Path(find_model("tiledseg-nuclei").path)
    shutil.copy(weights, folder / "mymodel")
    for size in weights.parent.glob(f"{weights.name.partition('.')[0]}*size*.npy"):
        shutil.copy(size, folder / "mymodel_size.npy")
    return folder


@pytest.fixture
def here(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the small data, as the present folder."""
    folder = tmp_path / "work"
    shutil.copytree(workspace, folder)
    monkeypatch.chdir(folder)
    return folder


def has_labels(folder: Path, options: argparse.Namespace) -> None:
    """A run made labels, a table and a report."""
    root = folder / (options.output or options.image)
    assert open_labels(root)[:].max() > 0
    assert (root / "tables" / "cells" / "report.html").is_file()


def has_page(folder: Path, options: argparse.Namespace) -> None:
    """A check left its page."""
    page = options.output or f"{options.result}/tables/cells/qc.html"
    assert "<svg" in (folder / page).read_text(encoding="utf-8")


def has_image(folder: Path, options: argparse.Namespace) -> None:
    """A conversion made an image."""
    assert tiledseg.open_image(folder / options.output).ome_version == "0.5"


def has_exports(folder: Path, options: argparse.Namespace) -> None:
    """What was asked for is there."""
    wanted = [getattr(options, kind) for kind in EXPORTS]
    assert all((folder / place).exists() for place in wanted if place is not None)


CHECKS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "segment": has_labels,
    "qc": has_page,
    "convert": has_image,
    "export": has_exports,
}
"""What a command leaves, beside exit code 0."""


@pytest.mark.parametrize("command", [command for command in commands() if is_run(command)])
def test_the_command_runs(command: str, here: Path) -> None:
    for word, smaller in SMALLER.items():
        command = command.replace(word, smaller)
    words = shlex.split(command)[1:]
    options = make_parser().parse_args(words)
    made = options.output if words[0] in ("segment", "convert") else None
    if made is not None:
        for left in here.glob(f"{made}*"):  # there for commands that need it
            shutil.rmtree(left)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(words) == 0
    assert printed.getvalue().strip()
    if words[0] in CHECKS:
        CHECKS[words[0]](here, options)


@pytest.mark.parametrize("code", python_blocks(), ids=lambda code: code.splitlines()[0])
def test_the_python_runs(code: str, here: Path) -> None:
    for left in here.glob("out.ome.zarr*"):
        shutil.rmtree(left)
    for word, smaller in SMALLER.items():
        code = code.replace(word, smaller)
    path = here / "example.py"
    path.write_text(code, encoding="utf-8")
    given = {"truth": tifffile.imread("labels.tif"), "scipy": scipy, "tiledseg": tiledseg}
    names = runpy.run_path(str(path), given)
    result = names.get("result")
    if isinstance(result, tiledseg.Segmentation):
        assert result.report.n_objects > 0
        assert json.dumps(dataclasses.asdict(result.report), default=str)
