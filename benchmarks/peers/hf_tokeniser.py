"""HF style: how Geneformer's public tokeniser goes about it, in two speeds.

    block of 512 rows  ->  columns with a token  ->  / total * 10,000 / median  (float64)
      by_rows:  a scipy row per cell             ->  argsort of its non-zeros
      lean:     slices of the block's arrays     ->  argsort of its non-zeros

The public tokeniser indexes the normalised scipy matrix once per cell, which costs as much as the
sorting; `lean` is what is left when that is taken out, so nothing but numpy's own speed counts.
Both use numpy's default sort, which leaves the order of ties undefined; and scipy divides by a
dense matrix by multiplying with its reciprocal, so that by_rows may swap values that are nearly
tied. Written afresh from the published method.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import sparse

from geneformer_mcore.types import CLS

ROWS_PER_BLOCK = 512
_TARGET_SUM = 10_000


class HFTokeniser:
    """Tokenises CSR blocks. stable: ties keep the order of the columns, which is slower."""

    def __init__(
        self,
        token_of_column: np.ndarray,
        medians: np.ndarray,
        seq_length: int,
        stable: bool = False,
    ) -> None:
        """token_of_column: int32 [genes], 0: no token; medians: float64 [tokens]."""
        self._columns = np.flatnonzero(token_of_column)
        self._tokens = token_of_column[self._columns]
        self._medians = medians[self._tokens]
        self._token_of_column = token_of_column
        self._median_of_column = np.where(token_of_column > 0, medians[token_of_column], 1.0)
        self._kind: Literal["stable"] | None = "stable" if stable else None
        self._room = seq_length

    def by_rows(self, counts: sparse.csr_matrix) -> list[np.ndarray]:
        """Tokens of every cell, through one scipy row per cell."""
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64))
        known = counts[:, self._columns].astype(np.float64)
        values = sparse.csr_matrix(known / totals * _TARGET_SUM / self._medians)
        cells = []
        for number in range(values.shape[0]):
            row = values[number]
            cells.append(self._ranked(row.data, self._tokens[row.indices]))
        return cells

    def lean(self, counts: sparse.csr_matrix) -> list[np.ndarray]:
        """Tokens of every cell, through slices of whole-block arrays. No cell may be empty."""
        count = counts.data.astype(np.float64)
        row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        totals = np.add.reduceat(count, counts.indptr[:-1])
        token = self._token_of_column[counts.indices]
        kept = token > 0
        column, row, token = counts.indices[kept], row[kept], token[kept]
        value = count[kept] / totals[row] * _TARGET_SUM / self._median_of_column[column]
        ends = np.cumsum(np.bincount(row, minlength=counts.shape[0])).tolist()
        return [
            self._ranked(value[start:stop], token[start:stop])
            for start, stop in zip([0, *ends[:-1]], ends, strict=True)
        ]

    def _ranked(self, value: np.ndarray, token: np.ndarray) -> np.ndarray:
        order = np.argsort(-value, kind=self._kind)[: self._room - 1]
        cell = np.empty(len(order) + 1, np.uint16)
        cell[0] = CLS
        cell[1:] = token[order]
        return cell


def blocks(counts: sparse.csr_matrix) -> list[sparse.csr_matrix]:
    """`counts` in blocks of ROWS_PER_BLOCK rows."""
    return [
        counts[start : start + ROWS_PER_BLOCK]
        for start in range(0, counts.shape[0], ROWS_PER_BLOCK)
    ]
