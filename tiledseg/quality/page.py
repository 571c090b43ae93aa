"""The page: findings, histogram, maps, and pictures of the most suspicious places."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..markup import document, escaped, figures, map_of, pairs, picture, section, table
from ..pictures import colour_map, heat_map
from .findings import Finding, per_area, scale_of
from .places import Place
from .records import Records
from .sizes import Maps
from .subject import Subject

__all__ = ["page_of"]

Facts = dict[str, Any]
Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 300, 8, 40
MOST_ROWS = 16
MOST_LINES = 2000
"""That are drawn."""


def page_of(
    subject: Subject,
    facts: Facts,
    findings: Sequence[Finding],
    maps: Maps,
    records: Records,
    places: Sequence[tuple[str, Place]],
) -> str:
    """The page of a check.

    Parameters
    ----------
    subject : Subject
    facts : dict
        From `findings.facts_of`.
    findings : sequence of Finding
    maps : Maps
    records : Records
    places : sequence of (str, Place)
        What is suspicious, and a picture.

    Returns
    -------
    page : str
    """
    sections = [
        section("Findings", _findings(findings)),
        section("Sizes", _histogram(facts["sizes"])),
        section("Density", _density(subject, maps)),
        section("Median size", _median(subject, maps)),
        section("Straight edges", _edges(subject, facts["straight_edges"])),
        section("Agreement of neighbouring blocks", _agreement(records)),
        section("Objects cut by the halo", _halo(facts, records)),
        *(section(title, _place(place)) for title, place in places),
        section("What was looked at", _what(subject, facts)),
    ]
    n_to_see = sum(finding.is_suspicious for finding in findings)
    line = "nothing suspicious" if not n_to_see else f"{n_to_see} of {len(findings)} findings to look at"
    return document(f"tiledseg qc: {subject.name}", [facts["labels"], line], _figures(facts), sections)


def _figures(facts: Facts) -> str:
    """The numbers to see first."""
    sizes = facts["sizes"]
    shown = [(f"{facts['n_objects']:,}", "objects")]
    if sizes is not None:
        shown.append((f"{sizes['median']:.1f} {sizes['unit']}", "median diameter"))
    shown.append((f"{facts['straight_edges']['n_lines']:,}", "suspicious straight lines"))
    shown.append((f"{facts['n_at_image_border']:,}", "objects at the border of the image"))
    if "n_cut_by_halo" in facts["run"]:
        shown.append((f"{facts['run']['n_cut_by_halo']:,}", "objects cut by the halo"))
    return figures(shown)


def _findings(findings: Iterable[Finding]) -> str:
    """All of them; those to look at in colour."""
    kinds = {True: ' class="bad"', False: ""}
    rows = (
        f"<tr><td>{escaped(found.name)}</td><td{kinds[found.is_suspicious]}>{escaped(found.text)}</td></tr>"
        for found in findings
    )
    return '<table class="lines">' + "".join(rows) + "</table>"


def _histogram(sizes: Facts | None) -> str:
    """How often diameters occur, on a scale of ratios; the tails in colour, median and quartiles marked."""
    if sizes is None:
        return "<p>there are no objects</p>"
    ends, counts = np.array(sizes["histogram"]["ends"]), np.array(sizes["histogram"]["counts"])
    low, high = math.log(ends[0]), math.log(ends[-1])
    most = int(counts.max())

    def x(diameter: float) -> float:
        return LEFT + (WIDTH - 2 * LEFT) * (math.log(diameter) - low) / (high - low)

    bars = []
    for start, stop, n in zip(ends[:-1], ends[1:], counts, strict=True):
        is_tail = stop <= sizes["tiny_below"] or start >= sizes["huge_above"]
        height = (HEIGHT - BOTTOM - 10) * int(n) / most
        width = max(1.0, x(stop) - x(start) - 1)
        bars.append(
            f'<rect x="{x(start):.1f}" y="{HEIGHT - BOTTOM - height:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="var(--{"bad" if is_tail else "mark"})"><title>{start:.1f} to {stop:.1f}: {int(n):,}</title></rect>'
        )
    first, third = (x(value) for value in sizes["quartiles"])
    middle, bottom = x(sizes["median"]), HEIGHT - BOTTOM
    ticks = "".join(
        f'<line x1="{x(at):.1f}" y1="{bottom}" x2="{x(at):.1f}" y2="{bottom + 5}" stroke="var(--soft)"/>'
        f'<text x="{x(at):.1f}" y="{bottom + 20}" text-anchor="middle">{at:g}</text>'
        for at in _ticks(float(ends[0]), float(ends[-1]))
    )
    caption = (
        f"{most:,} objects in the fullest bar. Band: half of all objects; line: median. Red: under a third of the "
        f"median ({sizes['n_tiny']:,}) or over three times ({sizes['n_huge']:,})."
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="12" fill="var(--soft)">'
        f'<rect x="{first:.1f}" y="0" width="{max(1.0, third - first):.1f}" height="{bottom}" fill="var(--line)"/>'
        f"{''.join(bars)}"
        f'<line x1="{middle:.1f}" y1="0" x2="{middle:.1f}" y2="{bottom}" stroke="var(--ink)" stroke-width="2"/>'
        f'<line x1="0" y1="{bottom}" x2="{WIDTH}" y2="{bottom}" stroke="var(--soft)"/>{ticks}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">diameter in {escaped(sizes["unit"])}</text></svg>'
        f"<p>{escaped(caption)}</p>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two numbers; all whole numbers of the last place where those are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    many = [step * 10.0**power for power in powers for step in range(1, 10)]
    ticks = [at for at in few if low <= at <= high]
    return ticks if len(ticks) > 2 else [at for at in many if low <= at <= high]


def _density(subject: Subject, maps: Maps) -> str:
    """Objects per area."""
    if not maps.counts.any():
        return "<p>there are no objects</p>"
    per, unit = per_area(subject)
    values = np.where(maps.counts > 0, maps.counts / maps.area * per, np.nan)
    most = float(np.nanmax(values))
    return (
        map_of(colour_map(values, 0, most), "objects per area", ("0", f"{most:,.0f} per {unit}"))
        + f"<p>{escaped(_squares(subject, maps))}</p>"
    )


def _median(subject: Subject, maps: Maps) -> str:
    """Median diameters."""
    if not maps.counts.any():
        return "<p>there are no objects</p>"
    scale = scale_of(subject)
    values = maps.medians**scale.power * scale.factor
    low, high = (float(value) for value in np.nanpercentile(values, [2, 98]))
    png = colour_map(values, low, max(high, low * 1.01))
    ends = (f"{low:.1f} {scale.unit} or less", f"{high:.1f} {scale.unit} or more")
    text = f"{_squares(subject, maps)} Few objects in a square make its median a chance."
    return map_of(png, "median diameter", ends) + f"<p>{escaped(text)}</p>"


def _squares(subject: Subject, maps: Maps) -> str:
    more = "" if len(subject.axes) == 2 else " All planes and time points together."
    return f"Squares of {maps.side} px. Grey: no objects.{more}"


def _edges(subject: Subject, found: Facts) -> str:
    """Where the lines are: a drawing, and the least likely ones."""
    if not found["edges"]:
        return (
            "<p>No line of the image has more straight edges of objects than by chance. Looked for were lines along "
            "rows, columns and planes, and parts of such lines, without knowing of blocks.</p>"
        )
    rows = [
        (
            f"{one['across']} {one['position']}" + "".join(f", {axis} {one[axis]}" for axis in "tz" if axis in one),
            ", ".join(f"{axis} {low}:{high}" for axis, (low, high) in one["along"].items()),
            f"{one['n_straight']:,}",
            f"{one['n_expected']:.2g}",
            f"{one['n_crossing']:,}",
        )
        for one in found["edges"][:MOST_ROWS]
    ]
    more = f"<p>The {MOST_ROWS} least likely; qc.json has more.</p>" if len(found["edges"]) > MOST_ROWS else ""
    text = (
        "Lines on which more objects end with a straight edge than by chance. Between them objects are cut, as where "
        "blocks were not stitched, or fields of view were put side by side."
    )
    head = ["across", "along", "end there", "expected", "cross it"]
    return _drawing(subject, found["edges"]) + f"<p>{escaped(text)}</p>" + table(head, rows) + more


def _drawing(subject: Subject, edges: Sequence[Facts]) -> str:
    """The image as a frame, with the lines across y and x."""
    height, width = subject.shape[-2:]
    lines = []
    for one in edges[:MOST_LINES]:
        at = one["position"]
        if one["across"] == "y":
            (x1, x2), y1, y2 = one["along"]["x"], at, at
        elif one["across"] == "x":
            x1, x2, (y1, y2) = at, at, one["along"]["y"]
        else:
            continue
        lines.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" vector-effect="non-scaling-stroke"/>')
    if not lines:
        return ""
    return (
        f'<svg class="map" viewBox="0 0 {width} {height}" role="img" stroke="var(--bad)" stroke-width="2">'
        f'<rect width="{width}" height="{height}" fill="var(--back)" stroke="none"/>{"".join(lines)}</svg>'
    )


def _agreement(records: Records) -> str:
    """Shares of labels that both blocks saw."""
    blocks = records.blocks
    if blocks is None:
        return f"<p>not available: {escaped(records.why)}</p>"
    if not np.isfinite(blocks.agreement).any():
        return "<p>no objects on borders of blocks</p>"
    low = min(0.9, float(np.nanmin(blocks.agreement)))
    png = colour_map(blocks.agreement, low, 1)
    text = (
        "Share of the labels on borders of a block that the block beside it saw as well; each border is told of by the "
        "block before it. Grey: none there."
    )
    return map_of(png, "agreement per block", (f"{low:.0%}", "100%")) + f"<p>{escaped(text)}</p>"


def _halo(facts: Facts, records: Records) -> str:
    """Blocks with objects that reach past the halo."""
    blocks, n = records.blocks, facts["run"].get("n_cut_by_halo")
    if n is None:
        return f"<p>not available: {escaped(records.why)}</p>"
    if not n:
        return "<p>none: every block saw its objects whole</p>"
    text = f"<p>{n:,} objects reach past the halo of a block; a larger --halo sees them whole.</p>"
    if blocks is None:
        return text + f"<p>where is not available: {escaped(records.why)}</p>"
    rows = [
        (", ".join(f"{axis} {i}" for axis, i in one["start"].items()), one["n_objects"]) for one in facts["cut_by_halo"]
    ]
    shown = map_of(heat_map(blocks.n_cut), "objects cut per block", ("1", f"{int(blocks.n_cut.max()):,}"))
    return shown + text + table(["block that begins at", "objects"], rows)


def _place(place: Place) -> str:
    return picture(place.png, place.text, "place") + f"<p>{escaped(place.text)}</p>"


def _what(subject: Subject, facts: Facts) -> str:
    """Labels, image, and sizes."""
    spacing = facts["spacing_um"]
    shape = " x ".join(map(str, facts["shape"]))
    return pairs(
        [
            ("labels", facts["labels"]),
            ("shape", f"{shape} ({facts['axes']})"),
            ("pixel size", "unknown" if spacing is None else " x ".join(f"{s:g}" for s in spacing) + " µm"),
            ("image in pictures", None if subject.image is None else subject.image.name),
        ]
    )
