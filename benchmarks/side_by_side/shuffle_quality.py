"""How well a stream of cells is shuffled, measured on the order in which they came.

rows in the order of the stream  ->  batches  ->  each measure over that of a uniform shuffle

1 means: as good as a uniform shuffle of all cells.
"""

from __future__ import annotations

import numpy as np

BLOCK_CELLS = 64
"""Cells that lie together in source order, as one block of it."""


def quality(rows: np.ndarray, dataset_N: np.ndarray, batch_size: int) -> dict[str, float]:
    """rows: int64, the source row of every cell of an epoch, in the order of the stream.

    blocks:    mean number of different blocks of BLOCK_CELLS source rows in a batch
    datasets:  mean entropy of the data sets in a batch
    distance:  median distance, in source order, between cells that follow each other
    each over its value for a uniform shuffle of the same rows.
    """
    uniform = np.random.default_rng(0).permutation(rows)
    found = _measures(rows, dataset_N, batch_size)
    best = _measures(uniform, dataset_N, batch_size)
    return {name: found[name] / best[name] if best[name] else 1.0 for name in found}


def _measures(rows: np.ndarray, dataset_N: np.ndarray, batch_size: int) -> dict[str, float]:
    starts = range(0, len(rows) - batch_size + 1, batch_size)
    batches = [rows[start : start + batch_size] for start in starts]
    return {
        "blocks": float(np.mean([len(np.unique(batch // BLOCK_CELLS)) for batch in batches])),
        "datasets": float(np.mean([_entropy(dataset_N[batch]) for batch in batches])),
        "distance": float(np.median(np.abs(np.diff(rows)))),
    }


def _entropy(labels: np.ndarray) -> float:
    counts = np.bincount(labels)
    share = counts[counts > 0] / len(labels)
    return float(-(share * np.log(share)).sum())


def two_epochs(
    first: np.ndarray, second: np.ndarray, num_cells: int, batch_size: int
) -> dict[str, bool | float]:
    """Whether each epoch holds every cell once, whether they differ, and how alike batches are.

    mates_again: pairs of cells that share a batch in both epochs, over their number were both
    epochs shuffled uniformly: what reading in blocks costs, even where each batch is well mixed.
    """
    every = np.arange(num_cells)
    each_once = all(np.array_equal(np.sort(epoch), every) for epoch in (first, second))
    differ = len(first) != len(second) or bool(np.any(first != second))
    again = _mates_again(first, second, batch_size) if each_once else float("nan")
    return {"each_once": each_once, "epochs_differ": differ, "mates_again": again}


def _mates_again(first: np.ndarray, second: np.ndarray, batch_size: int) -> float:
    batch_in_second = np.empty(len(second), np.int64)
    batch_in_second[second] = np.arange(len(second)) // batch_size
    pairs = shared = 0
    for start in range(0, len(first), batch_size):
        batch = first[start : start + batch_size]
        _, counts = np.unique(batch_in_second[batch], return_counts=True)
        shared += int((counts * (counts - 1)).sum())
        pairs += len(batch) * (len(batch) - 1)
    expected = pairs * (batch_size - 1) / (len(first) - 1)
    return shared / expected
