"""Cluster files, job scripts, and the job that looks after workers, with processes of this machine as jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import tiledseg
from tiledseg.batch import submission_of
from tiledseg.batch.config import parse_bytes, parse_seconds, read_config
from tiledseg.batch.scheduler import scheduler_of
from tiledseg.batch.scripts import lifetime_of
from tiledseg.batch.supervisor import TRIES, Workers
from tiledseg.batch.systems import SYSTEMS, system_of
from tiledseg.cli import main
from tiledseg.errors import ClusterError, SettingsError
from tiledseg.omezarr import write_image
from tiledseg.slides import synthetic_slide

EXAMPLES = Path(__file__).parents[1] / "notebooks" / "cluster"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "there are no workers"),
        ("[workers.gpu", "is no TOML"),
        ("[worker.gpu]", "unknown table 'worker'; known are cluster, run, workers"),
        ("[workers.gpu]\ngpu = 1", r"unknown key of \[workers.gpu\] 'gpu'; known are cores, directives, gpus"),
        ("[run]\ngpus = 1", r"unknown key of \[run\] 'gpus'"),
        ("workers = 3", "workers must be a table, not 3"),
        ("[workers]\ngpu = 3", "workers.gpu must be a table, not 3"),
        ("[workers.gpu]\ngpus = -1", r"\[workers.gpu\] gpus must be at least 0, not -1"),
        ("[workers.gpu]\ngpus = true", "gpus must be a whole number, not True"),
        ("[workers.gpu]\ntasks_per_gpu = 0", r"\[workers.gpu\] tasks_per_gpu must be at least 1, not 0"),
        ("[workers.gpu]\njobs = 0", "jobs must be at least 1"),
        ("[workers.gpu]\nmemory = 16", "memory must be a text, not 16"),
        ("[workers.gpu]\nmemory = '16'", "memory must be a text such as 16GiB"),
        ("[workers.gpu]\nwalltime = '4 hours'", "walltime must be a text such as 90min"),
        ("[workers.gpu]\nwalltime = '0s'", "walltime must be at least a second"),
        ("[workers.gpu]\nqueue = 'a; rm b'", "would not be safe in a job script"),
        ("[workers.gpu]\ndirectives = ['account']", "directives are options such as '--account=lab'"),
        (
            "[workers.gpu]\ndirectives = ['--a\\nrm b', \"--c\"]\n[cluster]\nsetup = 'x'",
            "setup must be a list of lines",
        ),
        ("[workers.run]", "a name of small letters and digits other than 'run'"),
        ("[workers.'a b']", "a name of small letters"),
        ("[workers.gpu]\n[cluster]\nsecurity = 'ssl'", "security must be tls or dask or none, not 'ssl'"),
    ],
)
def test_a_slip_in_a_cluster_file_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "cluster.toml").write_text(text)
    with pytest.raises(SettingsError, match=sentence) as said:
        read_config(tmp_path / "cluster.toml")
    assert str(said.value).startswith(f"cluster file {tmp_path / 'cluster.toml'}")


def test_a_missing_cluster_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere.toml cannot be read: No such file"):
        read_config(tmp_path / "nowhere.toml")


def test_times_and_sizes() -> None:
    texts = ("45s", "90min", "1.5h", "2d", "00:10:00", "1-12:30:00")
    assert [parse_seconds("walltime", text) for text in texts] == [45, 5400, 5400, 172_800, 600, 131_400]
    assert [parse_bytes("memory", text) for text in ("16GiB", "500 MB", "1.5TiB")] == [2**34, 5 * 10**8, 3 * 2**39]


@pytest.mark.parametrize("walltime_s", [10, 60, 3600, 86_400])
def test_workers_leave_before_their_walltime(walltime_s: int) -> None:
    lifetime, stagger = lifetime_of(walltime_s)
    assert lifetime >= 0.75 * walltime_s
    assert lifetime + stagger < walltime_s


def scripts(system: str, folder: Path, text: str) -> dict[str, str]:
    """Scripts of a run by the example, each by bash without fault."""
    (folder / "cluster.toml").write_text(text)
    found = submission_of(system, folder / "cluster.toml", folder / "o'er here", ("segment", "a b.zarr")).scripts()
    for script in found.values():
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return found


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("slurm", ["#SBATCH --gres=gpu:2", "#SBATCH --mem=65536M", "#SBATCH --time=240", "#SBATCH --partition=gpu"]),
        ("lsf", ['#BSUB -gpu "num=2"', "#BSUB -M 65536MB", "#BSUB -W 240", "#BSUB -q gpu"]),
        ("pbs", ["#PBS -l select=1:ncpus=8:mem=65536mb:ngpus=2", "#PBS -l walltime=04:00:00", "#PBS -q gpu"]),
        ("local", []),
    ],
)
def test_job_scripts_of_the_example(tmp_path: Path, system: str, expected: list[str]) -> None:
    found = scripts(system, tmp_path, (EXAMPLES / "slurm.toml").read_text())
    assert list(found) == ["run.sh", "gpu.sh", "cpu.sh"]
    gpu, cpu = found["gpu.sh"].splitlines(), found["cpu.sh"].splitlines()
    assert set(expected) <= set(gpu)
    for words in ("--nthreads 6 --resources GPU=6", "--memory-limit 32768MiB", "--lifetime 13500s"):
        assert words in found["gpu.sh"]
    for words in ("--nthreads 16 --resources CPU=16", "--memory-limit 65536MiB", "CUDA_VISIBLE_DEVICES=\n"):
        assert words in found["cpu.sh"]
    assert "module load cuda" in gpu
    assert "module load cuda" in cpu
    assert found["run.sh"].endswith("-- segment 'a b.zarr'\n")
    # Options of a batch system count only before the first command.
    first = next(i for i, line in enumerate(gpu) if not line.startswith("#"))
    assert not [line for line in gpu[first:] if line.startswith(("#S", "#B", "#P"))]


def test_the_example_without_a_batch_system_is_a_script_of_bash() -> None:
    read = subprocess.run(["bash", "-n", str(EXAMPLES / "scheduler-file.sh")], capture_output=True, text=True)
    assert (read.returncode, read.stderr) == (0, "")


def test_workers_with_a_gpu_do_all_where_there_are_no_others(tmp_path: Path) -> None:
    found = scripts("slurm", tmp_path, "[workers.gpu]\ngpus = 2\ncores = 8")
    assert "--nthreads 10 --resources 'GPU=6 CPU=4'" in found["gpu.sh"]


def test_without_encryption_no_certificate_is_named(tmp_path: Path) -> None:
    found = scripts("slurm", tmp_path, "[cluster]\nsecurity = 'none'\n[workers.cpu]")
    assert "TLS" not in found["cpu.sh"]


@pytest.mark.parametrize("system", sorted(set(SYSTEMS) - {"local"}))
def test_a_batch_system_that_is_not_here_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], system: str
) -> None:
    write_image(tmp_path / "slide.ome.zarr", np.zeros((64, 64), np.uint8), axes="yx", chunk=64)
    (tmp_path / "cluster.toml").write_text("[workers.cpu]")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    image, output = str(tmp_path / "slide.ome.zarr"), str(tmp_path / "out.ome.zarr")
    assert main(["cluster", system, "-c", str(tmp_path / "cluster.toml"), "segment", image, "-o", output]) == 2
    said = capsys.readouterr().err
    assert "is not on this machine; submit from one on which" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "cluster.toml", "slide.ome.zarr"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["info", "slide.ome.zarr"], "a cluster runs 'segment IMAGE ...'"),
        (["segment", "slide.ome.zarr", "--workers", "2"], "a cluster runs 'segment IMAGE ...'"),
        (["segment", "nowhere.ome.zarr"], "nowhere.ome.zarr"),
        (["segment", "slide.ome.zarr", "--diameter=-3"], "diameter"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_is_submitted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "slide.ome.zarr", np.zeros((64, 64), np.uint8), axes="yx", chunk=64)
    (tmp_path / "cluster.toml").write_text("[workers.cpu]")
    assert main(["cluster", "local", "-c", "cluster.toml", "--", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.toml", "slide.ome.zarr"]


def test_a_dry_run_prints_the_scripts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "slide.ome.zarr", np.zeros((64, 64), np.uint8), axes="yx", chunk=64)
    example, image = str(EXAMPLES / "slurm.toml"), str(tmp_path / "slide.ome.zarr")
    assert main(["cluster", "slurm", "-c", example, "--dry-run", "--", "segment", image, "--name", "nuclei"]) == 0
    shown = capsys.readouterr().out
    assert "==> gpu.sh <==" in shown
    assert str(tmp_path / "slide.ome.zarr.nuclei.cluster" / "logs") in shown
    assert [path.name for path in tmp_path.iterdir()] == ["slide.ome.zarr"]


def test_jobs_that_end_at_once_are_not_submitted_for_ever(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text("[workers.cpu]\njobs = 1")
    (tmp_path / "cpu.sh").write_text(f"echo started >> {tmp_path / 'started'}; exit 1")
    workers = Workers(system_of("local"), read_config(tmp_path / "cluster.toml"), tmp_path, "test")

    def keep_on() -> None:
        for _ in range(100):
            workers.replace()
            time.sleep(0.05)

    with pytest.raises(ClusterError, match=f"{TRIES} jobs of kind 'cpu' ended one after another"):
        keep_on()
    assert (tmp_path / "started").read_text().count("started") == TRIES


def wait_for(what: Callable[[], Any], timeout_s: float = 300) -> Any:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    return pytest.fail("waited in vain")


def started(folder: Path) -> set[int]:
    """Process ids of the jobs that were started."""
    return {int(path.stem.partition("-")[2]) for path in folder.glob("logs/cpu-*.log")}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_workers_leave_by_themselves_and_others_come(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text("[workers.cpu]\nwalltime = '15s'")
    (tmp_path / "logs").mkdir()
    submission = submission_of("local", tmp_path / "cluster.toml", tmp_path, ("segment",))
    (tmp_path / "cpu.sh").write_text(submission.scripts()["cpu.sh"])
    workers = Workers(submission.system, submission.config, tmp_path, submission.name)
    came: set[str] = set()

    def have_two_come() -> bool:
        workers.replace()
        came.update(str(worker["name"]) for worker in list(cluster.scheduler_info["workers"].values()))
        workers.note(came)
        return len(came) == 2

    with scheduler_of(submission.system, submission.config, tmp_path) as cluster:
        try:
            wait_for(have_two_come)
        finally:
            workers.cancel()
    first, second = sorted(tmp_path.glob("logs/cpu-*.log"), key=lambda log: log.stat().st_mtime)
    assert "Closing worker gracefully" in first.read_text()
    assert "Closing worker gracefully" not in second.read_text()


@pytest.mark.slow
def test_a_lost_job_is_replaced_and_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: its home stays empty, and no key is left."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    image, _ = synthetic_slide((900, 900), diameter=12.0, seed=1)
    write_image(tmp_path / "slide.ome.zarr", image, axes="yx", chunk=256)
    (tmp_path / "cluster.toml").write_text("[cluster]\npoll = '1s'\n[workers.cpu]\njobs = 2\n")
    run = ["segment", str(tmp_path / "slide.ome.zarr"), "-o", str(tmp_path / "out.ome.zarr"), "--diameter", "12"]
    command = [sys.executable, "-m", "tiledseg.cli", "cluster", "local", "-c", str(tmp_path / "cluster.toml"), "--"]
    folder = tmp_path / "out.ome.zarr.cells.cluster"
    journal = tmp_path / "out.ome.zarr.cells.tiledseg" / "flows.journal"

    with subprocess.Popen([*command, *run, "--block", "256"], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: process.poll() is not None or (journal.exists() and "." in journal.read_text()))
            assert (folder / "tls" / "key.pem").stat().st_mode & 0o077 == 0
            assert (folder / "tls").stat().st_mode & 0o077 == 0
            first = started(folder)
            assert len(first) == 2
            os.killpg(min(first), signal.SIGKILL)
            wait_for(lambda: len(started(folder)) == 3)
        finally:
            process.terminate()
        said = process.communicate(timeout=60)[1]
    assert f"cpu jobs are over or lost and are replaced: {min(first)}." in said
    assert process.returncode == 128 + signal.SIGTERM
    assert not [pid for pid in started(folder) if is_alive(pid)]

    ended = subprocess.run([*command, *run, "--block", "256"], capture_output=True, text=True, check=True)
    assert "resumed      " in ended.stdout
    assert "worked on    cpu, 2 workers" in ended.stdout
    assert not [pid for pid in started(folder) if is_alive(pid)]
    reference = tiledseg.segment(image, diameter=12.0, block=256)
    labels = zarr.open_array(tmp_path / "out.ome.zarr" / "labels" / "cells" / "0", mode="r")
    assert np.array_equal(labels[:], reference.labels.compute())
    assert not list((tmp_path / "home").iterdir())
    assert not (folder / "tls").exists()


def test_the_manifest_of_kubernetes_is_valid() -> None:
    import kubernetes_validate
    import yaml

    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    kinds = [document["kind"] for document in documents]
    assert kinds == ["ConfigMap", "Service", "Job", "Deployment", "Deployment"]
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)
    wrong = documents[3] | {"spec": {**documents[3]["spec"], "replicas": "four"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)
