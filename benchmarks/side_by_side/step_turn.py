"""One turn of one contestant, in a process of its own: times of steps, memory, losses.

build -> batches of all steps, on the device -> unmeasured steps -> clock: one step after the other
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.step_contestant import Job, StepContestant, add
from benchmarks.side_by_side.step_cells import StepCells
from geneformer_mcore.errors import DataError

MIB = 2**20


def take_turn(kind: type[StepContestant], job: Job, micro_batch: int) -> dict[str, Any]:
    """What was measured, over the measured steps.

    seconds:         of every measured step; batches are ready, and on the device, before the clock
    losses:          nats per predicted gene, of every step from the first, unmeasured ones included
    cells:           of the measured steps together, as are
    needed, computed: the work that the cells are, and what was computed on for it
    peak_mib:        memory of weights, gradients, moments and activations: on a GPU what torch
                     has allocated at most, on a CPU what the process grew by
    """
    _be_the_first_to_go()
    here = kind.enter()
    try:
        return _measured(kind, job, micro_batch, here)
    finally:
        kind.leave()


def _measured(
    kind: type[StepContestant], job: Job, micro_batch: int, here: torch.device
) -> dict[str, Any]:
    before_mib = _forget_peak_mib(here)
    contestant = kind(job, micro_batch, here)
    batches = [contestant.batches(number) for number in range(job.warmup + job.steps)]
    placed = [contestant.placed(each) for each in batches]
    losses, seconds = [], []
    for each in placed:
        _wait_for(here)
        began = time.perf_counter()
        losses.append(contestant.step(each))
        _wait_for(here)
        seconds.append(time.perf_counter() - began)
    if not all(math.isfinite(loss) for loss in losses):
        raise DataError(f"{kind.label}: a loss is not finite ({losses}).")
    return {
        "seconds": seconds[job.warmup :],
        "losses": losses,
        "cells": job.steps * contestant.config.train.global_batch_size,
        "peak_mib": _peak_mib(here) - before_mib,
        "about": contestant.about,
    } | _work(contestant, job, batches)


def _work(contestant: StepContestant, job: Job, batches: list) -> dict[str, Any]:
    """Summed over the measured steps: {"needed": ..., "computed": ...}, each as `Work`."""
    cells = StepCells.open(job.cells, contestant.config, job.vocabulary_size)
    needed, computed = [], []
    for number in range(job.warmup, job.warmup + job.steps):
        num_predicted = sum(len(batch.labels_M) for batch in batches[number])
        needed.append(cells.needed(number, num_predicted))
        computed.append(contestant.computed(batches[number], needed[-1]))
    return {"needed": vars(add(needed)), "computed": vars(add(computed))}


def _be_the_first_to_go() -> None:
    """Where memory runs out, this process is to be killed, and no other of the machine."""
    place = Path("/proc/self/oom_score_adj")
    if place.exists():
        place.write_text("1000")


def _forget_peak_mib(here: torch.device) -> float:
    """Starts to look for a peak; what is in use now."""
    if here.type == "cuda":
        torch.cuda.reset_peak_memory_stats(here)
        return torch.cuda.memory_allocated(here) / MIB
    Path("/proc/self/clear_refs").write_text("5")
    return _of_status("VmRSS")


def _peak_mib(here: torch.device) -> float:
    if here.type == "cuda":
        return torch.cuda.max_memory_allocated(here) / MIB
    return _of_status("VmHWM")


def _of_status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(name))
    return int(kib) / 1024


def _wait_for(here: torch.device) -> None:
    if here.type == "cuda":
        torch.cuda.synchronize(here)
