"""The order of cells: a pure function of (seed, epoch), the same for every layout.

    position (counts training cells without end)
      -> epoch = position // n,  place = position % n
      -> spans of neighbouring rows, permuted by (seed, epoch)
      -> windows of a few spans, shuffled inside by (seed, epoch, window)
      -> row

The store is shuffled when it is written, so reading whole spans mixes well; the windows mix what
the spans leave together. Whoever knows the position knows everything: there is no other state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_SPANS, _CELLS = 1, 2  # what a random stream is for


@dataclass(frozen=True)
class Order:
    """The order of `num_cells` rows, starting at row `first_row` of a source."""

    first_row: int
    num_cells: int
    span_cells: int
    window_spans: int
    seed: int

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and epochs (int64 [stop - start] each) of the positions start..stop-1."""
        assert 0 <= start <= stop
        parts = []
        while start < stop:
            epoch, place = divmod(start, self.num_cells)
            window = _windows(self, epoch).at(place)
            rows = _window_rows(self, epoch, window)
            begin = place - int(_windows(self, epoch).starts[window])
            taken = rows[begin : begin + stop - start]
            parts.append((taken, np.full(len(taken), epoch)))
            start += len(taken)
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@dataclass(frozen=True)
class _Windows:
    """The windows of one epoch. spans: the permuted span numbers; starts: first place of each."""

    spans: np.ndarray
    starts: np.ndarray

    def at(self, place: int) -> int:
        return int(np.searchsorted(self.starts, place, side="right")) - 1


@lru_cache(maxsize=4)
def _windows(order: Order, epoch: int) -> _Windows:
    num_spans = -(-order.num_cells // order.span_cells)
    spans = permutation(num_spans, order.seed, _SPANS, epoch, 0)
    lengths = np.full(num_spans, order.span_cells)
    lengths[spans == num_spans - 1] = order.num_cells - (num_spans - 1) * order.span_cells
    first_places = np.cumsum(lengths) - lengths
    return _Windows(spans, first_places[:: order.window_spans])


@lru_cache(maxsize=4)
def _window_rows(order: Order, epoch: int, window: int) -> np.ndarray:
    spans = _windows(order, epoch).spans
    here = spans[window * order.window_spans : (window + 1) * order.window_spans]
    places = (here[:, None] * order.span_cells + np.arange(order.span_cells)).ravel()
    places = places[places < order.num_cells]
    shuffled = places[permutation(len(places), order.seed, _CELLS, epoch, window)]
    return order.first_row + shuffled


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
