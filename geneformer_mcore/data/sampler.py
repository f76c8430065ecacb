"""The order of cells: a pure function of (seed, epoch), the same for every layout.

    position (counts training cells without end)
      -> epoch = position // n,  place = position % n
      -> spans of neighbouring rows, permuted by (seed, epoch)
      -> windows of `window_spans` spans, each span shuffled inside by (seed, epoch, span)
      -> place p of a window is the next cell of its span p % window_spans  -> row

The position is the only state. Data-parallel rank r of d takes every d-th position, so of a window
it reads window_spans / gcd(window_spans, d) spans only, 8 of 64 for 8 ranks, and no other rank
reads those (but in the last window of an epoch, which may hold fewer).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_SPANS, _CELLS = 1, 2  # purposes of random streams


@dataclass(frozen=True)
class Places:
    """Rows of the source, epochs and windows (counted over all epochs) of positions; int64 [N]."""

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
        """The places of the positions start..stop-1."""
        assert 0 <= start <= stop
        rows, epochs, windows = [], [], []
        while start < stop:
            epoch, place = divmod(start, self.num_cells)
            _, starts = _windows(self, epoch)
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


@lru_cache(maxsize=8)
def _windows(order: Sampler, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The permuted spans of an epoch, and the first place of each window."""
    num_spans = -(-order.num_cells // order.span_cells)
    spans = permutation(num_spans, order.seed, _SPANS, epoch, 0)
    lengths = np.full(num_spans, order.span_cells)
    lengths[spans == num_spans - 1] = order.num_cells - (num_spans - 1) * order.span_cells
    first_places = np.cumsum(lengths) - lengths
    return spans, first_places[:: order.window_spans]


@lru_cache(maxsize=8)
def _window_rows(order: Sampler, epoch: int, window: int) -> np.ndarray:
    spans, _ = _windows(order, epoch)
    here = spans[window * order.window_spans : (window + 1) * order.window_spans]
    cells = [_span_places(order, epoch, int(span)) for span in here]
    # Column = span; a short span leaves holes at its end.
    columns = np.full((max(map(len, cells)), len(cells)), -1)
    for number, places in enumerate(cells):
        columns[: len(places), number] = places
    flat = columns.ravel()
    return order.first_row + flat[flat >= 0]


def _span_places(order: Sampler, epoch: int, span: int) -> np.ndarray:
    first = span * order.span_cells
    size = min(order.span_cells, order.num_cells - first)
    return first + permutation(size, order.seed, _CELLS, epoch, span)


def permutation(size: int, seed: int, purpose: int, epoch: int, index: int) -> np.ndarray:
    """int64 [size], a permutation of 0..size-1 by the arguments alone: the raw output of Philox,
    sorted, as numpy guarantees that stream for ever, but not `Generator.permutation`."""
    keys = np.random.Philox(
        key=np.array([seed, purpose], dtype=np.uint64),
        counter=np.array([0, 0, index, epoch], dtype=np.uint64),
    ).random_raw(size)
    return np.argsort(keys, kind="stable")
