"""The protocol of a task: all that pretraining and fine-tuning do not have in common.

Task -> cells, feed -> stages -> the trainer's loop, optimizer, checkpoints -> HeldOut: validation
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from geneformer_mcore.data.loader import Feed
from geneformer_mcore.distributed.groups import Topology
from geneformer_mcore.model.flops import ModelShape
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.optim.optimizer import Trainable
from geneformer_mcore.training.datasets import RunCells
from geneformer_mcore.training.run_folder import RunFolder


class HeldOut(Protocol):
    """This rank's part of the cells that are not trained on."""

    def evaluate(
        self, trainable: Trainable, is_last: bool, begun: Callable[[], None]
    ) -> dict[str, Any]:
        """The record for metrics.jsonl, with `val_loss`; the same on every rank.
        is_last: after the last step of the run;  begun: called before every batch"""
        ...


class Task(Protocol):
    """A learning task on some cells."""

    cells: RunCells

    @property
    def facts(self) -> dict[str, Any]:
        """Plain JSON that must equal that of the checkpoint, besides settings and cells."""
        ...

    @property
    def shape(self) -> ModelShape | None:
        """For the FLOPs of a step; None if they are not counted."""
        ...

    def stages(self, device: torch.device) -> list[Geneformer]:
        """This rank's part of the model with initial weights; frozen ones require no gradient."""
        ...

    def feed(self, topology: Topology, device: torch.device) -> Feed: ...

    def held_out(self, topology: Topology, device: torch.device) -> HeldOut | None:
        """None if the run does not validate."""
        ...

    def describe(self, folder: RunFolder, feed: Feed, held_out: HeldOut | None) -> list[str]:
        """Write baselines or labels, on rank 0; returns lines to log. May raise DataError."""
        ...
