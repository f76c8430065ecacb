"""The compiled loop of packing.py: cells, longest first, each to the least busy bin with room.

What it computes is defined by `packing.deal_plainly`, against which it is tested cell by cell.
"""

from __future__ import annotations

import numpy as np

from geneformer_mcore.cells.compiled import compiled


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
