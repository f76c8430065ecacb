"""Which kernels really run: the names that the profiler sees in a forward and backward pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.side_by_side.memory import wait_for

_ATTENTION = re.compile(r"flash|fmha|sdpa|attention|attn|softmax|bmm|dropout|cudnn", re.IGNORECASE)
_MOST, _LONGEST_NAME = 12, 140


def kernels(work: Callable[[], Any], here: torch.device) -> list[dict[str, Any]]:
    """Kernels of a GPU (operators of a CPU) that have to do with attention, the slowest first:
    name, calls, microseconds in all. `work` is done twice: libraries choose kernels in the first.
    """
    work()
    wait_for(here)
    on_gpu = here.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as seen:
        work()
        wait_for(here)
    found = [
        {
            "name": event.key[:_LONGEST_NAME],
            "calls": event.count,
            "us": event.self_device_time_total if on_gpu else event.self_cpu_time_total,
        }
        for event in seen.key_averages()
        if _ATTENTION.search(event.key)
    ]
    found = [event for event in found if event["us"] > 0]
    return sorted(found, key=lambda event: -event["us"])[:_MOST]
