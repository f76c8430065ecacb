"""A layer of X of a SOMA Experiment, read by joinids in bounded memory.

joinids  ->  one query, its answer in parts of bounded size  ->  entries by rows  ->  CSR
"""

from __future__ import annotations

from typing import Any

import numpy as np

from geneformer_mcore.cells.grouping import count_rows, place_entries, sort_columns
from geneformer_mcore.cells.joinids import as_coordinates
from geneformer_mcore.cells.normalise import CountBlock
from geneformer_mcore.cells.soma import FAILURES, unreadable

_SPARSE = ("soma_dim_0", "soma_dim_1", "soma_data")

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Some entries: place of the row among those asked for int32, column int32, value float32 | 64."""

_BAND_VALUES = 4 << 20
"""Of a dense array, so many values are read at once."""


class SomaMatrix:
    """An open SOMA SparseNDArray or DenseNDArray, cells x genes; `name` is what messages call it.

    num_columns: of its shape, which may be wider than there are genes
    """

    def __init__(self, array: Any, name: str) -> None:
        self.name, self._array = name, array
        self.num_columns = int(array.shape[1])
        self.address = str(array.uri)

    def read(self, ids: np.ndarray, start: int) -> CountBlock:
        """The rows of `ids` (ascending) as a block whose first row is `start`; values unchecked.

        DataError if they cannot be read.
        """
        try:
            is_dense = self._array.soma_type == "SOMADenseNDArray"
            parts = self._dense(ids) if is_dense else self._sparse(ids)
        except FAILURES as error:
            what = f"the rows of joinids {ids[0]:,} to {ids[-1]:,} cannot be read"
            raise unreadable(self.name, what, error) from error
        indptr = np.zeros(len(ids) + 1, np.int64)
        for rows, _, _ in parts:
            count_rows(rows, indptr[1:])
        indptr = np.cumsum(indptr)
        values, columns = np.empty(int(indptr[-1])), np.empty(int(indptr[-1]), np.int32)
        nexts = indptr[:-1].copy()
        while parts:  # Each is given back once its entries have their place.
            place_entries(*parts.pop(0), nexts, columns, values)
        sort_columns(indptr, columns, values)
        return CountBlock(values, columns, indptr, start)

    def _sparse(self, ids: np.ndarray) -> list[Part]:
        coordinates, parts = as_coordinates(ids), []
        for table in self._array.read((coordinates,)).tables():
            rows, columns, values = (table[name].to_numpy() for name in _SPARSE)
            is_run = isinstance(coordinates, slice)
            places = rows - ids[0] if is_run else np.searchsorted(ids, rows)
            parts.append(_part(places, columns, values))
        return parts

    def _dense(self, ids: np.ndarray) -> list[Part]:
        parts = []
        most = max(1, _BAND_VALUES // self.num_columns)
        place = 0
        for run in np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1):
            for first in range(int(run[0]), int(run[-1]) + 1, most):
                last = min(first + most - 1, int(run[-1]))
                rows = self._array.read((slice(first, last),)).to_numpy()
                places, columns = np.nonzero(rows)
                parts.append(_part(places + place, columns, rows[places, columns]))
                place += len(rows)
        return parts


def _part(places: np.ndarray, columns: np.ndarray, values: np.ndarray) -> Part:
    # Two kinds of value, so that the compiled loops exist in two variants.
    kind = np.float32 if values.dtype == np.float32 else np.float64
    # What int32 does not hold must not become another column: the highest is none, and refused.
    columns = np.minimum(columns, np.iinfo(np.int32).max)
    return places.astype(np.int32), columns.astype(np.int32), values.astype(kind)
