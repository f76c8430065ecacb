"""The most memory that was in use: torch's on a GPU, the process's on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

MIB = 2**20


def forget_peak_mib(here: torch.device) -> float:
    """Starts to look for a peak; what is in use now."""
    if here.type == "cuda":
        torch.cuda.init()  # before it, there are no statistics to reset
        torch.cuda.reset_peak_memory_stats(here)
        return torch.cuda.memory_allocated(here) / MIB
    Path("/proc/self/clear_refs").write_text("5")
    return _of_status("VmRSS")


def peak_mib(here: torch.device) -> float:
    """The most since `forget_peak_mib`: what torch has allocated, or what was resident of the whole
    process, libraries included."""
    if here.type == "cuda":
        return torch.cuda.max_memory_allocated(here) / MIB
    return _of_status("VmHWM")


def wait_for(here: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if here.type == "cuda":
        torch.cuda.synchronize(here)


def _of_status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(name))
    return int(kib) / 1024
