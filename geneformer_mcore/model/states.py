"""States of one layer as one vector per cell: what an encoder is used for once it is trained.

    stages -> cut after a layer -> micro batches through Megatron's schedule -> states [S, B, H]
           -> mean over the genes of each cell, or its [CLS]                 -> fp32 [N, H]

A mean takes every gene, the last one too, and neither [CLS] nor padding; it is added up in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from geneformer_mcore.config.sections import Pooling as Pooling
from geneformer_mcore.contracts import Batch
from geneformer_mcore.feed.places import positions_in_cells
from geneformer_mcore.model import inference
from geneformer_mcore.model.geneformer import Geneformer


def cut(stages: Sequence[Geneformer], num_layers: int) -> None:
    """Leaves the first `num_layers` layers: what the stages then give is the residual stream behind
    them, as it is, without the final norm. 0 leaves the embedding of genes and ranks."""
    for stage in stages:
        kept = [layer for layer in stage.encoder.layers if layer.layer_number <= num_layers]
        stage.encoder.layers = torch.nn.ModuleList(kept)
        stage.encoder.final_layernorm = None


def of_cells(
    stages: Sequence[Geneformer], batches: list[Batch], pooling: Pooling
) -> list[torch.Tensor]:
    """fp32 [N, H] for the cells of each of `batches`, which are all of one shape and on the
    device; on ranks that do not hold the last stage nothing. Every cell must have a gene."""

    def pooled(hidden_SBH: torch.Tensor, batch: Batch, stage: Geneformer) -> torch.Tensor:
        return pool(inference.whole(hidden_SBH, stage), batch, pooling)

    return inference.through(stages, batches, pooled)


def pool(hidden_SBH: torch.Tensor, batch: Batch, pooling: Pooling) -> torch.Tensor:
    """fp32 [N, H]: one vector per cell of a padded or packed batch."""
    rows_TH = hidden_SBH.transpose(0, 1).reshape(-1, hidden_SBH.shape[-1])
    inside_BS = positions_in_cells(batch)
    if pooling is Pooling.cls:
        return rows_TH[((inside_BS == 0) & _is_real(batch)).flatten()].float()
    genes_TH = rows_TH[((inside_BS > 0) & _is_real(batch)).flatten()].float()
    if len(batch.lengths_N) == 0:
        return genes_TH
    # Segments, not an index_add: the same order of addition each time, on a GPU too.
    return torch.segment_reduce(genes_TH, "mean", lengths=batch.lengths_N - 1)


def _is_real(batch: Batch) -> torch.Tensor:
    """bool [B, S] (or [1, S]), False at padding."""
    places_S = torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
    if batch.bounds is None:
        return places_S < batch.lengths_N[:, None]
    return (places_S < batch.bounds[len(batch.lengths_N)])[None]
