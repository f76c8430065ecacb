"""One optimizer step on this rank's micro batches.

zero gradients -> Megatron's schedule (loss sum, token count) -> gradients / global count
               -> a reason to leave the update out? -> clip -> AdamW
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.profiler import record_function

from geneformer_mcore.data.collate import cells_of
from geneformer_mcore.data.loader import Feed
from geneformer_mcore.distributed.collectives import sum_of_losses
from geneformer_mcore.distributed.groups import Topology
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.optim.optimizer import Trainable
from geneformer_mcore.types import Batch


@dataclass(frozen=True)
class Totals:
    """Sums over the cells of one or more global batches, the same on every rank.

    loss_sum:            nats, over all predicted genes
    cell_mean_sum:       nats, sum over cells of the mean loss within the cell
    num_cells:           cells with a predicted gene
    num_tokens:          [CLS] included, padding not
    sum_squared_lengths: sum over cells of (tokens of the cell)^2
    """

    loss_sum: float = 0.0
    num_predicted: int = 0
    cell_mean_sum: float = 0.0
    num_cells: int = 0
    num_tokens: int = 0
    sum_squared_lengths: int = 0

    @property
    def loss(self) -> float:
        """Nats per predicted gene, or NaN."""
        return self.loss_sum / self.num_predicted if self.num_predicted else math.nan

    @property
    def cell_mean(self) -> float:
        """Mean over cells of the mean loss within a cell, as in the model card."""
        return self.cell_mean_sum / self.num_cells if self.num_cells else math.nan

    def __add__(self, other: Totals) -> Totals:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Totals(*(mine + theirs for mine, theirs in pairs))


@dataclass(frozen=True)
class StepResult:
    """One step. left_out: why no weight was changed, or ""."""

    totals: Totals
    grad_norm: float
    left_out: str = ""

    @property
    def updated(self) -> bool:
        return not self.left_out


NOTHING_PREDICTED = "nothing is predicted in it"
"""Why a step without a loss is left out."""


def only_finite(loss: float, grad_norm: float) -> str:
    return "" if math.isfinite(grad_norm) and math.isfinite(loss) else "not finite"


def train_step(
    trainable: optim.Trainable,
    batches: list[Batch],
    lr: float,
    topology: Topology,
    reason_to_skip: Callable[[float, float], str] = only_finite,
) -> StepResult:
    """Forward, backward and update over all micro batches of this rank.
    reason_to_skip: of loss and gradient norm, the same on every rank; "" to update the weights"""
    for chunk in trainable.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    # Names for the profiler.
    with record_function("forward and backward"):
        totals = run_schedule(trainable.chunks, batches, topology, forward_only=False)
    with record_function("gradient norm"):
        grad_norm = optim.gradient_norm(trainable.optimizer)
    left_out = NOTHING_PREDICTED
    if totals.num_predicted:
        left_out = reason_to_skip(totals.loss, grad_norm)
    if not left_out:
        with record_function("update"):
            optim.set_learning_rate(trainable.optimizer, lr)
            optim.update(trainable, grad_norm)
    return StepResult(totals, grad_norm, left_out)


def run_schedule(
    chunks: list, batches: list[Batch], topology: Topology, forward_only: bool
) -> Totals:
    """Megatron's schedule (none, 1F1B or interleaved) over the micro batches of this rank."""
    num_rows, num_positions = batches[0].tokens_BS.shape
    iterators = [iter(batches) for _ in chunks]
    single = len(chunks) == 1
    reported = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=chunks[0] if single else chunks,
        num_microbatches=len(batches),
        seq_length=num_positions,
        micro_batch_size=num_rows,
        forward_only=forward_only,
    )
    local = torch.zeros(6, dtype=torch.float64, device=batches[0].tokens_BS.device)
    for sums in reported:
        local += sums
    # Waits for the device, as the gradient norm does: every rank must know whether to update.
    loss_sum, predicted, cell_mean_sum, *counts = sum_of_losses(local, topology).tolist()
    return Totals(loss_sum, round(predicted), cell_mean_sum, *(round(count) for count in counts))


def _forward_step(
    batches: Iterator[Batch], chunk: Geneformer
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple]]:
    batch = next(batches)

    def loss_and_count(loss_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = torch.tensor(loss_M.numel(), dtype=torch.int, device=loss_M.device)
        # Megatron scales the first of these in place: the last must be a copy.
        return loss_M.sum(), count, _sums(loss_M.detach(), batch)

    return chunk(batch), loss_and_count


def _sums(loss_M: torch.Tensor, batch: Batch) -> torch.Tensor:
    """fp64 [6] in the order of Totals."""
    cell_M = cells_of(batch, batch.selected_M)
    loss_M = loss_M.double()
    per_cell = torch.zeros(len(batch.lengths_N), dtype=torch.float64, device=loss_M.device)
    counts = torch.zeros_like(per_cell)
    per_cell.index_add_(0, cell_M, loss_M)
    counts.index_add_(0, cell_M, torch.ones_like(loss_M))
    lengths = batch.lengths_N.double()
    sums = (
        loss_M.sum(),
        counts.sum(),
        (per_cell / counts.clamp(min=1)).sum(),
        (counts > 0).sum(),
        lengths.sum(),
        lengths.square().sum(),
    )
    return torch.stack([value.double() for value in sums])


def validation_steps(feed: Feed, limit: int) -> int:
    """Global batches that cover the cells of `feed`, at most `limit`."""
    return min(limit, -(-feed.order.num_cells // feed.share.global_batch_size))


def evaluate(
    trainable: Trainable,
    feed: Feed,
    limit: int,
    topology: Topology,
    device: torch.device,
    begun: Callable[[], None] = lambda: None,
) -> Totals:
    """Sums over the first `limit` global batches of held-out cells, each cell once. Weights,
    random states and the position in the training data are left alone.

    begun: called before every batch
    """
    totals = Totals()
    for chunk in trainable.chunks:
        chunk.train(mode=False)
    with torch.no_grad():
        for number in range(validation_steps(feed, limit)):
            begun()
            batches = feed.validation_step(number * feed.share.global_batch_size)
            on_device = [batch.to(device) for batch in batches]
            totals += run_schedule(trainable.chunks, on_device, topology, forward_only=True)
    return totals
