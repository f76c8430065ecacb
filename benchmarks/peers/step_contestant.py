"""What a contestant of train_step.py is: global batches in a shape of its own, and a full step.

cells of step n, the same for all -> its micro batches -> placed on the device
    -> [ zero gradients -> forward, backward ... -> clip -> AdamW ]   what is timed
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.side_by_side.sizes import CONFIGS, VOCABULARY
from geneformer_mcore.config import Config, load
from geneformer_mcore.model.flops import ModelShape, Workload, padded_workload
from geneformer_mcore.types import Batch

NEVER = -1e4
"""Output bias of the rows that pad the vocabulary: their probability is 0, and so is what a peer's
loss owes to them. Ours leaves them out by itself."""


@dataclass(frozen=True)
class Job:
    """What is asked of every contestant, in plain values: it goes to their processes as JSON.

    cells:            folder of a flat copy of tokens (see store/flat.py)
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

    def shape(self) -> ModelShape:
        """The model's size, for FLOPs: that of the card, whatever a contestant adds to it."""
        model = self.config().model
        return ModelShape(
            model.num_layers, model.hidden_size, model.ffn_hidden_size, self.vocabulary_size
        )


class StepContestant(ABC):
    """One row of the table. An instance is a model with its optimizer, ready to be trained.

    label:    how tables call it
    package:  the distribution whose version stands beside it; "" for ourselves
    config:   the settings, with its own on top
    """

    config: Config
    label: ClassVar[str]
    package: ClassVar[str] = ""

    @classmethod
    def why_not(cls, job: Job, on_gpu: bool) -> str:
        """Why it cannot be measured on this machine, or with these settings; "" if it can."""
        return ""

    @classmethod
    def enter(cls) -> torch.device:
        """Prepares this process, once, before one is made: its device, and as many threads as there
        are cores. Nothing of Megatron-Core's, or of ours, slows a peer down."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @classmethod
    def leave(cls) -> None:
        """Gives back what `enter` took."""
        return

    @abstractmethod
    def __init__(self, job: Job, micro_batch: int, here: torch.device) -> None:
        """Builds it on `here`. micro_batch: cells of a forward pass."""

    @property
    @abstractmethod
    def about(self) -> str:
        """Its attention, number format and padding, in a few words."""

    @abstractmethod
    def batches(self, number: int) -> list[Batch]:
        """The micro batches of step `number` (from 0), on the host."""

    @abstractmethod
    def placed(self, batches: list[Batch]) -> list[Any]:
        """The same on the device, in the form that `step` takes."""

    @abstractmethod
    def step(self, placed: list[Any]) -> float:
        """A full training step. The mean loss per predicted gene, in nats, before it."""

    def computed(self, batches: list[Batch], needed: Workload) -> Workload:
        """What it computes on: here, every position of every padded cell, all predicted.

        needed: what the same cells consist of
        """
        shapes = [batch.tokens_BS.shape for batch in batches]
        parts = [padded_workload(num_positions, num_cells) for num_cells, num_positions in shapes]
        return add(parts)


def add(parts: list[Workload]) -> Workload:
    """The sum of several amounts of work."""
    return Workload(
        sum(part.tokens for part in parts),
        sum(part.sum_squared_lengths for part in parts),
        sum(part.num_predicted for part in parts),
    )
