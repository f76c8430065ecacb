"""Perturbed cells: genes deleted, or ranked above all others.

delete             counts   ->  without those of the genes  ->  ranked again: the next ones move up
delete, truncated  sentence ->  without the genes           ->  shorter: truncated genes stay out
overexpress        sentence ->  [CLS], genes, the rest      ->  truncated: the last ones fall off

Deleting ranks the counts again, by the code that ranks every cell, instead of removing the gene
from the ranking: the smaller total is a factor common to all genes and changes no rank but for
rounding, which may swap genes of equal values. Truncated and overexpress follow Geneformer:
`delete_indices` and `overexpress_tokens` in its perturber_utils.py, with a [CLS] token.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np

from geneformer_mcore.inference.cells import CountedCell, ragged
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.tokenizer.rank_encoder import RankEncoder
from geneformer_mcore.types import CLS, RaggedCells


class Mode(Enum):
    """Kind of perturbation."""

    delete = "delete"
    overexpress = "overexpress"


class Editor:
    """Perturbs cells of one file."""

    def __init__(
        self, encoder: RankEncoder, token_of_column: np.ndarray, mode: Mode, truncated: bool
    ) -> None:
        """token_of_column: int32 [columns of the file], see genes.GeneMap."""
        self._encoder, self._token_of_column = encoder, token_of_column
        self.mode, self.truncated = mode, truncated

    def variants(self, cell: CountedCell, sets: Sequence[np.ndarray]) -> RaggedCells:
        """A perturbed cell per set of genes (int32 tokens each), [CLS] first; [CLS] alone where all
        genes are deleted."""
        if self.mode is Mode.overexpress:
            return ragged([self._in_front(cell.tokens_T, genes) for genes in sets])
        if self.truncated:
            return ragged([cell.tokens_T[~np.isin(cell.tokens_T, genes)] for genes in sets])
        return self._ranked_again(cell, sets)

    def _in_front(self, tokens_T: np.ndarray, genes: np.ndarray) -> np.ndarray:
        rest = tokens_T[1:][~np.isin(tokens_T[1:], genes)]
        moved = np.concatenate([[CLS], genes, rest])[: self._encoder.seq_length]
        return moved.astype(np.uint16)

    def _ranked_again(self, cell: CountedCell, sets: Sequence[np.ndarray]) -> RaggedCells:
        tokens_E = self._token_of_column[cell.columns_E]
        kept = [np.flatnonzero(~np.isin(tokens_E, genes)) for genes in sets]
        indptr = np.cumsum([0, *map(len, kept)], dtype=np.int64)
        entries = np.concatenate([np.empty(0, np.int64), *kept])
        block = CountBlock(cell.counts_E[entries], cell.columns_E[entries], indptr)
        ranked = self._encoder.encode(block, self._token_of_column)
        keys = np.arange(len(sets), dtype=np.uint64)
        return RaggedCells(ranked.tokens_T, ranked.offsets, keys)
