"""Opening TIFF and OME-TIFF: the first series of a file, with its pyramid."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..axes import ALL_AXES, check_axes
from ..errors import ImageError
from .assembly import StoredLevel, UnnamedAxesError, assemble_image, channel_names, check_array, is_number
from .damage import BAD_FILE
from .image import DROPPED, Image
from .units import MICROMETERS, unit_name

__all__ = ["TiffSource", "open_tiff"]

_log = logging.getLogger(__name__)

_WINDOW = 1024
"""Pixels along y and x that are read at once where any window can be."""


@dataclass(frozen=True)
class TiffSource:
    """The first series of a TIFF file."""

    path: str
    axes: str
    stamp: int

    def open(self, level: int, path: str) -> Any:  # noqa: ARG002
        """The array of one level."""
        return _open_tiff_level(self.path, level, self.stamp)

    def chunk_folder(self, path: str) -> None:
        """None: the chunks lie inside the file."""


def open_tiff(path: Path, axes: str | None, *, aloud: bool = True) -> Image:
    """Open the first series of a TIFF, with its pyramid.

    Parameters
    ----------
    path : path
    axes : str, optional
        Axes of the stored array, in its order, instead of those of the file.
    aloud : bool
        Whether to say it if any window reads a whole plane.

    Returns
    -------
    image : Image

    Raises
    ------
    ImageError
        If the file cannot be read, or the meaning of an axis is unknown.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            if not len(tif.series):
                raise ImageError(f"{path} is a TIFF without images.")
            series = tif.series[0]
            if len(tif.series) > 1:
                _log.info("%s holds %d series; using the first", path, len(tif.series))
            disk_axes = _tiff_axes(path, series.axes, series.shape, axes)
            calibration, channels = _tiff_calibration(tif, series)
            levels = [level for level in series.levels if level.ndim == series.ndim]
            check_array(series.shape, np.dtype(series.dtype), str(path))
            if aloud:
                _warn_one_strip(path, series)
        stamp = path.stat().st_mtime_ns
        stored: list[StoredLevel] = []
        for index, level in enumerate(levels):
            array = _open_tiff_level(str(path), index, stamp)
            stored.append(StoredLevel("", level.shape, array.chunks))
    except BAD_FILE as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(
            f"{path} is not a readable TIFF ({error}); give a TIFF, a slide, HDF5, N5 or a Zarr."
        ) from error
    source = TiffSource(str(path.absolute()), disk_axes, stamp)
    known = [calibration.get(letter, (0.0, None)) for letter in disk_axes]
    stored[0] = replace(stored[0], scale=[size for size, _ in known])
    image = assemble_image(str(path), source, np.dtype(series.dtype), stored, [unit for _, unit in known])
    return replace(image, channels=channel_names(channels, image.n_channels))


class _Contiguous:
    """Pixels that lie in a file one after another, uncompressed: any window reads no more than itself.

    The file is mapped while it is read only: what stays mapped counts as memory of the process.
    """

    def __init__(
        self, path: str, offset: Any, shape: tuple[int, ...], dtype: np.dtype[Any], n_last: int | None
    ) -> None:
        self._where: dict[str, Any] = {"filename": path, "mode": "r", "offset": offset, "shape": shape, "dtype": dtype}
        self.shape, self.dtype = shape, dtype
        picture = shape if n_last is None else shape[:-1]
        last = () if n_last is None else (n_last,)
        self.chunks = (1,) * (len(picture) - 2) + tuple(min(n, _WINDOW) for n in picture[-2:]) + last

    def __getitem__(self, selection: Any) -> npt.NDArray[Any]:
        return np.array(np.memmap(**self._where)[selection])


@lru_cache(maxsize=32)
def _open_tiff_level(path: str, level: int, stamp: int) -> Any:  # noqa: ARG001
    """One level of the first series, opened once per process; the stamp keys the cache only."""
    import tifffile
    import zarr

    tif = tifffile.TiffFile(path)
    try:
        series = tif.series[0]
        if series.levels[level].dataoffset is not None:
            of = series.levels[level]
            dtype = np.dtype(f"{tif.byteorder}{of.dtype.char}")
            tif.close()
            return _Contiguous(
                path, of.dataoffset, of.shape, dtype, n_last=of.shape[-1] if of.axes[-1] == "S" else None
            )
        array = zarr.open_array(series.aszarr(level=level), mode="r")
    except BAD_FILE:
        tif.close()
        raise
    weakref.finalize(array, tif.close)
    return array


def _warn_one_strip(path: Path, series: Any) -> None:
    """Say so if every window reads a whole plane."""
    page = series.keyframe
    if series.dataoffset is None and not page.is_tiled and page.rowsperstrip >= page.imagelength:
        text = "%s is compressed as one strip, so any window reads a whole plane; tiledseg convert reads each once"
        _log.warning(text, path)


def _tiff_axes(path: Path, letters: str, shape: Sequence[int], axes: str | None) -> str:
    """Axes in the order on disk; a letter of length 1 that means nothing here is dropped."""
    if axes is not None:
        return check_axes(axes, len(shape), str(path))
    found: list[str] = []
    for letter, size in zip(letters, shape, strict=True):
        axis = "c" if letter == "S" else letter.lower()
        if axis in ALL_AXES and axis not in found:
            found.append(axis)
        elif size == 1:
            found.append(DROPPED)
        elif axis == "c" and shape[found.index("c")] == 1:
            found[found.index("c")] = DROPPED
            found.append("c")
        else:
            raise UnnamedAxesError(
                f"{path} has an axis {letter!r} of length {size} whose meaning is unknown (axes {letters!r}, "
                f"shape {tuple(shape)}); give axes with one of t, c, z, y, x per dimension."
            )
    kept = "".join(found)
    check_axes(kept.replace(DROPPED, ""), len(kept.replace(DROPPED, "")), str(path))
    return kept


def _tiff_calibration(tif: Any, series: Any) -> tuple[dict[str, tuple[float, str | None]], list[Any]]:
    """Pixel sizes and units by axis, and channel names, where the file gives reliable ones."""
    if series.kind == "ome":
        return _ome_xml(tif.ome_metadata)
    resolution = tif.pages[0].resolution
    sizes: dict[str, float] = {}
    unit: str | None = None
    if tif.imagej_metadata:
        unit = unit_name(tif.imagej_metadata.get("unit"))
        sizes = {"z": tif.imagej_metadata.get("spacing", 0)}
        steps = 1.0
    elif tif.pages[0].resolutionunit == 3:  # inches are a printer's resolution, centimetres a microscope's
        unit, steps = "micrometer", 1e4
    for axis, per_unit in zip("xy", resolution, strict=False):
        if unit in MICROMETERS and per_unit:
            sizes[axis] = steps / per_unit
    found = {axis: (float(size), unit) for axis, size in sizes.items() if is_number(size) and size > 0}
    return ({} if unit not in MICROMETERS else found), []


def _ome_xml(text: str) -> tuple[dict[str, tuple[float, str | None]], list[Any]]:
    """Pixel sizes and channel names of the first image of OME-XML."""
    from xml.etree import ElementTree

    pixels = ElementTree.fromstring(text).find("{*}Image/{*}Pixels")
    if pixels is None:
        return {}, []
    found: dict[str, tuple[float, str | None]] = {}
    for axis in "xyz":
        size = float(pixels.get(f"PhysicalSize{axis.upper()}", "nan"))
        unit = unit_name(pixels.get(f"PhysicalSize{axis.upper()}Unit", "µm"))
        if math.isfinite(size) and size > 0 and unit in MICROMETERS:
            found[axis] = (size, unit)
    return found, [channel.get("Name") for channel in pixels.findall("{*}Channel")]
