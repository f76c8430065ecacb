"""Dense matrices of an h5ad file, read along their chunks, zeros left out.

data set  ->  a band of rows at a time  ->  CSR
          ->  chunks taller than a band: entries by columns, to be turned
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from geneformer_mcore.cells.compiled import compiled
from geneformer_mcore.cells.normalise import BLOCK_ENTRIES, CountBlock
from geneformer_mcore.cells.turned import Entries

BAND_BYTES = 32 << 20
"""So much of a dense matrix is in memory at once; a band of chunks may be up to four times that."""

_PROBED = 1 << 18
_PLACES = 8


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
    """A dense matrix in chunks of few rows, or in none (a matrix.StoredMatrix)."""

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
        places = sorted({self.shape[0] * place // _PLACES for place in range(_PLACES)})
        rows = [self._item[place] for place in places if place < self.shape[0]]
        return np.concatenate([np.zeros(0, self._item.dtype), *rows])

    def close(self) -> None:
        """There is nothing to give back."""


class TallChunks:
    """A dense matrix whose chunks are too tall for a band of rows (a turned.ByColumns)."""

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
        return self._item[:height, :width].ravel()[:_PROBED]


def _as_floats(rows: np.ndarray) -> np.ndarray:
    # Two kinds of number, so that the compiled loops exist in two variants.
    return rows if rows.dtype == np.float32 else rows.astype(np.float64)
