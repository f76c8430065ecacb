"""Cells by row number, from whole spans that are read once per window.

places  ->  missing spans: read, each into a slot of the pool
        ->  views of the cells in the pool, truncated
        ->  slots of past windows are freed
"""

from __future__ import annotations

import numpy as np

from geneformer_mcore.data.collate import copy_cut
from geneformer_mcore.data.sampler import Places, Sampler
from geneformer_mcore.types import CellViews, KnownLengths, TokenSource

_ABSENT = -1


class ShuffleBuffer:
    """This rank's spans of the current window, in slots with room for the longest cells."""

    def __init__(self, source: TokenSource, order: Sampler, seq_length: int) -> None:
        self.source = source
        self.order = order
        self.seq_length = seq_length
        num_spans = -(-order.num_cells // order.span_cells)
        self._slot_of_span = np.full(num_spans, _ABSENT)
        self._window_of_span = np.full(num_spans, _ABSENT)
        self._num_slots = 0
        self._free: list[int] = []
        self._pool_T = np.empty(0, np.uint16)
        self._starts = np.empty((0, order.span_cells), np.int64)
        self._lengths = np.empty((0, order.span_cells), np.int64)
        self._keys = np.empty((0, order.span_cells), np.uint64)
        # A batch may need the spans of a window and those of the next.
        self._add_slots(min(num_spans, 2 * order.window_spans))

    def lengths(self, places: Places) -> np.ndarray:
        """int64, tokens of the cells at `places`; reads all of them if the source does not know."""
        if isinstance(self.source, KnownLengths):
            return np.minimum(self.source.lengths(places.rows), self.seq_length)
        return self.take(places).lengths_N

    def take(self, places: Places) -> CellViews:
        """The cells at `places`, in that order; the views hold until the next call."""
        in_order = places.rows - self.order.first_row
        spans, cells = in_order // self.order.span_cells, in_order % self.order.span_cells
        self._window_of_span[spans] = places.windows
        slots = self._slot_of_span[spans]
        if slots.min(initial=0) == _ABSENT:
            # Not the first place's: packed cells come in the order of their micro batches.
            self._drop_before(int(places.windows.min()))
            for span in np.unique(spans[slots == _ABSENT]):
                self._read(int(span))
            slots = self._slot_of_span[spans]
            assert slots.min() != _ABSENT
        starts_N, lengths_N = self._starts[slots, cells], self._lengths[slots, cells]
        return CellViews(self._pool_T, starts_N, lengths_N, self._keys[slots, cells])

    def _read(self, span: int) -> None:
        order = self.order
        start = span * order.span_cells
        stop = min(start + order.span_cells, order.num_cells)
        block = self.source.read(order.first_row + start, order.first_row + stop)
        if not self._free:
            self._add_slots(self._num_slots)
        slot, number = self._free.pop(), len(block)
        room = self._pool_T[slot * self._slot_tokens : (slot + 1) * self._slot_tokens]
        lengths = np.minimum(block.lengths, self.seq_length)
        self._lengths[slot, :number] = lengths
        self._starts[slot, :number] = slot * self._slot_tokens + np.cumsum(lengths) - lengths
        self._keys[slot, :number] = block.keys_N
        if block.lengths.max(initial=0) <= self.seq_length:
            room[: len(block.tokens_T)] = block.tokens_T
        else:
            copy_cut(block.tokens_T, block.offsets, self.seq_length, room)
        self._slot_of_span[span] = slot

    def _drop_before(self, window: int) -> None:
        past = np.flatnonzero((self._window_of_span < window) & (self._slot_of_span != _ABSENT))
        self._free += self._slot_of_span[past].tolist()
        self._slot_of_span[past] = _ABSENT

    @property
    def _slot_tokens(self) -> int:
        return self.order.span_cells * self.seq_length

    def _add_slots(self, number: int) -> None:
        before = self._num_slots
        self._num_slots += number
        # Taken from the end of the list, so those used before come first.
        self._free = [*range(self._num_slots - 1, before - 1, -1), *self._free]
        self._pool_T = _longer(self._pool_T, self._num_slots * self._slot_tokens)
        self._starts = _longer(self._starts, self._num_slots)
        self._lengths = _longer(self._lengths, self._num_slots)
        self._keys = _longer(self._keys, self._num_slots)


def _longer(array: np.ndarray, length: int) -> np.ndarray:
    """`array` with room for `length` rows; it takes memory once it is written to."""
    longer = np.empty((length, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer
