"""Cells with a label, and batches that predict it instead of masked genes.

source of all cells + labelled rows -> LabelledRows: these cells, renumbered
Collator + class of each cell -> LabelledBatches: [CLS] of every cell selected, its class the label
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from geneformer_mcore.data.collate import Collator, rows_of
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.types import (
    Batch,
    CellViews,
    KnownLengths,
    RaggedCells,
    RandomAccess,
    TokenSource,
)

_FAR = 512
"""Distance in rows from which two cells are read by separate queries."""


@dataclass(frozen=True)
class LabelledRows:
    """Some rows (int64, ascending) of a source as a source (a types.KnownLengths)."""

    source: KnownLengths
    rows: np.ndarray

    def read(self, start: int, stop: int) -> RaggedCells:
        rows = self.rows[start:stop]
        cuts = np.flatnonzero(np.diff(rows) > _FAR) + 1
        parts = [self._read(part) for part in np.split(rows, cuts) if len(part)]
        if not parts:
            return self.source.read(0, 0)
        lengths = np.concatenate([part.lengths for part in parts])
        return RaggedCells(
            np.concatenate([part.tokens_T for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([part.keys_N for part in parts]),
        )

    def _read(self, rows: np.ndarray) -> RaggedCells:
        first = int(rows[0])
        block = self.source.read(first, int(rows[-1]) + 1)
        views = CellViews(block.tokens_T, block.offsets[:-1], block.lengths, block.keys_N)
        return views.part(rows - first).ragged()

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.source.lengths(self.rows[rows])


@dataclass(frozen=True)
class LabelledViews(LabelledRows):
    """The same of a types.RandomAccess."""

    def views(self, rows: np.ndarray) -> CellViews:
        assert isinstance(self.source, RandomAccess)
        return self.source.views(self.rows[rows])


def labelled_source(source: TokenSource, rows: np.ndarray) -> LabelledRows:
    """`rows` (int64, ascending) of `source`, which must know the lengths of its cells."""
    assert isinstance(source, KnownLengths)
    return (LabelledViews if isinstance(source, RandomAccess) else LabelledRows)(source, rows)


class LabelledBatches:
    """A Collator of unmasked cells whose labels are their classes, found by `cell_key`."""

    def __init__(self, maker: Collator, keys_N: np.ndarray, classes_N: np.ndarray) -> None:
        """keys_N: uint64, of all cells; classes_N: int64, of the same cells."""
        order = np.argsort(keys_N)
        self._maker = maker
        self._keys_N, self._classes_N = keys_N[order], classes_N[order]

    def __call__(
        self,
        cells: CellViews,
        epochs_N: np.ndarray,
        idle_N: np.ndarray,
        masking: Masking,
        num_positions: int,
        packed: bool = False,
    ) -> Batch:
        unmasked = np.ones(len(cells), bool)
        batch = self._maker(cells, epochs_N, unmasked, masking, num_positions, packed)
        asked = np.flatnonzero(~idle_N)
        starts_M = rows_of(cells.lengths_N, num_positions, packed)[asked]
        device = batch.tokens_BS.device
        return replace(
            batch,
            selected_M=torch.from_numpy(starts_M.astype(np.int64)).to(device),
            labels_M=torch.from_numpy(self._classes_of(cells.keys_N[asked])).to(device),
        )

    def _classes_of(self, keys_M: np.ndarray) -> np.ndarray:
        places_M = np.searchsorted(self._keys_N, keys_M)
        assert np.array_equal(self._keys_N[places_M], keys_M), "a cell without a class"
        return self._classes_N[places_M]
