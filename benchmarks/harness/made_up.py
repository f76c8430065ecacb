"""Made-up cells: tokens for training steps, counts for loaders and tokenisers.

lengths, log-normal like real cells', cut at seq_length  ->  [CLS], different genes, shuffled
genes, common and rare ones, by data set                 ->  reads drawn  ->  counts, CSR
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geneformer_mcore.types import CLS, NUM_SPECIALS, CellViews, RaggedCells

if TYPE_CHECKING:
    from scipy import sparse

MEAN_TOKENS = 1300
NUM_CELLS = 1024
POOL_CELLS, POOL_SETS = 2000, 4
GENES, KNOWN_SHARE = 20_000, 0.86
"""Genes of a usual file, the share of them in the vocabulary; some 1,700 are expressed per cell."""
_LOG_SPREAD = 0.5
"""Standard deviation of log(genes) of a cell: 0.31 in blood (pbmc3k), 0.29 in bone marrow, 0.56 in
lung; of several tissues together it is more than of one."""


class MadeUpCells:
    """Cells of the given numbers of tokens: [CLS], then different genes in a random order.
    Implements types.RandomAccess. mean_tokens: of a cell."""

    def __init__(self, lengths_N: np.ndarray, vocabulary_size: int) -> None:
        genes = np.arange(NUM_SPECIALS, vocabulary_size, dtype=np.uint16)
        np.random.default_rng(0).shuffle(genes)
        self.num_cells, self.mean_tokens = len(lengths_N), float(lengths_N.mean())
        self._lengths_N = lengths_N.astype(np.int64)
        self._starts_N = np.cumsum(self._lengths_N) - self._lengths_N
        self._tokens_T = np.full(int(lengths_N.sum()), CLS, np.uint16)
        for row, (start, length) in enumerate(zip(self._starts_N, lengths_N, strict=True)):
            positions = (row * 37 + np.arange(length - 1)) % len(genes)
            self._tokens_T[start + 1 : start + length] = genes[positions]

    def __len__(self) -> int:
        return self.num_cells

    def views(self, rows: np.ndarray) -> CellViews:
        keys = rows.astype(np.uint64)
        return CellViews(self._tokens_T, self._starts_N[rows], self._lengths_N[rows], keys)

    def read(self, start: int, stop: int) -> RaggedCells:
        return self.views(np.arange(start, stop)).ragged()


def token_cells(mean: int | None, seq_length: int, vocabulary_size: int) -> MadeUpCells:
    """Cells of about `mean` tokens, at most seq_length each; None: all of seq_length."""
    full = np.full(NUM_CELLS, seq_length)
    lengths_N = like_real(mean, seq_length, NUM_CELLS) if mean else full
    return MadeUpCells(lengths_N, vocabulary_size)


def like_real(mean: int, seq_length: int, num_cells: int) -> np.ndarray:
    """int64 [num_cells]: tokens of cells, log-normal, cut off at seq_length as a store cuts them: a
    median of 1,300 cut off at 2,048 has that mean, too."""
    lengths = np.random.default_rng(1).lognormal(np.log(mean), _LOG_SPREAD, num_cells)
    return np.clip(np.rint(lengths), 2, seq_length).astype(np.int64)


def count_sets(
    rng: np.random.Generator,
) -> tuple[list[sparse.csr_matrix], list[str], dict[str, float]]:
    """(float32 CSR counts of each data set, gene ids, medians of the known genes)."""
    from scipy import sparse

    common = rng.lognormal(0.0, 2.0, GENES)
    sets = []
    for _ in range(POOL_SETS):
        # Each data set prefers genes of its own, as tissues do.
        share = np.cumsum(common * rng.lognormal(0.0, 0.7, GENES))
        reads = rng.lognormal(8.0, 0.5, POOL_CELLS // POOL_SETS).astype(int)
        genes = [np.searchsorted(share, rng.random(each) * share[-1]) for each in reads]
        rows = [np.bincount(each, minlength=GENES).astype(np.float32) for each in genes]
        sets.append(sparse.csr_matrix(np.stack(rows)))
    gene_ids = [f"ENSG{number:011d}" for number in range(GENES)]
    known = np.flatnonzero(rng.random(GENES) < KNOWN_SHARE)
    return sets, gene_ids, {gene_ids[gene]: float(1 + common[gene]) for gene in known}
