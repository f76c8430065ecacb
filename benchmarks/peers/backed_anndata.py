"""AnnData in backed mode: random rows of an h5ad file, what anndata alone offers.

permutation of all rows  ->  64 of them, sorted  ->  X[rows] from the open file  ->  scipy CSR
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.peers.contestant import COUNTS, Contestant, shuffled_batches
from benchmarks.side_by_side.prepared import Prepared


class BackedAnnData(Contestant):
    """Uniformly shuffled; a batch is (rows, CSR)."""

    label = "anndata backed, random rows"
    table = COUNTS
    package = "anndata"

    def __init__(self, data: Prepared) -> None:
        import anndata

        self._matrix = anndata.read_h5ad(data.counts_file, backed="r").X
        self._num_cells = len(data)

    def epoch(self, number: int) -> Iterator[Any]:
        for rows in shuffled_batches(self._num_cells, number):
            ordered = np.sort(rows)
            yield ordered, self._matrix[ordered]

    def cells(self, batch: Any) -> np.ndarray:
        return batch[0]

    def sums(self, batch: Any) -> np.ndarray:
        return np.asarray(batch[1].sum(axis=1, dtype=np.float64)).ravel()
