"""All-reduce in every group that training talks in: is the sum right, and how fast is it?

    groups of groups.named_groups, in the same order on every rank -> sums, seconds, bandwidth

Bus bandwidth = 2 (n - 1) / n x bytes / seconds for n ranks, as nccl-tests define it in their
doc/PERFORMANCE.md: what each link carries, so that it can be compared with the hardware's, whatever
n is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
_TIMES = 5
_MOST_NAMED = 8


@dataclass(frozen=True)
class Reduced:
    """What a rank found in one of its groups. seconds: of one all-reduce, median; 0 for a group of
    one, in which nothing is sent."""

    group: str
    ranks: list[int]
    is_right: bool
    seconds: float
    num_bytes: int

    @property
    def bus_bytes_per_s(self) -> float:
        """Bus bandwidth; 0 for a group of one."""
        return bus_bandwidth(len(self.ranks), self.num_bytes, self.seconds)


def bus_bandwidth(num_ranks: int, num_bytes: int, seconds: float) -> float:
    """Bytes per second of an all-reduce of `num_bytes` among `num_ranks` (see above)."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes / seconds if seconds else 0.0


def check(
    groups: dict[str, dist.ProcessGroup], device: torch.device, doing: Callable[[str], None]
) -> list[Reduced]:
    """This rank's groups, one after the other; all ranks call it together.

    doing: told before each, for the watch: by it a rank that does not come is found.
    """
    found = []
    for name, group in groups.items():
        ranks = dist.get_process_group_ranks(group)
        doing(f"the all-reduce of the {name} group ({named(ranks)})")
        found.append(_one(name, group, ranks, device))
    return found


def named(ranks: list[int]) -> str:
    """ "rank 3", "ranks 0, 2, 4"; many are not all listed."""
    more = f" ... {ranks[-1]}" if len(ranks) > _MOST_NAMED else ""
    word = "ranks" if len(ranks) > 1 else "rank"
    return f"{word} {', '.join(map(str, ranks[:_MOST_NAMED]))}{more}"


def _one(name: str, group: dist.ProcessGroup, ranks: list[int], device: torch.device) -> Reduced:
    num_bytes = _BYTES[device.type]
    if len(ranks) == 1:
        return Reduced(name, ranks, True, 0.0, num_bytes)
    number = ranks.index(dist.get_rank()) + 1
    values = torch.empty(num_bytes // 4, dtype=torch.float32, device=device)
    # Small whole numbers: their sum is exact in 32 bits, in whatever order it is made.
    expected = len(ranks) * (len(ranks) + 1) / 2
    is_right, seconds = True, []
    for _ in range(1 + _TIMES):
        values.fill_(number)
        torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        is_right &= bool((values == expected).all())
    # The first one sets up connections.
    return Reduced(name, ranks, is_right, statistics.median(seconds[1:]), num_bytes)
