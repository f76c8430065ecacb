"""The stream of global batches of a data-parallel rank, prepared ahead by one thread.

    position -> Sampler -> rows -> this rank's cells -> ShuffleBuffer -> Collator -> micro batches

    padded: rank r of d takes cells r, r + d, ... in groups of micro_batch_size
    packed: collate.pack assigns the whole global batch, by the lengths of its cells

The state is one integer, the position: cells seen since the start of the run. One prefetch thread
suffices: what takes time releases the interpreter's lock. To a GPU batches are copied from pinned
memory on a side stream, one step ahead.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from geneformer_mcore.config import Config
from geneformer_mcore.config.derive import token_budget
from geneformer_mcore.data.collate import Collator, make_batch, pack, padded_length
from geneformer_mcore.data.masking import VALIDATION_EPOCH, Masking
from geneformer_mcore.data.sampler import Places, Sampler
from geneformer_mcore.data.shuffle_buffer import ShuffleBuffer
from geneformer_mcore.types import (
    Batch,
    CellViews,
    KnownLengths,
    RaggedCells,
    RandomAccess,
    TokenSource,
)


def prefetched(steps: Iterator[list[Batch]], depth: int) -> Iterator[list[Batch]]:
    """Prepare up to `depth` steps in a thread, which ends with the iterator; raises its errors."""
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
            for step in steps:
                put(step)
                if closed.is_set():
                    return
        except BaseException as error:  # raised by the consumer
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


@dataclass(frozen=True)
class Share:
    """A rank's part of every global batch, which holds the same cells in every layout."""

    global_batch_size: int
    micro_batch_size: int
    data_rank: int
    data_size: int


@dataclass(frozen=True)
class Budget:
    """Most tokens of a packed micro batch; multiple: of micro batches per step and rank."""

    tokens: int
    multiple: int = 1


def budget(config: Config) -> Budget | None:
    """The budget of packed cells; None if they are padded."""
    if not config.data.packing:
        return None
    parallel = config.parallel
    # The interleaved schedule runs micro batches in groups of the number of stages.
    return Budget(token_budget(config), parallel.pipeline if parallel.virtual_pipeline > 1 else 1)


class Feed:
    """The cells of one data-parallel rank. Ranks of a tensor or pipeline group read the same."""

    def __init__(
        self,
        source: TokenSource,
        order: Sampler,
        masking: Masking,
        share: Share,
        seq_length: int,
        pad_multiple: int,
        maker: Collator = make_batch,
        budget: Budget | None = None,
    ) -> None:
        """budget: packs cells; without one they are padded."""
        self.order = order
        self.masking = masking
        self.share = share
        self.seq_length = seq_length
        self.pad_multiple = pad_multiple
        self.budget = budget
        self._maker = maker
        self._cells: _Direct | ShuffleBuffer
        if isinstance(source, RandomAccess):
            self._cells = _Direct(source, seq_length)
        else:
            self._cells = ShuffleBuffer(source, order, seq_length)

    def step(self, position: int) -> list[Batch]:
        """The micro batches of the training batch that starts at `position`, all of one shape."""
        places = self.order.places(position, position + self.share.global_batch_size)
        if self.budget is not None:
            return self._packed(places, places.epochs)
        return self._padded(places, places.epochs, np.zeros(len(places), dtype=bool))

    def validation_step(self, position: int) -> list[Batch]:
        """The same for validation, by VALIDATION_EPOCH; idle cells fill up the last batch."""
        size = self.share.global_batch_size
        places = self.order.places(position, min(position + size, self.order.num_cells))
        if self.budget is not None:
            return self._packed(places, np.full(len(places), VALIDATION_EPOCH))
        idle = np.arange(size) >= len(places)
        places = places.take(np.where(idle, 0, np.arange(size)))
        return self._padded(places, np.full(size, VALIDATION_EPOCH), idle)

    def validation_cells(self, limit: int) -> RaggedCells:
        """The cells of the first `limit` validation steps, truncated."""
        num_cells = min(limit * self.share.global_batch_size, self.order.num_cells)
        return self._cells.take(self.order.places(0, num_cells)).ragged()

    def _padded(self, places: Places, epochs: np.ndarray, idle: np.ndarray) -> list[Batch]:
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

    def _packed(self, places: Places, epochs: np.ndarray) -> list[Batch]:
        assert self.budget is not None
        share, budget = self.share, self.budget
        lengths = self._cells.lengths(places)
        packing = pack(lengths, budget.tokens, share.data_size, budget.multiple)
        num_positions = padded_length(packing.most_tokens, self.pad_multiple, budget.tokens)
        bins = packing.of_rank(share.data_rank, share.data_size)
        mine = np.concatenate(bins)
        cells, epochs = self._cells.take(places.take(mine)), epochs[mine]
        stops = np.cumsum([len(each) for each in bins])
        parts = [slice(stop - len(each), stop) for stop, each in zip(stops, bins, strict=True)]
        return [
            self._maker(
                cells.part(part),
                epochs[part],
                np.zeros(part.stop - part.start, bool),
                self.masking,
                num_positions,
                packed=True,
            )
            for part in parts
        ]

    def steps(self, position: int, prefetch: int, pinned: bool = False) -> Iterator[list[Batch]]:
        """Global batches from `position` on, without end, `prefetch` of them (0: none) prepared
        by a thread that ends when the iterator is closed. pinned: in page-locked memory."""

        def in_line() -> Iterator[list[Batch]]:
            for start in itertools.count(position, self.share.global_batch_size):
                batches = self.step(start)
                yield [batch.pinned() for batch in batches] if pinned else batches

        return prefetched(in_line(), prefetch) if prefetch else in_line()


class _Direct:
    """Cells of a source with random access."""

    def __init__(self, source: RandomAccess, seq_length: int) -> None:
        self._source = source
        self._seq_length = seq_length

    def lengths(self, places: Places) -> np.ndarray:
        """int64, tokens of the cells at `places`; cells are read if the source does not know."""
        if isinstance(self._source, KnownLengths):
            return np.minimum(self._source.lengths(places.rows), self._seq_length)
        return self.take(places).lengths_N

    def take(self, places: Places) -> CellViews:
        """The cells at `places`, truncated."""
        cells = self._source.views(places.rows)
        lengths_N = np.minimum(cells.lengths_N, self._seq_length)
        return CellViews(cells.tokens_T, cells.starts_N, lengths_N, cells.keys_N)


def steps_on_device(
    feed: Feed, position: int, prefetch: int, device: torch.device
) -> Iterator[list[Batch]]:
    """Global batches from `position` on with their tensors on `device`, without end."""
    if device.type != "cuda":
        return feed.steps(position, prefetch)
    return _ahead(feed, position, prefetch, device)


def _ahead(feed: Feed, position: int, prefetch: int, device: torch.device) -> Iterator[list[Batch]]:
    side = torch.cuda.Stream(device)
    # Pinned by the prefetch thread, as page-locking takes time.
    with closing(feed.steps(position, prefetch, pinned=True)) as steps:  # type: ignore[type-var]
        coming = _copied(next(steps), device, side)
        while True:
            batches, done = coming
            coming = _copied(next(steps), device, side)
            here = torch.cuda.current_stream(device)
            here.wait_event(done)
            for batch in batches:
                # The allocator must not reuse this memory before `here` has read it.
                batch.record_stream(here)
            yield batches


def _copied(
    batches: list[Batch], device: torch.device, side: torch.cuda.Stream
) -> tuple[list[Batch], torch.cuda.Event]:
    with torch.cuda.stream(side):
        copies = [batch.to(device) for batch in batches]
        return copies, side.record_event()
