"""The stream of global batches, dealt to data-parallel ranks, prepared one step ahead or more.

    position -> Order -> rows -> spans read once -> this rank's cells -> micro batches
                                                      (one prefetch thread)

The state is one integer, the position: cells seen since the start of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from geneformer_mcore.contracts import Batch, CellViews, RaggedCells, RandomAccess, TokenSource
from geneformer_mcore.feed.batch import BatchMaker, make_batch, padded_length
from geneformer_mcore.feed.masks import VALIDATION_EPOCH, Masking
from geneformer_mcore.feed.order import Order, Places
from geneformer_mcore.feed.prefetch import prefetched
from geneformer_mcore.feed.spans import Spans


@dataclass(frozen=True)
class Share:
    """Which part of every global batch a rank works on.

    Cell i of a global batch goes to data-parallel rank i % data_size: a global batch holds the
    same cells whatever the layout.
    """

    global_batch_size: int
    micro_batch_size: int
    data_rank: int
    data_size: int


class Feed:
    """The cells of one data-parallel rank. Ranks of a tensor or pipeline group read the same."""

    def __init__(
        self,
        source: TokenSource,
        order: Order,
        masking: Masking,
        share: Share,
        seq_length: int,
        pad_multiple: int,
        maker: BatchMaker = make_batch,
    ) -> None:
        """maker: what makes micro batches of cells; all makers make the same ones."""
        self.order = order
        self.masking = masking
        self.share = share
        self.seq_length = seq_length
        self.pad_multiple = pad_multiple
        self._maker = maker
        self._cells: _Direct | Spans
        if isinstance(source, RandomAccess):
            self._cells = _Direct(source, seq_length)
        else:
            self._cells = Spans(source, order, seq_length)

    def step(self, position: int) -> list[Batch]:
        """The micro batches of the training batch that starts at `position`, all padded alike."""
        places = self.order.places(position, position + self.share.global_batch_size)
        return self._micro_batches(places, places.epochs, np.zeros(len(places), dtype=bool))

    def validation_step(self, position: int) -> list[Batch]:
        """The same for validation: masks are those of VALIDATION_EPOCH, and beyond the last cell
        the batch is filled up with cells in which nothing is predicted."""
        size = self.share.global_batch_size
        places = self.order.places(position, min(position + size, self.order.num_cells))
        idle = np.arange(size) >= len(places)
        places = places.take(np.where(idle, 0, np.arange(size)))
        return self._micro_batches(places, np.full(size, VALIDATION_EPOCH), idle)

    def validation_cells(self, limit: int) -> RaggedCells:
        """The cells of the first `limit` validation steps, truncated."""
        num_cells = min(limit * self.share.global_batch_size, self.order.num_cells)
        return self._cells.take(self.order.places(0, num_cells)).ragged()

    def _micro_batches(self, places: Places, epochs: np.ndarray, idle: np.ndarray) -> list[Batch]:
        share = self.share
        mine = slice(share.data_rank, None, share.data_size)
        cells = self._cells.take(places.take(mine))
        epochs, idle = epochs[mine], idle[mine]
        longest = int(cells.lengths_N.max())
        num_positions = padded_length(longest, self.pad_multiple, self.seq_length)
        size = share.micro_batch_size
        parts = [slice(start, start + size) for start in range(0, len(cells), size)]
        return [
            self._maker(cells.part(part), epochs[part], idle[part], self.masking, num_positions)
            for part in parts
        ]

    def steps(self, position: int, prefetch: int, pinned: bool = False) -> Iterator[list[Batch]]:
        """Global batches from `position` on, without end. With `prefetch` > 0 a thread keeps that
        many ready; it ends when the iterator is closed. pinned: in page-locked memory."""
        in_line = self._in_line(position, pinned)
        return prefetched(in_line, prefetch) if prefetch else in_line

    def _in_line(self, position: int, pinned: bool) -> Iterator[list[Batch]]:
        while True:
            batches = self.step(position)
            yield [batch.pinned() for batch in batches] if pinned else batches
            position += self.share.global_batch_size


class _Direct:
    """Cells from a source that gives single ones."""

    def __init__(self, source: RandomAccess, seq_length: int) -> None:
        self._source = source
        self._seq_length = seq_length

    def take(self, places: Places) -> CellViews:
        """The cells at `places`, in that order, at most seq_length tokens of each."""
        cells = self._source.views(places.rows)
        lengths_N = np.minimum(cells.lengths_N, self._seq_length)
        return CellViews(cells.tokens_T, cells.starts_N, lengths_N, cells.keys_N)
