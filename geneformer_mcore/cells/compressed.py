"""CSR and CSC matrices of an h5ad file: their index checked, then read by entries.

group: data, indices, indptr  ->  do they fit each other?  ->  CSR: rows a..b
                                                           ->  CSC: entries by columns
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from geneformer_mcore.cells.normalise import CountBlock
from geneformer_mcore.cells.turned import Entries, last_fitting
from geneformer_mcore.errors import DataError

_PROBED = 1 << 15
_PLACES = 8


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
    """A CSR matrix (a matrix.StoredMatrix). Its indptr, 8 bytes a row, is kept."""

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
    """A CSC matrix (a turned.ByColumns). Its indptr, 8 bytes a column, is kept."""

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
    starts = [data.shape[0] * place // _PLACES for place in range(_PLACES)]
    return np.concatenate([data[start : start + _PROBED] for start in starts])
