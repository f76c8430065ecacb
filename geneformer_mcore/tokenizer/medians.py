"""The median of each gene over any number of values: exact while they fit, else from histograms.

    (gene, value) in any order  ->  kept                            ->  exact medians
                                ->  more than fit: bin of the value: exponent and upper 9 bits of
                                    the fraction  ->  count + 1     ->  medians within 0.1 %

Only the number of all values decides which. A bin is at most 2^-9 wide relative to its values, so
its midpoint, and a median of midpoints, is within 2^-10 (0.1 %) of the true one. Histograms add up
exactly, independent of the order of the values and of their distribution over processes. The idea
is that of DDSketch (Masson, Rim, Lee, VLDB 2019), with bins read off a float64 instead of a
logarithm. Only octaves in use take memory: 2 KB for each octave of each gene.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from geneformer_mcore.backends import compiled

_BITS = 9
_BINS = 1 << _BITS
"""Bins per octave (a factor of two)."""

RELATIVE_ERROR = 2.0 ** -(_BITS + 1)
"""No median is further from the exact one, as a share of it."""

_SHIFT = 52 - _BITS  # float64: 52 bits of fraction below 11 of exponent.
_OCTAVES = 64
_LOWEST = -50
"""Values are resolved from 2^-50 to 2^14; shares of a cell's 10,000 are far inside. Smaller ones
count as 2^-50, larger ones as 2^14, for which the bound does not hold."""

NUM_KEYS = _OCTAVES * _BINS

_FIRST = (1023 + _LOWEST) << _BITS
_NO_PAGE = -1


@dataclass(frozen=True)
class BinCounts:
    """Histograms as a list: `counts[i]` values of gene `places[i]` lie in the bin `keys[i]`.

    places int32, keys uint16, counts uint32: all [bins in use], by place, then by key.
    """

    places: np.ndarray
    keys: np.ndarray
    counts: np.ndarray


class Histograms:
    """A histogram for each of a growing number of genes, which are numbered from 0."""

    def __init__(self) -> None:
        self._page_of = np.full((0, _OCTAVES), _NO_PAGE, np.int32)
        self._pages = np.zeros((0, _BINS), np.uint32)
        self._num_pages = 0

    @property
    def num_bytes(self) -> int:
        """Memory in use."""
        return self._page_of.nbytes + self._num_pages * _BINS * self._pages.itemsize

    def __getstate__(self) -> dict[str, object]:
        # Not the room to spare.
        return self.__dict__ | {"_pages": self._pages[: self._num_pages]}

    def add_values(self, places: np.ndarray, values: np.ndarray) -> None:
        """Counts each value: places int32 [V], its gene; values float64 [V], all above 0."""
        keys = np.empty(len(values), np.uint16)
        _keys(values.view(np.int64), keys)
        ones = np.broadcast_to(np.uint32(1), len(values))
        self.add(BinCounts(places, keys, ones))

    def add(self, bins: BinCounts) -> None:
        """Adds other histograms; a bin holds fewer than 2^32 values."""
        if not len(bins.places):
            return
        self._make_room_for_genes(int(bins.places.max()) + 1)
        start = 0
        while start < len(bins.places):
            start, self._num_pages = _add(
                bins.places,
                bins.keys,
                bins.counts,
                start,
                self._page_of,
                self._pages,
                self._num_pages,
            )
            if start < len(bins.places):
                self._make_room_for_pages()

    def bins(self) -> BinCounts:
        """The histograms as a list."""
        length = int(np.count_nonzero(self._pages))
        bins = BinCounts(
            np.empty(length, np.int32), np.empty(length, np.uint16), np.empty(length, np.uint32)
        )
        _list(self._page_of, self._pages, bins.places, bins.keys, bins.counts)
        return bins

    def medians(self, num_genes: int) -> np.ndarray:
        """float64 [num_genes], within RELATIVE_ERROR of exact; NaN for a gene without a value.

        Of an even number of values, the mean of the two in the middle.
        """
        self._make_room_for_genes(num_genes)
        middle_keys = np.full((num_genes, 2), -1, np.int64)
        _middle_bins(self._page_of[:num_genes], self._pages, middle_keys)
        lower_bits = (middle_keys + _FIRST) << _SHIFT
        midpoints = (lower_bits | (1 << (_SHIFT - 1))).view(np.float64)
        return np.where(middle_keys[:, 0] < 0, np.nan, midpoints.mean(axis=1))

    def _make_room_for_genes(self, num_genes: int) -> None:
        missing = num_genes - len(self._page_of)
        if missing > 0:
            more = np.full((max(missing, len(self._page_of) // 4), _OCTAVES), _NO_PAGE, np.int32)
            self._page_of = np.concatenate([self._page_of, more])

    def _make_room_for_pages(self) -> None:
        # The system allocates fresh zeros when touched, so doubling costs no memory.
        pages = np.zeros((max(1024, 2 * len(self._pages)), _BINS), np.uint32)
        pages[: self._num_pages] = self._pages
        self._pages = pages


@compiled
def _keys(bits: np.ndarray, keys: np.ndarray) -> None:
    """The bin of each positive float64, given as its bits."""
    for i in range(len(bits)):
        key = (bits[i] >> _SHIFT) - _FIRST
        keys[i] = min(max(key, 0), NUM_KEYS - 1)


@compiled
def _add(
    places: np.ndarray,
    keys: np.ndarray,
    counts: np.ndarray,
    start: int,
    page_of: np.ndarray,
    pages: np.ndarray,
    num_pages: int,
) -> tuple[int, int]:
    """Adds entries from `start` on; returns (the first not added for want of pages, pages used)."""
    for i in range(start, len(places)):
        octave = keys[i] >> _BITS
        page = page_of[places[i], octave]
        if page == _NO_PAGE:
            if num_pages == len(pages):
                return i, num_pages
            page = num_pages
            page_of[places[i], octave] = page
            num_pages += 1
        pages[page, keys[i] & (_BINS - 1)] += counts[i]
    return len(places), num_pages


@compiled
def _list(
    page_of: np.ndarray,
    pages: np.ndarray,
    places: np.ndarray,
    keys: np.ndarray,
    counts: np.ndarray,
) -> None:
    written = 0
    for place in range(len(page_of)):
        for octave in range(_OCTAVES):
            page = page_of[place, octave]
            if page == _NO_PAGE:
                continue
            for bin_ in range(_BINS):
                count = pages[page, bin_]
                if count:
                    places[written] = place
                    keys[written] = octave * _BINS + bin_
                    counts[written] = count
                    written += 1


@compiled
def _sum_of(pages_of_gene: np.ndarray, pages: np.ndarray) -> int:
    total = 0
    for page in pages_of_gene:
        if page != _NO_PAGE:
            for bin_ in range(_BINS):
                total += int(pages[page, bin_])
    return total


@compiled
def _middle_bins(page_of: np.ndarray, pages: np.ndarray, middle_keys: np.ndarray) -> None:
    """The bins of the two middle values of each gene (one bin twice, for an odd number)."""
    for place in range(len(page_of)):
        total = _sum_of(page_of[place], pages)
        below = 0
        for octave in range(_OCTAVES):
            page = page_of[place, octave]
            if page == _NO_PAGE:
                continue
            for bin_ in range(_BINS):
                above = below + int(pages[page, bin_])
                for side in range(2):
                    if below <= (total - 1 + side) // 2 < above:
                        middle_keys[place, side] = octave * _BINS + bin_
                below = above


BYTES_PER_VALUE = 24
"""Memory of a kept value while medians are computed: gene 4 and value 8, twice."""

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
        """Replaces kept values by histograms, for good."""
        if self._histograms is None:
            self._histograms = Histograms()
        while self._parts:
            self._histograms.add_values(*self._parts.pop())

    def take(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Removes and yields the values as `add` got them. Only while `is_exact`."""
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
            _group(*self._parts.pop(), next_of_gene, values)
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
def _group(
    places: np.ndarray, values: np.ndarray, next_of_gene: np.ndarray, grouped: np.ndarray
) -> None:
    for i in range(len(places)):
        grouped[next_of_gene[places[i]]] = values[i]
        next_of_gene[places[i]] += 1
