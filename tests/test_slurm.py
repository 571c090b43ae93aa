"""A run on a real SLURM of two nodes with two fake GPUs each, jobs of which are cancelled."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import tiledseg
from tiledseg.cli import main
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide

from .slurm import skip_without_slurm, slurm

pytestmark = pytest.mark.slow

CLUSTER = """
[cluster]
interface = "lo"
poll = "1s"
[run]
walltime = "20min"
memory = "8GiB"
[workers.gpu]
jobs = 3  # the third waits for a place
gpus = 2
tasks_per_gpu = 1  # there is no GPU, and little memory
cores = 2
memory = "4GiB"
walltime = "20min"
[workers.cpu]
cores = 1
memory = "2GiB"
"""


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """SLURM, and folders that jobs may write to: their home stays empty."""
    skip_without_slurm()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(Path(tiledseg.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    with slurm(tmp_path / "slurm") as config:
        monkeypatch.setenv("SLURM_CONF", str(config))
        yield tmp_path


def submitted(capsys: pytest.CaptureFixture[str], cluster: Path, arguments: list[str]) -> dict[str, Any]:
    assert main(["cluster", "slurm", "-c", str(cluster), "--json", *arguments]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def jobs(name: str = "") -> dict[str, str]:
    """Where the jobs are that wait or run, by id."""
    listed = subprocess.run(
        ["squeue", "-h", "-o", "%A %j %N"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = [line.split(" ") for line in listed]
    return {job: node for job, of, node in found if of.endswith(name)}


def wait_for(what: Callable[[], Any], timeout_s: float = 300) -> Any:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        time.sleep(0.2)
    logs = [f"{path.name}: {path.read_text()[-2000:]}" for path in Path.cwd().glob("*.cluster/logs/*")]
    pytest.fail("waited in vain\n" + "\n".join(logs))


def test_jobs_are_cancelled_and_the_labels_are_those_of_a_local_run(
    queue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = queue / "cluster.toml"
    cluster.write_text(CLUSTER)
    image, _ = synthetic_slide((1600, 1600), diameter=12.0, seed=1)
    write_image(queue / "slide.ome.zarr", image, axes="yx", chunk=256)
    run = ["--", "segment", "slide.ome.zarr", "-o", "out.ome.zarr", "--diameter", "12", "--block", "256", "--json"]
    journal = queue / "out.ome.zarr.cells.tiledseg" / "flows.journal"

    first = submitted(capsys, cluster, run)
    folder = Path(first["folder"])
    wait_for(lambda: not jobs("-run") or (journal.exists() and journal.read_text().count(".") > 3))
    gpu_jobs = jobs("-gpu")
    assert sorted(gpu_jobs.values()) == ["", "n0", "n1"]
    assert main(["cluster", "slurm", "-c", str(cluster), *run]) == 2
    assert f"in the queue already, as job {first['job']}" in capsys.readouterr().err

    lost = next(job for job, node in gpu_jobs.items() if node)
    subprocess.run(["scancel", lost], check=True)
    wait_for(lambda: jobs("-gpu").keys() - gpu_jobs.keys())
    subprocess.run(["scancel", first["job"]], check=True)
    wait_for(lambda: not jobs())
    assert not (queue / "out.ome.zarr" / "labels" / "cells" / "0" / "c").exists()

    # As after a job that could not cancel its workers any more.
    left = ["sbatch", "--parsable", f"--job-name={first['name']}-gpu", "--output=left.log", "--wrap", "sleep 600"]
    stale = subprocess.run(left, capture_output=True, text=True, check=True).stdout.strip()
    second = submitted(capsys, cluster, run)
    wait_for(lambda: second["job"] not in jobs())
    log = (folder / "logs" / f"run-{second['job']}.log").read_text()
    report = json.loads(log[log.index("\n{") : log.rindex("}") + 1])
    assert f"gpu jobs of an earlier attempt are cancelled: {stale}" in log
    assert report["kept"]["flows"] > 3
    assert report["computed"]["flows"] > 0
    assert report["workers"].startswith("5 workers")
    wait_for(lambda: not jobs())

    reference = tiledseg.segment("slide.ome.zarr", "local.ome.zarr", diameter=12.0, block=256, device="cpu")
    labels = zarr.open_array(queue / "out.ome.zarr" / "labels" / "cells" / "0", mode="r")
    assert reference.report.n_objects > 5000
    assert np.array_equal(labels[:], reference.labels.compute())
    assert not list((queue / "home").iterdir())
    assert not (folder / "tls").exists()
    assert not (folder / "scheduler.json").exists()


@pytest.mark.parametrize(
    ("tables", "here", "text"),
    [
        ("[workers.gpu]\nqueue = 'nowhere'", [], "sbatch refuses {}/gpu.sh: "),
        ("[workers.gpu]\nqueue = 'nowhere'", [], "Invalid partition name specified; change the cluster file"),
        ("[workers.gpu]\ngpus = 9", [], "node configuration is not available; change the cluster file"),
        ("[workers.gpu]\n[run]\nwalltime = '3d'", [], "would wait for ever (PartitionTimeLimit) and was cancelled"),
        (
            "[cluster]\npoll = '1s'\n[workers.gpu]\nwalltime = '3d'",
            ["--here"],
            "jobs of kind 'gpu' would wait for ever (PartitionTimeLimit); change the cluster file",
        ),
    ],
)
def test_what_cannot_be_had_is_said_at_once(
    queue: Path, capsys: pytest.CaptureFixture[str], tables: str, here: list[str], text: str
) -> None:
    cluster = queue / "cluster.toml"
    cluster.write_text(tables)
    write_image(queue / "slide.ome.zarr", np.zeros((64, 64), np.uint8), axes="yx", chunk=64)
    run = ["segment", "slide.ome.zarr", "-o", "out.ome.zarr"]
    assert main(["cluster", "slurm", "-c", str(cluster), *here, *run]) == 2
    assert text.format(queue / "out.ome.zarr.cells.cluster") in capsys.readouterr().err
    wait_for(lambda: not jobs(), timeout_s=10)
