"""Looking at results: in the browser by neuroglancer, or in napari."""

from __future__ import annotations

from typing import Any

from .browser import View
from .scene import Scene, open_scene, scene_of

__all__ = ["Scene", "View", "open_scene", "scene_of", "view"]


def view(out: Any, image: Any = None, *, name: str | None = None, axes: str | None = None, port: int = 0) -> View:
    """Look at labels over their image in the browser; in Jupyter the result shows itself.

    Parameters
    ----------
    out : path or address
        An OME-Zarr with labels, labels alone, or an image alone.
    image : path, address or array, optional
        The image, if it is not `out`. Default: what the report of the run names, if that is on a disk here.
    name : str, optional
        Of the labels. Default: all, of which the first are shown.
    axes : str, optional
        Axes of an image that does not say them.
    port : int
        On loopback; 0 takes a free one.

    Returns
    -------
    View
        ``.url`` is the address, ``.open()`` opens the browser; it is served until ``.close()`` or the process ends.

    Raises
    ------
    TiledsegError
        If there is nothing to look at, or neuroglancer is not installed.
    """
    return View(open_scene(out, image, name, axes), port)
