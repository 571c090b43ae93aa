"""The object table as CSV, a row group at a time."""

from __future__ import annotations

from pathlib import Path

from .result import Result

__all__ = ["write_csv"]


def write_csv(result: Result, path: Path) -> None:
    """Write the object table: a line of names, then a line per object.

    Parameters
    ----------
    result : Result
    path : Path
        Of the file; what is there is replaced.
    """
    import pyarrow.csv

    with pyarrow.csv.CSVWriter(path, result.table.schema) as writer:
        for rows in result.table.batches():
            writer.write_table(rows)
