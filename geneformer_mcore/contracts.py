"""The words that every floor shares (floor 1): special tokens, ragged cells, one micro batch.

Shape legend, used as suffixes of tensor names throughout:

    B  cells of a micro batch        S  positions of the padded micro batch, [CLS] included
    H  hidden size                   V  padded vocabulary (this rank's part of it under TP)
    M  selected positions, that is, those whose gene must be predicted
    N  cells of a ragged block       T  tokens of a ragged block, laid end to end
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = ("[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UKW]")
"""In the order of NVIDIA's Geneformer; a gene's id is its place in the vocabulary plus five."""

CLS, MASK, PAD, SEP, UKW = range(len(SPECIAL_TOKENS))
NUM_SPECIALS = len(SPECIAL_TOKENS)

VOCABULARY_MULTIPLE = 512
"""The embedding is padded to a multiple of this (25,429 -> 25,600), whatever the tensor-parallel
size, so that a checkpoint fits every layout."""


def padded_vocabulary_size(vocabulary_size: int) -> int:
    """Rows of the embedding for `vocabulary_size` tokens, specials included."""
    return -(-vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True)
class RaggedCells:
    """Tokenised cells laid end to end.

    tokens_T:   uint16, cell i is tokens_T[offsets[i]:offsets[i + 1]], [CLS] first
    offsets:    int64 [N + 1], starting at 0
    keys_N:     uint64, the `cell_key` of each cell (see store.keys)
    """

    tokens_T: np.ndarray
    offsets: np.ndarray
    keys_N: np.ndarray

    def __len__(self) -> int:
        return len(self.keys_N)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each cell, [CLS] included."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> RaggedCells:
        """The cells `rows` (int [N']), in that order, as a new block."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # Index of every wanted token: its cell's old start plus its place within the cell.
        shift = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return RaggedCells(
            self.tokens_T[np.arange(offsets[-1]) + shift], offsets, self.keys_N[rows]
        )

    @staticmethod
    def concatenate(blocks: list[RaggedCells]) -> RaggedCells:
        """The cells of all blocks, one after the other."""
        lengths = np.concatenate([block.lengths for block in blocks])
        return RaggedCells(
            np.concatenate([block.tokens_T for block in blocks]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([block.keys_N for block in blocks]),
        )


class TokenSource(Protocol):
    """Whatever tokenised cells can be read from by row number: a store, a flat file, an array."""

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1, in row order. Called from the prefetch thread."""
        ...


@dataclass(frozen=True)
class Batch:
    """One micro batch, ready for the model.

    tokens_BS:   int64, masked token ids, [PAD] after the last token of a cell
    lengths_B:   int64, tokens of each cell, [CLS] included
    selected_M:  int64, flat places `b * S + s` of the positions to predict, ascending
    labels_M:    int64, the true token ids at those places
    keys_B:      uint64 array, the `cell_key` of each cell: for logs, never seen by the model
    """

    tokens_BS: torch.Tensor
    lengths_B: torch.Tensor
    selected_M: torch.Tensor
    labels_M: torch.Tensor
    keys_B: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Real tokens, [CLS] included and padding not."""
        return int(self.lengths_B.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.tokens_BS.to(device, non_blocking=True),
            self.lengths_B.to(device, non_blocking=True),
            self.selected_M.to(device, non_blocking=True),
            self.labels_M.to(device, non_blocking=True),
            self.keys_B,
        )
