"""A contestant of train_step.py: global batches in a shape of its own, and a full step.

cells of step n, the same for all -> its micro batches -> placed on the device
    -> [ zero gradients -> forward, backward ... -> clip -> AdamW ]   what is timed
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.harness.common import CONFIGS, VOCABULARY
from geneformer_mcore.config import Config, load
from geneformer_mcore.model.flops import ModelShape, Workload, padded_workload
from geneformer_mcore.types import Batch

HF_DYNAMIC, HF_PADDED = "hf_dynamic", "hf_padded"
"""Those that all others are compared with: Hugging Face as usual, and as NVIDIA's stack pads."""
NAMES = (
    *("ours_packed", "ours_padded"),
    *(HF_DYNAMIC, "hf_grouped", HF_PADDED),
    *("megatron", "te_layers"),
)
"""In the order of the table, ours first."""
NEVER = -1e4
"""Output bias of the rows that pad the vocabulary: their probability is 0, and so is their part in
a peer's loss. Ours leaves them out by itself."""


@dataclass(frozen=True)
class Job:
    """The task of every contestant, in plain values: it goes to their processes as JSON.

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

    label:    its name in tables
    package:  the distribution whose version is shown; "" for ourselves
    config:   the settings, with its own on top
    """

    config: Config
    label: ClassVar[str]
    package: ClassVar[str] = ""

    @classmethod
    def why_not(cls, job: Job, on_gpu: bool) -> str:
        """The reason why it cannot be measured on this machine, or with these settings; or ""."""
        return ""

    @classmethod
    def enter(cls) -> torch.device:
        """Prepare this process, once, before one is made: its device, and as many threads as there
        are cores. Nothing of Megatron-Core's, or of ours, slows a peer down."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @classmethod
    def leave(cls) -> None:
        """Undo `enter`."""
        return

    @abstractmethod
    def __init__(self, job: Job, micro_batch: int, here: torch.device) -> None:
        """Build it on `here`. micro_batch: cells of a forward pass."""

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
        """Take a full training step. The mean loss per predicted gene, in nats, before it."""

    def computed(self, batches: list[Batch], needed: Workload) -> Workload:
        """The work that is computed: here, every position of every padded cell, all predicted.

        needed: the work that the same cells are
        """
        shapes = [batch.tokens_BS.shape for batch in batches]
        return add(
            [padded_workload(num_positions, num_cells) for num_cells, num_positions in shapes]
        )


def add(parts: list[Workload]) -> Workload:
    """The sum of several amounts of work."""
    names = ("tokens", "sum_squared_lengths", "num_predicted")
    return Workload(*(sum(getattr(part, name) for part in parts) for name in names))


def contestants() -> dict[str, type[StepContestant]]:
    """{name: its class}. Imports Megatron-Core, and no other peer."""
    from benchmarks.harness.peers import steps_megatron, steps_torch

    kinds: tuple[type[StepContestant], ...] = (
        *(steps_megatron.OursPacked, steps_megatron.OursPadded),
        *(steps_torch.HFDynamic, steps_torch.HFGrouped, steps_torch.HFPadded),
        *(steps_megatron.PlainMegatron, steps_torch.TELayers),
    )
    return dict(zip(NAMES, kinds, strict=True))
