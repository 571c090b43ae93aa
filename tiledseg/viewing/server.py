"""A web server for one browser on this machine: reads only, and answers nobody who does not know its secret.

Other users of the machine, and pages of other sites in the same browser, can reach a port on loopback as well. So every
address begins with a random token; a request must name this machine as its host, which a page of another site under a
name of its own cannot (DNS rebinding); there is no leave for pages of other sites to read what it sends.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..errors import SettingsError, TiledsegError

__all__ = ["Answer", "PageServer"]

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
IDLE_S = 120
BEAT_S = 15
POLL_S = 0.1
_HOST = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?")


@dataclass(frozen=True)
class Answer:
    """What a request is answered with."""

    content: bytes = b""
    kind: str = "application/octet-stream"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    is_stream: bool = False
    """Whether it never ends: the connection is held until one of both leaves."""


class PageServer(ThreadingHTTPServer):
    """A server on loopback, in threads of this process, that answers GET and HEAD below a secret path.

    Parameters
    ----------
    answer : callable
        From the path after the secret, and the address that the browser calls this server by, to an answer; None is
        not found. Called by several threads at once.
    port : int
        0 takes a free one.

    Raises
    ------
    SettingsError
        If the port is taken, or may not be used.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[str, str], Answer | None], port: int = 0) -> None:
        self.answer = answer
        self.token = secrets.token_urlsafe(16)
        self.closing = threading.Event()
        self._troubles: set[str] = set()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise SettingsError(f"port {port} cannot be used ({error}); give another, or none (--port).") from error
        self._thread = threading.Thread(target=self.serve_forever, args=(POLL_S,), name="tiledseg-view", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """The address of its first page."""
        return f"http://{LOOPBACK}:{self.port}/{self.token}/"

    def close(self) -> None:
        """Stop answering; safe to repeat."""
        if not self.closing.is_set():
            self.closing.set()
            self.shutdown()
            self.server_close()
            self._thread.join()

    def say(self, trouble: str) -> None:
        """Tell of what cannot be read, once."""
        if trouble not in self._troubles:
            self._troubles.add(trouble)
            logger.warning("%s", trouble)

    def handle_error(self, *_: Any) -> None:
        """Say what broke; a browser that hangs up is no news."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            logger.error("a request failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "tiledseg"
    sys_version = ""
    timeout = IDLE_S
    server: PageServer

    def do_GET(self) -> None:
        self._send(self._answer())

    def do_HEAD(self) -> None:
        self._send(self._answer())

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self) -> Answer:
        """What to answer."""
        host = self.headers.get("Host", "")
        if _HOST.fullmatch(host) is None:
            return _plain(HTTPStatus.FORBIDDEN, "only this machine is served, by the name 127.0.0.1 or localhost")
        token, _, path = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            return _plain(HTTPStatus.NOT_FOUND, "there is nothing here: the address that was printed is longer")
        try:
            found = self.server.answer(path, f"http://{host}/{token}")
        except TiledsegError as error:
            self.server.say(str(error))
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        return found or _plain(HTTPStatus.NOT_FOUND, "not found")

    def _send(self, answer: Answer) -> None:
        """Send an answer; of a HEAD its headers only."""
        self.send_response(answer.status)
        headers = {
            "Content-Type": answer.kind,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            **answer.headers,
        }
        if answer.is_stream:
            self.close_connection = True
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(len(answer.content))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)
            if answer.is_stream:
                self._hold()

    def _hold(self) -> None:
        """Keep a stream of events open, in which nothing happens."""
        with contextlib.suppress(OSError):
            while not self.server.closing.wait(BEAT_S):
                self.wfile.write(b":\n\n")


def _plain(status: HTTPStatus, text: str) -> Answer:
    return Answer(f"{text}\n".encode(), "text/plain; charset=utf-8", status)
