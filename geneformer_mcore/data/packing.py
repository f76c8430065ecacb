"""Which cell of a global batch is packed into which micro batch of which rank.

    lengths of all cells of a global batch
      -> as few micro batches as the token budget allows, the same number on every rank
      -> longest cells first, each to the micro batch with the least work so far that has room
      -> a micro batch number per cell

A pure function of the lengths: every rank computes the whole of it, and a global batch holds the
same cells whatever the layout. A rank is done when its longest micro batches are, and attention
grows with the square of a cell's length, so both tokens and squares are made alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from geneformer_mcore.backends import compiled, is_available
from geneformer_mcore.errors import DataError

# The compiled loop of packing.py: cells, longest first, each to the least busy bin with room.
#
# What it computes is defined by `packing.deal_plainly`, against which it is tested cell by cell.


@compiled
def _comes_first(works: np.ndarray, one: int, other: int) -> bool:
    """Whether bin `one` has less work; of equals, the lower number."""
    return works[one] < works[other] or (works[one] == works[other] and one < other)


@compiled
def _sink(heap: np.ndarray, size: int, place: int, works: np.ndarray) -> None:
    """Moves the bin at `place` down to where no bin below it comes first."""
    moved = heap[place]
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and _comes_first(works, heap[child + 1], heap[child]):
            child += 1
        if not _comes_first(works, heap[child], moved):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = moved


@compiled
def _rise(heap: np.ndarray, place: int, works: np.ndarray) -> None:
    """Moves the bin at `place` up to where the bin above it comes first."""
    moved = heap[place]
    while place > 0 and _comes_first(works, moved, heap[(place - 1) // 2]):
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    heap[place] = moved


@compiled
def deal(
    lengths_N: np.ndarray,
    costs_N: np.ndarray,
    order_N: np.ndarray,
    budget: int,
    num_bins: int,
    bin_N: np.ndarray,
) -> bool:
    """Fills `bin_N` (int64 [N]) with the bin of each cell; False if they do not fit.

    lengths_N, costs_N:  int64, float64
    order_N:             int64, the cells, longest first
    """
    works, room = np.zeros(num_bins), np.full(num_bins, budget)
    heap, full = np.arange(num_bins), np.empty(num_bins, np.int64)
    size = num_bins
    for k in range(len(order_N)):
        cell = order_N[k]
        num_full = 0
        while size > 0 and room[heap[0]] < lengths_N[cell]:
            full[num_full] = heap[0]
            num_full += 1
            size -= 1
            heap[0] = heap[size]
            _sink(heap, size, 0, works)
        if size == 0:
            return False
        chosen = heap[0]
        bin_N[cell] = chosen
        works[chosen] += costs_N[cell]
        room[chosen] -= lengths_N[cell]
        _sink(heap, size, 0, works)
        for i in range(num_full):
            # Those with no room for the shortest cell are not asked again.
            if room[full[i]] >= lengths_N[order_N[-1]]:
                heap[size] = full[i]
                _rise(heap, size, works)
                size += 1
    return True


SQUARES_LIKE_TOKENS = 2048.0
"""Length at which the square term of a cell's cost equals its linear term. By the FLOPs of
model/flops.py it is 1,345 for the 10M model and 4,770 for the 106M one (head included); one value
for all, so that a change of the model does not change how cells are packed."""


@dataclass(frozen=True)
class Packing:
    """Micro batches of one global batch.

    bins:         for each micro batch of each rank the cells in it, int64, ascending: numbers
                  within the global batch. Rank r of d works on bins[r], bins[r + d], ...
    most_tokens:  tokens of the fullest one
    """

    bins: list[np.ndarray]
    most_tokens: int

    def of_rank(self, data_rank: int, data_size: int) -> list[np.ndarray]:
        """The micro batches of a data-parallel rank."""
        return self.bins[data_rank::data_size]


def pack(lengths_N: np.ndarray, budget: int, data_size: int, multiple: int = 1) -> Packing:
    """Deals cells of `lengths_N` tokens (int64 [N]) to micro batches of at most `budget` tokens.

    data_size:  data-parallel ranks
    multiple:   every rank gets a multiple of so many micro batches (of the interleaved pipeline)

    Raises DataError if a cell is longer than the budget.
    """
    longest = int(lengths_N.max(initial=0))
    if longest > budget:
        raise DataError(
            f"a cell of {longest} tokens does not fit a micro batch of {budget} tokens. Set "
            "data.tokens_per_micro_batch to data.seq_length or more."
        )
    per_round = data_size * multiple
    rounds = max(1, -(-int(lengths_N.sum()) // (budget * per_round)))
    while (bin_N := _deal(lengths_N, budget, rounds * per_round)) is None:
        rounds += 1
    # Stable: cells of one micro batch ascend. np.split would take longer than all of the rest.
    cells = np.argsort(bin_N, kind="stable")
    stops = np.cumsum(np.bincount(bin_N, minlength=rounds * per_round)).tolist()
    bins = [cells[start:stop] for start, stop in pairwise([0, *stops])]
    return Packing(bins, int(np.bincount(bin_N, lengths_N, minlength=1).max()))


def _deal(lengths_N: np.ndarray, budget: int, num_bins: int) -> np.ndarray | None:
    """int64 [N], the bin of every cell; None if they do not fit."""
    lengths = lengths_N.astype(np.float64)
    costs_N = lengths * (1 + lengths / SQUARES_LIKE_TOKENS)
    # Stable: cells of one length keep their order.
    order_N = np.argsort(-lengths_N, kind="stable")
    if not is_available("numba"):
        return deal_plainly(lengths_N, costs_N, order_N, budget, num_bins)

    bin_N = np.empty(len(lengths_N), np.int64)
    fits = deal(lengths_N.astype(np.int64), costs_N, order_N, budget, num_bins, bin_N)
    return bin_N if fits else None


def deal_plainly(
    lengths_N: np.ndarray, costs_N: np.ndarray, order_N: np.ndarray, budget: int, num_bins: int
) -> np.ndarray | None:
    """The bin of every cell, or None: each cell, in the order of `order_N`, goes to the bin with
    the least cost so far (of equals, the first) that has room. A tenth as fast as compiled."""
    bin_N = np.empty(len(lengths_N), np.int64)
    room = [budget] * num_bins
    heap = [(0.0, number) for number in range(num_bins)]
    sizes, costs = lengths_N.tolist(), costs_N.tolist()
    for cell in order_N.tolist():
        full = []
        while heap and room[heap[0][1]] < sizes[cell]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        work, number = heap[0]
        heapq.heapreplace(heap, (work + costs[cell], number))
        bin_N[cell] = number
        room[number] -= sizes[cell]
        for entry in full:
            heapq.heappush(heap, entry)
    return bin_N


def imbalance(loads: Sequence[float] | np.ndarray) -> float:
    """The largest load over the mean load: by how much longer all wait for the slowest."""
    values = np.asarray(loads, np.float64)
    return float(values.max() / values.mean())
