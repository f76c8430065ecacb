"""Assignment of the cells of a global batch to micro batches and ranks.

    lengths of all cells of a global batch
      -> as few micro batches as the token budget allows, the same number on every rank
      -> longest cells first, each to the micro batch with the least work so far that has room

A pure function of the lengths, which every rank computes. Attention grows with the square of a
cell's length, so both tokens and squares are balanced.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from geneformer_mcore.backends import compiled
from geneformer_mcore.errors import DataError

SQUARES_LIKE_TOKENS = 2048.0
"""Length at which the square term of a cell's cost equals its linear term: by model/flops.py 1,345
for the 10M model and 4,770 for the 106M one. One value, so packing does not depend on the model."""


@dataclass(frozen=True)
class Packing:
    """Micro batches of one global batch.

    bins:         int64, ascending, the cells (within the global batch) of each micro batch; rank r
                  of d works on bins[r], bins[r + d], ...
    most_tokens:  tokens of the fullest one
    """

    bins: list[np.ndarray]
    most_tokens: int

    def of_rank(self, data_rank: int, data_size: int) -> list[np.ndarray]:
        return self.bins[data_rank::data_size]


def pack(lengths_N: np.ndarray, budget: int, data_size: int, multiple: int = 1) -> Packing:
    """Assign cells of `lengths_N` tokens (int64 [N]) to micro batches of at most `budget` tokens,
    a multiple of `multiple` per rank. Raises DataError if a cell is longer than the budget."""
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
    # Stable: cells of one micro batch ascend. np.split would be slow.
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
    bin_N = np.empty(len(lengths_N), np.int64)
    fits = _fill(lengths_N.astype(np.int64), costs_N, order_N, budget, num_bins, bin_N)
    return bin_N if fits else None


@compiled
def _fill(
    lengths_N: np.ndarray,
    costs_N: np.ndarray,
    order_N: np.ndarray,
    budget: int,
    num_bins: int,
    bin_N: np.ndarray,
) -> bool:
    """Fill `bin_N` (int64 [N]) with the bin of each cell; False if they do not fit.

    Each cell, in the order of `order_N` (longest first), goes to the first bin with the least cost
    so far that has room.
    """
    room = np.full(num_bins, budget)
    heap = [(0.0, number) for number in range(num_bins)]
    full = heap[:0]
    for cell in order_N:
        while len(heap) > 0 and room[heap[0][1]] < lengths_N[cell]:
            full.append(heapq.heappop(heap))
        if len(heap) == 0:
            return False
        work, number = heap[0]
        heapq.heapreplace(heap, (work + costs_N[cell], number))
        bin_N[cell] = number
        room[number] -= lengths_N[cell]
        for entry in full:
            # Those with no room for the shortest cell are not asked again.
            if room[entry[1]] >= lengths_N[order_N[-1]]:
                heapq.heappush(heap, entry)
        full.clear()
    return True


def imbalance(loads: Sequence[float] | np.ndarray) -> float:
    """The largest load over the mean load."""
    values = np.asarray(loads, np.float64)
    return float(values.max() / values.mean())
