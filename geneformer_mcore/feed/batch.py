"""Tokenised cells -> padded micro batches with masks.

RaggedCells -> truncated to seq_length -> masked -> padded to one length per step -> Batch
"""

from __future__ import annotations

import numpy as np
import torch

from geneformer_mcore.contracts import PAD, Batch, RaggedCells
from geneformer_mcore.feed.masks import Masking


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
    cells: RaggedCells,
    epochs_N: np.ndarray,
    idle_N: np.ndarray,
    masking: Masking,
    num_positions: int,
) -> Batch:
    """One micro batch of `num_positions` positions; no cell may be longer.

    idle_N: bool [N], cells that only fill the shape: nothing is predicted in them.
    """
    lengths = cells.lengths
    assert lengths.max(initial=0) <= num_positions
    seen_T, selected_T = masking.apply(cells, epochs_N)
    selected_T &= ~np.repeat(idle_N, lengths)
    # Where each token goes in the padded, flattened batch.
    shift_N = np.arange(len(cells)) * num_positions - cells.offsets[:-1]
    place_T = np.arange(len(seen_T)) + np.repeat(shift_N, lengths)
    tokens = np.full(len(cells) * num_positions, PAD, dtype=np.int64)
    tokens[place_T] = seen_T
    return Batch(
        tokens_BS=torch.from_numpy(tokens).view(len(cells), num_positions),
        lengths_B=torch.from_numpy(lengths.astype(np.int64)),
        selected_M=torch.from_numpy(place_T[selected_T]),
        labels_M=torch.from_numpy(cells.tokens_T[selected_T].astype(np.int64)),
        keys_B=cells.keys_N,
    )
