#!/usr/bin/env python
"""Run the notebooks and save them with their outputs, as they are kept: ``python scripts/notebooks.py [NOTEBOOK ...]``.

What needs a running kernel is left out of what is saved: a slider without one shows an error in place of its picture.
Nor is any real data kept: TILEDSEG_DATA is not passed on.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"


def save(path: Path) -> float:
    """Run one notebook in its folder and write it back; seconds it took."""
    began = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        record_timing=False,
    )
    client.execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
    nbformat.write(notebook, path)
    return time.perf_counter() - began


if __name__ == "__main__":
    os.environ.pop("TILEDSEG_DATA", None)
    for name in sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb"))):
        print(f"{Path(name).name:24} {save(Path(name)):6.1f} s {Path(name).stat().st_size / 1000:6.0f} kB", flush=True)
