"""One turn of one contestant, in a process of its own: times of steps, memory, losses.

build -> batches of all steps, on the device -> unmeasured steps -> clock: one step after the other

Before the rounds, each contestant tries every micro batch; its fastest is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.harness.common import forget_peak_mib, peak_mib, rate_text, wait_for
from benchmarks.harness.peers.steps import Job, StepContestant, add
from benchmarks.harness.train_step.cells import StepCells
from benchmarks.harness.train_step.rows import rate
from geneformer_mcore.errors import DataError

Turn: TypeAlias = Callable[[str, int], tuple[dict[str, Any], str]]
"""(contestant, micro batch) -> (what was measured, why it failed)."""
Tried: TypeAlias = dict[int, float | str]
"""{micro batch: cells/s, or why there is none}."""


def tune(
    turn: Turn, labels: dict[str, str], sizes: Sequence[int], failures: dict[str, str]
) -> dict[str, Tried]:
    """The rate of every contestant of `labels` with each micro batch of `sizes`, ascending.

    failures: {contestant: why it is skipped}; who can take no size at all is added
    """
    found: dict[str, Tried] = {name: {} for name in labels}
    if len(sizes) == 1:
        return found  # nothing to choose from
    for name, tried in found.items():
        for size in [] if name in failures else sizes:
            measured, why = turn(name, size)
            tried[size] = why or rate(measured)
            shown = why or rate_text(rate(measured))
            print(f"micro batch {size}: {labels[name]}: {shown}", flush=True)
            if why:
                break  # a larger one wants more memory still
        if tried and all(isinstance(each, str) for each in tried.values()):
            failures[name] = str(tried[sizes[0]])
    return found


def fastest(tried: Tried, sizes: Sequence[int]) -> int:
    """The micro batch with the highest rate; the first of `sizes` where none has one."""
    rates = {size: found for size, found in tried.items() if not isinstance(found, str)}
    return max(rates, key=lambda size: rates[size], default=sizes[0])


def take_turn(kind: type[StepContestant], job: Job, micro_batch: int) -> dict[str, Any]:
    """The measurements, over the measured steps.

    seconds:         of every measured step; batches are ready, and on the device, before the clock
    losses:          nats per predicted gene, of every step from the first, unmeasured ones included
    cells:           of the measured steps together, as are
    needed, computed: the work that the cells are, and that which was computed on for it
    peak_mib:        memory of weights, gradients, moments and activations: on a GPU allocated by
                     torch, on a CPU the growth of the process
    """
    # Where memory runs out, this process is to be killed, and no other of the machine.
    place = Path("/proc/self/oom_score_adj")
    if place.exists():
        place.write_text("1000")
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
