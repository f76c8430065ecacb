"""Cells whose tokens say who they are, so that a misaligned read shows in every batch."""

from __future__ import annotations

import numpy as np

from geneformer_mcore.data.loader import Feed, Share
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.types import CLS, NUM_SPECIALS, CellViews, RaggedCells

VOCABULARY = 300
MASKING = Masking(0.15, (0.8, 0.02, 0.18), VOCABULARY, seed=1)


class Cells:
    """Cells of keys 0, 1, ...: key k has k % 50 + 2 tokens, the first gene k % 295 + 5, and so on.

    A contracts.TokenSource that remembers what was read.
    """

    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells
        self.reads: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.num_cells

    def read(self, start: int, stop: int) -> RaggedCells:
        self.reads.append((start, stop))
        return ragged([cell(key) for key in range(start, stop)], np.arange(start, stop))


def cell(key: int) -> np.ndarray:
    genes = (np.arange(key % 50 + 1) * 7 + key) % (VOCABULARY - NUM_SPECIALS) + NUM_SPECIALS
    return np.concatenate([[CLS], genes]).astype(np.uint16)


def ragged(cells: list[np.ndarray], keys: np.ndarray) -> RaggedCells:
    offsets = np.concatenate([[0], np.cumsum([len(c) for c in cells])]).astype(np.int64)
    return RaggedCells(np.concatenate(cells), offsets, keys.astype(np.uint64))


def views(block: RaggedCells) -> CellViews:
    return CellViews(block.tokens_T, block.offsets[:-1], block.lengths, block.keys_N)


def feed(source: Cells, rank: int = 0, size: int = 1, batch: int = 24, **changes: int) -> Feed:
    """A feed with spans of 8 cells, in windows of 3."""
    order = Sampler(0, source.num_cells, span_cells=8, window_spans=3, seed=7)
    share = Share(batch, changes.get("micro", batch // size), rank, size)
    return Feed(source, order, MASKING, share, changes.get("seq_length", 64), pad_multiple=16)


def true_tokens(key: int, seq_length: int = 64) -> list[int]:
    """The tokens of a cell before masking."""
    return cell(key)[:seq_length].tolist()
