"""Blocks of counts, and their values scaled to a common sum per cell.

    CSR row (column, count)  ->  total of the row  ->  count / total * 10,000 of its known genes

Duplicate columns of a gene are summed, explicit zeros are no expressed genes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geneformer_mcore.cells.kernels import normalise_rows

BLOCK_ENTRIES = 12 << 20
"""Entries of a block at most (144 MiB), unless one row alone has more."""


@dataclass(frozen=True)
class CountBlock:
    """Some rows of a count matrix, as CSR; row i is entries indptr[i] .. indptr[i + 1] - 1.

    data:       float64 [entries], counts
    indices:    int32 [entries], column (gene of the file) of each
    indptr:     int64 [rows + 1], starting at 0
    start:      the first row's place in the file
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    start: int = 0

    def __len__(self) -> int:
        return len(self.indptr) - 1


def is_distinct(token_of_column: np.ndarray) -> bool:
    """Whether no two columns (token 0 aside) share a token."""
    known = token_of_column[token_of_column > 0]
    return len(known) == 0 or int(np.bincount(known).max()) == 1


def normalised_values(
    block: CountBlock, token_of_column: np.ndarray, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every expressed known gene of every cell: (tokens int32, values float64), in row order.

    A value is count / (all counts of the cell) * 10,000.
    token_of_column: int32 [columns], 0 for a column that is no known gene.
    """
    tokens = np.empty(len(block.data) + 1, np.int32)
    values = np.empty(len(block.data) + 1, np.float64)
    written = normalise_rows(
        block.data,
        block.indices,
        block.indptr,
        token_of_column,
        is_distinct(token_of_column),
        np.zeros(num_tokens),
        tokens,
        values,
    )
    return tokens[:written], values[:written]
