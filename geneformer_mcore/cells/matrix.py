"""A count matrix as it lies in an h5ad file, read by rows in bounded memory.

HDF5 group or data set  ->  which format, is its index sound?  ->  rows a..b as CSR arrays

CSR     rows lie together: read as they are                                   (compressed)
dense   a band of rows at a time, along the chunks of the file, zeros left out     (dense)
CSC, and dense in chunks too tall for a band: turned once, on disk if it is large (turned)
"""

from __future__ import annotations

from typing import Any, Protocol

import h5py
import numpy as np

from geneformer_mcore.cells.compressed import ColumnGroup, RowGroup, encoding_of
from geneformer_mcore.cells.dense import Bands, TallChunks, band_rows
from geneformer_mcore.cells.normalise import CountBlock
from geneformer_mcore.cells.turned import TurnedMatrix
from geneformer_mcore.errors import DataError


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
