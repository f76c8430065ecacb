"""The stream of global batches, dealt to data-parallel ranks, prepared one step ahead or more.

    position -> Order -> rows -> spans read once -> this rank's cells -> micro batches
                                                      (one prefetch thread)

The state is one integer, the position: cells seen since the start of the run.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from geneformer_mcore.contracts import Batch, RaggedCells, TokenSource
from geneformer_mcore.feed.batch import make_batch, padded_length, truncate
from geneformer_mcore.feed.masks import VALIDATION_EPOCH, Masking
from geneformer_mcore.feed.order import Order


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
    ) -> None:
        self.order = order
        self.masking = masking
        self.share = share
        self.seq_length = seq_length
        self.pad_multiple = pad_multiple
        self._spans = _Spans(source, order)

    def step(self, position: int) -> list[Batch]:
        """The micro batches of the training batch that starts at `position`, all padded alike."""
        share = self.share
        rows, epochs = self.order.rows(position, position + share.global_batch_size)
        return self._micro_batches(rows, epochs, np.zeros(len(rows), dtype=bool))

    def validation_step(self, position: int) -> list[Batch]:
        """The same for validation: masks are those of VALIDATION_EPOCH, and beyond the last cell
        the batch is filled up with cells in which nothing is predicted."""
        places = np.arange(position, position + self.share.global_batch_size)
        idle = places >= self.order.num_cells
        last = min(position + self.share.global_batch_size, self.order.num_cells)
        rows, _ = self.order.rows(position, last)
        rows = np.concatenate([rows, np.full(idle.sum(), rows[0])])
        return self._micro_batches(rows, np.full(len(rows), VALIDATION_EPOCH), idle)

    def validation_cells(self, limit: int) -> RaggedCells:
        """The cells of the first `limit` validation steps, truncated."""
        num_cells = min(limit * self.share.global_batch_size, self.order.num_cells)
        rows, _ = self.order.rows(0, num_cells)
        return truncate(self._spans.take(rows), self.seq_length)

    def _micro_batches(self, rows: np.ndarray, epochs: np.ndarray, idle: np.ndarray) -> list[Batch]:
        share = self.share
        mine = slice(share.data_rank, None, share.data_size)
        cells = truncate(self._spans.take(rows[mine]), self.seq_length)
        longest = int(cells.lengths.max())
        num_positions = padded_length(longest, self.pad_multiple, self.seq_length)
        parts = np.arange(len(cells)).reshape(-1, share.micro_batch_size)
        return [
            make_batch(
                cells.take(part),
                epochs[mine][part],
                idle[mine][part],
                self.masking,
                num_positions,
            )
            for part in parts
        ]

    def steps(self, position: int, prefetch: int) -> Iterator[list[Batch]]:
        """Global batches from `position` on, without end. With `prefetch` > 0 a thread keeps that
        many ready; it ends when the iterator is closed."""
        if prefetch == 0:
            return self._in_line(position)
        return _prefetched(self._in_line(position), prefetch)

    def _in_line(self, position: int) -> Iterator[list[Batch]]:
        while True:
            yield self.step(position)
            position += self.share.global_batch_size


class _Spans:
    """Reads whole spans and keeps the last two windows' worth of them."""

    def __init__(self, source: TokenSource, order: Order) -> None:
        self.source = source
        self.order = order
        self.kept: OrderedDict[int, RaggedCells] = OrderedDict()

    def take(self, rows: np.ndarray) -> RaggedCells:
        """The cells of `rows` (int64), in that order."""
        places = rows - self.order.first_row
        needed, which = np.unique(places // self.order.span_cells, return_inverse=True)
        blocks = [self._span(int(span)) for span in needed]
        first_in_joined = np.cumsum([0] + [len(block) for block in blocks[:-1]])
        in_span = places - needed[which] * self.order.span_cells
        taken = RaggedCells.concatenate(blocks).take(first_in_joined[which] + in_span)
        while len(self.kept) > 2 * self.order.window_spans:
            self.kept.popitem(last=False)
        return taken

    def _span(self, span: int) -> RaggedCells:
        if span not in self.kept:
            order = self.order
            start = order.first_row + span * order.span_cells
            stop = min(start + order.span_cells, order.first_row + order.num_cells)
            self.kept[span] = self.source.read(start, stop)
        self.kept.move_to_end(span)
        return self.kept[span]


def _prefetched(batches: Iterator[list[Batch]], depth: int) -> Iterator[list[Batch]]:
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: object) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for step in batches:
                put(step)
                if closed.is_set():
                    return
        except BaseException as error:  # handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
