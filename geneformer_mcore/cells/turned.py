"""A matrix that lies by columns, turned once so that it can be read by rows.

    columns  ->  entries per row counted  ->  ranges of rows, each small enough for memory
             ->  entries appended to the place of their range, in memory or in a file
             ->  read: one range at a time, put in order of its rows

The file is a temporary one without a name: whatever happens to the process, nothing is left of it.
Memory beside it: two ranges and two batches, whatever the size of the matrix, and 10 bytes a row.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np

from geneformer_mcore.cells.grouping import count_rows, place_entries
from geneformer_mcore.cells.normalise import BLOCK_ENTRIES, CountBlock
from geneformer_mcore.errors import OutsideError

_RECORD = np.dtype([("row", np.int32), ("column", np.int32), ("value", np.float64)])

IN_MEMORY_BYTES = 256 << 20
"""A matrix up to this size, 16 bytes an entry, is turned without a file."""

RANGE_ENTRIES = 4 << 20
BATCH_ENTRIES = 4 << 20
"""Entries of a range of rows, and of a batch on its way there: 64 MiB each."""


@dataclass(frozen=True)
class Entries:
    """Some entries of a matrix: rows and columns int32 [E], values of any kind of number [E].

    Of one row, entries come in ascending order of their columns.
    """

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray


class ByColumns(Protocol):
    """A matrix that can be read by columns, as often as wanted.

    num_entries:  how many there are; None if that is not known yet
    """

    shape: tuple[int, int]

    @property
    def num_entries(self) -> int | None: ...

    def rows(self, most: int) -> Iterator[np.ndarray]:
        """The row of every entry, int32, about `most` at a time."""

    def entries(self, most: int) -> Iterator[Entries]:
        """All entries, in the same order, about `most` at a time."""

    def some(self) -> np.ndarray:
        """Some stored values, from all over the matrix."""


class TurnedMatrix:
    """Rows of a ByColumns (a matrix.StoredMatrix); it is turned at the first read."""

    def __init__(self, columns: ByColumns, name: str) -> None:
        """name: what messages call it."""
        self.shape, self._columns, self._name = columns.shape, columns, name
        self._turned: _Turned | None = None

    @property
    def is_sequential(self) -> bool:
        """Whether it is, or may be, too large to be turned in memory."""
        number = self._columns.num_entries
        return number is None or number * _RECORD.itemsize > IN_MEMORY_BYTES

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, values not checked. OutsideError if there is no room to turn it."""
        return self._rows().read(start, stop)

    def fitting(self, start: int, stop: int) -> int:
        """As many rows as have BLOCK_ENTRIES, at least one."""
        return last_fitting(self._rows().indptr, start, stop)

    def some(self) -> np.ndarray:
        """Some stored values; nothing is turned for them."""
        return self._columns.some()

    def close(self) -> None:
        """Removes what was turned."""
        if self._turned is not None:
            self._turned.file.close()

    def _rows(self) -> _Turned:
        if self._turned is None:
            self._turned = _turn(self._columns, self._name)
        return self._turned


def last_fitting(indptr: np.ndarray, start: int, stop: int) -> int:
    """The last row up to which rows start.. have BLOCK_ENTRIES at most; above start, <= stop."""
    fitting = int(np.searchsorted(indptr, indptr[start] + BLOCK_ENTRIES, side="right")) - 1
    return min(stop, max(fitting, start + 1))


class _Turned:
    """The entries in the order of their ranges of rows; the range that was read last is kept.

    indptr:  int64 [rows + 1]; bounds: the first row of each range, and the number of rows
    """

    def __init__(self, indptr: np.ndarray) -> None:
        self.indptr = indptr
        steps = np.arange(0, int(indptr[-1]) + RANGE_ENTRIES, RANGE_ENTRIES)
        firsts = np.searchsorted(indptr, steps, side="right") - 1
        firsts[0] = 0  # Found is the last of the empty rows that all begin at entry 0.
        self.bounds = np.unique(np.append(np.minimum(firsts, len(indptr) - 1), len(indptr) - 1))
        self.file: BinaryIO = io.BytesIO()
        self._kept: tuple[int, np.ndarray, np.ndarray] | None = None

    def read(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1."""
        number = int(np.searchsorted(self.bounds, start, side="right")) - 1
        data, indices = [np.zeros(0)], [np.zeros(0, np.int32)]
        while number < len(self.bounds) - 1 and self.bounds[number] < stop:
            first = int(self.indptr[self.bounds[number]])
            a = max(int(self.indptr[start]) - first, 0)
            b = max(int(self.indptr[stop]) - first, 0)
            values, columns = self._range(number)
            data.append(values[a:b])
            indices.append(columns[a:b])
            number += 1
        indptr = self.indptr[start : stop + 1] - self.indptr[start]
        return CountBlock(np.concatenate(data), np.concatenate(indices), indptr, start)

    def _range(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(values, columns) of a range, in order of its rows."""
        if self._kept is None or self._kept[0] != number:
            self._kept = None  # Given back before another takes its place.
            top, bottom = self.bounds[number : number + 2]
            first, last = int(self.indptr[top]), int(self.indptr[bottom])
            self.file.seek(first * _RECORD.itemsize)
            raw = self.file.read((last - first) * _RECORD.itemsize)
            records = np.frombuffer(raw, _RECORD)
            values, columns = np.empty(last - first), np.empty(last - first, np.int32)
            place_entries(
                records["row"] - top,
                records["column"],
                records["value"],
                self.indptr[top:bottom] - first,
                columns,
                values,
            )
            self._kept = number, values, columns
        return self._kept[1], self._kept[2]


def _turn(columns: ByColumns, name: str) -> _Turned:
    num_rows = columns.shape[0]
    indptr = np.zeros(num_rows + 1, np.int64)
    for rows in columns.rows(BATCH_ENTRIES):
        count_rows(rows, indptr[1:])
    turned = _Turned(np.cumsum(indptr))
    size = int(turned.indptr[-1]) * _RECORD.itemsize
    if size > IN_MEMORY_BYTES:
        turned.file = _file_of(size, name)
    numbers = np.arange(len(turned.bounds) - 1)
    kind = np.uint16 if len(numbers) <= 1 << 16 else np.int64
    range_of_row = np.repeat(numbers.astype(kind), np.diff(turned.bounds))
    nexts = turned.indptr[turned.bounds[:-1]]
    try:
        for entries in columns.entries(BATCH_ENTRIES):
            _append(entries, range_of_row, nexts, turned.file, size, name)
    except BaseException:
        with suppress(OSError):  # Of a full disk once more.
            turned.file.close()
        raise
    return turned


def _append(
    entries: Entries,
    range_of_row: np.ndarray,
    nexts: np.ndarray,
    file: BinaryIO,
    size: int,
    name: str,
) -> None:
    """Writes entries to their ranges' next places, which move on. OutsideError if it cannot."""
    ranges = range_of_row[entries.rows]
    order = np.argsort(ranges, kind="stable")  # By its digits: numpy does so up to 16 bits.
    counts = np.bincount(ranges, minlength=len(nexts))
    starts = np.concatenate([[0], np.cumsum(counts)])
    records = np.empty(len(ranges), _RECORD)
    records["row"], records["column"] = entries.rows[order], entries.columns[order]
    records["value"] = entries.values[order]
    try:
        for number in np.flatnonzero(counts):
            file.seek(int(nexts[number]) * _RECORD.itemsize)
            file.write(records[starts[number] : starts[number + 1]].tobytes())
        file.flush()
    except OSError as error:
        raise _no_room(size, name, str(error.strerror)) from error
    nexts += counts


def _file_of(size: int, name: str) -> BinaryIO:
    try:
        folder = tempfile.gettempdir()
        if shutil.disk_usage(folder).free >= size:
            return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise _no_room(size, name, str(error.strerror)) from error
    raise _no_room(size, name, "there is too little room")


def _no_room(size: int, name: str, why: str) -> OutsideError:
    """size: bytes that the whole file takes"""
    try:
        folder = tempfile.gettempdir()
        free = f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB are free there"
    except OSError:
        folder, free = "a folder for temporary files", "none can be written to"
    return OutsideError(
        f"{name} lies by columns (CSC) and is turned on disk, which takes {size / 1e9:,.1f} GB of "
        f"{folder} and failed: {why}; {free}. Remedy: make room, name another folder with the "
        "variable TMPDIR, or write the matrix as CSR; then start the same command again."
    )
