"""What a run learns: all that pretraining and fine-tuning do not have in common.

Task -> the cells and how they are shown (feed)  -> the trainer: one loop, one optimizer,
     -> the stages and what of them is trained   ->              one kind of checkpoint
     -> what held-out cells tell (HeldOut)
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
        """What is written to metrics.jsonl, `val_loss` among it; the same on every rank.

        is_last: after the last step of the run;  begun: called before every batch
        """
        ...


class Task(Protocol):
    """What is learned of which cells."""

    cells: RunCells

    @property
    def facts(self) -> dict[str, Any]:
        """What two starts must have in common beside settings and cells, as plain JSON."""
        ...

    @property
    def shape(self) -> ModelShape | None:
        """By which the arithmetic of a step is counted; None if it is not."""
        ...

    def stages(self, device: torch.device) -> list[Geneformer]:
        """This rank's part of the model with the weights that a new run begins with; what is not
        to be trained requires no gradient."""
        ...

    def feed(self, topology: Topology, device: torch.device) -> Feed:
        """This rank's training cells."""
        ...

    def held_out(self, topology: Topology, device: torch.device) -> HeldOut | None:
        """None if the run does not validate."""
        ...

    def describe(self, folder: RunFolder, feed: Feed, held_out: HeldOut | None) -> list[str]:
        """Writes what the run's figures are to be read with, on rank 0; lines to be told. Raises
        DataError where the figures would say nothing."""
        ...
