"""The notebooks as they are kept: run, readable on their own, small, and free of where they were run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 400_000

# What tells of a machine: folders of users and of temporary files, and addresses but loopback.
MACHINE = re.compile(
    r"(?<![\w.])/(?:home|Users|root|tmp|work|var|private|opt|usr|mnt|data)/|[A-Z]:\\\\|https?://(?!127\.0\.0\.1)"
)


@pytest.fixture(params=NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def notebook(request):
    return request.param, nbformat.read(request.param, as_version=4)


def texts(output):
    """What is read of an output; pictures are not."""
    yield output.get("text", "")
    for kind, content in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", content)


def test_there_are_notebooks():
    names = {path.stem for path in NOTEBOOKS}
    assert {"quickstart", "whole_slide", "volume", "own_model", "cluster", "reading_results"} <= names


def test_every_cell_was_run_in_order_and_none_failed(notebook):
    _, content = notebook
    nbformat.validate(content)
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    assert kinds & {"display_data", "execute_result"}


def test_it_shows_pictures_and_explains_itself(notebook):
    _, content = notebook
    kinds = [kind for cell in content.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert "image/png" in kinds or "image/jpeg" in kinds
    assert "application/vnd.jupyter.widget-view+json" not in kinds
    prose = [cell.source for cell in content.cells if cell.cell_type == "markdown"]
    assert prose[0].startswith("# ")
    assert len(prose) >= 4


def test_it_is_small(notebook):
    path, _ = notebook
    assert path.stat().st_size < MOST_BYTES


def test_it_does_not_tell_where_it_was_run(notebook):
    _, content = notebook
    shown = [text for cell in content.cells for output in cell.get("outputs", []) for text in texts(output)]
    assert shown
    found = [
        match.group() for text in [*shown, *(cell.source for cell in content.cells)] for match in MACHINE.finditer(text)
    ]
    assert found == []


def test_progress_ends_as_text(notebook):
    """No bar is left at a part of what it counts."""
    _, content = notebook
    for cell in content.cells:
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/plain", "")
            assert not re.match(r"(survey|flows|masks|train) \d", text), text
