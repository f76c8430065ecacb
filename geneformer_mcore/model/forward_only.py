"""A trained model at work: Megatron's schedule, forward only, and what is computed of its states.

    stages + micro batches -> states [S, B, H] of the last stage
        -> cell_embeddings:   mean over the genes of each cell, or its [CLS], fp32 [N, H]
        -> cell_predictions:  loss and rank of each masked gene, summed per cell, fp64 [N, 8]
        -> of_variants:       displacement of perturbed cells, compared with the originals' states

A mean takes neither [CLS] nor padding, and is added up in fp32. Sums of predictions are per cell in
fp64, so that totals do not depend on batches. A displacement is 1 - cosine, computed as half the
squared distance of the unit vectors, as the difference of two numbers close to 1 is inexact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import functional

from geneformer_mcore.config.sections import Pooling
from geneformer_mcore.data.collate import cells_of, positions_in_cells
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.types import MASK, Batch

Finish = Callable[[Tensor, Batch, Geneformer], Tensor]
"""Of the last stage's hidden states [S, B, H] (this rank's share), their batch, and the stage."""


def through(stages: Sequence[Geneformer], batches: list[Batch], finish: Finish) -> list[Tensor]:
    """Results of `finish` for batches of one shape, on the device; [] without the last stage."""
    (stage,) = stages
    stage.train(mode=False)
    num_rows, num_positions = batches[0].tokens_BS.shape
    with torch.no_grad():
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, finish=finish),
            data_iterator=iter(batches),
            model=stage,
            num_microbatches=len(batches),
            seq_length=num_positions,
            micro_batch_size=num_rows,
            forward_only=True,
            collect_non_loss_data=True,
        )


def _forward_step(batches: Iterator[Batch], stage: Geneformer, finish: Finish) -> tuple:
    batch = next(batches)

    def finished(hidden_SBH: Tensor, non_loss_data: bool) -> Tensor:
        assert non_loss_data
        return finish(hidden_SBH, batch, stage)

    return stage.encode(batch), finished


def whole(hidden_SBH: Tensor, stage: Geneformer) -> Tensor:
    """All positions, gathered under sequence parallel."""
    if not stage.config.sequence_parallel:
        return hidden_SBH
    return gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)


def cut(stages: Sequence[Geneformer], num_layers: int) -> None:
    """Keep the first `num_layers` layers: the output is the residual stream after them, without the
    final norm. 0 keeps the embedding of genes and ranks."""
    for stage in stages:
        kept = [layer for layer in stage.encoder.layers if layer.layer_number <= num_layers]
        stage.encoder.layers = torch.nn.ModuleList(kept)
        stage.encoder.final_layernorm = None


def cell_embeddings(
    stages: Sequence[Geneformer], batches: list[Batch], pooling: Pooling
) -> list[Tensor]:
    """fp32 [N, H] for the cells of each batch, see `through`. Every cell must have a gene."""

    def pooled(hidden_SBH: Tensor, batch: Batch, stage: Geneformer) -> Tensor:
        return pool(whole(hidden_SBH, stage), batch, pooling)

    return through(stages, batches, pooled)


def pool(hidden_SBH: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
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


def _is_real(batch: Batch) -> Tensor:
    """bool [B, S] (or [1, S]), False at padding."""
    places_S = torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
    if batch.bounds is None:
        return places_S < batch.lengths_N[:, None]
    return (places_S < batch.bounds[len(batch.lengths_N)])[None]


OF_ALL = ("loss_sum", "num_predicted", "num_top1", "num_top5")
OF_MASKED = ("masked_loss_sum", "num_masked", "masked_num_top1", "masked_num_top5")
"""Of genes shown as [MASK]: one shown unchanged can be copied."""
PREDICTION_COLUMNS = OF_ALL + OF_MASKED
_ROWS_AT_ONCE = 512
"""Rows of logits in fp64 at a time: 100 MB at 25,600 genes."""


def cell_predictions(stages: Sequence[Geneformer], batches: list[Batch]) -> list[Tensor]:
    """fp64 [N, 8], the PREDICTION_COLUMNS of the cells of each batch; see `through`."""
    return through(stages, batches, _sums)


def _sums(hidden_SBH: Tensor, batch: Batch, stage: Geneformer) -> Tensor:
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
    sums = torch.zeros(
        len(batch.lengths_N), len(PREDICTION_COLUMNS), dtype=torch.float64, device=rows.device
    )
    return sums.index_add_(0, cells_of(batch, batch.selected_M), rows)


def losses_and_ranks(
    logits_MV: Tensor, labels_M: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """fp64 [M] twice: nats, and the number of genes ranked before the right one, of equal logits
    those with smaller ids. logits_MV: this tensor rank's columns."""
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


DISPLACEMENT_COLUMNS = ("shift", "gene_shift", "goal_shift")
"""1 - cosine of the cell's vectors before and after; its mean over genes of both sentences; cosine
with the goal after, minus that before (NaN without a goal)."""


@dataclass(frozen=True)
class Originals:
    """Unperturbed cells, on the device.

    cells_NH:   fp32, their vectors;  tokens_TH: states of all their tokens, end to end
    goal_H:     fp64, the vector of the goal, or None
    """

    cells_NH: Tensor
    tokens_TH: Tensor
    goal_H: Tensor | None


def originals(
    stages: Sequence[Geneformer], batch: Batch, pooling: Pooling, goal_H: Tensor | None
) -> Originals | None:
    """Of the cells of one packed batch; None on ranks without the last stage."""
    found = through(stages, [batch], lambda hidden_SBH, _, stage: whole(hidden_SBH, stage))
    if not found:
        return None
    (hidden_SBH,) = found
    used = int(batch.lengths_N.sum())
    return Originals(pool(hidden_SBH, batch, pooling), hidden_SBH[:used, 0], goal_H)


@dataclass(frozen=True)
class Variants:
    """A packed batch of perturbed cells.

    cells_N:   int64, the number of each one's original
    places_T:  int64, the row of the same gene in Originals.tokens_TH, -1 for none and [CLS]
    """

    batch: Batch
    cells_N: Tensor
    places_T: Tensor


def of_variants(
    stages: Sequence[Geneformer],
    variants: Sequence[Variants],
    before: Originals | None,
    pooling: Pooling,
) -> list[tuple[Tensor, Tensor]]:
    """Per batch fp64 [N, DISPLACEMENT_COLUMNS], and fp32 [T] of its tokens, NaN without original;
    nothing on ranks without the last stage. All batches are of one shape."""
    waiting = iter(variants)

    def compared(hidden_SBH: Tensor, batch: Batch, stage: Geneformer) -> object:
        these = next(waiting)
        assert before is not None
        assert batch is these.batch
        return _compare(whole(hidden_SBH, stage), these, before, pooling)

    batches = [each.batch for each in variants]
    return through(stages, batches, compared)  # type: ignore[arg-type, return-value]


def _compare(
    hidden_SBH: Tensor, these: Variants, before: Originals, pooling: Pooling
) -> tuple[Tensor, Tensor]:
    batch = these.batch
    after_NH = pool(hidden_SBH, batch, pooling).double()
    before_NH = before.cells_NH.double()[these.cells_N]
    moved_T = _moved_tokens(hidden_SBH, these, before)
    has_T = ~moved_T.isnan()
    sums_N, counts_N = (
        torch.segment_reduce(values, "sum", lengths=batch.lengths_N)
        for values in (moved_T.nan_to_num().double(), has_T.double())
    )
    goal_N = torch.full_like(sums_N, torch.nan)
    if before.goal_H is not None:
        # cos a - cos b from unit vectors: their difference first, as it is small.
        after_NH, before_NH = (functional.normalize(each, dim=1) for each in (after_NH, before_NH))
        goal_N = (after_NH - before_NH) @ functional.normalize(before.goal_H, dim=0)
    return torch.stack([_apart(after_NH, before_NH), sums_N / counts_N, goal_N], 1), moved_T


def _moved_tokens(hidden_SBH: Tensor, these: Variants, before: Originals) -> Tensor:
    """fp32 [T], NaN where the original has no such gene."""
    after_TH = hidden_SBH[: len(these.places_T), 0].float()
    before_TH = before.tokens_TH[these.places_T.clamp(min=0)].float()
    return torch.where(these.places_T >= 0, _apart(after_TH, before_TH), torch.nan)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    difference = functional.normalize(one, dim=1) - functional.normalize(other, dim=1)
    return difference.square().sum(dim=1) / 2
