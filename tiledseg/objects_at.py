"""Objects of the published result by where they lie: rows of the table, and the pixels of each object's own box.

The table and the labels are all that is needed, so a finished result can be taken up again without its scratch. An
object belongs to the region in which its box begins, and its pixels are read wherever they are: no object is cut.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import OutputError
from .grid import Region

__all__ = ["ObjectTable", "Window", "windows_of"]

GROUPS_KEPT = 3
"""Row groups of a table that are kept in memory: neighbouring regions need the same."""

Boxes = npt.NDArray[np.int64]


class ObjectTable:
    """The object table by place.

    Parameters
    ----------
    source : Path or pyarrow.Table
        The file, or the table itself.
    axes : str
        Those of the labels.

    Raises
    ------
    OutputError
        If the file is not an object table.
    """

    def __init__(self, source: Any, axes: str) -> None:
        import pyarrow
        import pyarrow.parquet

        self.source, self.axes = source, axes
        self._lock = threading.Lock()
        self._file: Any = None
        if isinstance(source, Path):
            try:
                self._file = pyarrow.parquet.ParquetFile(source)
            except (OSError, pyarrow.ArrowException) as error:
                raise OutputError(f"the table {source} cannot be read ({error}); run segment again.") from error
        self.schema = source.schema if self._file is None else self._file.schema_arrow
        boxed = [f"bbox_{axis}_start" in self.schema.names for axis in axes]
        self._starts = [f"bbox_{axis}_start" if is_boxed else axis for axis, is_boxed in zip(axes, boxed, strict=True)]
        self._stops = [f"bbox_{axis}_stop" if is_boxed else axis for axis, is_boxed in zip(axes, boxed, strict=True)]
        self._beyond = np.array([0 if is_boxed else 1 for is_boxed in boxed])
        self.object_axes = "".join(axis for axis, is_boxed in zip(axes, boxed, strict=True) if is_boxed)
        missing = {"label", *self._starts, *self._stops} - set(self.schema.names)
        if missing:
            raise OutputError(f"the table {source} has no column {min(missing)!r}; run segment again.")
        self.n_objects = source.num_rows if self._file is None else self._file.metadata.num_rows

    def batches(self) -> Iterator[Any]:
        """All rows, a pyarrow.Table per row group."""
        if self._file is None:
            yield self.source
            return
        for group in range(self._file.metadata.num_row_groups):
            yield self._file.read_row_group(group)

    def starting_in(self, region: Region, columns: tuple[str, ...] | None = None) -> Any:
        """Rows of the objects whose box begins in a region.

        Parameters
        ----------
        region : tuple of slice
            One per axis.
        columns : tuple of str, optional
            More columns than those of labels and boxes; None for all.

        Returns
        -------
        rows : pyarrow.Table
            In order of their labels.
        """
        import pyarrow

        needed = None if columns is None else tuple(dict.fromkeys(("label", *self._starts, *self._stops, *columns)))
        names = self.schema.names if needed is None else needed
        found = [pyarrow.table({name: pyarrow.array([], self.schema.field(name).type) for name in names})]
        for group in self._groups_near(region):
            rows = self._group(group, needed)
            is_in = np.ones(rows.num_rows, bool)
            for name, part in zip(self._starts, region, strict=True):
                at = rows[name].to_numpy()
                is_in &= (at >= part.start) & (at < part.stop)
            if is_in.any():
                found.append(rows.filter(pyarrow.array(is_in)))
        return pyarrow.concat_tables(found)

    def boxes_of(self, rows: Any) -> Boxes:
        """Boxes of some rows, shape (n, 2, axes): first and one-past-last index."""
        low = np.stack([rows[name].to_numpy() for name in self._starts], 1)
        high = np.stack([rows[name].to_numpy() for name in self._stops], 1) + self._beyond
        return np.stack([low, high], 1).astype(np.int64)

    def _groups_near(self, region: Region) -> list[int]:
        """Row groups that may hold objects that begin in a region, by the least and largest values noted of each."""
        if self._file is None:
            return [0]
        metadata = self._file.metadata
        columns = [self._file.schema_arrow.get_field_index(name) for name in self._starts]
        near = []
        for group in range(metadata.num_row_groups):
            noted = [metadata.row_group(group).column(column).statistics for column in columns]
            if all(
                of is None or not of.has_min_max or (of.min < part.stop and of.max >= part.start)
                for of, part in zip(noted, region, strict=True)
            ):
                near.append(group)
        return near

    def _group(self, group: int, columns: tuple[str, ...] | None) -> Any:
        """A row group, read once for neighbouring regions."""
        if self._file is None:
            return self.source if columns is None else self.source.select(list(columns))
        with self._lock:
            return self._read(group, columns)

    @functools.cached_property
    def _read(self) -> Any:
        @functools.lru_cache(GROUPS_KEPT)
        def read(group: int, columns: tuple[str, ...] | None) -> Any:
            return self._file.read_row_group(group, None if columns is None else list(columns))

        return read


@dataclass(frozen=True)
class Window:
    """A part of the image that holds some objects whole.

    Attributes
    ----------
    region : tuple of slice
    which : array of int
        The objects, by their position among those given.
    """

    region: Region
    which: npt.NDArray[np.intp]


def windows_of(region: Region, boxes: Boxes) -> Iterator[Window]:
    """What to read of the image for the objects that begin in a region.

    Parameters
    ----------
    region : tuple of slice
    boxes : array of int64, shape (n, 2, axes)
        Of objects that begin in it.

    Yields
    ------
    window : Window
        One that reaches at most as far beyond the region as the region is long, for all that lie in it; then one
        for every larger object, of its own box. All objects are in exactly one.
    """
    limit = np.array([2 * part.stop - part.start for part in region])
    is_near = (boxes[:, 1] <= limit).all(axis=1)
    near = np.flatnonzero(is_near)
    if near.size:
        yield Window(_region_of(boxes[near, 0].min(axis=0), boxes[near, 1].max(axis=0)), near)
    for i in np.flatnonzero(~is_near):
        yield Window(_region_of(boxes[i, 0], boxes[i, 1]), np.array([i]))


def _region_of(low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]) -> Region:
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
