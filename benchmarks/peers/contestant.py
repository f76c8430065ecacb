"""What a contestant is: batches of cells out of a format of its own, and which cells they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from benchmarks.side_by_side.prepared import Prepared

BATCH_SIZE = 64
SEED = 0

COUNTS, TOKENS = "counts", "tokens"
"""The two tables: raw counts out, or padded batches of the same tokens."""


class Contestant(ABC):
    """One row of a table. An instance is a loader that was opened, ready to be read.

    label:    how tables call it
    table:    COUNTS, or TOKENS if what comes out are padded batches of token ids
    package:  the distribution whose version stands beside it; "" for ourselves
    formats:  what makes its files, each run once, in this order; a function writes to the place
              that has its own name
    """

    label: ClassVar[str]
    table: ClassVar[str]
    package: ClassVar[str] = ""
    formats: ClassVar[tuple[Callable[[Prepared], None], ...]] = ()

    @abstractmethod
    def __init__(self, data: Prepared) -> None:
        """Opens it. What a first batch waits for and a second does not, happens here or then."""

    @abstractmethod
    def epoch(self, number: int) -> Iterator[Any]:
        """The batches of epoch `number`, shuffled."""

    @abstractmethod
    def cells(self, batch: Any) -> np.ndarray:
        """What names the cells of a batch: their source rows, unless `rows` says otherwise."""

    @abstractmethod
    def sums(self, batch: Any) -> np.ndarray:
        """float64 [B]: of each cell, the sum of its counts, or of its token ids."""

    def rows(self, cells: np.ndarray) -> np.ndarray:
        """int64: the source rows of what `cells` gave."""
        return cells

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's own."""
        return not self.package


def shuffled_batches(num_cells: int, epoch: int) -> list[np.ndarray]:
    """Rows of a uniform shuffle, in batches, for those peers that are read by row number."""
    order = np.random.default_rng([SEED, epoch]).permutation(num_cells)
    return [order[start : start + BATCH_SIZE] for start in range(0, num_cells, BATCH_SIZE)]
