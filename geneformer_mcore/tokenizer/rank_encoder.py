"""Rank-value encoding: a cell's counts become its genes in descending order of normalised value.

    RankEncoder.encode -> encode_rows, per CSR row (column, count):
        gather_cell: (token, summed count) of the known genes, total of all
        -> count / total * 10,000 / median of the gene -> sorted -> [CLS] in front, truncated
    normalised_values -> normalise_rows: count / total * 10,000, for the medians

The order is exactly that of a stable float64 sort, ties by token id: genes are sorted by the upper
18 bits of their float32 values (two passes of a radix sort), then the short runs of equal bits by
(float64 value descending, token id ascending). The bits of positive floats order as the floats do,
and neither rounding to float32 nor dropping bits ever swaps two values.

All compiled loops are in one file because numba's cache on disk looks at the file of the function
it compiles, not at those of the functions it calls: an edit elsewhere could leave stale code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from geneformer_mcore.backends import compiled
from geneformer_mcore.errors import DataError
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import CLS

TARGET_SUM = 10_000.0
"""Counts of a cell are scaled to this sum before the median of the gene divides them."""

_FEW = 64  # Below this many genes clearing the histograms costs more than comparing.
_DIGIT_BITS = 9
"""Two digits separate all but some thirty of a cell's 1,500 genes. More bits would leave fewer, and
clearing and adding up the histograms would take longer than that saves."""
_DIGITS = 1 << _DIGIT_BITS


@compiled
def _gather_distinct(
    data: np.ndarray,
    indices: np.ndarray,
    start: int,
    stop: int,
    token_of_column: np.ndarray,
    median_of_column: np.ndarray | None,
    tokens: np.ndarray,
    counts: np.ndarray,
    medians: Any,
) -> tuple[np.int64, float, float, int]:
    """gather_cell where no two columns share a token; n is -1 if the row's columns don't ascend."""
    n = np.uint64(0)
    genes = 0
    total = 0.0
    unknown = 0.0
    ascending = True
    previous = -1
    # Without branches, for unknown genes come at random: what is not kept is overwritten next.
    # Unsigned places, here and below, spare numba's test for a negative one: a fifth of the time.
    for entry in range(np.uint64(start), np.uint64(stop)):
        column = indices[entry]
        count = np.float64(data[entry])
        token = token_of_column[np.uint64(column)]
        tokens[n] = token
        counts[n] = count
        if median_of_column is not None:  # decided when it is compiled
            medians[n] = median_of_column[np.uint64(column)]
        expressed = count != 0.0
        n += np.uint64(expressed & (token != 0))
        genes += expressed
        total += count
        unknown += count * (token == 0)
        ascending &= column > previous
        previous = column
    found = np.int64(n) if ascending else np.int64(-1)
    return found, total, total - unknown, genes


@compiled
def _gather_repeated(
    data: np.ndarray,
    indices: np.ndarray,
    start: int,
    stop: int,
    token_of_column: np.ndarray,
    median_of_column: np.ndarray | None,
    tokens: np.ndarray,
    counts: np.ndarray,
    medians: Any,
    sums: np.ndarray,
) -> tuple[int, float, float, int]:
    """gather_cell where tokens may come again; `sums` is float64 [tokens], zero before and after"""
    n = 0
    genes = 0
    total = 0.0
    known = 0.0
    for entry in range(start, stop):
        count = np.float64(data[entry])
        if count == 0.0:
            continue
        total += count
        genes += 1
        token = token_of_column[indices[entry]]
        if token == 0:
            continue
        known += count
        if sums[token] == 0.0:
            tokens[n] = token
            if median_of_column is not None:
                medians[n] = median_of_column[indices[entry]]
            n += 1
        sums[token] += count
    for i in range(n):
        counts[i] = sums[tokens[i]]
        sums[tokens[i]] = 0.0
    return n, total, known, genes


@compiled
def gather_cell(
    data: np.ndarray,
    indices: np.ndarray,
    start: int,
    stop: int,
    token_of_column: np.ndarray,
    median_of_column: np.ndarray | None,
    distinct: bool,
    tokens: np.ndarray,
    counts: np.ndarray,
    medians: Any,
    sums: np.ndarray,
) -> tuple[int, float, float, int]:
    """The known genes of entries start..stop-1: tokens[:n], and counts[:n] summed by token.

    token_of_column:   int32 [columns]; columns of token 0 count into the total alone
    median_of_column:  float64 [columns], or None if medians are not wanted
    distinct:          whether no two columns share a token: then nothing need be summed
    tokens, counts, medians:  int32, float64 and float64 (or None), room for stop - start + 1
    sums:              float64 [tokens], all zero
    Returns (n, total, total of known genes, expressed genes).
    """
    row = (data, indices, start, stop, token_of_column, median_of_column, tokens, counts, medians)
    if distinct:
        found = _gather_distinct(*row)
        if found[0] >= 0:
            return found
    # Also for a row that names a column twice, which only ascending columns rule out.
    return _gather_repeated(*row, sums)


@compiled
def normalise_rows(
    data: np.ndarray,
    indices: np.ndarray,
    indptr: np.ndarray,
    token_of_column: np.ndarray,
    distinct: bool,
    sums: np.ndarray,
    tokens_out: np.ndarray,
    values_out: np.ndarray,
) -> int:
    written = 0
    for row in range(len(indptr) - 1):
        # Gathered in place: the spare item that gathering may touch is one that comes later.
        n, total, _, _ = gather_cell(
            data,
            indices,
            indptr[row],
            indptr[row + 1],
            token_of_column,
            None,
            distinct,
            tokens_out[written:],
            values_out[written:],
            None,
            sums,
        )
        for i in range(written, written + n):
            values_out[i] = values_out[i] / total * TARGET_SUM
        written += n
    return written


@compiled
def _comes_before(values: np.ndarray, tokens: np.ndarray, a: int, b: int) -> bool:
    return values[a] > values[b] or (values[a] == values[b] and tokens[a] < tokens[b])


@compiled
def _sort_run(
    packed: np.ndarray, start: int, stop: int, values: np.ndarray, tokens: np.ndarray
) -> None:
    """Shell sort of packed[start:stop] by (value descending, token ascending)."""
    gap = 1
    while gap < (stop - start) // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(start + gap, stop):
            moving = packed[i]
            gene = moving & np.uint64(0xFFFFFFFF)
            j = i
            while j >= start + gap:
                other = packed[j - gap] & np.uint64(0xFFFFFFFF)
                if not _comes_before(values, tokens, gene, other):
                    break
                packed[j] = packed[j - gap]
                j -= gap
            packed[j] = moving
        gap //= 3


@compiled
def _pack(bits: np.ndarray, packed: np.ndarray, n: int, low: np.ndarray, high: np.ndarray) -> None:
    """Item i: (the distance of bits[i] from the largest, as two digits) above 32 bits that hold i.
    low, high: how often each lower and each upper digit occurs."""
    lowest = bits[0]
    highest = bits[0]
    for i in range(1, n):
        lowest = min(lowest, bits[i])
        highest = max(highest, bits[i])
    dropped = np.uint64(0)
    while np.uint64(highest - lowest) >> dropped >= np.uint64(_DIGITS * _DIGITS):
        dropped += np.uint64(1)
    low[:] = 0
    high[:] = 0
    for i in range(np.uint64(n)):
        key = np.uint64(highest - bits[i]) >> dropped
        packed[i] = key << np.uint64(32) | i
        low[key & np.uint64(_DIGITS - 1)] += np.uint32(1)
        high[key >> np.uint64(_DIGIT_BITS)] += np.uint32(1)


@compiled
def _radix_pass(
    source: np.ndarray, target: np.ndarray, n: int, shift: int, histogram: np.ndarray
) -> None:
    """Moves items in the order of the digit at `shift`; uses up its histogram."""
    start = np.uint32(0)
    for digit in range(np.uint64(_DIGITS)):
        here = histogram[digit]
        histogram[digit] = start
        start += here
    for i in range(np.uint64(n)):
        digit = source[i] >> np.uint64(shift) & np.uint64(_DIGITS - 1)
        place = histogram[digit]
        target[np.uint64(place)] = source[i]
        histogram[digit] = place + np.uint32(1)


@compiled
def _order_genes(
    bits: np.ndarray,
    packed: np.ndarray,
    spare: np.ndarray,
    n: int,
    values: np.ndarray,
    tokens: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> None:
    """Puts the genes 0..n-1 in rank order, as the lower 32 bits of packed[:n].

    bits:            uint32, the values as float32
    low, high:       uint32 [_DIGITS], room for histograms
    """
    if n < _FEW:
        for i in range(n):
            packed[i] = np.uint64(i)
        _sort_run(packed, 0, n, values, tokens)
        return
    _pack(bits, packed, n, low, high)
    _radix_pass(packed, spare, n, 32, low)
    _radix_pass(spare, packed, n, 32 + _DIGIT_BITS, high)
    # Runs of equal keys: few and short, but for cells whose values are nearly all the same.
    place = np.uint64(1)
    while place < np.uint64(n):
        key = packed[place] >> np.uint64(32)
        if key == packed[place - np.uint64(1)] >> np.uint64(32):
            start = np.int64(place) - 1
            while place < np.uint64(n) and packed[place] >> np.uint64(32) == key:
                place += np.uint64(1)
            _sort_run(packed, start, np.int64(place), values, tokens)
        place += np.uint64(1)


@compiled
def encode_rows(
    data: np.ndarray,
    indices: np.ndarray,
    indptr: np.ndarray,
    token_of_column: np.ndarray,
    distinct: bool,
    medians_of_token: np.ndarray,
    max_genes: int,
    tokens_out: np.ndarray,
    lengths_out: np.ndarray,
    n_counts_out: np.ndarray,
    known_out: np.ndarray,
    n_genes_out: np.ndarray,
    n_known_out: np.ndarray,
) -> None:
    room = np.max(np.diff(indptr)) + 1
    tokens = np.empty(room, np.int32)
    values = np.empty(room, np.float64)
    medians = np.empty(room, np.float64)
    rounded = np.empty(room, np.float32)
    bits = rounded.view(np.uint32)
    packed = np.empty(room, np.uint64)
    spare = np.empty(room, np.uint64)
    sums = np.zeros(len(medians_of_token), np.float64)
    median_of_column = medians_of_token[token_of_column]
    low = np.empty(_DIGITS, np.uint32)
    high = np.empty(_DIGITS, np.uint32)
    written = 0
    for row in range(len(indptr) - 1):
        n, total, known, genes = gather_cell(
            data,
            indices,
            indptr[row],
            indptr[row + 1],
            token_of_column,
            median_of_column,
            distinct,
            tokens,
            values,
            medians,
            sums,
        )
        for i in range(n):
            # In this order of evaluation: another one swaps genes that are nearly tied.
            value = values[i] / total * TARGET_SUM / medians[i]
            values[i] = value
            rounded[i] = value
        _order_genes(bits, packed, spare, n, values, tokens, low, high)
        kept = min(n, max_genes)
        tokens_out[written] = CLS
        cell = tokens_out[written + 1 : written + 1 + kept]
        for i in range(np.uint64(kept)):
            cell[i] = tokens[packed[i] & np.uint64(0xFFFFFFFF)]
        written += 1 + kept
        lengths_out[row] = 1 + kept
        n_counts_out[row], known_out[row] = total, known
        n_genes_out[row], n_known_out[row] = genes, n


def is_distinct(token_of_column: np.ndarray) -> bool:
    """Whether no two columns (token 0 aside) share a token."""
    known = token_of_column[token_of_column > 0]
    return len(known) == 0 or int(np.bincount(known).max()) == 1


def normalised_values(
    block: CountBlock, token_of_column: np.ndarray, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every expressed known gene of every cell: (tokens int32, values float64), in row order.

    A value is count / (all counts of the cell) * 10,000; columns of one gene are summed.
    token_of_column: int32 [columns], 0 for a column that is no known gene.
    """
    tokens = np.empty(len(block.data) + 1, np.int32)
    values = np.empty(len(block.data) + 1, np.float64)
    written = normalise_rows(
        block.data,
        block.indices,
        block.indptr,
        token_of_column,
        is_distinct(token_of_column),
        np.zeros(num_tokens),
        tokens,
        values,
    )
    return tokens[:written], values[:written]


MIN_SEQ_LENGTH = 2
MAX_SEQ_LENGTH = 65_536
"""Token ids are 16 bits: no cell has more different ones."""


@dataclass(frozen=True)
class RankedCells:
    """Encoded cells, in the rows' order; a cell without a known gene has its [CLS] alone.

    tokens_T:        uint16, cell i is tokens_T[offsets[i]:offsets[i + 1]], [CLS] first
    offsets:         int64 [N + 1], starting at 0
    n_counts_N:      float64, all counts of the cell, unknown genes included
    known_counts_N:  float64, those of genes in the vocabulary
    n_genes_N:       int32, expressed genes (columns above zero), unknown ones included
    n_known_N:       int32, those of the vocabulary, before the cut to seq_length
    """

    tokens_T: np.ndarray
    offsets: np.ndarray
    n_counts_N: np.ndarray
    known_counts_N: np.ndarray
    n_genes_N: np.ndarray
    n_known_N: np.ndarray

    def __len__(self) -> int:
        return len(self.n_genes_N)


class RankEncoder:
    """Encodes blocks of counts for one vocabulary and sequence length."""

    def __init__(self, vocabulary: Vocabulary, seq_length: int) -> None:
        """seq_length: maximum tokens per cell, [CLS] included, 2..65,536 (else DataError)."""
        if not MIN_SEQ_LENGTH <= seq_length <= MAX_SEQ_LENGTH:
            raise DataError(
                f"seq_length must be at least {MIN_SEQ_LENGTH} ([CLS] and one gene) and at most "
                f"{MAX_SEQ_LENGTH:,}, not {seq_length}."
            )
        self.vocabulary = vocabulary
        self.seq_length = seq_length

    def encode(self, block: CountBlock, token_of_column: np.ndarray) -> RankedCells:
        """The ranked tokens of every cell of `block`; token_of_column: see genes.GeneMap."""
        num_cells = len(block)
        room = np.minimum(np.diff(block.indptr), self.seq_length - 1) + 1
        tokens_T = np.empty(int(room.sum()), np.uint16)
        lengths_N = np.zeros(num_cells, np.int64)
        n_counts_N, known_counts_N = np.zeros(num_cells), np.zeros(num_cells)
        n_genes_N, n_known_N = np.zeros(num_cells, np.int32), np.zeros(num_cells, np.int32)
        if num_cells:
            encode_rows(
                block.data,
                block.indices,
                block.indptr,
                token_of_column,
                is_distinct(token_of_column),
                self.vocabulary.medians_of_token,
                self.seq_length - 1,
                tokens_T,
                lengths_N,
                n_counts_N,
                known_counts_N,
                n_genes_N,
                n_known_N,
            )
        offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
        return RankedCells(
            tokens_T[: offsets[-1]], offsets, n_counts_N, known_counts_N, n_genes_N, n_known_N
        )
