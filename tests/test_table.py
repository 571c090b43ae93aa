"""The object table, put together batch after batch of ids."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest

from tiledseg import table
from tiledseg.config import Settings
from tiledseg.images import open_image
from tiledseg.inputs import Input
from tiledseg.job import Job
from tiledseg.networks.models import find_model
from tiledseg.omezarr import create_labels, plan_labels, write_image
from tiledseg.store import DiskStore

SIDE = 2048
N_REGIONS = 4
WIDTH = 18


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A run whose labels are published, but for the table: four regions, two channels, 0.5 µm pixels."""
    path = tmp_path / "image.ome.zarr"
    flat = np.zeros((2, 2 * SIDE, 2 * SIDE), np.uint8)
    write_image(path, flat, axes="cyx", channels=["a", "b"], spacing_um=(0.5, 0.5))
    settings, image = Settings.of(), dataclasses.replace(open_image(path), dtype=np.dtype(np.float32))
    plan = plan_labels(image, None, "cells", None)
    create_labels(plan, attributes={})
    store, model = DiskStore(tmp_path / "scratch"), find_model(settings.flows.model)
    return Job(
        image, (Input((0,)),), settings, model, "cpu", store, labels="m", plan=plan, table=tmp_path / "table.parquet"
    )


def leave_parts(job: Job, n_objects: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Parts of objects as regions measure them; an object may have parts in any regions, at least in one."""
    rows = []
    is_there = rng.random((N_REGIONS, n_objects)) < 0.3
    is_there[rng.integers(0, N_REGIONS, n_objects), np.arange(n_objects)] = True
    for region, there in enumerate(is_there):
        ids = np.flatnonzero(there) + 1
        parts = rng.integers(1, 4 * SIDE, (ids.size, WIDTH)).astype(np.float64)
        parts[:, 0] = ids
        parts[ids % 5 == 0, 9] = 0  # no finite pixel of the first channel
        job.store.save(f"m/measured/{region}", parts)
        rows.append(parts)
    return np.concatenate(rows)


def intensities(name: str, totals: Any, counts: Any, squares: Any, low: Any, high: Any) -> dict[str, Any]:
    """Of the parts of an object that have finite pixels."""
    if not counts.size:
        return dict.fromkeys([f"{of}_{name}" for of in ("mean", "std", "min", "max")], np.nan)
    count, mean = counts.sum(), totals.sum() / counts.sum()
    variance = (squares + counts * (totals / counts - mean) ** 2).sum() / count
    row = {"mean": mean, "std": np.sqrt(variance), "min": low.min(), "max": high.max()}
    return {f"{of}_{name}": np.float32(value) for of, value in row.items()}


def expected_columns(parts: npt.NDArray[np.float64], n_objects: int) -> dict[str, Any]:
    """The table, object by object."""
    columns: dict[str, list[Any]] = {}
    for label in range(1, n_objects + 1):
        mine = parts[parts[:, 0] == label]
        area, y, x = mine[:, 1:4].sum(axis=0)
        row = {"label": label, "centroid_y": y / area, "centroid_x": x / area}
        row |= {"centroid_y_um": y / area * 0.5, "centroid_x_um": x / area * 0.5}
        row |= {"bbox_y_start": mine[:, 4].min(), "bbox_y_stop": mine[:, 6].max()}
        row |= {"bbox_x_start": mine[:, 5].min(), "bbox_x_stop": mine[:, 7].max()}
        row |= {"area": area, "area_um2": area / 4}
        for name, first in (("a", 8), ("b", 13)):
            row |= intensities(name, *mine[mine[:, first + 1] > 0, first : first + 5].T)
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


@pytest.mark.parametrize(("n_objects", "batch"), [(20, 1), (1000, 77), (1000, 250), (1000, 2**18), (1, 10), (0, 10)])
def test_the_table_does_not_depend_on_the_batches(
    job: Job, monkeypatch: pytest.MonkeyPatch, n_objects: int, batch: int
) -> None:
    monkeypatch.setattr(table, "TABLE_BATCH", batch)
    assert job.table is not None
    parts = leave_parts(job, n_objects, np.random.default_rng(3))
    table.write_table(0, job)
    file = pyarrow.parquet.ParquetFile(job.table)
    assert file.metadata.num_row_groups == -(-n_objects // batch)
    made = file.read()
    assert made.num_rows == n_objects
    in_memory = table.table_of(job)
    assert in_memory.schema == made.schema
    types = {field.name: str(field.type) for field in made.schema}
    assert types["label"] == "uint32"
    assert {types[name] for name in ("area", "bbox_y_start", "bbox_x_stop")} == {"int64"}
    assert {types[name] for name in ("centroid_y", "centroid_x_um", "area_um2")} == {"double"}
    assert {types[name] for name in ("mean_a", "mean_b")} == {"float"}
    for name, values in expected_columns(parts, n_objects).items():
        off = 1e-6 if name.startswith("std") else 0  # its last bit depends on the order in which parts are added
        np.testing.assert_allclose(made[name].to_numpy(), values, rtol=off, err_msg=name)
        np.testing.assert_array_equal(in_memory[name].to_numpy(), made[name].to_numpy(), err_msg=name)
    assert not job.table.with_name("table.parquet.partial").exists()


def test_memory_for_the_table_does_not_grow_with_the_objects(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE_BATCH", 2000)
    leave_parts(job, 10, np.random.default_rng(0))
    table.write_table(0, job)  # what is imported on first use does not count
    peaks = []
    for n_objects in (10_000, 80_000):
        leave_parts(job, n_objects, np.random.default_rng(0))
        gc.collect()
        tracemalloc.start()
        table.write_table(0, job)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Not a single number is kept for each further object; what else the process allocates meanwhile is less.
    assert peaks[1] - peaks[0] < 70_000 * 8
