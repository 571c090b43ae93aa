"""Who may talk to a run over TLS: nobody without a certificate."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

import tiledseg
from tiledseg.cli import main
from tiledseg.omezarr import write_image

from .conftest import Slide


def make_certificate(folder: Path) -> dict[str, str]:
    """A certificate signed by itself, that accepts itself alone; the environment in which Dask uses it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, folder.name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    prefix = "DASK_DISTRIBUTED__COMM__TLS__"
    environment = {f"{prefix}CA_FILE": str(folder / "cert.pem")}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        environment[f"{prefix}{role}__CERT"] = str(folder / "cert.pem")
        environment[f"{prefix}{role}__KEY"] = str(folder / "key.pem")
    return environment


@pytest.fixture
def scheduler_file(tmp_path: Path) -> Iterator[Path]:
    """A scheduler and a worker that speak TLS, as processes of their own."""
    environment = os.environ | make_certificate(tmp_path / "ours")
    where = ["--scheduler-file", str(tmp_path / "scheduler.json"), "--host", "127.0.0.1"]
    programs = {
        "scheduler": [
            *where,
            "--protocol",
            "tls",
            "--port",
            "0",
            "--no-dashboard",
            "--dashboard-address",
            "127.0.0.1:0",
        ],
        "worker": [*where, "--nthreads", "2", "--no-dashboard", "--local-directory", str(tmp_path)],
    }
    started = []
    try:
        for program, options in programs.items():
            command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *options]
            with (tmp_path / f"{program}.log").open("w") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        until = time.monotonic() + 60
        while not (tmp_path / "scheduler.json").exists() and time.monotonic() < until:
            time.sleep(0.1)
        yield tmp_path / "scheduler.json"
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)


def test_over_tls_the_bits_are_the_same_and_others_are_refused(
    scheduler_file: Path, slide: Slide, tmp_path: Path
) -> None:
    write_image(tmp_path / "slide.ome.zarr", slide[0], axes="yx", chunk=256)
    address = json.loads(scheduler_file.read_text())["address"]
    assert address.startswith("tls://127.0.0.1:")
    foreign = make_certificate(tmp_path / "foreign")
    ours = {name: text.replace("/foreign/", "/ours/") for name, text in foreign.items()}
    settings = ["--diameter", "24", "--block", "256"]

    def started(name: str, scheduler: str, certificates: dict[str, str]) -> subprocess.Popen[str]:
        places = [str(tmp_path / "slide.ome.zarr"), "-o", str(tmp_path / f"{name}.ome.zarr")]
        command = [sys.executable, "-m", "tiledseg.cli", "segment", *places, *settings, "--scheduler", scheduler]
        return subprocess.Popen(
            command, env=os.environ | certificates, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    plain = address.replace("tls://", "tcp://")
    processes = {
        "tls": started("tls", str(scheduler_file), ours),
        "plaintext": started("plaintext", plain, ours),
        "foreign": started("foreign", address, foreign),
    }
    said = {name: process.communicate(timeout=240)[1] for name, process in processes.items()}
    assert {name: process.returncode for name, process in processes.items()} == {"tls": 0, "plaintext": 2, "foreign": 2}
    for name in ("plaintext", "foreign"):
        assert said[name].count("\n") == 1, said
        assert "no Dask scheduler answers at" in said[name]
        assert not (tmp_path / f"{name}.ome.zarr").exists()
    reference = tiledseg.segment(slide[0], diameter=24.0, block=256)
    labels = zarr.open_array(tmp_path / "tls.ome.zarr" / "labels" / "cells" / "0", mode="r")
    assert np.array_equal(labels[:], reference.labels.compute())
    written = [p for name in ("tls.ome.zarr", "tls.ome.zarr.cells.tiledseg") for p in (tmp_path / name).rglob("*")]
    key = (tmp_path / "ours" / "key.pem").read_bytes().splitlines()[1]
    assert not [path for path in written if path.is_file() and key in path.read_bytes()]


@pytest.mark.parametrize("is_file", [False, True])
def test_a_scheduler_behind_tls_wants_certificates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_file: bool
) -> None:
    scheduler = "tls://127.0.0.1:8786"
    if is_file:
        (tmp_path / "scheduler.json").write_text(json.dumps({"address": scheduler}))
        scheduler = str(tmp_path / "scheduler.json")
    write_image(tmp_path / "slide.ome.zarr", np.zeros((64, 64), np.uint8), axes="yx", chunk=64)
    assert main(["segment", str(tmp_path / "slide.ome.zarr"), "--scheduler", scheduler]) == 2
    said = capsys.readouterr().err
    assert f"no Dask scheduler answers at {scheduler} without certificates" in said
    assert "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT" in said


def test_a_file_that_no_scheduler_wrote_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scheduler.json").write_text("[]")
    write_image(tmp_path / "slide.ome.zarr", np.zeros((64, 64), np.uint8), axes="yx", chunk=64)
    image, scheduler = str(tmp_path / "slide.ome.zarr"), str(tmp_path / "scheduler.json")
    assert main(["segment", image, "--scheduler", scheduler]) == 2
    assert "is no scheduler file" in capsys.readouterr().err
