"""How images, plans, diameters and results look in Jupyter: a picture, key figures, a histogram.

Everything that comes from files is escaped. Styles stand in the elements themselves, for notebooks that are not
trusted show no others; pictures are within the page. A picture reads few pixels whatever the size of the image; one
that cannot be made is replaced by a sentence that says why.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .canvas import data_uri
from .displayed import place_text
from .errors import TiledsegError
from .images import Image
from .job import Diameter, Estimate
from .looks import look_at
from .pictures import histogram
from .pipeline import Plan, Segmentation
from .preflight import size_text
from .quicklook import overview_of
from .tuning import Tuned, Tuner

__all__ = ["figures", "html_of", "image_tag", "table"]

SIDE = 400
"""Of an overview."""
ROWS_READ = 2**20
"""Of a table, for a histogram."""
MOST_CHANNELS = 12
"""That are listed."""
SOFT = "color:gray"

Row = tuple[str, object]


def html_of(shown: Any) -> str:
    """What Jupyter shows of something.

    Parameters
    ----------
    shown : Segmentation, Image, Plan or Diameter

    Returns
    -------
    page : str
        HTML without scripts or references.
    """
    view: Callable[[Any], str] = next(view for kind, view in VIEWS.items() if isinstance(shown, kind))
    return view(shown)


def escaped(value: object) -> str:
    """Anything, safe within HTML."""
    return html.escape(str(value))


def table(rows: Iterable[Row]) -> str:
    """Names and values."""
    lines = (
        f'<tr><td style="text-align:left;{SOFT}">{escaped(name)}</td>'
        f'<td style="text-align:left">{escaped(value)}</td></tr>'
        for name, value in rows
        if value is not None
    )
    return f"<table>{''.join(lines)}</table>"


def figures(title: str, rows: Sequence[Row]) -> str:
    """The numbers to see first, under a title."""
    parts = "".join(
        f'<span style="display:inline-block;margin:0 2em .4em 0"><b style="font-size:1.35em">{escaped(value)}</b> '
        f'<span style="{SOFT}">{escaped(name)}</span></span>'
        for name, value in rows
        if value is not None
    )
    return f'<div style="margin:.3em 0"><b>{escaped(title)}</b></div><div>{parts}</div>'


def image_tag(picture: Any, caption: str) -> str:
    """A picture within the page, with a line under it."""
    return (
        f'<img alt="{escaped(caption)}" src="{data_uri(picture)}" style="max-width:100%">'
        f'<div style="{SOFT};font-size:.9em">{escaped(caption)}</div>'
    )


def _side_by_side(*parts: str) -> str:
    """Parts beside each other where there is room."""
    boxes = "".join(f'<div style="margin:0 1.5em .6em 0">{part}</div>' for part in parts if part)
    return f'<div style="display:flex;flex-wrap:wrap;align-items:flex-start">{boxes}</div>'


def _overview(source: Any) -> str:
    """A picture of all, or why there is none."""
    why = ""
    for labels in (None, False):  # with those that there are; if that cannot be done, without
        try:
            picture = overview_of(look_at(source, labels=labels), SIDE)
        except TiledsegError as error:
            why = why or str(error)
        else:
            return image_tag(picture, f"{picture.caption}{f'; no outlines: {why}' if why else ''}")
    return f'<div style="{SOFT}">no picture: {escaped(why)}</div>'


def _image(image: Image) -> str:
    """An image: what is known, and a picture."""
    spacing = image.spacing_um()
    rows: list[Row] = [
        ("axes", image.axes),
        ("shape", _by(image.shape)),
        ("type", image.dtype),
        ("pixel size", "not known" if spacing is None else f"{_by(f'{s:g}' for s in spacing)} µm"),
        ("channels", _channels(image.channels)),
        ("levels", "; ".join(_by(level.shape) for level in image.levels)),
        ("chunks", _by(image.levels[0].chunks)),
        ("OME-Zarr", image.ome_version),
    ]
    return _side_by_side(_overview(image), f"<b>{escaped(image.name)}</b>{table(rows)}")


def _segmentation(result: Segmentation) -> str:
    """A result: picture with outlines, key figures, how large objects are."""
    report = result.report
    diameter = report.diameter
    numbers: list[Row] = [
        ("objects", f"{report.n_objects:,}"),
        ("diameter", None if diameter is None else f"{diameter.value:.1f} px"),
        ("blocks", f"{report.n_blocks:,}"),
        ("cut at a border of blocks", report.n_seam - report.n_seam_linked),
        ("in all", f"{report.wall_seconds:.1f} s"),
        ("peak memory", size_text(report.peak_memory)),
    ]
    rows: list[Row] = [
        ("diameter", None if diameter is None else _diameter_text(diameter)),
        ("model", None if report.model is None else f"{report.model['name']}, {report.model['precision']}"),
        ("function", report.segmenter),
        ("shown", report.channel if result.image.n_channels > 1 else None),
        ("cut by the halo", f"{report.n_cut_by_halo:,} objects" if report.n_cut_by_halo else None),
        ("left out as too large", f"{report.n_too_large:,} objects" if report.n_too_large else None),
        ("labels", place_text(result.path)),
        ("table", place_text(result.table_path)),
        ("report", place_text(result.report_path)),
    ]
    sizes, caption = _sizes_of(result)
    drawn = _histogram(sizes, caption)
    return figures(result.image.name, numbers) + _side_by_side(_overview(result), drawn + table(rows))


def _sizes_of(result: Segmentation) -> tuple[npt.NDArray[np.float64], str]:
    """Diameters of the objects as circles or balls, of a part of them if there are very many."""
    try:
        found, n_all = result.object_sizes(ROWS_READ)
    except (TiledsegError, OSError, ValueError):
        return np.zeros(0), ""  # the table was moved or deleted: the rest is still of use
    part = "" if found.size == n_all else f" of {found.size:,} of {n_all:,} objects"
    shape = "circles" if len(result.job.extent.objects) == 2 else "balls"
    return found, f"Diameters{part}, as {shape} of the same size."


def _histogram(sizes: npt.NDArray[np.float64], caption: str) -> str:
    """A histogram of diameters, nothing of none."""
    if sizes.size == 0:
        return ""
    file = io.BytesIO()
    low, median, high = np.percentile(sizes, [25, 50, 75]).tolist()
    histogram(sizes, file, median, (low, high))
    return (
        f'<img alt="{escaped(caption)}" src="{data_uri(file.getvalue())}" style="width:30em;max-width:100%">'
        f'<div style="{SOFT};font-size:.9em">{escaped(caption)}</div>'
    )


def _diameter(diameter: Diameter) -> str:
    """A diameter: value, spread, and what it rests on."""
    rows: list[Row] = [("it is", _source_text(diameter))]
    if diameter.source == "estimated":
        low, high = diameter.quartiles
        rows += [
            ("half of the objects", f"{low:.1f} to {high:.1f} px"),
            ("rests on", f"{diameter.n_objects:,} objects in {diameter.n_windows:,} windows"),
        ]
    sizes = diameter.sizes if isinstance(diameter, Estimate) else np.zeros(0)
    drawn = _histogram(sizes, "Of the objects that the estimate rests on.")
    return figures("Diameter", [("px", f"{diameter.value:.2f}")]) + _side_by_side(drawn, table(rows))


def _plan(plan: Plan) -> str:
    """What a run would do, and need."""
    image, seconds = plan["image"], plan["seconds"]
    numbers: list[Row] = [
        ("blocks", f"{plan['n_blocks']:,}"),
        ("network tiles", f"{plan['n_tiles']:,}"),
        ("memory at most", size_text(plan["memory_bytes"])),
        ("scratch at most", size_text(plan["scratch_bytes"]) if plan["scratch"] else None),
        *((stage, f"{n:,.0f} s at most") for stage, n in seconds.items()),
    ]
    source = {"given": "as given", "assumed": "assumed: the survey will estimate it"}
    rows: list[Row] = [
        ("image", f"{image['name']}: {image['axes']} {_by(image['shape'])}, {image['dtype']}"),
        ("shown", plan["channel"] if len(image["channels"]) > 1 else None),
        ("diameter", f"{plan['diameter']:g} px, {source.get(plan['diameter_source'], 'as the survey found')}"),
        ("halo", f"{plan['halo']} px"),
        ("workers", f"{plan['n_workers']} x {plan['n_threads']} threads"),
        ("labels", place_text(plan["labels"])),
        ("table", place_text(plan["table"])),
        ("scratch", place_text(plan["scratch"])),
        ("there is", plan["state"]),
    ]
    refused = ""
    if plan["refused"] is not None:
        refused = f'<div style="color:#b3261e"><b>It would be refused:</b> {escaped(plan["refused"])}</div>'
    return figures("What a run would do", numbers) + refused + table(rows)


def _source_text(diameter: Diameter) -> str:
    return {"given": "as given", "default": "a guess: too few objects were found"}.get(diameter.source, diameter.source)


def _diameter_text(diameter: Diameter) -> str:
    """In one line."""
    text = f"{diameter.value:.2f} px, {_source_text(diameter)}"
    if diameter.source != "estimated":
        return text
    low, high = diameter.quartiles
    return f"{text}, half of {diameter.n_objects:,} objects {low:.1f} to {high:.1f}"


def _channels(names: Sequence[str]) -> str:
    more = len(names) - MOST_CHANNELS
    return ", ".join(names[:MOST_CHANNELS]) + (f" and {more} more" if more > 0 else "")


def _by(numbers: Iterable[object]) -> str:
    return " x ".join(str(n) for n in numbers)


def _tuner(tuner: Tuner) -> str:
    """What a tuner shows, for readers without sliders."""
    return _tuned(tuner.shown)


def _tuned(tuned: Tuned) -> str:
    """What settings give in a region."""
    numbers: list[Row] = [("objects", f"{tuned.n_objects:,}"), ("before", f"{tuned.n_before:,}")]
    legend = "; ".join(f"{name} {getattr(tuned, f'n_{name}'):,} ({COLOUR_NAMES[name]})" for name in COLOUR_NAMES)
    given = ", ".join(f"{name}={value!r}" for name, value in tuned.settings.items()) or "as by default"
    return (
        figures("Objects in the region", numbers)
        + f'<div>{escaped(legend)}; unchanged: grey</div><div style="{SOFT}">{escaped(given)}</div>'
        + image_tag(tuned.picture, tuned.picture.caption)
    )


COLOUR_NAMES = {"gained": "blue", "lost": "orange", "changed": "yellow"}
VIEWS: dict[type, Callable[[Any], str]] = {
    Tuner: _tuner,
    Tuned: _tuned,
    Segmentation: _segmentation,
    Image: _image,
    Plan: _plan,
    Diameter: _diameter,
}
