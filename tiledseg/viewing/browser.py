"""A scene in the browser: neuroglancer's own page, and the pixels it asks for, from one server on this machine."""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import os
import re
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from ..errors import SettingsError
from .pieces import Pieces, Stored
from .scene import Scene
from .server import Answer, PageServer
from .state import state_of

__all__ = ["View", "can_open_browser"]

PAGE = "v/1/"
"""Neuroglancer's page wants such a path, and finds `EVENTS` from it."""
EVENTS = "events/1"
FRAME_HEIGHT = 600
KINDS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".wasm": "application/wasm"}
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.(?:js|css|html|wasm)")
_LAYER = re.compile(r"(\d{1,4})/([A-Za-z0-9./]+)")


class View:
    """A scene served to the browser, until it is closed or the process ends.

    In Jupyter it shows itself.

    Parameters
    ----------
    scene : Scene
    port : int
        0 takes a free one.

    Raises
    ------
    SettingsError
        If neuroglancer is not installed, or the port is taken.
    ImageError
        If an image cannot be read part by part.
    """

    def __init__(self, scene: Scene, port: int = 0) -> None:
        self.scene = scene
        self._client = _client_folder()
        self._sources = _sources_of(scene)
        self._server = PageServer(self._answer, port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<View of {self.scene.title} at {self.url}>"

    @property
    def url(self) -> str:
        """The address to open; it holds a secret."""
        return self._server.url

    @property
    def port(self) -> int:
        """The port it is served on."""
        return self._server.port

    def close(self) -> None:
        """Stop serving; safe to repeat."""
        self._server.close()

    def open(self) -> bool:
        """Open it in the browser of this machine; whether there is one."""
        return can_open_browser() and webbrowser.open(self.url)

    def wait(self) -> None:
        """Serve until the process is interrupted."""
        while True:
            time.sleep(3600)

    def _repr_html_(self) -> str:
        """A frame with the viewer, for Jupyter."""
        url, title = html.escape(self.url), html.escape(self.scene.title)
        return (
            f'<iframe src="{url}" title="{title}" width="100%" height="{FRAME_HEIGHT}" style="border:0"></iframe>'
            f'<p><a href="{url}" target="_blank" rel="noreferrer">{title} in a window of its own</a>, while this '
            f"kernel runs; if that is on another machine, once port {self.port} is forwarded from there.</p>"
        )

    def _answer(self, path: str, address: str) -> Answer | None:
        """What is below the secret."""
        if path == "":
            state = json.dumps(state_of(self.scene, f"{address}/data"), separators=(",", ":"))
            return Answer(status=302, headers={"Location": f"{address}/{PAGE}#!{quote(state, safe='')}"})
        if path == EVENTS:
            return Answer(kind="text/event-stream", is_stream=True)
        if path.startswith(PAGE):
            return self._page(path.removeprefix(PAGE) or "index.html")
        found = _LAYER.fullmatch(path.removeprefix("data/")) if path.startswith("data/") else None
        if found is None or int(found[1]) >= len(self._sources):
            return None
        content = self._sources[int(found[1])].file(found[2])
        return None if content is None else Answer(content)

    def _page(self, name: str) -> Answer | None:
        """A file of neuroglancer's page."""
        file = self._client / name
        if _FILE.fullmatch(name) is None or not file.is_file():
            return None
        # Their names change with their content, but for the first.
        keep = {} if name == "index.html" else {"Cache-Control": "private, max-age=86400"}
        return Answer(file.read_bytes(), KINDS[file.suffix], headers=keep)


def can_open_browser() -> bool:
    """Whether a browser opened here would be seen: not on a machine somebody is logged in to over SSH."""
    if os.environ.get("SSH_CONNECTION") or os.environ.get("SSH_TTY"):
        return False
    has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(has_screen) or not sys.platform.startswith("linux")


def _sources_of(scene: Scene) -> list[Pieces]:
    """What each layer of the viewer reads, in the order of its state."""
    sources = []
    if scene.picture is not None:
        picture = scene.picture
        stored = Stored(picture.image)
        sources += [Pieces(stored, picture.placement, one.index, is_labels=False) for one in picture.channels]
    sources += [Pieces(Stored(one.image), one.placement, None, is_labels=True) for one in scene.overlays]
    return sources


@functools.cache
def _client_folder() -> Path:
    """The folder of neuroglancer's page; its Python side is not needed, and not imported."""
    found: Any = importlib.util.find_spec("neuroglancer")
    folder = Path(found.origin).parent / "static" / "client" if found is not None and found.origin else None
    if folder is None or not (folder / "index.html").is_file():
        raise SettingsError(
            "looking at results in the browser needs the package neuroglancer; install it: pip install -e "
            '".[view]", or look in napari (--napari).'
        )
    return folder
