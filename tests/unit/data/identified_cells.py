"""Cells whose tokens say who they are, so that a misaligned read shows in every batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from geneformer_mcore.data.collate import cells_of, make_batch
from geneformer_mcore.data.loader import Feed, Share
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.types import CLS, NUM_SPECIALS, Batch, CellViews, RaggedCells, TokenSource

VOCABULARY = 300
MASKING = Masking(0.15, (0.8, 0.02, 0.18), VOCABULARY, seed=1)


class Cells:
    """Cells of keys 0, 1, ...: key k has k % 50 + 2 tokens, the first gene k % 295 + 5, and so on.

    A types.TokenSource that remembers what was read.
    """

    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells
        self.reads: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.num_cells

    def read(self, start: int, stop: int) -> RaggedCells:
        self.reads.append((start, stop))
        return ragged([cell(key) for key in range(start, stop)], np.arange(start, stop))


class Spanned(Cells):
    """Cells that are read by spans, and whose lengths are known: as a token store's."""

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return rows % 50 + 2


def cell(key: int) -> np.ndarray:
    genes = (np.arange(key % 50 + 1) * 7 + key) % (VOCABULARY - NUM_SPECIALS) + NUM_SPECIALS
    return np.concatenate([[CLS], genes]).astype(np.uint16)


def ragged(cells: list[np.ndarray], keys: np.ndarray) -> RaggedCells:
    offsets = np.concatenate([[0], np.cumsum([len(c) for c in cells])]).astype(np.int64)
    return RaggedCells(np.concatenate(cells), offsets, keys.astype(np.uint64))


def views(block: RaggedCells) -> CellViews:
    return CellViews(block.tokens_T, block.offsets[:-1], block.lengths, block.keys_N)


def feed(source: TokenSource, rank: int = 0, size: int = 1, batch: int = 24, **changes) -> Feed:
    """A feed of all cells. `spans`: cells of a span, and spans of a window."""
    given = {"num_cells": len(source), "spans": (8, 3), "micro": batch // size, "seq_length": 64}
    given |= {"pad": 16, "maker": make_batch, "budget": None} | changes
    num_cells, spans, micro, *others = given.values()
    order = Sampler(0, num_cells, *spans, seed=7)
    return Feed(source, order, MASKING, Share(batch, micro, rank, size), *others)


def sights(batch: Batch) -> Iterator[tuple[int, bytes]]:
    """(key, all that is seen of the cell and predicted in it) of every cell of a batch."""
    num_positions = batch.tokens_BS.shape[1]
    tokens = batch.tokens_BS.flatten().numpy().astype("<i8")
    cells, selected = cells_of(batch, batch.selected_M).numpy(), batch.selected_M.numpy()
    for b, key in enumerate(batch.keys_N.tolist()):
        start = b * num_positions if batch.bounds is None else int(batch.bounds[b])
        here = cells == b
        predicted = [selected[here] - start, batch.labels_M.numpy()[here]]
        seen = tokens[start : start + int(batch.lengths_N[b])]
        yield key, seen.tobytes() + b"|" + np.stack(predicted).tobytes()
