"""Fixtures shared by the tests: a small slide with known truth, and real data where it is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings

from tiledseg.networks import models
from tiledseg.slides import synthetic_slide

# Shared machines are noisy: a slow example is not a failure.
settings.register_profile("tiledseg", deadline=None)
settings.load_profile("tiledseg")

Slide = tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option for what takes minutes."""
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes or gigabytes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is slow unless it is asked for."""
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session")
def slide() -> Slide:
    """Picture and truth of 700 x 610 px with touching nuclei of 24 px."""
    return synthetic_slide((700, 610), diameter=24.0, seed=3)


@pytest.fixture
def data() -> Path:
    """Folder of the real data sets."""
    folder = os.environ.get("TILEDSEG_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TILEDSEG_DATA does not name a folder")
    return Path(folder)


@pytest.fixture(scope="module")
def small_tiles() -> Iterator[int]:
    """Networks with tiles of 96 px for a module: planes that are smaller than a tile take a fifth of the time."""
    side = 96
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.ARCHITECTURES, "unet", dataclasses.replace(models.ARCHITECTURES["unet"], tile=side))
        models._describe.cache_clear()
        yield side
    models._describe.cache_clear()


@pytest.fixture(scope="session")
def client() -> Any:
    """A Dask client of two worker processes with one thread each."""
    import logging

    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client
