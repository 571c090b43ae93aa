"""The demo, at a size that takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from tiledseg.cli import main
from tiledseg.demo import run_demo


def test_the_demo_scores_what_it_found(tmp_path: Path) -> None:
    lines: list[str] = []
    facts = run_demo(tmp_path / "demo", side=1300, say=lines.append)
    scores = facts["slide"]["scores"]
    assert scores["overall"]["ap"][0] >= 0.9
    assert scores["n_cut"] == 0
    assert scores["at_seams"]["n_truth"] > 20
    assert facts["slide"]["same_as_one_block"]
    assert facts["tissue"]["n_objects"] > 50
    assert "  the same as one block of 1300 px, bit for bit: yes" in lines
    for name, shape in (("tissue.png", (1024, 1024)), ("slide.png", (1300, 1300)), ("slide-detail.png", (1152, 1152))):
        picture = np.asarray(Image.open(tmp_path / "demo" / name))
        assert picture.shape[:2] == shape
        assert np.ptp(picture.astype(int).max(-1) - picture.min(-1)) > 0, "no coloured outlines"
    labels = zarr.open_array(tmp_path / "demo" / "slide.ome.zarr" / "labels" / "cells" / "0", mode="r")
    assert labels[:].max() == facts["slide"]["n_objects"]
    again = run_demo(tmp_path / "demo", side=600)
    assert again["slide"]["n_objects"] < facts["slide"]["n_objects"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "-o", str(tmp_path / "file" / "demo")]) == 2
    assert "choose another folder with -o" in capsys.readouterr().err
