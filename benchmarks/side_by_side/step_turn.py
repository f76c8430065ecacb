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
from benchmarks.side_by_side.memory import forget_peak_mib, peak_mib, wait_for
from benchmarks.side_by_side.step_cells import StepCells
from geneformer_mcore.errors import DataError


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
    before_mib = forget_peak_mib(here)
    contestant = kind(job, micro_batch, here)
    batches = [contestant.batches(number) for number in range(job.warmup + job.steps)]
    placed = [contestant.placed(each) for each in batches]
    losses, seconds = [], []
    for each in placed:
        wait_for(here)
        began = time.perf_counter()
        losses.append(contestant.step(each))
        wait_for(here)
        seconds.append(time.perf_counter() - began)
    if not all(math.isfinite(loss) for loss in losses):
        raise DataError(f"{kind.label}: a loss is not finite ({losses}).")
    return {
        "seconds": seconds[job.warmup :],
        "losses": losses,
        "cells": job.steps * contestant.config.train.global_batch_size,
        "peak_mib": peak_mib(here) - before_mib,
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
