"""Sentences of a cell with genes deleted, or with genes in front of all others.

delete             counts   ->  without those of the genes  ->  ranked anew: the next ones move in
delete, truncated  sentence ->  without the genes           ->  shorter: what was cut off stays away
overexpress        sentence ->  [CLS], genes, the rest      ->  cut: the last ones fall off

Deleting ranks the cell anew, by the code that ranks every other, rather than taking the gene out of
its ranking: the total of the counts becomes smaller, which is a factor common to all genes and
changes no rank but for rounding, and rounding may swap genes whose values are equal on paper.
Truncated and overexpress are what Geneformer does: `delete_indices` and `overexpress_tokens` in its
perturber_utils.py, as they are with a [CLS] token.
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
    """What is done with the genes of a perturbation."""

    delete = "delete"
    overexpress = "overexpress"


class Editor:
    """Makes the variants of cells of one file."""

    def __init__(
        self, encoder: RankEncoder, token_of_column: np.ndarray, mode: Mode, truncated: bool
    ) -> None:
        """token_of_column: int32 [columns of the file], see genes.GeneMap."""
        self._encoder, self._token_of_column = encoder, token_of_column
        self.mode, self.truncated = mode, truncated

    def variants(self, cell: CountedCell, sets: Sequence[np.ndarray]) -> RaggedCells:
        """One sentence per set of genes (int32 tokens each), [CLS] first. Deleting all that a cell
        has leaves its [CLS] alone."""
        if self.mode is Mode.overexpress:
            return ragged([self._in_front(cell.tokens_T, genes) for genes in sets])
        if self.truncated:
            return ragged([cell.tokens_T[~np.isin(cell.tokens_T, genes)] for genes in sets])
        return self._ranked_anew(cell, sets)

    def _in_front(self, tokens_T: np.ndarray, genes: np.ndarray) -> np.ndarray:
        rest = tokens_T[1:][~np.isin(tokens_T[1:], genes)]
        moved = np.concatenate([[CLS], genes, rest])[: self._encoder.seq_length]
        return moved.astype(np.uint16)

    def _ranked_anew(self, cell: CountedCell, sets: Sequence[np.ndarray]) -> RaggedCells:
        tokens_E = self._token_of_column[cell.columns_E]
        kept = [np.flatnonzero(~np.isin(tokens_E, genes)) for genes in sets]
        indptr = np.concatenate([[0], np.cumsum([len(entries) for entries in kept])])
        entries = np.concatenate([np.empty(0, np.int64), *kept])
        block = CountBlock(cell.counts_E[entries], cell.columns_E[entries], indptr.astype(np.int64))
        ranked = self._encoder.encode(block, self._token_of_column)
        keys = np.arange(len(sets), dtype=np.uint64)
        return RaggedCells(ranked.tokens_T, ranked.offsets, keys)
