"""The median of each gene over any number of values, exact while they fit, else from histograms.

    (gene, value) from anywhere, in any order  ->  kept as they are  ->  medians, exact
                                               ->  more than fit: histograms (see sketch)
                                                                    ->  medians within 0.1 %

Which of the two it is depends on how many values there are in all, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from geneformer_mcore.cells.compiled import compiled
from geneformer_mcore.cells.sketch import RELATIVE_ERROR, BinCounts, Histograms

BYTES_PER_VALUE = 24
"""What a kept value takes at the most, while the medians are taken: gene 4 and value 8, twice."""

NO_LIMIT = 1 << 62


class MedianCollector:
    """Collects values > 0 of genes, which are numbered; see BYTES_PER_VALUE for its memory."""

    def __init__(self, most_values: int = NO_LIMIT) -> None:
        """most_values: beyond this many values, histograms take their place."""
        self._most_values = most_values
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._histograms: Histograms | None = None
        self.num_values = 0

    @property
    def is_exact(self) -> bool:
        """Whether every value is still there."""
        return self._histograms is None

    @property
    def relative_error(self) -> float:
        """How far a median may be from the exact one, as a share of it."""
        return 0.0 if self.is_exact else RELATIVE_ERROR

    def add(self, places: np.ndarray, values: np.ndarray) -> None:
        """places int32 [V], the gene of each value; values float64 [V]. Kept as they are."""
        self.num_values += len(values)
        if self._histograms is not None:
            self._histograms.add_values(places, values)
            return
        self._parts.append((places, values))
        if self.num_values > self._most_values:
            self.give_up_values()

    def add_bins(self, bins: BinCounts) -> None:
        """Adds values of which only histograms are left."""
        self.give_up_values()
        assert self._histograms is not None
        self._histograms.add(bins)
        self.num_values += int(bins.counts.sum())

    def give_up_values(self) -> None:
        """From now on there are histograms only."""
        if self._histograms is None:
            self._histograms = Histograms()
        while self._parts:
            self._histograms.add_values(*self._parts.pop())

    def take(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gives the values away, as `add` took them; none are left. Only while `is_exact`."""
        assert self._histograms is None
        while self._parts:
            places, values = self._parts.pop()
            self.num_values -= len(values)
            yield places, values

    def bins(self) -> BinCounts:
        """The histograms, where there are no values (see is_exact)."""
        assert self._histograms is not None
        return self._histograms.bins()

    def values(self, num_genes: int) -> tuple[np.ndarray, np.ndarray]:
        """(offsets int64 [num_genes + 1], values float64 [V]): values of gene i are those between
        offsets i and i + 1, in no order. Only while `is_exact`."""
        assert self._histograms is None
        lengths = np.zeros(num_genes, np.int64)
        for places, _ in self._parts:
            lengths += np.bincount(places, minlength=num_genes)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        values, next_of_gene = np.empty(self.num_values), offsets[:-1].copy()
        while self._parts:
            _deal(*self._parts.pop(), next_of_gene, values)
        self._parts = [(np.repeat(np.arange(num_genes, dtype=np.int32), lengths), values)]
        return offsets, values

    def medians(self, num_genes: int) -> np.ndarray:
        """float64 [num_genes], NaN for a gene without a value; of an even number of values, the
        mean of the two in the middle."""
        if self._histograms is not None:
            return self._histograms.medians(num_genes)
        offsets, values = self.values(num_genes)
        medians = np.full(num_genes, np.nan)
        for gene in np.flatnonzero(np.diff(offsets)):
            medians[gene] = np.median(values[offsets[gene] : offsets[gene + 1]])
        return medians


@compiled
def _deal(
    places: np.ndarray, values: np.ndarray, next_of_gene: np.ndarray, dealt: np.ndarray
) -> None:
    for i in range(len(places)):
        dealt[next_of_gene[places[i]]] = values[i]
        next_of_gene[places[i]] += 1
