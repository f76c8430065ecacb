"""The compiled loops of the feed: cells masked, padded and put into a batch in one go.

    cells wherever they lie --fill_batch--> padded tokens with masks, selected places, labels

What they compute is defined by `masks.Masking.apply` and `batch.make_batch_plainly`, the same in
numpy, against which they are tested bit by bit. numba's cache on disk looks at one file, so what
is compiled together lies together.
"""

from __future__ import annotations

import numpy as np

from geneformer_mcore.cells.compiled import compiled
from geneformer_mcore.contracts import MASK, NUM_SPECIALS, PAD

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_UNIT = 2.0**-53


@compiled
def copy_cut(
    tokens_T: np.ndarray, offsets: np.ndarray, longest: int, out_tokens_T: np.ndarray
) -> None:
    """Lays cells (see contracts.RaggedCells) end to end, at most `longest` tokens of each."""
    written = 0
    for cell in range(len(offsets) - 1):
        start = offsets[cell]
        length = min(offsets[cell + 1] - start, longest)
        for k in range(length):
            out_tokens_T[written + k] = tokens_T[start + k]
        written += length


@compiled
def _mix(x: np.uint64) -> np.uint64:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@compiled
def _select(bits_S: np.ndarray, below: np.uint64, places_M: np.ndarray) -> int:
    """The places, 0 ([CLS]) apart, whose bits stay below a bound; how many there are."""
    # Without branches, for selected places come at random: what is not kept is overwritten next.
    # Unsigned, for an index that may be negative costs a test.
    n = np.uint64(0)
    for i in range(np.uint64(1), np.uint64(len(bits_S))):
        places_M[n] = i
        n += np.uint64((bits_S[i] >> np.uint64(11)) < below)
    return int(n)


@compiled
def _show(
    bits_M: np.ndarray,
    masked_below: np.uint64,
    random_below: np.uint64,
    num_genes: int,
    shown_M: np.ndarray,
) -> None:
    """What is shown at selected places with these bits: [MASK], a random gene, or -1: unchanged."""
    for k in range(len(bits_M)):
        action = _mix(bits_M[k] ^ _MIX_1) >> np.uint64(11)
        unit = np.float64(_mix(bits_M[k] ^ _MIX_2) >> np.uint64(11)) * _UNIT
        gene = np.int32(NUM_SPECIALS) + np.int32(unit * num_genes)
        changed = np.int32(MASK) if action < masked_below else gene
        shown_M[k] = changed if action < random_below else np.int32(-1)


@compiled
def _largest(numbers_N: np.ndarray) -> int:
    largest = 0
    for number in numbers_N:
        largest = max(largest, number)
    return largest


@compiled
def fill_batch(
    tokens_T: np.ndarray,
    starts_N: np.ndarray,
    lengths_N: np.ndarray,
    keys_N: np.ndarray,
    epochs_N: np.ndarray,
    seed_bits: np.uint64,
    idle_N: np.ndarray,
    selected_below: np.uint64,
    masked_below: np.uint64,
    random_below: np.uint64,
    num_genes: int,
    rows: np.ndarray,
    tokens: np.ndarray,
    selected_M: np.ndarray,
    labels_M: np.ndarray,
) -> int:
    """Fills a micro batch; returns M, the number of selected places.

    tokens_T, starts_N, lengths_N:  the cells (see contracts.CellViews)
    keys_N, epochs_N, seed_bits:    what the cells' random streams are of (masks.Masking.streams)
    *_below:    bounds on 53 random bits: a probability p is ceil(p * 2^53)
    rows:       int64 [N + 1], where the row of each cell lies in `tokens` (see batch.rows_of)
    tokens:     int32, the flattened batch to fill
    selected_M, labels_M: int64, room for every token
    """
    longest = _largest(lengths_N)
    bits = np.empty(longest, np.uint64)
    places = np.empty(longest + 1, np.int32)
    chosen = np.empty(longest, np.uint64)
    shown = np.empty(longest, np.int32)
    if len(starts_N) == 0:
        tokens[:] = PAD
    m = 0
    for b in range(len(starts_N)):
        length = lengths_N[b]
        cell = tokens_T[starts_N[b] : starts_N[b] + length]
        row = tokens[rows[b] : rows[b + 1]]
        # Plain loops over one thing each: these the compiler turns into SIMD.
        for i in range(len(cell)):
            row[i] = cell[i]
        row[length:] = PAD
        if idle_N[b]:
            continue
        stream = _mix(_mix(keys_N[b] ^ seed_bits) + np.uint64(epochs_N[b]))
        for i in range(len(cell)):
            bits[i] = _mix(stream + np.uint64(i) * _GOLDEN)
        n = _select(bits[:length], selected_below, places)
        for k in range(n):
            chosen[k] = bits[np.uint64(places[k])]
        _show(chosen[:n], masked_below, random_below, num_genes, shown)
        selected, labels = selected_M[m : m + n], labels_M[m : m + n]
        for k in range(n):
            place = np.uint64(places[k])
            token = row[place]
            labels[k] = token
            row[place] = shown[k] if shown[k] >= 0 else token
            selected[k] = rows[b] + np.int64(places[k])
        m += n
    return m
