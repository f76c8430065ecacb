"""Tokenised cells -> padded micro batches with masks.

CellViews, at most seq_length long -> masked -> padded to one length per step -> Batch
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from geneformer_mcore.backends import is_available
from geneformer_mcore.contracts import NUM_SPECIALS, PAD, Batch, CellViews, RaggedCells
from geneformer_mcore.feed.masks import Masking


class BatchMaker(Protocol):
    """Whatever makes a micro batch of cells: the loops of this host, or DALI on a GPU."""

    def __call__(
        self,
        cells: CellViews,
        epochs_N: np.ndarray,
        idle_N: np.ndarray,
        masking: Masking,
        num_positions: int,
    ) -> Batch:
        """One micro batch of `num_positions` positions; no cell may be longer.

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


def padded_length(longest: int, multiple: int, seq_length: int) -> int:
    """Positions of a padded batch: `longest` rounded up to `multiple` (0: seq_length), and never
    more than seq_length, for which the model has positions."""
    if multiple == 0:
        return seq_length
    return min(-(-longest // multiple) * multiple, seq_length)


def make_batch(
    cells: CellViews,
    epochs_N: np.ndarray,
    idle_N: np.ndarray,
    masking: Masking,
    num_positions: int,
) -> Batch:
    """A BatchMaker: by compiled loops where numba is here, else by numpy, with equal results."""
    assert cells.lengths_N.max(initial=0) <= num_positions
    make = _make_compiled if is_available("numba") else make_batch_plainly
    return make(cells, epochs_N, idle_N, masking, num_positions)


def make_batch_plainly(
    cells: CellViews,
    epochs_N: np.ndarray,
    idle_N: np.ndarray,
    masking: Masking,
    num_positions: int,
) -> Batch:
    """A BatchMaker in numpy alone: what a batch is, in few lines, and a tenth as fast."""
    ragged, lengths = cells.ragged(), cells.lengths_N
    seen_T, selected_T = masking.apply(ragged, epochs_N)
    selected_T &= ~np.repeat(idle_N, lengths)
    # Where each token goes in the padded, flattened batch.
    shift_N = np.arange(len(cells)) * num_positions - ragged.offsets[:-1]
    place_T = np.arange(len(seen_T)) + np.repeat(shift_N, lengths)
    tokens = np.full(len(cells) * num_positions, PAD, dtype=np.int32)
    # Idle cells are shown as they are.
    tokens[place_T] = np.where(selected_T, seen_T, ragged.tokens_T)
    return Batch(
        tokens_BS=torch.from_numpy(tokens).view(len(cells), num_positions),
        lengths_B=torch.from_numpy(lengths),
        selected_M=torch.from_numpy(place_T[selected_T]),
        labels_M=torch.from_numpy(ragged.tokens_T[selected_T].astype(np.int64)),
        keys_B=cells.keys_N,
    )


def _make_compiled(
    cells: CellViews,
    epochs_N: np.ndarray,
    idle_N: np.ndarray,
    masking: Masking,
    num_positions: int,
) -> Batch:
    from geneformer_mcore.feed.kernels import fill_batch

    tokens_BS = np.empty((len(cells), num_positions), dtype=np.int32)
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
        tokens_BS,
        selected,
        labels,
    )
    return Batch(
        tokens_BS=torch.from_numpy(tokens_BS),
        lengths_B=torch.from_numpy(cells.lengths_N),
        # Copied: a view would keep the room for all tokens alive.
        selected_M=torch.from_numpy(selected[:num_selected].copy()),
        labels_M=torch.from_numpy(labels[:num_selected].copy()),
        keys_B=cells.keys_N,
    )
