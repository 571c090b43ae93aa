"""A run on workers of a real dask-gateway on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiledseg
from tiledseg.omezarr import write_image

from .conftest import Slide

pytestmark = pytest.mark.slow

CONFIG = """
c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.address = "127.0.0.1:{ports[0]}"
c.Proxy.address = "127.0.0.1:{ports[1]}"
c.Proxy.tcp_address = "127.0.0.1:{ports[2]}"
c.ClusterConfig.scheduler_cmd = ["{python}", "-m", "distributed.cli.dask_scheduler"]
c.ClusterConfig.worker_cmd = ["{python}", "-m", "distributed.cli.dask_worker"]
c.ClusterConfig.worker_cores = 1
c.ClusterConfig.worker_memory = "2 G"
c.UnsafeLocalBackend.clusters_directory = "{folder}/clusters"
c.UnsafeLocalBackend.inherited_environment = ["PATH", "PYTHONPATH"]
c.UnsafeLocalBackend.sigint_timeout = 3
c.UnsafeLocalBackend.cluster_start_timeout = 120
"""


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.fixture
def gateway_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster that a gateway made; its scheduler is behind the gateway's proxy and speaks TLS."""
    pytest.importorskip("dask_gateway_server", reason="dask-gateway-server is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dask-gateway's own, at import
        dask_gateway = pytest.importorskip("dask_gateway", reason="dask-gateway is not installed")
    # One that was closed raises when it is collected, which may be after this test.
    if hasattr(dask_gateway.Gateway, "__del__"):
        del dask_gateway.Gateway.__del__
    monkeypatch.setenv("PYTHONPATH", str(Path(tiledseg.__file__).parents[1]))
    ports = free_ports(3)
    config = tmp_path / "gateway.py"
    config.write_text(CONFIG.format(ports=ports, python=sys.executable, folder=tmp_path))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [sys.executable, "-m", "dask_gateway_server", "-f", str(config)]
    with (tmp_path / "gateway.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PATH": path})
    try:
        gateway = connected(dask_gateway, ports, server, tmp_path / "gateway.log")
        with gateway, gateway.new_cluster(shutdown_on_close=True) as cluster:
            cluster.scale(2)
            yield cluster
    finally:
        server.terminate()
        server.wait(30)


def connected(dask_gateway: Any, ports: list[int], server: subprocess.Popen[bytes], log: Path) -> Any:
    address, proxy = f"http://127.0.0.1:{ports[1]}", f"tls://127.0.0.1:{ports[2]}"
    until, is_up = time.monotonic() + 60, False
    while not is_up and server.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{address}/api/health", timeout=5) as answer:
                is_up = answer.status == 200
        except OSError:  # the proxy is up before it knows the gateway
            time.sleep(0.2)
    if not is_up:
        pytest.fail(f"the gateway does not come up: {log.read_text()[-2000:]}")
    return dask_gateway.Gateway(address, proxy_address=proxy, auth="basic")


def test_a_cluster_of_a_gateway_gives_the_same_bits(gateway_cluster: Any, slide: Slide, tmp_path: Path) -> None:
    from distributed import Client

    write_image(tmp_path / "slide.ome.zarr", slide[0], axes="yx", chunk=256)
    with Client(gateway_cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=120)
        assert client.scheduler.address.startswith("gateway://")
    settings: dict[str, Any] = {"diameter": 24.0, "block": 256}
    found = tiledseg.segment(tmp_path / "slide.ome.zarr", tmp_path / "out.ome.zarr", client=gateway_cluster, **settings)
    assert found.report.workers.startswith("2 workers")
    assert gateway_cluster.status == "running"
    reference = tiledseg.segment(slide[0], **settings)
    assert np.array_equal(found.labels.compute(), reference.labels.compute())
