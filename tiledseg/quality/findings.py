"""What the figures say, in plain words: one line a finding, those to look at marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..grid import Index
from .edges import Edge, period_of
from .records import Records
from .regions import Labelled
from .sizes import Sizes
from .subject import Subject
from .table import Sums

__all__ = ["Finding", "Scale", "facts_of", "findings_of", "scale_of"]

TINY, HUGE = 1 / 3, 3.0
"""Diameters by the median: below and above, an object is in a tail."""
MANY_TINY, MANY_HUGE = 0.05, 0.01
"""Shares of all objects that are many."""
WELL_AGREED = 0.98
MOST_EDGES = 200
"""That are listed in `facts_of`."""

Facts = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes
    ----------
    name : str
        What it is about.
    text : str
    is_suspicious : bool
        Whether somebody should look.
    """

    name: str
    text: str
    is_suspicious: bool = False


@dataclass(frozen=True)
class Scale:
    """From pixels of objects to diameters: of the circle, or ball, of the same size.

    Attributes
    ----------
    unit : str
        ``"µm"``, or ``"px"`` (of x) where the pixel size is not known.
    power, factor : float
        A diameter is `factor` times the size to the `power`.
    """

    unit: str
    power: float
    factor: float

    def diameter(self, size: float) -> float:
        """Of a size in pixels."""
        return float(self.factor * size**self.power)

    def size(self, diameter: float) -> float:
        """In pixels, of a diameter."""
        return float((diameter / self.factor) ** (1 / self.power))


def scale_of(subject: Subject) -> Scale:
    """What diameters of the labels are given in."""
    ndim, spacing = len(subject.object_shape), subject.spacing_um
    round_one = 4 / math.pi if ndim == 2 else 6 / math.pi
    volume = 1.0 if spacing is None else math.prod(spacing)
    return Scale("px" if spacing is None else "µm", 1 / ndim, (round_one * volume) ** (1 / ndim))


def facts_of(subject: Subject, labelled: Labelled, records: Records, table: Sums | None) -> Facts:
    """All figures, ready for JSON.

    Parameters
    ----------
    subject : Subject
    labelled : Labelled
    records : Records
    table : (int, int) or None

    Returns
    -------
    facts : dict
    """
    sizes, scale = labelled.sizes, scale_of(subject)
    lines = {(frame, edge.axis, edge.position) for frame, edge in labelled.edges}
    by_axis = {axis: _positions(labelled.edges, i) for i, axis in enumerate(subject.object_axes)}
    return {
        "labels": str(subject.labels.name),
        "axes": subject.axes,
        "shape": list(subject.shape),
        "spacing_um": subject.spacing_um,
        "n_objects": sizes.n_objects,
        "n_pixels": sizes.n_pixels,
        "largest_id": sizes.largest_id,
        "table": None if table is None else {"n_rows": table[0], "n_pixels": table[1]},
        "sizes": _sizes(sizes, scale) if sizes.n_objects else None,
        "n_at_image_border": sizes.n_at_border,
        "straight_edges": {
            "n_lines": len(lines),
            "positions": by_axis,
            "every": {axis: period_of(positions) for axis, positions in by_axis.items()},
            "share_cut": _share_cut(labelled.edges),
            "edges": [_edge(subject, frame, edge) for frame, edge in labelled.edges[:MOST_EDGES]],
        },
        "run": {**records.report, "not_known": records.why},
        "cut_by_halo": None
        if records.blocks is None
        else [
            {"start": dict(zip(subject.axes, start, strict=True)), "n_objects": n} for start, n in records.blocks.places
        ],
    }


def _positions(edges: Sequence[tuple[Index, Edge]], axis: int) -> list[int]:
    """Of lines across one axis, in order."""
    return sorted({edge.position for _, edge in edges if edge.axis == axis})


def _share_cut(edges: Sequence[tuple[Index, Edge]]) -> float | None:
    """Of the objects at all lines, those that end there."""
    n_straight, n_crossing = (sum(getattr(edge, name) for _, edge in edges) for name in ("n_straight", "n_crossing"))
    return n_straight / (n_straight + n_crossing) if n_straight else None


def _edge(subject: Subject, frame: Index, edge: Edge) -> Facts:
    """One straight edge."""
    parts = zip(subject.object_axes, edge.region, strict=True)
    return {
        **dict(zip(subject.axes, frame, strict=False)),
        "across": subject.object_axes[edge.axis],
        "position": edge.position,
        "along": {axis: [p.start, p.stop] for i, (axis, p) in enumerate(parts) if i != edge.axis},
        "n_straight": edge.n_straight,
        "n_expected": edge.n_expected,
        "n_crossing": edge.n_crossing,
        "chance": edge.chance,
    }


def _sizes(sizes: Sizes, scale: Scale) -> Facts:
    """Diameters and tails."""
    quartiles = sizes.quantiles((0.05, 0.25, 0.5, 0.75, 0.95))
    low, first, median, third, high = (scale.diameter(size) for size in quartiles)
    tiny, huge = scale.size(TINY * median), scale.size(HUGE * median)
    counts, ends = sizes.histogram(scale.power)
    return {
        "unit": scale.unit,
        "median": median,
        "quartiles": [first, third],
        "percentiles_5_95": [low, high],
        "tiny_below": TINY * median,
        "n_tiny": sizes.n_between(0, tiny),
        "huge_above": HUGE * median,
        "n_huge": sizes.n_between(huge, math.inf),
        "histogram": {"ends": (ends * scale.factor).tolist(), "counts": counts.tolist()},
    }


def findings_of(subject: Subject, facts: Facts, labelled: Labelled, records: Records) -> list[Finding]:
    """What to tell, the most important last but one: see `Finding`.

    Parameters
    ----------
    subject : Subject
    facts : dict
        From `facts_of`.
    labelled : Labelled
    records : Records

    Returns
    -------
    findings : list of Finding
    """
    found = [_objects(facts), *_table(facts)]
    if facts["sizes"] is not None:
        found += [_tails(facts), _density(subject, labelled.sizes), _at_border(facts)]
    return [*found, _halo(facts), _agreement(facts, records), _edges(facts)]


def _objects(facts: Facts) -> Finding:
    n, last = facts["n_objects"], facts["largest_id"]
    if n == 0:
        return Finding("objects", "none", True)
    ids = "ids 1 to N without gaps" if n == last else f"the largest id is {last:,}"
    if n > last:
        return Finding(
            "objects", f"{n:,}, more than the largest id, {last:,}: some ids stand for several objects", True
        )
    return Finding("objects", f"{n:,}, {ids}")


def _table(facts: Facts) -> list[Finding]:
    table = facts["table"]
    if table is None:
        return []
    if (table["n_rows"], table["n_pixels"]) == (facts["n_objects"], facts["n_pixels"]):
        return [Finding("table", "a row for each of them, with the same pixels in all")]
    return [
        Finding(
            "table",
            f"{table['n_rows']:,} rows with {table['n_pixels']:,} pixels, but the labels have {facts['n_objects']:,} "
            f"objects with {facts['n_pixels']:,}: one is not of the other",
            True,
        )
    ]


def _tails(facts: Facts) -> Finding:
    sizes, n = facts["sizes"], facts["n_objects"]
    unit, (first, third) = sizes["unit"], sizes["quartiles"]
    tiny, huge = sizes["n_tiny"] / n, sizes["n_huge"] / n
    text = (
        f"diameters {sizes['median']:.1f} {unit} (quartiles {first:.1f} and {third:.1f}); {tiny:.1%} are under a third "
        f"of that, {huge:.1%} over three times"
    )
    if tiny > MANY_TINY:
        text += "; many are tiny: cells that fell apart, or specks (a larger --min-size drops them)"
    if huge > MANY_HUGE:
        text += "; many are huge: cells that were merged, or no cells"
    return Finding("sizes", text, tiny > MANY_TINY or huge > MANY_HUGE)


def _density(subject: Subject, sizes: Sizes) -> Finding:
    """How many there are in an area, and in how much of the image there are none."""
    maps = sizes.maps()
    per, unit = per_area(subject)
    per_square = maps.counts / maps.area * per
    occupied = per_square[maps.counts > 0]
    low, high = np.percentile(occupied, [5, 95])
    empty = float(maps.area[maps.counts == 0].sum() / maps.area.sum())
    return Finding(
        "density",
        f"{sizes.n_objects / maps.area.sum() * per:,.0f} objects per {unit}; {low:,.0f} to {high:,.0f} where there are "
        f"any, none in {empty:.0%} of the image (squares of {maps.side} px)",
    )


def per_area(subject: Subject) -> tuple[float, str]:
    """Pixels of an area to count in, and what it is called."""
    spacing = subject.spacing_um
    if spacing is None:
        return 1e6, "million pixels"
    return 1e6 / (spacing[-1] * spacing[-2]), "mm²"


def _at_border(facts: Facts) -> Finding:
    n = facts["n_at_image_border"]
    return Finding("image border", f"{n:,} objects touch it ({n / facts['n_objects']:.1%}) and may be cut by it")


def _halo(facts: Facts) -> Finding:
    n = facts["run"].get("n_cut_by_halo")
    if n is None:
        return Finding("cut by halo", f"not known: {facts['run']['not_known']}")
    if not n:
        return Finding("cut by halo", "no objects: every block saw its own whole")
    where = ""
    if facts["cut_by_halo"]:
        names = [", ".join(f"{axis} {i}" for axis, i in one["start"].items()) for one in facts["cut_by_halo"][:3]]
        where = f"; most in the blocks that begin at {'; '.join(names)}"
    return Finding("cut by halo", f"{n:,} objects reach past it{where}; a larger --halo sees them whole", True)


def _agreement(facts: Facts, records: Records) -> Finding:
    run = facts["run"]
    if "n_seam" not in run or "n_seam_linked" not in run:
        return Finding("neighbours", f"not known: {run['not_known']}")
    if not run["n_seam"]:
        return Finding("neighbours", "no objects on borders of blocks")
    share = run["n_seam_linked"] / run["n_seam"]
    text = f"of {run['n_seam']:,} labels on borders of blocks {share:.1%} were seen by both"
    if records.blocks is None:
        text += f"; no map: {records.why}"
    return Finding("neighbours", text, share < WELL_AGREED)


def _edges(facts: Facts) -> Finding:
    found = facts["straight_edges"]
    if not found["n_lines"]:
        return Finding("edges", "no straight edges that look like block borders")
    parts = []
    for axis, positions in found["positions"].items():
        if positions:
            every = found["every"][axis]
            shown = ", ".join(map(str, positions[:4])) + (", ..." if len(positions) > 4 else "")
            parts.append(f"across {axis} at {shown}" + (f" (most at multiples of {every})" if every else ""))
    return Finding(
        "edges",
        f"objects end in {found['n_lines']:,} straight lines, as at borders of blocks that were not stitched: "
        f"{'; '.join(parts)}; {found['share_cut']:.0%} of the objects at these lines are cut",
        True,
    )
