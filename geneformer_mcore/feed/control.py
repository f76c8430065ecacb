"""A control for what a model has learned: the same cells with their genes in a random order.

A model that reads expression ranks must do worse on them; one that has only learned which genes
occur together must not.
"""

from __future__ import annotations

import numpy as np

from geneformer_mcore.contracts import RaggedCells, TokenSource
from geneformer_mcore.feed.batch import truncate
from geneformer_mcore.feed.masks import mix, mix_scalar


class ShuffledGenes:
    """A source whose cells hold the genes of `source`'s, [CLS] first, the others shuffled by
    (seed, cell_key). Implements contracts.TokenSource."""

    def __init__(self, source: TokenSource, seed: int, seq_length: int) -> None:
        """seq_length: to which cells are cut first, so that only genes a model sees take part."""
        self.source = source
        self.seed = seed
        self.seq_length = seq_length

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1, shuffled within each cell."""
        cells = truncate(self.source.read(start, stop), self.seq_length)
        cell_T = np.repeat(np.arange(len(cells)), cells.lengths)
        stream_N = mix(cells.keys_N ^ mix_scalar(self.seed))
        place_T = np.arange(len(cell_T)) - cells.offsets[:-1][cell_T]
        bits_T = mix(stream_N[cell_T] + place_T.astype(np.uint64))
        bits_T[cells.offsets[:-1]] = 0  # [CLS] stays in front
        order = np.lexsort((bits_T, cell_T))
        return RaggedCells(cells.tokens_T[order], cells.offsets, cells.keys_N)
