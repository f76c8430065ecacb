"""Micro batches through a model that is not being trained: Megatron's schedule, forward only.

stages + batches  ->  residual stream of the last stage  ->  what is made of it, per batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from geneformer_mcore.contracts import Batch
from geneformer_mcore.model.geneformer import Geneformer

Finish = Callable[[torch.Tensor, Batch, Geneformer], torch.Tensor]
"""Called on the last stage with its hidden states [S, B, H] (this rank's share of the positions
under sequence parallel), the batch they are of, and the stage."""


def through(
    stages: Sequence[Geneformer], batches: list[Batch], finish: Finish
) -> list[torch.Tensor]:
    """What `finish` makes of each of `batches`, which are all of one shape and on the device; an
    empty list on ranks that do not hold the last stage."""
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

    def finished(hidden_SBH: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        assert non_loss_data
        return finish(hidden_SBH, batch, stage)

    return stage.encode(batch), finished


def whole(hidden_SBH: torch.Tensor, stage: Geneformer) -> torch.Tensor:
    """All positions, where sequence parallel gives each tensor rank its share."""
    if not stage.config.sequence_parallel:
        return hidden_SBH
    return gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)
