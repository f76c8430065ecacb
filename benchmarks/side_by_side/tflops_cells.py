"""The cells that tflops.py trains on: made up, all of full length or of lengths like real ones', or
those of a flat copy.

    mean 1,300 -> lengths, log-normal, cut off at seq_length -> windows of a shuffled list
    folder     -> store/flat.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from geneformer_mcore.types import CLS, NUM_SPECIALS, CellViews, RaggedCells

if TYPE_CHECKING:
    from geneformer_mcore.store.local_cache import FlatCopy

FULL = 0
"""Instead of a mean: every cell has as many tokens as fit."""

_NUM_CELLS = 1024
_LOG_SPREAD = 0.5
"""Standard deviation of log(genes) of a cell: 0.31 in blood (pbmc3k), 0.29 in bone marrow, 0.56 in
lung; of several tissues together it is more than of one."""


@dataclass(frozen=True)
class Cells:
    """Cells to train on, and how tables call them."""

    source: MadeUpCells | FlatCopy
    label: str
    mean_tokens: float
    """Of a cell as it is trained on: cut off at seq_length."""


class MadeUpCells:
    """Cells of the given numbers of tokens: [CLS], then different genes in a random order.
    Implements contracts.RandomAccess."""

    def __init__(self, lengths_N: np.ndarray, vocabulary_size: int) -> None:
        genes = np.arange(NUM_SPECIALS, vocabulary_size, dtype=np.uint16)
        np.random.default_rng(0).shuffle(genes)
        self.num_cells = len(lengths_N)
        starts_N = np.cumsum(lengths_N) - lengths_N
        self._starts_N, self._lengths_N = starts_N, lengths_N.astype(np.int64)
        self._keys_N = np.arange(self.num_cells, dtype=np.uint64)
        self._tokens_T = np.full(int(lengths_N.sum()), CLS, np.uint16)
        for row, (start, length) in enumerate(zip(starts_N, lengths_N, strict=True)):
            places = (row * 37 + np.arange(length - 1)) % len(genes)
            self._tokens_T[start + 1 : start + length] = genes[places]

    def __len__(self) -> int:
        return self.num_cells

    def views(self, rows: np.ndarray) -> CellViews:
        """The cells of `rows`."""
        return CellViews(
            self._tokens_T, self._starts_N[rows], self._lengths_N[rows], self._keys_N[rows]
        )

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1."""
        return self.views(np.arange(start, stop)).ragged()


def made_up(mean: int, seq_length: int, vocabulary_size: int) -> Cells:
    """Cells of `mean` tokens on average, at most seq_length each; FULL: all of seq_length."""
    if mean == FULL:
        lengths_N = np.full(_NUM_CELLS, seq_length)
        label = "made up, full length"
    else:
        lengths_N = like_real(mean, seq_length)
        label = f"made up, mean {mean:,}"
    return Cells(_made(tuple(lengths_N), vocabulary_size), label, float(lengths_N.mean()))


@lru_cache(maxsize=4)
def _made(lengths: tuple[int, ...], vocabulary_size: int) -> MadeUpCells:
    return MadeUpCells(np.array(lengths), vocabulary_size)


def like_real(mean: int, seq_length: int, num_cells: int = _NUM_CELLS) -> np.ndarray:
    """int64 [num_cells]: tokens of cells, log-normal, cut off at seq_length as a store cuts them,
    with that mean to about a token. mean: 2..seq_length."""
    normal = NormalDist(sigma=_LOG_SPREAD)
    quantiles = [normal.inv_cdf((place + 0.5) / num_cells) for place in range(num_cells)]
    spread = np.exp(np.random.default_rng(1).permutation(quantiles))
    low, high = 1.0, seq_length * math.exp(8 * _LOG_SPREAD)
    for _ in range(60):
        middle = math.sqrt(low * high)
        if _cut(spread * middle, seq_length).mean() < mean:
            low = middle
        else:
            high = middle
    return _cut(spread * high, seq_length)


def _cut(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    return np.clip(np.rint(lengths), 2, seq_length).astype(np.int64)


def of_flat_copy(folder: Path, seq_length: int) -> Cells:
    """Those of a flat copy. Raises DataError if there is no sound one."""
    from geneformer_mcore.store.local_cache import FlatCopy

    source = FlatCopy(folder)
    lengths_N = source.views(np.arange(len(source))).lengths_N
    mean = float(np.minimum(lengths_N, seq_length).mean())
    return Cells(source, f"flat copy {folder.name}, mean {mean:,.0f}", mean)
