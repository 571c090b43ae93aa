"""Servers on loopback, as processes of their own: S3 (moto's) and files over http that are not listed.

    python tests/servers.py s3|http PORT FOLDER

http serves what is in the folder. While the folder holds a file ``.answer``, either answers requests with the
status that is written in it, as a server that is broken or overloaded does: all, or those of the methods named
after it. While there is a file ``.unlisted``, what is not there is forbidden, as in S3 without leave to list.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server:
    """A server process that can be stopped and started again, which S3 forgets everything by."""

    def __init__(self, kind: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.kind, self.folder = kind, folder
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it listens."""
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, __file__, self.kind, str(self.port), str(self.folder)]
        self.process = subprocess.Popen(command, env=environment)
        for _ in range(400):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"the {self.kind} server did not start")

    def stop(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def answering(self, status: int, *methods: str) -> Iterator[None]:
        """While it answers everything so, or some methods."""
        answer = self.folder / ".answer"
        answer.write_text(" ".join([str(status), *methods]))
        try:
            yield
        finally:
            answer.unlink()


@contextlib.contextmanager
def serving(kind: str, folder: Path) -> Iterator[Server]:
    """A server while it is needed."""
    server = Server(kind, folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _status(folder: str, method: str) -> int | None:
    """What a request is to be answered with."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        status, *methods = (Path(folder) / ".answer").read_text().split()
        return int(status) if not methods or method in methods else None
    return None


class _Unlisted(SimpleHTTPRequestHandler):
    """Files only: of a folder there is nothing to see."""

    protocol_version = "HTTP/1.1"

    def send_head(self) -> Any:
        """Answer a GET or HEAD."""
        status = _status(self.directory, self.command)
        if status is None and not Path(self.translate_path(self.path)).is_file():
            status = 403 if (Path(self.directory) / ".unlisted").exists() else 404
        if status is not None:
            self.send_error(status)
            return None
        return super().send_head()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Nothing: a client that hangs up is no news."""


def _serve_http(port: int, folder: str) -> None:
    with _Quiet(("127.0.0.1", port), partial(_Unlisted, directory=folder)) as server:
        server.serve_forever()


def _serve_s3(port: int, folder: str) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    moto = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        status = _status(folder, environ["REQUEST_METHOD"])
        if status is None:
            return moto(environ, start_response)
        start_response(f"{status} as asked for", [("Content-Type", "application/xml"), ("Content-Length", "0")])
        return [b""]

    logging.getLogger("werkzeug").disabled = True
    run_simple("127.0.0.1", port, application, threaded=True)


if __name__ == "__main__":
    {"http": _serve_http, "s3": _serve_s3}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
