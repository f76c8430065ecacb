"""Cells to micro batches: masked, and padded or packed.

    CellViews, at most seq_length long --fill_batch--> tokens with masks, selected positions, labels
        padded: a row per cell       packed: one row of cells end to end       -> Batch

What the compiled loops compute is defined by `Masking.apply`, with which they are compared bit by
bit in tests. numba's disk cache looks at one file: what is compiled together is in one file.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from geneformer_mcore.backends import compiled
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.errors import DataError
from geneformer_mcore.store.keys import GOLDEN, MIX_1, MIX_2, mix, mix_scalar
from geneformer_mcore.types import (
    MASK,
    NUM_SPECIALS,
    PAD,
    Batch,
    CellViews,
    RaggedCells,
    TokenSource,
)


def positions_in_cells(batch: Batch) -> torch.Tensor:
    """int64 [B, S], the position of every token within its cell, 0 for [CLS]; of padding any."""
    num_positions = batch.tokens_BS.shape[1]
    places_S = torch.arange(num_positions, device=batch.tokens_BS.device)
    if batch.bounds is None:
        return places_S.expand_as(batch.tokens_BS)
    inside_S = places_S - batch.bounds[_pieces_of(batch.bounds, places_S)]
    # Behind the last cell there are pieces longer than the model has positions for.
    is_real_S = places_S < batch.bounds[len(batch.lengths_N)]
    return torch.where(is_real_S, inside_S, 0)[None]


def cells_of(batch: Batch, places_M: torch.Tensor) -> torch.Tensor:
    """int64 [M], the cells (numbers within the batch) that flat positions belong to."""
    if batch.bounds is None:
        return places_M // batch.tokens_BS.shape[1]
    return _pieces_of(batch.bounds, places_M)


def _pieces_of(bounds: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(bounds, places, right=True) - 1


_UNIT = 2.0**-53
_mix = compiled(mix)


@compiled
def copy_cut(
    tokens_T: np.ndarray, offsets: np.ndarray, longest: int, out_tokens_T: np.ndarray
) -> None:
    """Lays cells (see types.RaggedCells) end to end, at most `longest` tokens of each."""
    written = 0
    for cell in range(len(offsets) - 1):
        start = offsets[cell]
        length = min(offsets[cell + 1] - start, longest)
        for k in range(length):
            out_tokens_T[written + k] = tokens_T[start + k]
        written += length


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
        action = _mix(bits_M[k] ^ MIX_1) >> np.uint64(11)
        unit = np.float64(_mix(bits_M[k] ^ MIX_2) >> np.uint64(11)) * _UNIT
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
    """Fill a micro batch; returns M, the number of selected positions.

    tokens_T, starts_N, lengths_N:  the cells (see types.CellViews)
    keys_N, epochs_N, seed_bits:    of the cells' random streams (Masking.streams)
    *_below:    bounds on 53 random bits: a probability p is ceil(p * 2^53)
    rows:       int64 [N + 1], where the row of each cell begins in `tokens` (see rows_of)
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
            bits[i] = _mix(stream + np.uint64(i) * GOLDEN)
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


_REST_PIECE = 2048
"""Positions per piece of a packed batch's rest: an almost empty batch costs no more than a full."""


class Collator(Protocol):
    """Function from cells to a micro batch: make_batch, or DALI on a GPU."""

    def __call__(
        self,
        cells: CellViews,
        epochs_N: np.ndarray,
        idle_N: np.ndarray,
        masking: Masking,
        num_positions: int,
        packed: bool = False,
    ) -> Batch:
        """One micro batch of `num_positions` positions per row, into which every cell, or if
        packed all cells together, must fit.

        epochs_N: int64 [N], the epoch of each cell;  idle_N: bool [N], nothing is predicted
        """
        ...


def truncate(cells: RaggedCells, seq_length: int) -> RaggedCells:
    """Keep the first `seq_length` tokens of each cell, the highest-ranked genes."""
    lengths = cells.lengths
    if lengths.max(initial=0) <= seq_length:
        return cells
    place_T = np.arange(len(cells.tokens_T)) - np.repeat(cells.offsets[:-1], lengths)
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, seq_length))]).astype(np.int64)
    return RaggedCells(cells.tokens_T[place_T < seq_length], offsets, cells.keys_N)


def padded_length(longest: int, multiple: int, most: int) -> int:
    """Positions of a row: `longest` rounded up to `multiple`, at most `most`; 0: always `most`."""
    if multiple == 0:
        return most
    return min(-(-longest // multiple) * multiple, most)


def rows_of(lengths_N: np.ndarray, num_positions: int, packed: bool) -> np.ndarray:
    """int64 [N + 1]: start of each cell's row in the flattened batch, and the end of the last."""
    if not packed:
        return np.arange(len(lengths_N) + 1) * num_positions
    starts_N = np.cumsum(lengths_N) - lengths_N
    return np.concatenate([starts_N, [num_positions]]).astype(np.int64)


def pieces(lengths_N: np.ndarray, num_positions: int) -> tuple[np.ndarray, int]:
    """Bounds of a packed batch, int32 (see types.Batch), and tokens of its longest piece."""
    ends_N = np.cumsum(lengths_N)
    used = int(ends_N[-1]) if len(ends_N) else 0
    rest = np.arange(used, num_positions, _REST_PIECE)
    bounds = np.concatenate([[0], ends_N, rest[1:], [num_positions] * (len(rest) > 0)])
    return bounds.astype(np.int32), int(np.diff(bounds).max())


def assembled(
    cells: CellViews,
    tokens: torch.Tensor,
    selected_M: torch.Tensor,
    labels_M: torch.Tensor,
    num_positions: int,
    packed: bool,
) -> Batch:
    """The batch of `cells` with flattened `tokens`, on the device of the tensors."""
    bounds, longest = pieces(cells.lengths_N, num_positions) if packed else (None, 0)
    return Batch(
        tokens_BS=tokens.view(-1, num_positions),
        lengths_N=torch.from_numpy(cells.lengths_N).to(tokens.device),
        selected_M=selected_M,
        labels_M=labels_M,
        keys_N=cells.keys_N,
        bounds=None if bounds is None else torch.from_numpy(bounds).to(tokens.device),
        longest=longest,
    )


def make_batch(
    cells: CellViews,
    epochs_N: np.ndarray,
    idle_N: np.ndarray,
    masking: Masking,
    num_positions: int,
    packed: bool = False,
) -> Batch:
    """The Collator of compiled loops."""
    needed = cells.lengths_N.sum() if packed else cells.lengths_N.max(initial=0)
    assert needed <= num_positions
    rows = rows_of(cells.lengths_N, num_positions, packed)
    tokens = np.empty(rows[-1], dtype=np.int32)
    room = int(cells.lengths_N.sum()) + 1
    selected, labels = np.empty(room, np.int64), np.empty(room, np.int64)
    num_selected = fill_batch(
        cells.tokens_T,
        cells.starts_N,
        cells.lengths_N,
        cells.keys_N,
        epochs_N,
        masking.seed_bits,
        idle_N,
        *masking.bounds(),
        masking.vocabulary_size - NUM_SPECIALS,
        rows,
        tokens,
        selected,
        labels,
    )
    return assembled(
        cells,
        torch.from_numpy(tokens),
        # Copied: a view would keep the room for all tokens alive.
        torch.from_numpy(selected[:num_selected].copy()),
        torch.from_numpy(labels[:num_selected].copy()),
        num_positions,
        packed,
    )


class PermutedGenes:
    """Permutation control (a types.TokenSource): the cells of `source`, genes permuted by (seed,
    cell_key). A model that reads ranks must do worse; one of co-occurrences only must not."""

    def __init__(self, source: TokenSource, seed: int, seq_length: int) -> None:
        """seq_length: cells are truncated first, so that only genes a model sees are permuted."""
        self.source = source
        self.seed = seed
        self.seq_length = seq_length

    def read(self, start: int, stop: int) -> RaggedCells:
        cells = truncate(self.source.read(start, stop), self.seq_length)
        cell_T = np.repeat(np.arange(len(cells)), cells.lengths)
        stream_N = mix(cells.keys_N ^ mix_scalar(self.seed))
        place_T = np.arange(len(cell_T)) - cells.offsets[:-1][cell_T]
        bits_T = mix(stream_N[cell_T] + place_T.astype(np.uint64))
        bits_T[cells.offsets[:-1]] = 0  # [CLS] stays in front
        order = np.lexsort((bits_T, cell_T))
        return RaggedCells(cells.tokens_T[order], cells.offsets, cells.keys_N)


# Packing: the micro batch and rank of every cell of a global batch. A pure function of the lengths,
# which every rank computes: as few micro batches as the token budget allows, the same
# number on every rank; longest cells first, each to the micro batch with the least work so far that
# has room. Attention grows with the square of a length, so both tokens and squares are balanced.

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
