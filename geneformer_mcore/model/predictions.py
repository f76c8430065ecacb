"""How well each hidden gene is predicted: its loss, and its place among all genes.

    logits [M, V of this rank]  ->  cross entropy in fp64, over the tensor ranks
                                ->  genes that the model holds for likelier, over the tensor ranks
                                ->  sums per cell, fp64 [N, 8]

Sums are per cell and in fp64, so that a total does not depend on which cells went together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from geneformer_mcore.contracts import MASK, Batch
from geneformer_mcore.feed.places import cells_of
from geneformer_mcore.model import inference
from geneformer_mcore.model.geneformer import Geneformer

OF_ALL = ("loss_sum", "num_predicted", "num_top1", "num_top5")
OF_MASKED = ("masked_loss_sum", "num_masked", "masked_num_top1", "masked_num_top5")
"""Of the genes that are shown as [MASK]: a gene that is shown unchanged can be copied."""
COLUMNS = OF_ALL + OF_MASKED
_ROWS_AT_ONCE = 512
"""Logits that are doubled to fp64 at a time: 100 MB at 25,600 genes."""


def of_cells(stages: Sequence[Geneformer], batches: list[Batch]) -> list[torch.Tensor]:
    """fp64 [N, 8], the COLUMNS of the cells of each of `batches`; see inference.through."""
    return inference.through(stages, batches, _sums)


def _sums(hidden_SBH: torch.Tensor, batch: Batch, stage: Geneformer) -> torch.Tensor:
    logits_MV = stage.logits(hidden_SBH, batch.selected_M)
    parts = [
        torch.stack(losses_and_ranks(logits, labels, stage.tp_group), dim=1)
        for logits, labels in zip(
            logits_MV.split(_ROWS_AT_ONCE), batch.labels_M.split(_ROWS_AT_ONCE), strict=True
        )
    ]
    loss_M, rank_M = torch.cat(parts).unbind(dim=1)
    rows = torch.stack(
        [loss_M, torch.ones_like(loss_M), (rank_M < 1).double(), (rank_M < 5).double()], dim=1
    )
    is_masked_M = batch.tokens_BS.flatten()[batch.selected_M] == MASK
    rows = torch.cat([rows, rows * is_masked_M[:, None]], dim=1)
    sums = torch.zeros(len(batch.lengths_N), len(COLUMNS), dtype=torch.float64, device=rows.device)
    return sums.index_add_(0, cells_of(batch, batch.selected_M), rows)


def losses_and_ranks(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 [M] twice: nats, and how many genes come before the right one.

    logits_MV: this tensor rank's columns. Of equal logits the gene with the smaller id comes first.
    """
    logits_MV, num_here = logits_MV.double(), logits_MV.shape[1]
    first_id = dist.get_rank(group) * num_here
    here_M = labels_M - first_id
    is_here_M = (here_M >= 0) & (here_M < num_here)
    right_M = logits_MV.gather(1, here_M.clamp(0, num_here - 1)[:, None])[:, 0]
    right_M = torch.where(is_here_M, right_M, 0.0)
    dist.all_reduce(right_M, group=group)
    highest_M = logits_MV.amax(dim=1)
    dist.all_reduce(highest_M, op=dist.ReduceOp.MAX, group=group)
    sum_M = (logits_MV - highest_M[:, None]).exp().sum(dim=1)
    dist.all_reduce(sum_M, group=group)
    ids_V = torch.arange(first_id, first_id + num_here, device=labels_M.device)
    ties_MV = (logits_MV == right_M[:, None]) & (ids_V < labels_M[:, None])
    before_M = ((logits_MV > right_M[:, None]) | ties_MV).sum(dim=1).double()
    dist.all_reduce(before_M, group=group)
    return highest_M + sum_M.log() - right_M, before_M
