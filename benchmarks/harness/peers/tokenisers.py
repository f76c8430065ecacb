"""Other tokenisers, written afresh from the published methods, and the exact lists.

    exact      / all counts * 10,000 / median (float64), descending, ties by token id
    HF style   Geneformer's public tokeniser; lean: without its scipy row per cell
    BioNeMo    one cell at a time, every gene looked up in a dictionary by its name

All take CSR blocks of raw counts and return uint16 tokens of every cell, [CLS] first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy import sparse

from geneformer_mcore.types import CLS

ROWS_PER_BLOCK = 512
_TARGET_SUM = 10_000


def blocks(counts: sparse.csr_matrix) -> list[sparse.csr_matrix]:
    """`counts` in blocks of ROWS_PER_BLOCK rows."""
    starts = range(0, counts.shape[0], ROWS_PER_BLOCK)
    return [counts[start : start + ROWS_PER_BLOCK] for start in starts]


def exact_tokens(
    counts: sparse.csr_matrix, token_of_column: np.ndarray, medians: np.ndarray, seq_length: int
) -> list[np.ndarray]:
    """The truth, as plain as can be.

    token_of_column: int32 [genes], 0 for a gene without a token
    medians:         float64 [tokens]
    """
    cells = []
    for start, stop in pairwise(counts.indptr):
        count = counts.data[start:stop].astype(np.float64)
        token = token_of_column[counts.indices[start:stop]]
        kept = (token > 0) & (count > 0)
        value = count[kept] / count.sum() * _TARGET_SUM / medians[token[kept]]
        order = np.lexsort((token[kept], -value))
        cells.append(np.concatenate([[CLS], token[kept][order]])[:seq_length].astype(np.uint16))
    return cells


class HFTokeniser:
    """Geneformer's public way, in two speeds. stable: ties keep the order of columns, slower.

    numpy's default sort leaves the order of ties undefined; and scipy divides by a dense matrix by
    multiplying with its reciprocal, so that by_rows may swap values that are nearly tied.
    """

    def __init__(
        self,
        token_of_column: np.ndarray,
        medians: np.ndarray,
        seq_length: int,
        stable: bool = False,
    ) -> None:
        """Arguments as of `exact_tokens`."""
        self._columns = np.flatnonzero(token_of_column)
        self._tokens = token_of_column[self._columns]
        self._medians = medians[self._tokens]
        self._token_of_column = token_of_column
        self._median_of_column = np.where(token_of_column > 0, medians[token_of_column], 1.0)
        self._kind: Literal["stable"] | None = "stable" if stable else None
        self._room = seq_length

    def by_rows(self, counts: sparse.csr_matrix) -> list[np.ndarray]:
        """As published: one scipy row per cell, which costs as much as the sorting."""
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64))
        known = counts[:, self._columns].astype(np.float64)
        values = sparse.csr_matrix(known / totals * _TARGET_SUM / self._medians)
        rows = (values[number] for number in range(values.shape[0]))
        return [self._ranked(row.data, self._tokens[row.indices]) for row in rows]

    def lean(self, counts: sparse.csr_matrix) -> list[np.ndarray]:
        """The same by slices of whole-block arrays: numpy's own speed. No cell may be empty."""
        count = counts.data.astype(np.float64)
        row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        totals = np.add.reduceat(count, counts.indptr[:-1])
        token = self._token_of_column[counts.indices]
        kept = token > 0
        column, row, token = counts.indices[kept], row[kept], token[kept]
        value = count[kept] / totals[row] * _TARGET_SUM / self._median_of_column[column]
        ends = np.cumsum(np.bincount(row, minlength=counts.shape[0])).tolist()
        bounds = pairwise([0, *ends])
        return [self._ranked(value[start:stop], token[start:stop]) for start, stop in bounds]

    def _ranked(self, value: np.ndarray, token: np.ndarray) -> np.ndarray:
        order = np.argsort(-value, kind=self._kind)[: self._room - 1]
        cell = np.empty(len(order) + 1, np.uint16)
        cell[0] = CLS
        cell[1:] = token[order]
        return cell


class BioNeMoTokeniser:
    """Dictionaries {gene id: token} and {gene id: median}, cell by cell.

    Divides by the total of the genes that have a token: a constant per cell, so the same ranks but
    for rounding.
    """

    def __init__(
        self,
        gene_ids: Sequence[str],
        tokens: Mapping[str, int],
        medians: Mapping[str, float],
        seq_length: int,
    ) -> None:
        self._gene_ids = np.array(gene_ids, dtype=object)
        self._tokens, self._medians, self._room = tokens, medians, seq_length

    def encode(self, counts: sparse.csr_matrix) -> list[np.ndarray]:
        return [
            self._cell(counts.indices[start:stop], counts.data[start:stop])
            for start, stop in pairwise(counts.indptr)
        ]

    def _cell(self, columns: np.ndarray, counts: np.ndarray) -> np.ndarray:
        token_of, median_of = self._tokens, self._medians
        tokens, medians, places = [], [], []
        for place, gene in enumerate(self._gene_ids[columns].tolist()):
            if gene in token_of:
                tokens.append(token_of[gene])
                medians.append(median_of[gene])
                places.append(place)
        known = counts[places].astype(np.float64)
        value = known / known.sum() * _TARGET_SUM / np.array(medians)
        order = np.argsort(-value)[: self._room - 1]
        return np.concatenate([[CLS], np.array(tokens)[order]]).astype(np.uint16)
