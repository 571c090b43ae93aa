"""Whether the object table tells of the labels that are there: read by row groups."""

from __future__ import annotations

from pathlib import Path

from ..errors import OutputError
from ..remote import Location

__all__ = ["Sums", "sums_of"]

Sums = tuple[int, int]
"""Rows, and pixels of all of them."""


def sums_of(table: Location | None) -> Sums | None:
    """Add up a table.

    Parameters
    ----------
    table : Path, RemotePath or None
        Parquet.

    Returns
    -------
    sums : (int, int) or None
        None if there is none on a disk: one in a remote store is not fetched for this.

    Raises
    ------
    OutputError
        If it cannot be read.
    """
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    if not isinstance(table, Path) or not table.is_file():
        return None
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            names = [name for name in ("area", "volume") if name in file.schema_arrow.names]
            if not names:
                return None
            sizes = (
                pyarrow.compute.sum(file.read_row_group(i, columns=names[:1])[names[0]]).as_py() or 0
                for i in range(file.num_row_groups)
            )
            return int(file.metadata.num_rows), int(sum(sizes))
    except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise OutputError(f"table {table} cannot be read ({error}); run segment again to write it anew.") from error
