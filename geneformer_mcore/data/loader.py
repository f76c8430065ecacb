"""The stream of global batches, dealt to data-parallel ranks, prepared one step ahead or more.

    position -> Order -> rows -> this rank's cells -> spans read once -> micro batches
                                                      (one prefetch thread)

    padded: a rank's cells are every d-th, its micro batches the next few of them
    packed: packing.py deals the whole global batch, by the lengths of its cells

The state is one integer, the position: cells seen since the start of the run.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from geneformer_mcore.config import Config
from geneformer_mcore.config.derive import token_budget
from geneformer_mcore.data.collate import Collator, make_batch, padded_length
from geneformer_mcore.data.masking import VALIDATION_EPOCH, Masking
from geneformer_mcore.data.packing import pack
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

# Steps prepared ahead by one thread.
#
#     steps in line  ->  thread: next(steps) into a queue of a few  ->  the training loop takes them
#
# One thread is enough, and better than processes: what takes time releases the interpreter's lock,
# and nothing is copied between processes.


def prefetched(steps: Iterator[list[Batch]], depth: int) -> Iterator[list[Batch]]:
    """The same steps, up to `depth` of them ready. The thread ends when the iterator is closed;
    an error in it is raised here."""
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


@dataclass(frozen=True)
class Share:
    """Which part of every global batch a rank works on.

    Padded, cell i of a global batch goes to data-parallel rank i % data_size. A global batch holds
    the same cells whatever the layout.
    """

    global_batch_size: int
    micro_batch_size: int
    data_rank: int
    data_size: int


@dataclass(frozen=True)
class Budget:
    """That cells are packed, and how many fit.

    tokens:    of a micro batch, at most
    multiple:  micro batches per step and rank come in multiples of this
    """

    tokens: int
    multiple: int = 1


def budget(config: Config) -> Budget | None:
    """How cells are packed; None if they are padded."""
    if not config.data.packing:
        return None
    parallel = config.parallel
    # The interleaved schedule runs micro batches in groups of as many as there are stages.
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
        """maker: what makes micro batches of cells; all makers make the same ones.
        budget: packs cells; without one they are padded."""
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
        """The same for validation: masks are those of VALIDATION_EPOCH, and beyond the last cell
        a padded batch is filled up with cells in which nothing is predicted."""
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

    def lengths(self, places: Places) -> np.ndarray:
        """int64, tokens of each of the cells at `places`: by a source that knows them, so that no
        rank touches, and verifies, the tokens of other ranks' cells."""
        if isinstance(self._source, KnownLengths):
            return np.minimum(self._source.lengths(places.rows), self._seq_length)
        return self.take(places).lengths_N

    def take(self, places: Places) -> CellViews:
        """The cells at `places`, in that order, at most seq_length tokens of each."""
        cells = self._source.views(places.rows)
        lengths_N = np.minimum(cells.lengths_N, self._seq_length)
        return CellViews(cells.tokens_T, cells.starts_N, lengths_N, cells.keys_N)


# Batches on their way to a GPU: copied beside the computation, one step ahead.
#
# prefetch thread: batch -> pinned memory  |  side stream: copy of step n + 1 while step n computes
#
# On a CPU there is nothing to copy, and batches pass through.


def steps_on_device(
    feed: Feed, position: int, prefetch: int, device: torch.device
) -> Iterator[list[Batch]]:
    """Global batches from `position` on with their tensors on `device`, without end."""
    if device.type != "cuda":
        return feed.steps(position, prefetch)
    return _ahead(feed, position, prefetch, device)


def _ahead(feed: Feed, position: int, prefetch: int, device: torch.device) -> Iterator[list[Batch]]:
    side = torch.cuda.Stream(device)
    # Pinned by the prefetch thread: page-locking takes time, and copies from pageable memory wait.
    with closing(feed.steps(position, prefetch, pinned=True)) as steps:  # type: ignore[type-var]
        coming = _copied(next(steps), device, side)
        while True:
            batches, done = coming
            coming = _copied(next(steps), device, side)
            here = torch.cuda.current_stream(device)
            here.wait_event(done)
            for batch in batches:
                # The allocator must not give this memory away before `here` has used it.
                batch.record_stream(here)
            yield batches


def _copied(
    batches: list[Batch], device: torch.device, side: torch.cuda.Stream
) -> tuple[list[Batch], torch.cuda.Event]:
    with torch.cuda.stream(side):
        copies = [batch.to(device) for batch in batches]
        return copies, side.record_event()
