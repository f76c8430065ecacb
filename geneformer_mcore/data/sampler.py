"""The order of cells: a pure function of (seed, epoch), the same for every layout.

    position (counts training cells without end)
      -> epoch = position // n,  place = position % n
      -> spans of neighbouring rows, permuted by (seed, epoch)
      -> windows of `window_spans` spans, each span shuffled inside by (seed, epoch, span)
      -> dealt like cards: place p of a window is the next cell of its span p % window_spans
      -> row

The store is shuffled when it is written, so reading whole spans mixes well; a window mixes as many
spans as it holds. Whoever knows the position knows everything: there is no other state.

Dealing makes reading cheap for many ranks. Data-parallel rank r of d takes every d-th position, so
of a window it meets window_spans / gcd(window_spans, d) spans only: 8 of 64 for 8 ranks, and no
cell is read by two of them. (In the last window of an epoch, which holds fewer spans, ranks may
read the same ones.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_SPANS, _CELLS = 1, 2  # what a random stream is for


@dataclass(frozen=True)
class Places:
    """Where some positions of the stream lie; arrays of one length.

    rows:     int64, row numbers of the source
    epochs:   int64, the epoch each is seen in
    windows:  int64, the window each belongs to, counted on over all epochs
    """

    rows: np.ndarray
    epochs: np.ndarray
    windows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: slice | np.ndarray) -> Places:
        return Places(self.rows[which], self.epochs[which], self.windows[which])


@dataclass(frozen=True)
class Sampler:
    """The order of `num_cells` rows, starting at row `first_row` of a source."""

    first_row: int
    num_cells: int
    span_cells: int
    window_spans: int
    seed: int

    def places(self, start: int, stop: int) -> Places:
        """Where the positions start..stop-1 lie."""
        assert 0 <= start <= stop
        rows, epochs, windows = [], [], []
        while start < stop:
            epoch, place = divmod(start, self.num_cells)
            starts = _windows(self, epoch).starts
            window = int(np.searchsorted(starts, place, side="right")) - 1
            begin = place - int(starts[window])
            taken = _window_rows(self, epoch, window)[begin : begin + stop - start]
            rows.append(taken)
            epochs.append(np.full(len(taken), epoch))
            windows.append(np.full(len(taken), epoch * len(starts) + window))
            start += len(taken)
        if not rows:
            return Places(*(np.zeros(0, np.int64) for _ in range(3)))
        return Places(np.concatenate(rows), np.concatenate(epochs), np.concatenate(windows))

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and epochs (int64 [stop - start] each) of the positions start..stop-1."""
        places = self.places(start, stop)
        return places.rows, places.epochs


@dataclass(frozen=True)
class _Windows:
    """The windows of one epoch. spans: the permuted span numbers; starts: first place of each."""

    spans: np.ndarray
    starts: np.ndarray


@lru_cache(maxsize=8)
def _windows(order: Sampler, epoch: int) -> _Windows:
    num_spans = -(-order.num_cells // order.span_cells)
    spans = permutation(num_spans, order.seed, _SPANS, epoch, 0)
    lengths = np.full(num_spans, order.span_cells)
    lengths[spans == num_spans - 1] = order.num_cells - (num_spans - 1) * order.span_cells
    first_places = np.cumsum(lengths) - lengths
    return _Windows(spans, first_places[:: order.window_spans])


@lru_cache(maxsize=8)
def _window_rows(order: Sampler, epoch: int, window: int) -> np.ndarray:
    spans = _windows(order, epoch).spans
    here = spans[window * order.window_spans : (window + 1) * order.window_spans]
    cells = [_span_places(order, epoch, int(span)) for span in here]
    # Column = span. A span that is short leaves holes at the end of its column.
    dealt = np.full((max(map(len, cells)), len(cells)), -1)
    for column, places in enumerate(cells):
        dealt[: len(places), column] = places
    flat = dealt.ravel()
    return order.first_row + flat[flat >= 0]


def _span_places(order: Sampler, epoch: int, span: int) -> np.ndarray:
    first = span * order.span_cells
    size = min(order.span_cells, order.num_cells - first)
    return first + permutation(size, order.seed, _CELLS, epoch, span)


def permutation(size: int, seed: int, purpose: int, epoch: int, index: int) -> np.ndarray:
    """int64 [size], a permutation of 0..size-1 that depends on the arguments and nothing else.

    Sorts the raw output of Philox, a counter-based generator, because numpy promises the raw
    stream of a bit generator for ever, but not what `Generator.permutation` makes of it.
    """
    keys = np.random.Philox(
        key=np.array([seed, purpose], dtype=np.uint64),
        counter=np.array([0, 0, index, epoch], dtype=np.uint64),
    ).random_raw(size)
    return np.argsort(keys, kind="stable")
