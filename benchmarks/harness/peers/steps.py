"""A contestant of train_step.py: a model with its optimizer, a full step, one turn of it.

cells of step n, the same for all -> its micro batches -> placed on the device
    -> [ zero gradients -> forward, backward ... -> clip -> AdamW ]   timed, step by step
"""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.harness.common import CONFIGS, VOCABULARY, forget_peak_mib, peak_mib
from benchmarks.harness.step_cells import StepCells
from geneformer_mcore.config import Config, load
from geneformer_mcore.errors import DataError
from geneformer_mcore.model.flops import ModelShape, Workload
from geneformer_mcore.store.local_cache import FlatCopy
from geneformer_mcore.types import Batch

HF_DYNAMIC, HF_PADDED = "hf_dynamic", "hf_padded"
"""Those that all others are compared with: Hugging Face as usual, and as NVIDIA's stack pads."""
NAMES = ("ours_packed", "ours_padded", HF_DYNAMIC, HF_PADDED, "megatron")
"""In the order of the table, ours first."""
NEVER = -1e4
"""Output bias of the rows that pad the vocabulary: their probability is 0, and so is their part in
a peer's loss. Ours leaves them out by itself."""


@dataclass(frozen=True)
class Job:
    """The task of every contestant, in plain values: it goes to their processes as JSON.

    cells:            folder of a flat copy of tokens
    model:            the settings start from configs/geneformer_MODEL.yaml
    changes:          and these `section.key=value` follow, the global batch's size among them
    vocabulary_size:  tokens, specials included
    steps, warmup:    steps of a turn that are measured, and those before them
    """

    cells: str
    model: str
    changes: tuple[str, ...]
    vocabulary_size: int = VOCABULARY
    steps: int = 1
    warmup: int = 1

    def config(self, *changes: str) -> Config:
        """The settings, with a contestant's own on top."""
        return load(CONFIGS[self.model], [*self.changes, *changes])[0]

    def step_cells(self, config: Config) -> StepCells:
        """The cells, in the order of training."""
        return StepCells(FlatCopy(Path(self.cells)), config, self.vocabulary_size)

    def shape(self) -> ModelShape:
        """The model's size, for FLOPs: that of the card, whatever a contestant adds to it."""
        model = self.config().model
        widths = (model.num_layers, model.hidden_size, model.ffn_hidden_size)
        return ModelShape(*widths, self.vocabulary_size)


class StepContestant(ABC):
    """One row of the table. An instance is a model with its optimizer, ready to be trained.

    label:    its name in tables
    package:  the distribution whose version is shown; "" for ourselves
    config:   the settings, with its own on top
    about:    its attention, number format and padding, in a few words
    """

    config: Config
    about: str
    label: ClassVar[str]
    package: ClassVar[str] = ""

    @classmethod
    def why_not(cls) -> str:
        """The reason why it cannot be measured on this machine; or ""."""
        return ""

    @classmethod
    def enter(cls) -> torch.device:
        """Prepare this process, once, before one is made: its device, and as many threads as there
        are cores. Nothing of Megatron-Core's, or of ours, slows a peer down."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @abstractmethod
    def __init__(self, job: Job, micro_batch: int, here: torch.device) -> None:
        """Build it on `here`. micro_batch: cells of a forward pass."""

    @abstractmethod
    def batches(self, number: int) -> list[Batch]:
        """The micro batches of step `number` (from 0), on the host."""

    @abstractmethod
    def placed(self, batches: list[Batch]) -> list[Any]:
        """The same on the device, in the form that `step` takes."""

    @abstractmethod
    def step(self, placed: list[Any]) -> float:
        """Take a full training step. The mean loss per predicted gene, in nats, before it."""


def contestants() -> dict[str, type[StepContestant]]:
    """{name: its class}. Imports Megatron-Core, and no other peer."""
    from benchmarks.harness.peers import steps_megatron, steps_torch

    kinds: tuple[type[StepContestant], ...] = (
        *(steps_megatron.OursPacked, steps_megatron.OursPadded),
        *(steps_torch.HFDynamic, steps_torch.HFPadded),
        steps_megatron.PlainMegatron,
    )
    return dict(zip(NAMES, kinds, strict=True))


def take_turn(kind: type[StepContestant], job: Job, micro_batch: int) -> dict[str, Any]:
    """The measurements, over the measured steps. Ends with the process, whose device it takes.

    seconds:         of every measured step; batches are ready, and on the device, before the clock
    losses:          nats per predicted gene, of every step from the first, unmeasured ones included
    cells:           of the measured steps together, as are
    needed:          the work of the cells: real tokens, predicted positions only
    positions:       computed on for it, padding included
    peak_mib:        memory of weights, gradients, moments and activations: on a GPU allocated by
                     torch, on a CPU the growth of the process
    """
    # Where memory runs out, this process is to be killed, and no other of the machine.
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")
    here = kind.enter()
    before_mib = forget_peak_mib(here)
    contestant = kind(job, micro_batch, here)
    batches = [contestant.batches(number) for number in range(job.warmup + job.steps)]
    placed = [contestant.placed(each) for each in batches]
    losses, seconds = [], []
    for each in placed:
        began = _now(here)
        losses.append(contestant.step(each))
        seconds.append(_now(here) - began)
    if not all(map(math.isfinite, losses)):
        raise DataError(f"{kind.label}: a loss is not finite ({losses}).")
    return {
        "seconds": seconds[job.warmup :],
        "losses": losses,
        "cells": job.steps * contestant.config.train.global_batch_size,
        "peak_mib": peak_mib(here) - before_mib,
        "about": contestant.about,
        "needed": vars(_needed(contestant, job, batches)),
        "positions": sum(batch.tokens_BS.numel() for batch in chain(*batches[job.warmup :])),
    }


def _now(here: torch.device) -> float:
    if here.type == "cuda":
        torch.cuda.synchronize(here)
    return time.perf_counter()


def _needed(contestant: StepContestant, job: Job, batches: list[list[Batch]]) -> Workload:
    """Summed over the measured steps."""
    cells, total = job.step_cells(contestant.config), Workload(0, 0, 0)
    for number in range(job.warmup, job.warmup + job.steps):
        num_predicted = sum(len(batch.labels_M) for batch in batches[number])
        more = cells.needed(number, num_predicted)
        total = Workload(*(a + b for a, b in zip(astuple(total), astuple(more), strict=True)))
    return total
