"""The few things ranks tell each other outside Megatron's schedules."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from geneformer_mcore.parallel.groups import Topology


def sum_of_losses(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Adds up `values` (fp64, any shape) over the data-parallel ranks, for every rank to know.

    Only the last stage has losses, and the ranks of a tensor group all have the same ones: each
    value is counted once.
    """
    counts = topology.is_last_stage and topology.tensor_rank == 0
    total = values.clone() if counts else torch.zeros_like(values)
    dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says yes; every rank gets the same answer."""
    answer = torch.tensor([int(flag)], device=device)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer.item())


def from_first_rank(value: Any) -> Any:
    """Rank 0's `value` (small, picklable) on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Waits until every rank is here."""
    dist.barrier()
