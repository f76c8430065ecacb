"""The few things ranks tell each other outside Megatron's schedules."""

from __future__ import annotations

from collections.abc import Sequence
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
    return any_rank_each([flag], device)[0]


def any_rank_each(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """`any_rank` of several questions, for the price of one."""
    answers = torch.tensor([int(flag) for flag in flags], device=device)
    dist.all_reduce(answers, op=dist.ReduceOp.MAX)
    return [bool(answer) for answer in answers.tolist()]


def total(number: int, device: torch.device) -> int:
    """The sum of the ranks' numbers, on every rank."""
    answer = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(answer)
    return int(answer.item())


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's `value` (small, picklable), in order of rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_rank(value: Any) -> Any:
    """Rank 0's `value` (small, picklable) on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Waits until every rank is here."""
    dist.barrier()
