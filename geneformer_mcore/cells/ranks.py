"""Rank-value encoding: a cell's counts become the list of its genes, most telling first.

    count -> / total of the cell -> * 10,000 -> / median of the gene -> sort descending
          -> [CLS] in front -> cut to seq_length

The order is exactly that of a stable float64 sort, ties by token id: genes are sorted by the upper
18 bits of their float32 values (two passes of a radix sort), then the short runs that those cannot
tell apart are put in order by (float64 value descending, token id ascending). The bits of positive
floats order as the floats do, and neither rounding to float32 nor cutting bits off ever swaps two
values, so nothing else can be out of order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geneformer_mcore.cells.kernels import encode_rows
from geneformer_mcore.cells.normalise import CountBlock, is_distinct
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.errors import DataError

MIN_SEQ_LENGTH = 2
MAX_SEQ_LENGTH = 65_536
"""Token ids are 16 bits: no cell has more different ones."""


@dataclass(frozen=True)
class RankedCells:
    """Encoded cells, in the rows' order; a cell without a known gene has its [CLS] alone.

    tokens_T:        uint16, cell i is tokens_T[offsets[i]:offsets[i + 1]], [CLS] first
    offsets:         int64 [N + 1], starting at 0
    n_counts_N:      float64, all counts of the cell, unknown genes included
    known_counts_N:  float64, those of genes in the vocabulary
    n_genes_N:       int32, expressed genes (columns above zero), unknown ones included
    n_known_N:       int32, those of the vocabulary, before the cut to seq_length
    """

    tokens_T: np.ndarray
    offsets: np.ndarray
    n_counts_N: np.ndarray
    known_counts_N: np.ndarray
    n_genes_N: np.ndarray
    n_known_N: np.ndarray

    def __len__(self) -> int:
        return len(self.n_genes_N)


class RankEncoder:
    """Encodes blocks of counts for one vocabulary and sequence length."""

    def __init__(self, vocabulary: Vocabulary, seq_length: int) -> None:
        """seq_length: tokens per cell at most, [CLS] included, 2..65,536 (else DataError)."""
        if not MIN_SEQ_LENGTH <= seq_length <= MAX_SEQ_LENGTH:
            raise DataError(
                f"seq_length must be at least {MIN_SEQ_LENGTH} ([CLS] and one gene) and at most "
                f"{MAX_SEQ_LENGTH:,}, not {seq_length}."
            )
        self.vocabulary = vocabulary
        self.seq_length = seq_length

    def encode(self, block: CountBlock, token_of_column: np.ndarray) -> RankedCells:
        """The ranked tokens of every cell of `block`.

        token_of_column: int32 [columns of the file], the token id of each column's gene, 0 for a
        column that is not in the vocabulary (see genes.GeneMap).
        """
        num_cells = len(block)
        room = np.minimum(np.diff(block.indptr), self.seq_length - 1) + 1
        tokens_T = np.empty(int(room.sum()), np.uint16)
        lengths_N = np.zeros(num_cells, np.int64)
        n_counts_N, known_counts_N = np.zeros(num_cells), np.zeros(num_cells)
        n_genes_N, n_known_N = np.zeros(num_cells, np.int32), np.zeros(num_cells, np.int32)
        if num_cells:
            encode_rows(
                block.data,
                block.indices,
                block.indptr,
                token_of_column,
                is_distinct(token_of_column),
                self.vocabulary.medians_of_token,
                self.seq_length - 1,
                tokens_T,
                lengths_N,
                n_counts_N,
                known_counts_N,
                n_genes_N,
                n_known_N,
            )
        offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
        return RankedCells(
            tokens_T[: offsets[-1]], offsets, n_counts_N, known_counts_N, n_genes_N, n_known_N
        )
