"""Quality of a finished segmentation: figures and pictures that say where to look, without knowing the truth.

In the order of a check: `subject` is what is looked at; `regions` goes through the labels once, for `sizes` and
straight `edges`; `records` are what the run wrote down, `table` what the table says; `findings` puts it into words,
`places` into pictures, and `page` on a page.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..addresses import cleaned
from ..cluster import connect
from ..disk import write_whole
from ..errors import OutputError, SettingsError
from ..remote import Location, location
from ..store import disk_errors
from .findings import Finding, facts_of, findings_of
from .page import page_of
from .places import Place, place_of_edge, place_of_object
from .records import records_of
from .regions import Labelled, look_at, n_regions
from .subject import Subject, open_subject
from .table import sums_of

__all__ = ["Finding", "Quality", "qc"]

FEW_REGIONS = 4
MOST_EDGES = 6
"""Of which there are pictures."""

Listener = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quality:
    """What a check found.

    Attributes
    ----------
    findings : tuple of Finding
        A line each; those to look at have ``is_suspicious``.
    facts : dict
        All figures, as in ``qc.json``.
    html : str
        The page.
    path : Path, RemotePath or None
        Where it was written; the figures lie beside it.
    """

    findings: tuple[Finding, ...]
    facts: dict[str, Any]
    html: str = dataclasses.field(repr=False)
    path: Location | None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"findings": [dataclasses.asdict(found) for found in self.findings], **self.facts}


def qc(
    result: Any,
    *,
    name: str | None = None,
    image: Any = None,
    channel: str | int | None = None,
    page: str | os.PathLike[str] | None = None,
    scratch: str | os.PathLike[str] | None = None,
    client: Any = None,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Listener | None = None,
) -> Quality:
    """Look over labels: sizes, density, how well blocks agreed, and straight edges that look like borders of blocks.

    Parameters
    ----------
    result : Segmentation, path, address or array
        What `segment` returned, or the OME-Zarr that it wrote; or any labels: of other programs, or an array.
    name : str, optional
        Of the labels, if there are several.
    image : path, address or array, optional
        Shown below the outlines. Default: the OME-Zarr that holds the labels, if it is an image.
    channel : str or int, optional
        Of the image.
    page : path or address, optional
        Page to write, ``.html``; the figures go beside it as ``.json``. Default: ``qc.html`` beside the table, and
        nothing where there is none.
    scratch : path, optional
        Of the run, for the maps of its blocks. Default: where its report says it is.
    client, scheduler, workers
        As for `segment`.
    progress : callable, optional
        Called with stage, pieces done, pieces in all.

    Returns
    -------
    Quality

    Raises
    ------
    TiledsegError
        If there are no labels, the image is not theirs, or the page cannot be written.

    Notes
    -----
    The labels are read once, region by region, wherever the workers are. Straight edges are looked for without knowing
    the blocks, see `quality.edges` for the method: it finds a border on which a fifth of the cells are cut.
    Diameters are those of a circle (or ball) of the same size.
    """
    if hasattr(result, "report_path"):  # a Segmentation, for which this module need not load the network
        result = result.labels if result.path is None else str(result.path)
    subject = open_subject(result, name, image, channel)
    target = _target(subject, page)
    records = records_of(subject, None if scratch is None else Path(scratch))
    table = sums_of(None if subject.table_folder is None else subject.table_folder / "table.parquet")
    is_small = n_regions(subject) <= FEW_REGIONS or not subject.labels.is_shippable
    with connect(client, scheduler=scheduler, workers=workers, device="cpu", small=is_small) as executor:
        labelled = look_at(subject, executor, progress)
    facts = cleaned(facts_of(subject, labelled, records, table))
    findings = findings_of(subject, facts, labelled, records)
    places = _places(subject, labelled, facts)
    html = page_of(subject, facts, findings, labelled.sizes.maps(), records, places)
    quality = Quality(tuple(findings), facts, html, target)
    if target is not None:
        _write(target, html.encode())
        _write(_beside(target), json.dumps(quality.as_dict(), indent=1).encode())
    return quality


def _target(subject: Subject, page: str | os.PathLike[str] | None) -> Location | None:
    """Where the page goes."""
    if page is not None:
        place = location(page)
        if not place.name.lower().endswith((".html", ".htm")):
            raise SettingsError(f"the page {place} should end in .html.")
        return _writable(place)
    folder = subject.table_folder
    if folder is None or not (folder / "table.parquet").is_file():
        return None
    return _writable(folder / "qc.html")


def _writable(place: Location) -> Location:
    """The same, if it can be written."""
    if not isinstance(place, Path) and not place.is_writable:
        raise OutputError(f"{place} is on a web server, which is read only; say where the page goes (-o page.html).")
    if isinstance(place, Path) and not place.parent.is_dir():
        raise OutputError(f"cannot write {place}: its folder does not exist; make it, or give another page (-o).")
    return place


def _beside(page: Location) -> Location:
    """Where the figures go."""
    return page.parent / f"{page.name.rpartition('.')[0]}.json"


def _places(subject: Subject, labelled: Labelled, facts: dict[str, Any]) -> list[tuple[str, Place]]:
    """Pictures: the least likely lines, and objects of the tails."""
    shown = []
    for frame, edge in labelled.edges[:MOST_EDGES]:
        across = subject.object_axes[edge.axis]
        title = (
            f"Straight line across {across} at {edge.position}: {edge.n_straight} objects end, {edge.n_crossing} do not"
        )
        shown.append((title, place_of_edge(subject, frame, edge)))
    sizes, tails = facts["sizes"], labelled.sizes
    if sizes is not None and sizes["n_tiny"]:
        shown += [
            (f"One of the smallest: {row[0]:,} px", place_of_object(subject, frame, row))
            for frame, row in tails.smallest()
        ]
    if sizes is not None and sizes["n_huge"]:
        shown += [
            (f"One of the largest: {row[0]:,} px", place_of_object(subject, frame, row))
            for frame, row in tails.largest()
        ]
    return shown


def _write(place: Location, content: bytes) -> None:
    """Write a file of the result."""
    if not isinstance(place, Path):
        place.upload(content)
        return
    with disk_errors(place):
        write_whole(place, lambda file: file.write(content), place.parent)
