"""Entries of a matrix, in any order, put into rows: the counting sorts behind turning and reading.

(row, column, value)  ->  how many in each row  ->  each to the next place of its row  ->  CSR
"""

from __future__ import annotations

import numpy as np

from geneformer_mcore.cells.compiled import compiled


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
