"""A count matrix as it is stored (HDF5, zarr, memory), read by rows in bounded memory.

    group | array | scipy matrix  ->  format, is its index sound?  ->  rows a..b as CSR

    CSR                     rows are contiguous: slices of its arrays            RowGroup
    dense                   a band of rows at a time, along the chunks           Bands
    CSC, dense in chunks    converted to CSR at the first read: by scipy, or in  ConvertedMatrix
    too tall for a band     a temporary file of ranges of rows

Not `anndata.io.sparse_dataset(group)[a:b]`: for every slice it allocates an index of all rows, 4
bytes a row and the time for that.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import h5py
import numpy as np

from geneformer_mcore.backends import compiled
from geneformer_mcore.errors import DataError, ExternalIOError
from geneformer_mcore.io.blocks import BLOCK_ENTRIES, CountBlock
from geneformer_mcore.io.elements import check_array, check_encoding

BAND_BYTES = 32 << 20
"""So much of a dense matrix is in memory at once; a band of chunks may be up to four times that."""

IN_MEMORY_BYTES = 256 << 20
"""A matrix up to this size, 16 bytes an entry, is converted without a file."""

RANGE_ENTRIES = 4 << 20
BATCH_ENTRIES = 4 << 20
"""Entries of a range of rows, and of a batch on its way there: 64 MiB each."""

_RECORD = np.dtype([("row", np.int32), ("column", np.int32), ("value", np.float64)])

_PROBED_VALUES, _PROBED_PLACES = 1 << 18, 8
"""Values that `some` takes of a matrix, and the number of places they are from."""

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows int32 [E], columns int32 [E] and values (any number type) [E] of some entries of a matrix;
those of one row are in ascending order of their columns."""


class StoredMatrix(ABC):
    """Cells x genes, open for reading.

    is_sequential:  the first reader converts it, and rows are cheap in ascending order only: one
                    process should read all of it
    """

    shape: tuple[int, int]

    @property
    def is_sequential(self) -> bool:
        return False

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, values not checked. Raises OSError or ValueError if unreadable."""

    @abstractmethod
    def fitting(self, start: int, stop: int) -> int:
        """The last row up to which start.. are a block of bounded size; above start, <= stop."""

    @abstractmethod
    def some(self) -> np.ndarray:
        """Some stored values, from all over the matrix, by which to judge their kind."""

    def close(self) -> None:  # noqa: B027
        """Frees what reading took."""


def is_matrix(item: Any) -> bool:
    """Whether an item of a file, or an object in memory, is a dense or sparse matrix."""
    if hasattr(item, "shape"):
        return item.shape is not None and len(item.shape) == 2
    return hasattr(item, "keys") and all(part in item for part in ("data", "indices", "indptr"))


def open_matrix(item: Any, name: str, in_memory: bool = False) -> StoredMatrix:
    """The matrix `item`; `name` is used in messages.

    in_memory:  nothing is written, whatever its size
    Raises DataError if its index does not fit its values, or they are no numbers, or cannot be
    decompressed; ValueError for an unknown encoding.
    """
    is_dense = hasattr(item, "shape") and not _is_scipy(item)
    if hasattr(item, "attrs"):
        kinds = ("array",) if is_dense else ("csr_matrix", "csc_matrix")
        check_encoding(item, name, *kinds)
    parts = None if is_dense else Compressed.of(item)
    for part in [item] if parts is None else [parts.data, parts.indices, parts.indptr]:
        _check_filters(part, name)
    kind = (item if parts is None else parts.data).dtype
    if kind.kind not in "biuf":
        raise DataError(
            f"{name} holds values of type {kind}, and counts are numbers. Remedy: write them as "
            "integers or floats."
        )
    if parts is None:
        is_tall = _band_rows(item) is None
        return ConvertedMatrix(TallChunks(item), name, in_memory) if is_tall else Bands(item)
    _check_types(parts, name)
    _check_chunks(parts, name)
    indptr = _sound_indptr(parts, name)
    if parts.format == "csr":
        return RowGroup(parts, indptr)
    return ConvertedMatrix(ColumnGroup(parts, indptr, name), name, in_memory)


def _check_filters(item: Any, name: str) -> None:
    """Raises DataError if an HDF5 filter or file is needed that is not there."""
    if not isinstance(item, h5py.Dataset):
        return
    check_array(item, name)
    settings = item.id.get_create_plist()
    for place in range(settings.get_nfilters()):
        number, _, _, label = settings.get_filter(place)
        if not h5py.h5z.filter_avail(number):
            title = label.decode(errors="replace").split(";")[0] or "?"
            raise DataError(
                f"{name} is compressed by HDF5 filter {number} ({title}), which is not installed. "
                "Remedy: where it can be read, write it again: write_h5ad(..., compression='gzip')."
            )


def _check_types(parts: Compressed, name: str) -> None:
    """Raises DataError for types that anndata takes for no sparse matrix."""
    for part, array in (("indices", parts.indices), ("indptr", parts.indptr)):
        if array.dtype.kind not in "iu" or not np.can_cast(array.dtype, np.int64):
            what = f"its {part} must be whole numbers that int64 holds, and are {array.dtype}"
            raise _damaged(name, what)
    if parts.data.dtype == np.float16 or not parts.data.dtype.isnative:
        raise DataError(
            f"{name}: the values of a sparse matrix must be of a type that scipy has, and are "
            f"{parts.data.dtype}. Remedy: write them as float32, in the byte order of this machine."
        )


def _check_chunks(parts: Compressed, name: str) -> None:
    """Raises DataError if zarr chunks are missing, as in a copy in part: they would be read as
    zeros. One chunk of indices may be missing, where all its entries are in the first column."""
    for part, array, least in (("data", parts.data, 1), ("indices", parts.indices, 2)):
        there, number = getattr(array, "nchunks_initialized", 0), getattr(array, "nchunks", 0)
        if there < number >= least:
            what = f"{number - there:,} of the {number:,} chunks of its {part} are missing"
            raise _damaged(name, what)


def _damaged(name: str, what: str) -> DataError:
    return DataError(f"{name} is damaged: {what}. Remedy: get or write the file again.")


# Sparse matrices


class Compressed(NamedTuple):
    """The arrays of a sparse matrix, in a file or in memory; format: "csr" or "csc"."""

    format: str
    shape: tuple[int, int]
    data: Any
    indices: Any
    indptr: Any

    @classmethod
    def of(cls, item: Any) -> Compressed:
        """Those of a group of a file, or of a scipy matrix. ValueError for another encoding."""
        if _is_scipy(item):
            item = item if item.format in ("csr", "csc") else item.tocsr()
            used = slice(item.indptr[-1])  # There may be room for more.
            return cls(item.format, item.shape, item.data[used], item.indices[used], item.indptr)
        # AnnData before 0.7 named its attributes after h5sparse.
        encoding = item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", "unknown"))
        encoding = encoding.decode() if isinstance(encoding, bytes) else str(encoding)
        name = encoding.removesuffix("_matrix")
        if name not in ("csr", "csc"):
            raise ValueError(f"matrix encoding {encoding!r}, not csr, csc or dense")
        rows, columns = item.attrs.get("shape", item.attrs.get("h5sparse_shape"))
        return cls(name, (int(rows), int(columns)), item["data"], item["indices"], item["indptr"])


def _is_scipy(item: Any) -> bool:
    return hasattr(item, "tocsr")


def _sound_indptr(parts: Compressed, name: str) -> np.ndarray:
    """The index as int64. DataError if it does not fit the values."""
    indptr = parts.indptr[:].astype(np.int64)
    length = parts.shape[0 if parts.format == "csr" else 1]
    if len(indptr) != length + 1 or indptr[0] != 0 or np.any(np.diff(indptr) < 0):
        raise _damaged(name, f"an index (indptr) that does not fit {length:,}")
    for part, values in (("data", parts.data), ("indices", parts.indices)):
        if values.shape != (indptr[-1],):
            what = f"{values.shape[0]:,} {part} where its index names {indptr[-1]:,}"
            raise _damaged(name, what)
    return indptr


class RowGroup(StoredMatrix):
    """A CSR matrix. Its indptr, 8 bytes a row, is kept."""

    def __init__(self, parts: Compressed, indptr: np.ndarray) -> None:
        self.shape, self.indptr, self._parts = parts.shape, indptr, parts

    def read_rows(self, start: int, stop: int) -> CountBlock:
        first, last = self.indptr[start], self.indptr[stop]
        return CountBlock(
            self._parts.data[first:last].astype(np.float64),
            _as_int32(self._parts.indices[first:last]),
            self.indptr[start : stop + 1] - first,
            start,
        )

    def fitting(self, start: int, stop: int) -> int:
        return _last_fitting(self.indptr, start, stop)

    def some(self) -> np.ndarray:
        return _some_of(self._parts.data)


def _last_fitting(indptr: np.ndarray, start: int, stop: int) -> int:
    """The last row up to which rows start.. have BLOCK_ENTRIES at most; above start, <= stop."""
    fitting = int(np.searchsorted(indptr, indptr[start] + BLOCK_ENTRIES, side="right")) - 1
    return min(stop, max(fitting, start + 1))


def _some_of(data: Any) -> np.ndarray:
    starts = [data.shape[0] * place // _PROBED_PLACES for place in range(_PROBED_PLACES)]
    each = _PROBED_VALUES // _PROBED_PLACES
    return np.concatenate([data[start : start + each] for start in starts])


def _as_int32(indices: np.ndarray) -> np.ndarray:
    """Indices; -1, which is refused by name, for what int32 does not hold."""
    if indices.dtype.itemsize >= 4 and indices.dtype != np.int32:
        indices = np.where((indices < 0) | (indices >= 1 << 31), -1, indices)
    return indices.astype(np.int32, copy=False)


def _as_floats(values: np.ndarray) -> np.ndarray:
    """The values as one of two number types, of which compiled loops have two variants."""
    return values if values.dtype == np.float32 else values.astype(np.float64)


# Dense matrices


def _band_rows(item: Any) -> int | None:
    """Rows to read at a time, whole chunks of them; None if its chunks are too tall for that."""
    row_bytes = max(1, item.shape[1] * item.dtype.itemsize)
    chunks = getattr(item, "chunks", None)
    height = min(chunks[0], item.shape[0]) if chunks else 1
    if height * row_bytes > 4 * BAND_BYTES:
        return None if height > 1 else 1
    return height * max(1, BAND_BYTES // max(1, height * row_bytes))


class Bands(StoredMatrix):
    """A dense matrix without chunks, or in chunks of few rows (see _band_rows)."""

    def __init__(self, item: Any) -> None:
        self._item, self.shape = item, (int(item.shape[0]), int(item.shape[1]))
        self._band = _band_rows(item) or 1

    def read_rows(self, start: int, stop: int) -> CountBlock:
        counts = np.zeros(stop - start, np.int64)
        data, indices = [np.zeros(0)], [np.zeros(0, np.int32)]
        first = start
        while first < stop:
            last = min(stop, (first // self._band + 1) * self._band)
            rows, here = _as_floats(self._item[first:last]), counts[first - start : last - start]
            _count_entries(rows, here)
            data.append(np.empty(int(here.sum())))
            indices.append(np.empty(len(data[-1]), np.int32))
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
        places = sorted({self.shape[0] * i // _PROBED_PLACES for i in range(_PROBED_PLACES)})
        rows = [self._item[place : place + 1].ravel() for place in places]
        return np.concatenate([np.zeros(0, self._item.dtype), *rows])


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


# Conversion to CSR: the sources of entries, then their target


class ColumnGroup:
    """The entries of a CSC matrix, by columns."""

    def __init__(self, parts: Compressed, indptr: np.ndarray, name: str) -> None:
        """indptr: int64, sound"""
        self.shape = parts.shape
        self.num_entries: int | None = int(indptr[-1])
        self._parts, self._indptr, self._name = parts, indptr, name

    def rows(self, most: int) -> Iterator[np.ndarray]:
        """The row of every entry, int32, `most` at a time. DataError at a row that there is not."""
        for first in range(0, int(self._indptr[-1]), most):
            rows = _as_int32(self._parts.indices[first : first + most])
            if int(rows.min()) < 0 or int(rows.max()) >= self.shape[0]:
                raise _damaged(self._name, f"a row number beyond its {self.shape[0]:,} cells")
            yield rows

    def entries(self, most: int) -> Iterator[Entries]:
        """All entries, `most` at a time."""
        first = 0
        for rows in self.rows(most):
            stop = first + len(rows)
            lengths = np.diff(np.clip(self._indptr, first, stop))
            columns = np.repeat(np.arange(self.shape[1], dtype=np.int32), lengths)
            yield rows, columns, self._parts.data[first:stop]
            first = stop

    def some(self) -> np.ndarray:
        return _some_of(self._parts.data)

    def as_rows(self) -> RowGroup:
        """The whole matrix, its rows checked: scipy's loops go by them and check no bounds."""
        from scipy import sparse  # Takes 10 MB, which only conversions need.

        rows = np.concatenate([np.zeros(0, np.int32), *self.rows(1 << 22)])
        parts = _as_floats(self._parts.data[:]), rows, self._indptr
        matrix = sparse.csc_matrix(parts, self.shape).tocsr()
        return RowGroup(Compressed.of(matrix), matrix.indptr.astype(np.int64))


class TallChunks:
    """The entries of a dense matrix whose chunks are too tall for a band of rows."""

    num_entries: int | None = None

    def __init__(self, item: Any) -> None:
        self._item, self.shape = item, (int(item.shape[0]), int(item.shape[1]))

    def rows(self, most: int) -> Iterator[np.ndarray]:
        """The row of every entry, int32, in the order of `entries`."""
        return (rows for rows, _, _ in self.entries(most))

    def entries(self, most: int) -> Iterator[Entries]:
        """All entries above or below zero, from `most` values at a time, or one chunk's if more."""
        (num_rows, num_columns), (height, width) = self.shape, self._item.chunks
        width *= max(1, most // (height * width))
        for top in range(0, num_rows, height):
            for left in range(0, num_columns, width):
                part = self._item[top : top + height, left : left + width]
                rows, columns = np.nonzero(part)
                values = part[rows, columns]
                yield (rows + top).astype(np.int32), (columns + left).astype(np.int32), values

    def some(self) -> np.ndarray:
        height, width = self._item.chunks
        return self._item[:height, :width].ravel()[:_PROBED_VALUES]


class ConvertedMatrix(StoredMatrix):
    """Rows of a matrix that is not stored by rows; converted at the first read."""

    def __init__(
        self, source: ColumnGroup | TallChunks, name: str, in_memory: bool = False
    ) -> None:
        """in_memory: no file, whatever its size"""
        self.shape, self._source = source.shape, source
        self._name, self._in_memory = name, in_memory
        self._converted: RowGroup | _Ranges | None = None

    @property
    def is_sequential(self) -> bool:
        """Whether it is, or may be, too large to be converted in memory."""
        number = self._source.num_entries
        is_large = number is None or number * _RECORD.itemsize > IN_MEMORY_BYTES
        return is_large and not self._in_memory

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Implements StoredMatrix. ExternalIOError if there is no room to convert it."""
        return self._rows().read_rows(start, stop)

    def fitting(self, start: int, stop: int) -> int:
        return _last_fitting(self._rows().indptr, start, stop)

    def some(self) -> np.ndarray:
        return self._source.some()

    def close(self) -> None:
        if self._converted is not None:
            self._converted.close()

    def _rows(self) -> RowGroup | _Ranges:
        if self._converted is None:
            source = self._source
            if isinstance(source, ColumnGroup) and not self.is_sequential:
                self._converted = source.as_rows()
            else:
                self._converted = _to_ranges(source, self._name, self._in_memory)
        return self._converted


def _to_ranges(source: ColumnGroup | TallChunks, name: str, in_memory: bool) -> _Ranges:
    """Two passes: entries per row are counted, then each is written to the range of its row."""
    counts = np.zeros(source.shape[0] + 1, np.int64)
    for rows in source.rows(BATCH_ENTRIES):
        count_rows(rows, counts[1:])
    converted = _Ranges(np.cumsum(counts), name, in_memory)
    numbers = np.arange(len(converted.bounds) - 1)
    kind = np.uint16 if len(numbers) <= 1 << 16 else np.int64
    range_of_row = np.repeat(numbers.astype(kind), np.diff(converted.bounds))
    nexts = converted.indptr[converted.bounds[:-1]]
    try:
        for entries in source.entries(BATCH_ENTRIES):
            converted.append(entries, range_of_row, nexts)
    except BaseException:
        with suppress(OSError):  # Of a full disk once more.
            converted.close()
        raise
    return converted


class _Ranges:
    """Entries in the order of their ranges of rows, in memory or in a file without a name, of
    which nothing is left whatever happens to the process. The range read last is kept.

    Memory: two ranges and two batches, whatever the size of the matrix, and 10 bytes a row.
    indptr:  int64 [rows + 1]; bounds: the first row of each range, and the number of rows
    """

    def __init__(self, indptr: np.ndarray, name: str, in_memory: bool) -> None:
        self.indptr = indptr
        steps = np.arange(0, int(indptr[-1]) + RANGE_ENTRIES, RANGE_ENTRIES)
        firsts = np.searchsorted(indptr, steps, side="right") - 1
        firsts[0] = 0  # Found is the last of the empty rows that all begin at entry 0.
        self.bounds = np.unique(np.append(np.minimum(firsts, len(indptr) - 1), len(indptr) - 1))
        self._kept: tuple[int, np.ndarray, np.ndarray] | None = None
        self._name, self._bytes = name, int(indptr[-1]) * _RECORD.itemsize
        in_memory = in_memory or self._bytes <= IN_MEMORY_BYTES
        self._file = io.BytesIO() if in_memory else self._new_file()

    def append(self, entries: Entries, range_of_row: np.ndarray, nexts: np.ndarray) -> None:
        """Writes entries to their ranges' next positions, which move on. ExternalIOError if it
        cannot."""
        ranges = range_of_row[entries[0]]
        order = np.argsort(ranges, kind="stable")  # By its digits: numpy does so up to 16 bits.
        counts = np.bincount(ranges, minlength=len(nexts))
        starts = np.concatenate([[0], np.cumsum(counts)])
        records = np.empty(len(ranges), _RECORD)
        for field, values in zip(_RECORD.names or (), entries, strict=True):
            records[field] = values[order]
        try:
            for number in np.flatnonzero(counts):
                self._file.seek(int(nexts[number]) * _RECORD.itemsize)
                self._file.write(records[starts[number] : starts[number + 1]].tobytes())
            self._file.flush()
        except OSError as error:
            raise self._no_room(str(error.strerror)) from error
        nexts += counts

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, values not checked."""
        number = int(np.searchsorted(self.bounds, start, side="right")) - 1
        data, indices = [np.zeros(0)], [np.zeros(0, np.int32)]
        while number < len(self.bounds) - 1 and self.bounds[number] < stop:
            first = int(self.indptr[self.bounds[number]])
            here = slice(*(max(int(self.indptr[row]) - first, 0) for row in (start, stop)))
            values, columns = self._range(number)
            data.append(values[here])
            indices.append(columns[here])
            number += 1
        indptr = self.indptr[start : stop + 1] - self.indptr[start]
        return CountBlock(np.concatenate(data), np.concatenate(indices), indptr, start)

    def close(self) -> None:
        """Removes the file."""
        self._file.close()

    def _range(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(values, columns) of a range, in order of its rows."""
        if self._kept is None or self._kept[0] != number:
            self._kept = None  # Freed before another takes its place.
            top, bottom = self.bounds[number : number + 2]
            first, last = int(self.indptr[top]), int(self.indptr[bottom])
            self._file.seek(first * _RECORD.itemsize)
            records = np.frombuffer(self._file.read((last - first) * _RECORD.itemsize), _RECORD)
            values, columns = np.empty(last - first), np.empty(last - first, np.int32)
            rows, nexts = records["row"] - top, self.indptr[top:bottom] - first
            place_entries(rows, records["column"], records["value"], nexts, columns, values)
            self._kept = number, values, columns
        return self._kept[1:]

    def _new_file(self) -> Any:
        try:
            folder = tempfile.gettempdir()
            if shutil.disk_usage(folder).free >= self._bytes:
                return tempfile.TemporaryFile(dir=folder)
        except OSError as error:
            raise self._no_room(str(error.strerror)) from error
        raise self._no_room("there is too little room")

    def _no_room(self, why: str) -> ExternalIOError:
        try:
            folder = tempfile.gettempdir()
            free = f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB are free there"
        except OSError:
            folder, free = "a folder for temporary files", "none can be written to"
        return ExternalIOError(
            f"{self._name} is stored by columns (CSC) and converted to CSR on disk, which takes "
            f"{self._bytes / 1e9:,.1f} GB of {folder} and failed: {why}; {free}. Remedy: make "
            "room, name another folder with the variable TMPDIR, or write the matrix as CSR; then "
            "start the same command again."
        )


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
