"""The reference of the feed's compiled loops and of DALI: a batch made by numpy."""

from __future__ import annotations

import numpy as np
import torch

from geneformer_mcore.data.collate import assembled, rows_of
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.types import PAD, Batch, CellViews


def make_batch_plainly(
    cells: CellViews,
    epochs_N: np.ndarray,
    idle_N: np.ndarray,
    masking: Masking,
    num_positions: int,
    packed: bool = False,
) -> Batch:
    """A BatchMaker in numpy alone: the definition of a batch, in few lines."""
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
