"""A finished result: published labels and their table, which is all that exports need."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ImageError
from ..images import Image, open_image
from ..objects_at import ObjectTable
from ..omezarr import label_names
from ..omezarr.groups import open_group
from ..remote import Location, location

__all__ = ["Result", "open_result"]

Placement = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Result:
    """Published labels and their table.

    Attributes
    ----------
    labels : Image
    table : ObjectTable
    name : str
        Of the labels.
    placement : tuple of (float, float), optional
        Per axis where pixel 0 of the labels begins and how wide a pixel is, in pixels of the full-size image. None if
        the labels do not say, as those of earlier versions do not.
    """

    labels: Image
    table: ObjectTable
    name: str
    placement: Placement | None


@contextlib.contextmanager
def open_result(path: str | Path, name: str | None = None) -> Iterator[Result]:
    """Open what `segment` has published.

    Parameters
    ----------
    path : path or address
        The OME-Zarr in which the labels are, or the labels in it.
    name : str, optional
        Of the labels; needed if there are several.

    Yields
    ------
    result : Result
        A remote table is copied to this machine as long as it is used.

    Raises
    ------
    ImageError
        If there are no labels, or several to choose from, or they have no table.
    """
    place = location(path)
    if name is None and place.parent.name == "labels":
        place, name = place.parent.parent, place.name
    names = label_names(place)
    if name is None:
        if len(names) > 1:
            raise ImageError(f"{path} holds labels {', '.join(names)}; say which with --name.")
        name = next(iter(names), None)
    if name is None or name not in names or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ImageError(f"{path} holds no finished labels{'' if name is None else f' {name!r}'}; run segment first.")
    labels = open_image(str(place / "labels" / name))
    with _on_disk(place / "tables" / name / "table.parquet") as file:
        yield Result(
            labels, ObjectTable(file, labels.axes), name, _placement(place / "labels" / name, len(labels.axes))
        )


def _placement(path: Location, n_axes: int) -> Placement | None:
    """Where labels lie in the image they were made from; None if they do not say."""
    group = open_group(path)
    told = None if group is None else group.attrs.get("tiledseg")
    placement: Any = told.get("placement") if isinstance(told, dict) else None
    try:
        pairs = tuple((float(start), float(width)) for start, width in placement)
    except (TypeError, ValueError):
        return None
    return pairs if len(pairs) == n_axes else None


@contextlib.contextmanager
def _on_disk(table: Location) -> Iterator[Path]:
    """A table as a file of this machine."""
    if isinstance(table, Path):
        if not table.is_file():
            raise ImageError(f"{table} is missing; run segment again, which writes it.")
        yield table
        return
    with tempfile.TemporaryDirectory(prefix="tiledseg-") as folder:
        copy = Path(folder) / "table.parquet"
        copy.write_bytes(table.read_bytes())
        yield copy
