"""Tokenised cells -> padded or packed micro batches with masks.

CellViews, at most seq_length long -> masked -> a row per cell, padded to one length per step
                                             -> or one row of cells end to end, packed -> Batch
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from geneformer_mcore.backends import is_available
from geneformer_mcore.contracts import NUM_SPECIALS, PAD, Batch, CellViews, RaggedCells
from geneformer_mcore.feed.masks import Masking

_REST_PIECE = 2048
"""Positions of the pieces into which the unused rest of a packed batch is cut: as long as long
cells, so that a batch that is nearly empty costs no more than a full one."""


class BatchMaker(Protocol):
    """Whatever makes a micro batch of cells: the loops of this host, or DALI on a GPU."""

    def __call__(
        self,
        cells: CellViews,
        epochs_N: np.ndarray,
        idle_N: np.ndarray,
        masking: Masking,
        num_positions: int,
        packed: bool = False,
    ) -> Batch:
        """One micro batch of `num_positions` positions; no cell may be longer, and packed, all
        cells together may not be.

        epochs_N: int64 [N], the epoch each cell is seen in
        idle_N: bool [N], cells that only fill the shape: nothing is predicted in them.
        """
        ...


def truncate(cells: RaggedCells, seq_length: int) -> RaggedCells:
    """The same cells with at most `seq_length` tokens each: the highest-ranked genes stay."""
    lengths = cells.lengths
    if lengths.max(initial=0) <= seq_length:
        return cells
    place_T = np.arange(len(cells.tokens_T)) - np.repeat(cells.offsets[:-1], lengths)
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, seq_length))]).astype(np.int64)
    return RaggedCells(cells.tokens_T[place_T < seq_length], offsets, cells.keys_N)


def padded_length(longest: int, multiple: int, most: int) -> int:
    """Positions of a row: `longest` rounded up to `multiple` (0: always `most`), and never more
    than `most`, for which there is room."""
    if multiple == 0:
        return most
    return min(-(-longest // multiple) * multiple, most)


def rows_of(lengths_N: np.ndarray, num_positions: int, packed: bool) -> np.ndarray:
    """int64 [N + 1]: where the row of each cell begins in the flattened batch, and where the last
    one ends. Between the last token of a cell and the end of its row lies padding."""
    if not packed:
        return np.arange(len(lengths_N) + 1) * num_positions
    starts_N = np.cumsum(lengths_N) - lengths_N
    return np.concatenate([starts_N, [num_positions]]).astype(np.int64)


def pieces(lengths_N: np.ndarray, num_positions: int) -> tuple[np.ndarray, int]:
    """Bounds of a packed batch, int32 (see contracts.Batch), and tokens of its longest piece."""
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
    """The batch of `cells` whose flattened tokens and masks are given, on their device."""
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
    """A BatchMaker: by compiled loops where numba is here, else by numpy, with equal results."""
    needed = cells.lengths_N.sum() if packed else cells.lengths_N.max(initial=0)
    assert needed <= num_positions
    make = _make_compiled if is_available("numba") else make_batch_plainly
    return make(cells, epochs_N, idle_N, masking, num_positions, packed)


def make_batch_plainly(
    cells: CellViews,
    epochs_N: np.ndarray,
    idle_N: np.ndarray,
    masking: Masking,
    num_positions: int,
    packed: bool = False,
) -> Batch:
    """A BatchMaker in numpy alone: what a batch is, in few lines, and a tenth as fast."""
    ragged, lengths = cells.ragged(), cells.lengths_N
    seen_T, selected_T = masking.apply(ragged, epochs_N)
    selected_T &= ~np.repeat(idle_N, lengths)
    # Where each token goes in the flattened batch.
    rows = rows_of(lengths, num_positions, packed)
    place_T = np.arange(len(seen_T)) + np.repeat(rows[:-1] - ragged.offsets[:-1], lengths)
    tokens = np.full(rows[-1], PAD, dtype=np.int32)
    # Idle cells are shown as they are.
    tokens[place_T] = np.where(selected_T, seen_T, ragged.tokens_T)
    return assembled(
        cells,
        torch.from_numpy(tokens),
        torch.from_numpy(place_T[selected_T]),
        torch.from_numpy(ragged.tokens_T[selected_T].astype(np.int64)),
        num_positions,
        packed,
    )


def _make_compiled(
    cells: CellViews,
    epochs_N: np.ndarray,
    idle_N: np.ndarray,
    masking: Masking,
    num_positions: int,
    packed: bool,
) -> Batch:
    from geneformer_mcore.feed.kernels import fill_batch

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
