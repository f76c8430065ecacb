"""Collectives besides those of Megatron's schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from geneformer_mcore.distributed.groups import Topology

_ROWS_AT_ONCE = 65_536
_VALUES_AT_ONCE = 1 << 24


def sum_of_losses(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sum of `values` (fp64, any shape) over the data-parallel ranks, on every rank.
    Only the last stage has losses, equal on the ranks of a tensor group: each is counted once."""
    counts = topology.is_last_stage and topology.tensor_rank == 0
    total = values.clone() if counts else torch.zeros_like(values)
    dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank, on every rank."""
    return any_rank_each([flag], device)[0]


def any_rank_each(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """`any_rank` of several flags, in one collective."""
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


def first_problem(problem: str) -> str:
    """The first rank's text that is not empty, on every rank, or ""."""
    return next(filter(None, from_all_ranks(problem)), "")


def rows_on_first_rank(
    rows_N: np.ndarray, values_NH: np.ndarray, num_rows: int, device: torch.device
) -> np.ndarray | None:
    """On rank 0 [num_rows, H] with every rank's `values_NH` (floats) at its `rows_N` (int64,
    ascending), and NaN at rows that no rank has; None on the others. No row may be of two ranks.
    In parts, so that no other rank needs room for all."""
    width = values_NH.shape[1]
    is_first = dist.get_rank() == 0
    gathered = np.full((num_rows, width), np.nan, values_NH.dtype) if is_first else None
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, num_rows)
        here = slice(*np.searchsorted(rows_N, (start, stop)))
        # One more column marks the rows that a rank has.
        part = torch.from_numpy(np.zeros((stop - start, width + 1), values_NH.dtype))
        places = torch.from_numpy(rows_N[here] - start)
        part[places, :width] = torch.from_numpy(values_NH[here])
        part[places, width] = 1
        part = part.to(device)
        dist.reduce(part, dst=0)
        if gathered is not None:
            found = part.cpu().numpy()
            has = found[:, width] == 1
            gathered[start:stop][has] = found[has, :width]
    return gathered


def add_up_on_first_rank(values: np.ndarray, device: torch.device) -> None:
    """Add up `values` (contiguous floats) in place on rank 0; elsewhere they become undefined."""
    flat = values.reshape(-1)
    for start in range(0, len(flat), _VALUES_AT_ONCE):
        part = torch.from_numpy(flat[start : start + _VALUES_AT_ONCE]).to(device)
        dist.reduce(part, dst=0)
        flat[start : start + _VALUES_AT_ONCE] = part.cpu().numpy()


def barrier() -> None:
    dist.barrier()
