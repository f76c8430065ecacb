"""Counts of an h5ad file as validated CSR blocks, without loading the file.

    file.h5ad  ->  where are the counts?  ->  rows a..b as CSR  ->  checked  ->  CountBlock
               ->  obs: cell ids, labels  ->  var: gene ids and names

The file is opened for reading only and never modified.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import h5py
import numpy as np
import pandas as pd

from geneformer_mcore.backends import compiled
from geneformer_mcore.errors import DataError, ExternalIOError
from geneformer_mcore.io.blocks import (
    BLOCK_ENTRIES,
    READ_FAILURES,
    CountBlock,
    check_counts,
    looks_normalised,
)
from geneformer_mcore.io.frames import NAME_COLUMNS, StoredFrame
from geneformer_mcore.io.retry import raise_if_io_error

# A matrix that lies by columns, turned once so that it can be read by rows.
#
#     columns  ->  entries per row counted  ->  ranges of rows, each small enough for memory
#              ->  entries appended to the place of their range, in memory or in a file
#              ->  read: one range at a time, put in order of its rows
#
# The file is a temporary one without a name: whatever happens to the process, nothing is left of
# it. Memory beside it: two ranges and two batches, whatever the size of the matrix, and 10 bytes a
# row.

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
    """Rows of a ByColumns (a h5ad.StoredMatrix); it is turned at the first read."""

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


def _no_room(size: int, name: str, why: str) -> ExternalIOError:
    """size: bytes that the whole file takes"""
    try:
        folder = tempfile.gettempdir()
        free = f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB are free there"
    except OSError:
        folder, free = "a folder for temporary files", "none can be written to"
    return ExternalIOError(
        f"{name} lies by columns (CSC) and is turned on disk, which takes {size / 1e9:,.1f} GB of "
        f"{folder} and failed: {why}; {free}. Remedy: make room, name another folder with the "
        "variable TMPDIR, or write the matrix as CSR; then start the same command again."
    )


# CSR and CSC matrices of an h5ad file: their index checked, then read by entries.
#
# group: data, indices, indptr  ->  do they fit each other?  ->  CSR: rows a..b
#                                                            ->  CSC: entries by columns

_PROBED_SPARSE = 1 << 15
_PLACES_SPARSE = 8


def encoding_of(group: Any) -> str:
    """Which of "csr", "csc" it is; ValueError for another."""
    # AnnData before 0.7 named its attributes after h5sparse.
    encoding = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "unknown"))
    encoding = encoding.decode() if isinstance(encoding, bytes) else str(encoding)
    name = encoding.removesuffix("_matrix")
    if name not in ("csr", "csc"):
        raise ValueError(f"matrix encoding {encoding!r}, not csr, csc or dense")
    return name


class RowGroup:
    """A CSR matrix (a h5ad.StoredMatrix). Its indptr, 8 bytes a row, is kept."""

    is_sequential = False

    def __init__(self, group: Any, name: str) -> None:
        """DataError if its index does not fit its values."""
        self.shape, self._group = _shape(group), group
        self._indptr = _sound_indptr(group, self.shape[0], name)

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, values not checked."""
        first, last = self._indptr[start], self._indptr[stop]
        return CountBlock(
            self._group["data"][first:last].astype(np.float64),
            _as_int32(self._group["indices"][first:last]),
            self._indptr[start : stop + 1] - first,
            start,
        )

    def fitting(self, start: int, stop: int) -> int:
        """As many rows as have BLOCK_ENTRIES, at least one."""
        return last_fitting(self._indptr, start, stop)

    def some(self) -> np.ndarray:
        """Some stored values, from all over the matrix."""
        return _some_of(self._group["data"])

    def close(self) -> None:
        """There is nothing to give back."""


class ColumnGroup:
    """A CSC matrix (a h5ad.ByColumns). Its indptr, 8 bytes a column, is kept."""

    def __init__(self, group: Any, name: str) -> None:
        """DataError if its index does not fit its values."""
        self.shape, self._group, self._name = _shape(group), group, name
        self._indptr = _sound_indptr(group, self.shape[1], name)
        self.num_entries = int(self._indptr[-1])

    def rows(self, most: int) -> Iterator[np.ndarray]:
        """The row of every entry, int32, `most` at a time."""
        for first in range(0, self.num_entries, most):
            rows = _as_int32(self._group["indices"][first : first + most])
            if int(rows.min()) < 0 or int(rows.max()) >= self.shape[0]:
                raise damaged(self._name, f"a row number beyond its {self.shape[0]:,} cells")
            yield rows

    def entries(self, most: int) -> Iterator[Entries]:
        """All entries, `most` at a time."""
        first = 0
        for rows in self.rows(most):
            stop = first + len(rows)
            lengths = np.diff(np.clip(self._indptr, first, stop))
            columns = np.repeat(np.arange(self.shape[1], dtype=np.int32), lengths)
            yield Entries(rows, columns, self._group["data"][first:stop])
            first = stop

    def some(self) -> np.ndarray:
        """Some stored values, from all over the matrix."""
        return _some_of(self._group["data"])


def damaged(name: str, what: str) -> DataError:
    """The error for a matrix that contradicts itself."""
    return DataError(f"{name} is damaged: {what}. Remedy: get or write the file again.")


def _sound_indptr(group: Any, length: int, name: str) -> np.ndarray:
    indptr = group["indptr"][:].astype(np.int64)
    if len(indptr) != length + 1 or indptr[0] != 0 or np.any(np.diff(indptr) < 0):
        raise damaged(name, f"an index (indptr) that does not fit {length:,}")
    for part in ("data", "indices"):
        if group[part].shape != (indptr[-1],):
            what = f"{group[part].shape[0]:,} {part} where its index names {indptr[-1]:,}"
            raise damaged(name, what)
    return indptr


def _shape(group: Any) -> tuple[int, int]:
    rows, columns = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    return int(rows), int(columns)


def _as_int32(indices: np.ndarray) -> np.ndarray:
    # What int32 does not hold must not become another column: -1 is refused by name.
    if indices.dtype.itemsize >= 4 and indices.dtype != np.int32:
        indices = np.where((indices < 0) | (indices >= 1 << 31), -1, indices)
    return indices.astype(np.int32, copy=False)


def _some_of(data: Any) -> np.ndarray:
    starts = [data.shape[0] * place // _PLACES_SPARSE for place in range(_PLACES_SPARSE)]
    return np.concatenate([data[start : start + _PROBED_SPARSE] for start in starts])


# Dense matrices of an h5ad file, read along their chunks, zeros left out.
#
# data set  ->  a band of rows at a time  ->  CSR
#           ->  chunks taller than a band: entries by columns, to be turned

BAND_BYTES = 32 << 20
"""So much of a dense matrix is in memory at once; a band of chunks may be up to four times that."""

_PROBED_DENSE = 1 << 18
_PLACES_DENSE = 8


@compiled
def _count_entries(rows: np.ndarray, counts: np.ndarray) -> None:
    for i in range(rows.shape[0]):
        number = 0
        for j in range(rows.shape[1]):
            number += rows[i, j] != 0
        counts[i] = number


@compiled
def _copy_entries(rows: np.ndarray, data: np.ndarray, indices: np.ndarray) -> None:
    entry = 0
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            if rows[i, j] != 0:
                data[entry] = rows[i, j]
                indices[entry] = j
                entry += 1


def band_rows(item: Any) -> int | None:
    """Rows to read at a time, whole chunks of them; None if its chunks are too tall for that."""
    row_bytes = max(1, item.shape[1] * item.dtype.itemsize)
    height = min(item.chunks[0], item.shape[0]) if item.chunks else 1
    if height * row_bytes > 4 * BAND_BYTES:
        return None if height > 1 else 1
    return height * max(1, BAND_BYTES // (height * row_bytes))


class Bands:
    """A dense matrix in chunks of few rows, or in none (a h5ad.StoredMatrix)."""

    is_sequential = False

    def __init__(self, item: Any) -> None:
        """item: one for which band_rows gives a number."""
        self._item = item
        self.shape = (int(item.shape[0]), int(item.shape[1]))
        self._band = band_rows(item) or 1

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, values not checked."""
        counts = np.zeros(stop - start, np.int64)
        data, indices = [np.zeros(0)], [np.zeros(0, np.int32)]
        first = start
        while first < stop:
            last = min(stop, (first // self._band + 1) * self._band)
            rows = _as_floats(self._item[first:last])
            _count_entries(rows, counts[first - start : last - start])
            number = int(counts[first - start : last - start].sum())
            data.append(np.empty(number))
            indices.append(np.empty(number, np.int32))
            _copy_entries(rows, data[-1], indices[-1])
            first = last
        indptr = np.concatenate([[0], np.cumsum(counts)])
        return CountBlock(np.concatenate(data), np.concatenate(indices), indptr, start)

    def fitting(self, start: int, stop: int) -> int:
        """As many rows as had BLOCK_ENTRIES if none of their values were zero, in whole bands."""
        rows = max(1, BLOCK_ENTRIES // max(1, self.shape[1]))
        aligned = (start + rows) // self._band * self._band
        return min(stop, aligned if aligned > start else start + rows)

    def some(self) -> np.ndarray:
        """Some rows, from all over the matrix."""
        places = sorted({self.shape[0] * place // _PLACES_DENSE for place in range(_PLACES_DENSE)})
        rows = [self._item[place] for place in places if place < self.shape[0]]
        return np.concatenate([np.zeros(0, self._item.dtype), *rows])

    def close(self) -> None:
        """There is nothing to give back."""


class TallChunks:
    """A dense matrix whose chunks are too tall for a band of rows (a h5ad.ByColumns)."""

    num_entries = None

    def __init__(self, item: Any) -> None:
        self._item = item
        self.shape = (int(item.shape[0]), int(item.shape[1]))

    def rows(self, most: int) -> Iterator[np.ndarray]:
        """The row of every entry, int32."""
        return (entries.rows for entries in self.entries(most))

    def entries(self, most: int) -> Iterator[Entries]:
        """All entries above or below zero, from `most` values at a time, or one chunk's if more."""
        (num_rows, num_columns), (height, width) = self.shape, self._item.chunks
        width *= max(1, most // (height * width))
        for top in range(0, num_rows, height):
            for left in range(0, num_columns, width):
                part = self._item[top : top + height, left : left + width]
                rows, columns = np.nonzero(part)
                values = part[rows, columns]
                rows, columns = (rows + top).astype(np.int32), (columns + left).astype(np.int32)
                yield Entries(rows, columns, values)

    def some(self) -> np.ndarray:
        """Some values of the first chunk."""
        height, width = self._item.chunks
        return self._item[:height, :width].ravel()[:_PROBED_DENSE]


def _as_floats(rows: np.ndarray) -> np.ndarray:
    # Two kinds of number, so that the compiled loops exist in two variants.
    return rows if rows.dtype == np.float32 else rows.astype(np.float64)


# Entries of a matrix, in any order, put into rows: the counting sorts behind turning and reading.
#
# (row, column, value)  ->  how many in each row  ->  each to the next place of its row  ->  CSR


@compiled
def count_rows(rows: np.ndarray, counts: np.ndarray) -> None:
    """Adds to counts[row] the entries of each row."""
    for row in rows:
        counts[row] += 1


@compiled
def place_entries(
    rows: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    nexts: np.ndarray,
    placed_columns: np.ndarray,
    placed_values: np.ndarray,
) -> None:
    """Puts every entry to nexts[its row], which moves on; entries of one row stay in their order.

    rows, columns, values: [E] each; nexts: int64 [rows]; placed_*: room for all.
    """
    for entry in range(len(rows)):
        row = rows[entry]
        place = nexts[row]
        placed_columns[place] = columns[entry]
        placed_values[place] = values[entry]
        nexts[row] = place + 1


@compiled
def sort_columns(indptr: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
    """Puts the entries of every CSR row whose columns do not ascend in order of its columns."""
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        ascends = True
        for entry in range(start + 1, stop):
            ascends &= columns[entry] > columns[entry - 1]
        if not ascends:
            order = np.argsort(columns[start:stop], kind="mergesort")
            columns[start:stop] = columns[start:stop][order]
            values[start:stop] = values[start:stop][order]


# A count matrix as it lies in an h5ad file, read by rows in bounded memory.
#
# HDF5 group or data set  ->  which format, is its index sound?  ->  rows a..b as CSR arrays
#
# CSR     rows lie together: read as they are                                   (compressed)
# dense   a band of rows at a time, along the chunks of the file, zeros left out     (dense)
# CSC, and dense in chunks too tall for a band: turned once, on disk if it is large (turned)


class StoredMatrix(Protocol):
    """Cells x genes in an open file.

    is_sequential:  turning it is the work of whoever reads first, and its rows are cheap in
                    ascending order only: one process should read all of it
    """

    shape: tuple[int, int]

    @property
    def is_sequential(self) -> bool: ...

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, values not checked. Raises OSError or ValueError if unreadable."""

    def fitting(self, start: int, stop: int) -> int:
        """The last row up to which start.. are a block of bounded size; above start, <= stop."""

    def some(self) -> np.ndarray:
        """Some stored values, from all over the matrix: enough to tell what kind they are."""

    def close(self) -> None:
        """Gives back what reading took."""


def is_matrix(item: Any) -> bool:
    """Whether an item of an HDF5 file has the form of a dense or sparse matrix."""
    if isinstance(item, h5py.Dataset):
        return len(item.shape) == 2
    return isinstance(item, h5py.Group) and {"data", "indices", "indptr"} <= set(item)


def open_matrix(item: h5py.Group | h5py.Dataset, name: str) -> StoredMatrix:
    """The matrix `item`; `name` is what messages call it.

    Raises DataError if its index does not fit its values, or they are no numbers, or cannot be
    decompressed; ValueError for an unknown encoding.
    """
    is_dense = isinstance(item, h5py.Dataset)
    for part in [item] if is_dense else [item["data"], item["indices"], item["indptr"]]:
        _check_compression(part, name)
    kind = (item if is_dense else item["data"]).dtype
    if kind.kind not in "biuf":
        raise DataError(
            f"{name} holds values of type {kind}, and counts are numbers. Remedy: write them as "
            "integers or floats."
        )
    if not is_dense:
        if encoding_of(item) == "csr":
            return RowGroup(item, name)
        columns = ColumnGroup(item, name)
        return TurnedMatrix(columns, name)
    return TurnedMatrix(TallChunks(item), name) if band_rows(item) is None else Bands(item)


def _check_compression(item: h5py.Dataset, name: str) -> None:
    settings = item.id.get_create_plist()
    for place in range(settings.get_nfilters()):
        number, _, _, label = settings.get_filter(place)
        if not h5py.h5z.filter_avail(number):
            title = label.decode(errors="replace").split(";")[0] or "?"
            raise DataError(
                f"{name} is compressed by HDF5 filter {number} ({title}), which is not installed. "
                "Remedy: where it can be read, write it anew: write_h5ad(..., compression='gzip')."
            )


ROWS_PER_BLOCK = 4096

_PLACES = {"layers/counts": "layers/counts", "raw.X": "raw/X", "X": "X"}
_BEFORE_0_7 = {"raw/X": "raw.X", "raw/var": "raw.var"}
"""What AnnData called them, when it kept both at the top of the file."""


class CountsFile:
    """An h5ad file of counts, open for reading; see counts.Counts for what it gives.

    name:         the file, as given; stem: its name without folder and .h5ad
    location:     where the counts were found: "layers/counts", "raw.X", "X" or "layers/NAME"
    passed_over:  places before it in the order whose values are plainly no counts
    """

    def __init__(
        self, path: str | Path, layer: str | None = None, allow_normalised: bool = False
    ) -> None:
        """Opens `path` and finds its counts: in `layer` if given, else layers["counts"], raw.X, X.

        allow_normalised: values need not be whole numbers. Meant for counts scaled per cell, whose
        ranks are those of the counts; logarithms rank otherwise and must not be given.
        Raises DataError if the file cannot be read or has no counts where they are looked for.
        """
        self.path = Path(path)
        self.name = str(path)
        self.stem = self.path.name.removesuffix(".h5ad")
        self._whole_numbers = not allow_normalised
        self._file = _open_hdf5(self.path)
        try:
            self._open(layer)
        except DataError:
            self.close()
            raise
        except READ_FAILURES as error:
            self.close()
            raise_if_io_error(self.name, error)
            raise DataError(
                f"{self.path}: cannot be read as an AnnData file: {error}. Remedy: check that it "
                "is whole, and that anndata.read_h5ad opens it."
            ) from error

    def _open(self, layer: str | None) -> None:
        self.location, self.passed_over, self._matrix = self._find_counts(layer)
        self.num_cells, self.num_columns = self._matrix.shape
        self._obs = self._frame("obs")
        self._var = self._frame("raw/var" if self.location == "raw.X" else "var")
        if self.num_cells == 0 or self.num_columns == 0:
            raise DataError(
                f"{self.path}: {self.num_cells} cells x {self.num_columns} genes: there is nothing "
                "to encode. Remedy: leave the file out."
            )
        self._title = f"{self.path}: {self.location}"
        beside = (self._obs.num_rows, self._var.num_rows)
        if beside != self._matrix.shape:
            raise DataError(
                f"{self._title} is {self.num_cells:,} x {self.num_columns:,}, and the file "
                f"names {beside[0]:,} cells and {beside[1]:,} genes. Remedy: write the file again."
            )

    @property
    def is_sequential(self) -> bool:
        """Whether one process should read all rows, in order (see h5ad.StoredMatrix)."""
        return self._matrix.is_sequential

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Size in bytes and time of the last change in ns."""
        status = self.path.stat()
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}

    @property
    def obs_columns(self) -> list[str]:
        """The columns of obs, also those that cannot be read."""
        return list(self._obs.columns)

    def read_obs(self, start: int, stop: int) -> pd.DataFrame:
        """Rows start..stop-1 of obs, indexed by cell id."""
        return self._obs.read(start, stop)

    def read_cell_ids(self, start: int, stop: int) -> list[str]:
        """The obs names of rows start..stop-1."""
        return self._obs.row_names(start, stop)

    def read_dataset_ids(self, start: int, stop: int) -> list[str]:
        """The dataset of each cell: obs' `dataset_id`, else the file's name."""
        column = self._obs.readable.get("dataset_id")
        if column is None:
            return [self.stem] * (stop - start)
        found = pd.Series(column(start, stop), dtype=object)
        return [
            self.stem if absent or not str(name) else str(name)
            for name, absent in zip(found, found.isna(), strict=True)
        ]

    @cached_property
    def _gene_texts(self) -> dict[str, list[object]]:
        columns = {name: column(0, self.num_columns) for name, column in self._var.readable.items()}
        series = {name: pd.Series(values) for name, values in columns.items()}
        texts = {name: pd.Series(values, dtype=object) for name, values in series.items()}
        names: list[object] = [*self._var.row_names(0, self.num_columns)]
        return {
            name: text.tolist()
            for name, text in texts.items()
            if any(isinstance(value, str) for value in text)
        } | {"index": names}

    def gene_columns(self) -> dict[str, Sequence[object]]:
        """The columns of var that hold text; its row names under "index"."""
        return dict(self._gene_texts)

    def gene_names(self) -> list[str]:
        """One name (symbol) per column, from var's column of symbols, else its row names."""
        found = (name for name in NAME_COLUMNS if name in self._gene_texts)
        return [str(name) for name in self._gene_texts[next(found, "index")]]

    def blocks(
        self, num_rows: int = ROWS_PER_BLOCK, start: int = 0, stop: int | None = None
    ) -> Iterator[CountBlock]:
        """Rows start..stop-1 in blocks of at most `num_rows`, every value checked."""
        stop = self.num_cells if stop is None else stop
        while start < stop:
            with self._telling(start, stop):
                last = self._matrix.fitting(start, min(start + num_rows, stop))
            yield self.read_rows(start, last)
            start = last

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, every value checked.

        Raises DataError with row, gene, value and remedy at a value that is no count.
        """
        with self._telling(start, stop):
            block = self._matrix.read_rows(start, stop)
        check_counts(block, self, self._title, self._whole_numbers, self._layers())
        return block

    def close(self) -> None:
        """Closes the file; blocks already read stay good."""
        if hasattr(self, "_matrix"):
            self._matrix.close()
        self._file.close()

    def __enter__(self) -> CountsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _telling(self, start: int, stop: int) -> Iterator[None]:
        try:
            yield
        except READ_FAILURES as error:
            raise_if_io_error(self._title, error)
            raise DataError(
                f"{self._title}: rows {start} to {stop - 1} cannot be read: {error}. Remedy: "
                "the file is truncated or damaged; get it again."
            ) from error

    def _find_counts(self, layer: str | None) -> tuple[str, tuple[str, ...], StoredMatrix]:
        """(location, places passed over, matrix)."""
        wanted = _PLACES if layer is None else {_layer_name(layer): _layer_name(layer)}
        places = [name for name, path in wanted.items() if is_matrix(self._get(path))]
        if not places and not {"obs", "var"} <= set(self._file):
            raise DataError(
                f"{self.path}: an HDF5 file, and no AnnData file: it holds "
                f"{', '.join(self._file) or 'nothing'}; obs, var and a matrix are needed. Remedy: "
                "read it with scanpy or anndata, and write what that gives with write_h5ad."
            )
        if not places:
            raise DataError(
                f"{self.path}: no matrix in {' or '.join(wanted)}; layers of the file: "
                f"{', '.join(self._layers()) or 'none'}. Remedy: name the layer of the raw counts "
                "with `counts_layer=`."
            )
        for i, name in enumerate(places):
            matrix = open_matrix(self._get(wanted[name]), f"{self.path}: {name}")
            if name == places[-1] or not self._whole_numbers or not looks_normalised(matrix.some()):
                return name, tuple(places[:i]), matrix
        raise AssertionError("the last place is always taken")

    def _get(self, path: str) -> Any:
        return self._file.get(path, self._file.get(_BEFORE_0_7.get(path, path)))

    def _layers(self) -> list[str]:
        layers = self._file.get("layers")
        return list(layers) if isinstance(layers, h5py.Group) else []

    def _frame(self, path: str) -> StoredFrame:
        item = self._get(path)
        if not isinstance(item, (h5py.Group, h5py.Dataset)):
            raise DataError(
                f"{self.path}: has no `{path}`. Remedy: check that anndata.read_h5ad opens it."
            )
        return StoredFrame(item, f"{self.path}: {path}", self._file.get("uns"))


def _open_hdf5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file. Remedy: check the path.") from None
    except OSError as error:
        raise_if_io_error(str(path), error)
        size = path.stat().st_size if path.is_file() else 0
        raise DataError(
            f"{path}: not a whole HDF5 (h5ad) file ({size:,} bytes): {error}. Remedy: get it "
            "again; other formats are converted with anndata."
        ) from error


def _layer_name(layer: str) -> str:
    return layer if layer == "X" else f"layers/{layer}"
