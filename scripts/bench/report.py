"""What the benchmarks share on their way out: tables, targets, a JSON file, the exit code."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

THRESHOLDS = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Target:
    """A figure and the limit it must keep.

    Attributes
    ----------
    name : str
        What is measured.
    value, limit : float
        The figure, and what it is held against.
    at_least : bool
        Whether the limit is a lower one.
    needs_size : bool
        Whether the figure (a time, a memory, a share of few objects) says nothing at toy size.
    """

    name: str
    value: float
    limit: float
    at_least: bool = True
    needs_size: bool = True

    @property
    def is_met(self) -> bool:
        """Whether the figure keeps the limit; one that is not a number does not."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


class Table:
    """A table printed row by row, as the rows come.

    Parameters
    ----------
    columns : mapping of str to int
        Title and width of each column; the first is flush left.
    """

    def __init__(self, columns: Mapping[str, int]) -> None:
        self.columns = dict(columns)
        self.rows: list[dict[str, Any]] = []
        self._print(list(self.columns))

    def add(self, row: Mapping[str, Any]) -> None:
        """Print a row; what it has no value for stays empty, a note comes at its end."""
        self.rows.append(dict(row))
        self._print([as_text(row.get(title)) for title in self.columns], str(row.get("note", "")))

    def _print(self, cells: Sequence[str], note: str = "") -> None:
        widths = list(self.columns.values())
        first, *others = zip(cells, widths, strict=True)
        line = f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others)
        print(f"{line}  {note}".rstrip(), flush=True)


def as_text(value: Any) -> str:
    """A cell of a table: three figures of a number, all of several joined by a slash."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " / ".join(f"{item:.3f}" for item in value)
    if isinstance(value, float):
        return "?" if math.isnan(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that every benchmark has."""
    lines = (description or "").strip().splitlines()
    made = argparse.ArgumentParser(description=lines[0] if lines else None)
    made.add_argument("--toy", action="store_true", help="small sizes, at which most targets are not judged")
    made.add_argument("--save", type=Path, metavar="FILE", help="also write rows and targets as JSON")
    return made


def save(path: Path | None, rows: Sequence[Mapping[str, Any]], targets: Sequence[Target] = ()) -> None:
    """Write what there is so far; a run that is stopped leaves its finished rows."""
    if path is not None:
        judged = [{**asdict(target), "is_met": target.is_met} for target in targets]
        path.write_text(json.dumps({"rows": list(rows), "targets": judged}, indent=1) + "\n")


def finish(targets: Sequence[Target], rows: Sequence[Mapping[str, Any]], *, toy: bool, path: Path | None = None) -> int:
    """Print each target and whether it is met, save everything; returns the exit code.

    Returns
    -------
    code : int
        1 if a judged target is missed, else 0.
    """
    save(path, rows, targets)
    is_good = True
    print()
    for target in targets:
        is_judged = not (toy and target.needs_size)
        verdict = ("met" if target.is_met else "MISSED") if is_judged else "not judged at toy size"
        is_good &= target.is_met or not is_judged
        sign = ">=" if target.at_least else "<="
        print(f"{target.name}: {target.value:.4g} (target {sign} {target.limit:.4g}): {verdict}")
    return 0 if is_good else 1
