"""Where the tokens of a batch stand in their cells, and whose they are; on the batch's device."""

from __future__ import annotations

import torch

from geneformer_mcore.contracts import Batch


def positions_in_cells(batch: Batch) -> torch.Tensor:
    """int64 [B, S], the place of every token within its cell, 0 for [CLS]; of padding any that
    the model has."""
    num_positions = batch.tokens_BS.shape[1]
    places_S = torch.arange(num_positions, device=batch.tokens_BS.device)
    if batch.bounds is None:
        return places_S.expand_as(batch.tokens_BS)
    inside_S = places_S - batch.bounds[_pieces_of(batch.bounds, places_S)]
    # Behind the last cell there are pieces longer than the model has positions for.
    is_real_S = places_S < batch.bounds[len(batch.lengths_N)]
    return torch.where(is_real_S, inside_S, 0)[None]


def cells_of(batch: Batch, places_M: torch.Tensor) -> torch.Tensor:
    """int64 [M], the cell (its number within the batch) that flat places belong to."""
    if batch.bounds is None:
        return places_M // batch.tokens_BS.shape[1]
    return _pieces_of(batch.bounds, places_M)


def _pieces_of(bounds: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(bounds, places, right=True) - 1
