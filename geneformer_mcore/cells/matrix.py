"""A count matrix as it lies in an h5ad file: CSR, CSC or dense, read by rows.

    HDF5 group or data set  ->  which format, is its index sound?  ->  rows a..b as CSR arrays

CSR and dense matrices are streamed; a CSC matrix is turned into CSR in memory at the first read,
all of it.
"""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
from scipy import sparse

from geneformer_mcore.cells.normalise import CountBlock
from geneformer_mcore.errors import DataError


def is_matrix(item: Any) -> bool:
    """Whether an item of an HDF5 file has the form of a dense or sparse matrix."""
    if isinstance(item, h5py.Dataset):
        return len(item.shape) == 2
    return isinstance(item, h5py.Group) and {"data", "indices", "indptr"} <= set(item)


class StoredMatrix:
    """Cells x genes in an open HDF5 file; `name` is what messages call it.

    Raises DataError if its index does not fit its values, ValueError for an unknown encoding.
    """

    def __init__(self, item: h5py.Group | h5py.Dataset, name: str) -> None:
        self.name = name
        self._item = item
        self._csr: sparse.csr_matrix | None = None
        self._format = _format(item)
        self.shape = _shape(item)
        if self._format == "csr":
            self._indptr = self._sound_indptr(self.shape[0])

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, values not checked. Raises OSError or ValueError if unreadable."""
        if self._format == "dense":
            rows = self._item[start:stop]
            row, column = np.nonzero(rows)
            indptr = np.searchsorted(row, np.arange(stop - start + 1))
            return _count_block(rows[row, column], column, indptr, start)
        if self._format == "csc":
            if self._csr is None:
                self._csr = self._convert_csc()
            rows = self._csr[start:stop]
            return _count_block(rows.data, rows.indices, rows.indptr, start)
        first, last = self._indptr[start], self._indptr[stop]
        return _count_block(
            self._item["data"][first:last],
            self._item["indices"][first:last],
            self._indptr[start : stop + 1] - first,
            start,
        )

    def _convert_csc(self) -> sparse.csr_matrix:
        indptr = self._sound_indptr(self.shape[1])
        data, indices = self._item["data"][:], self._item["indices"][:]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.shape[0]:
            raise self._damaged(f"row numbers beyond its {self.shape[0]:,} cells")
        return sparse.csc_matrix((data, indices, indptr), self.shape).tocsr()

    def _sound_indptr(self, length: int) -> np.ndarray:
        indptr = self._item["indptr"][:].astype(np.int64)
        if len(indptr) != length + 1 or indptr[0] != 0 or np.any(np.diff(indptr) < 0):
            raise self._damaged(f"an index (indptr) that does not fit {length:,}")
        for part in ("data", "indices"):
            if self._item[part].shape != (indptr[-1],):
                raise self._damaged(
                    f"{self._item[part].shape[0]:,} {part} where its index names {indptr[-1]:,}"
                )
        return indptr

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.name} is damaged: {what}. Remedy: get or write the file again.")


def _format(item: h5py.Group | h5py.Dataset) -> str:
    if isinstance(item, h5py.Dataset):
        return "dense"
    encoding = item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", "unknown"))
    name = str(encoding).removesuffix("_matrix")
    if name not in ("csr", "csc"):
        raise ValueError(f"matrix encoding {encoding!r}, not csr, csc or dense")
    return name


def _shape(item: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    shape = (
        item.shape
        if isinstance(item, h5py.Dataset)
        else item.attrs.get("shape", item.attrs.get("h5sparse_shape"))
    )
    rows, columns = (int(number) for number in shape)
    return rows, columns


def _count_block(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, start: int
) -> CountBlock:
    # One kind of number for all files, so that the compiled loops exist in one variant.
    return CountBlock(
        np.ascontiguousarray(data, dtype=np.float64),
        np.ascontiguousarray(indices, dtype=np.int32),
        np.ascontiguousarray(indptr, dtype=np.int64),
        start,
    )
