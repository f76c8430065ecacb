"""The compiled loops over counts: gathering a cell's genes, normalising, sorting, encoding.

    CSR row (column, count)  ->  gather_cell: (token, summed count) of the known genes, total
        ->  normalise_rows: count / total * 10,000                                (for medians)
        ->  encode_rows: ... / median, sorted, as tokens with [CLS] in front      (for the model)

They are in one file because numba's cache on disk looks at the file of the function it compiles,
not at those of the functions that it calls: spread over files, an edit could leave stale code.
"""

from __future__ import annotations

import numpy as np

from geneformer_mcore.cells.compiled import compiled
from geneformer_mcore.contracts import CLS

TARGET_SUM = 10_000.0
"""Counts of a cell are scaled to this sum before the median of the gene divides them."""

_FEW = 64  # Below this many genes clearing the histograms costs more than comparing.
_DIGIT_BITS = 11
_DIGITS = 1 << _DIGIT_BITS


@compiled
def _gather_distinct(
    data: np.ndarray,
    indices: np.ndarray,
    start: int,
    stop: int,
    token_of_column: np.ndarray,
    tokens: np.ndarray,
    counts: np.ndarray,
) -> tuple[np.int64, float, float, int]:
    """gather_cell where no two columns share a token; n is -1 if the row's columns don't ascend."""
    n = np.uint64(0)
    genes = 0
    total = 0.0
    unknown = 0.0
    ascending = True
    previous = -1
    # Without branches, for unknown genes come at random: what is not kept is overwritten next.
    for entry in range(start, stop):
        column = indices[entry]
        count = np.float64(data[entry])
        token = token_of_column[column]
        tokens[n] = token
        counts[n] = count
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
    tokens: np.ndarray,
    counts: np.ndarray,
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
    distinct: bool,
    tokens: np.ndarray,
    counts: np.ndarray,
    sums: np.ndarray,
) -> tuple[int, float, float, int]:
    """The known genes of entries start..stop-1: tokens[:n], and counts[:n] summed by token.

    token_of_column:  int32 [columns]; columns of token 0 count into the total alone
    distinct:         whether no two columns share a token: then nothing need be summed
    tokens, counts:   int32 and float64, room for stop - start + 1
    sums:             float64 [tokens], all zero
    Returns (n, total, total of known genes, expressed genes).
    """
    if distinct:
        found = _gather_distinct(data, indices, start, stop, token_of_column, tokens, counts)
        if found[0] >= 0:
            return found
    # Also for a row that names a column twice, which only ascending columns rule out.
    return _gather_repeated(data, indices, start, stop, token_of_column, tokens, counts, sums)


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
            distinct,
            tokens_out[written:],
            values_out[written:],
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
def _radix_pass(
    source: np.ndarray, target: np.ndarray, n: int, shift: int, histogram: np.ndarray
) -> None:
    start = np.int32(0)
    for digit in range(_DIGITS):
        here = histogram[digit]
        histogram[digit] = start
        start += here
    for i in range(n):
        digit = source[i] >> np.uint64(shift) & np.uint64(_DIGITS - 1)
        target[histogram[digit]] = source[i]
        histogram[digit] += 1


@compiled
def _radix_sort(packed: np.ndarray, spare: np.ndarray, n: int, histograms: np.ndarray) -> None:
    """Sorts packed[:n] by bits 32..53, 11 at a time, through `spare` and back."""
    histograms[:] = 0
    for i in range(n):
        histograms[0, packed[i] >> np.uint64(32) & np.uint64(_DIGITS - 1)] += 1
        histograms[1, packed[i] >> np.uint64(32 + _DIGIT_BITS)] += 1
    _radix_pass(packed, spare, n, 32, histograms[0])
    _radix_pass(spare, packed, n, 32 + _DIGIT_BITS, histograms[1])


@compiled
def _pack(bits: np.ndarray, packed: np.ndarray, n: int) -> None:
    """Item i: (the distance of bits[i] from the largest, in 22 bits) above 32 bits that hold i."""
    lowest = bits[0]
    highest = bits[0]
    for i in range(1, n):
        lowest = min(lowest, bits[i])
        highest = max(highest, bits[i])
    dropped = np.uint64(0)
    while np.uint64(highest - lowest) >> dropped >= np.uint64(_DIGITS * _DIGITS):
        dropped += np.uint64(1)
    for i in range(n):
        packed[i] = np.uint64(highest - bits[i]) >> dropped << np.uint64(32) | np.uint64(i)


@compiled
def _order_genes(
    bits: np.ndarray,
    packed: np.ndarray,
    spare: np.ndarray,
    n: int,
    values: np.ndarray,
    tokens: np.ndarray,
    histograms: np.ndarray,
) -> None:
    """Puts the genes 0..n-1 in rank order, as the lower 32 bits of packed[:n]."""
    if n < _FEW:
        for i in range(n):
            packed[i] = np.uint64(i)
        _sort_run(packed, 0, n, values, tokens)
        return
    _pack(bits, packed, n)
    _radix_sort(packed, spare, n, histograms)
    start = 0
    for i in range(1, n + 1):
        if i == n or (packed[i] ^ packed[start]) >> np.uint64(32) != 0:
            if i - start > 1:
                _sort_run(packed, start, i, values, tokens)
            start = i


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
    histograms = np.zeros((2, _DIGITS), np.int32)
    written = 0
    for row in range(len(indptr) - 1):
        n, total, known, genes = gather_cell(
            data,
            indices,
            indptr[row],
            indptr[row + 1],
            token_of_column,
            distinct,
            tokens,
            values,
            sums,
        )
        for i in range(n):
            medians[i] = medians_of_token[tokens[i]]
        for i in range(n):
            # In this order of evaluation: another one swaps genes that are nearly tied.
            value = values[i] / total * TARGET_SUM / medians[i]
            values[i] = value
            rounded[i] = value
        _order_genes(bits, packed, spare, n, values, tokens, histograms)
        kept = min(n, max_genes)
        tokens_out[written] = CLS
        for i in range(kept):
            tokens_out[written + 1 + i] = tokens[packed[i] & np.uint64(0xFFFFFFFF)]
        written += 1 + kept
        lengths_out[row] = 1 + kept
        n_counts_out[row], known_out[row] = total, known
        n_genes_out[row], n_known_out[row] = genes, n
