"""Peers that are plain torch modules: one lean training loop for all of them.

micro batches -> [zero gradients -> (forward, backward) per micro batch -> clip -> fused AdamW]
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.peers.step_contestant import Job, StepContestant
from benchmarks.side_by_side.step_cells import StepCells
from geneformer_mcore.config.sections import OptimConfig
from geneformer_mcore.types import PAD, Batch

IGNORED = -100
"""The label of a position that torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Labelled:
    """One micro batch on the device, in the form that a masked language model of torch takes.

    tokens_BS, labels_BS:  int64; the label is IGNORED where nothing is predicted
    is_real_BS:            int64, 1 where there is a token, 0 where there is padding
    """

    tokens_BS: torch.Tensor
    is_real_BS: torch.Tensor
    labels_BS: torch.Tensor
    num_predicted: int


class TorchStep(StepContestant):
    """A torch module that returns the mean loss of a micro batch.

    by_length:  cells of like length go into one micro batch
    """

    by_length: ClassVar[bool] = False

    def __init__(self, job: Job, micro_batch: int, here: torch.device) -> None:
        self.config = job.config()
        self.here = here
        self.micro_batch = micro_batch
        self.cells = StepCells.open(job.cells, self.config, job.vocabulary_size)
        torch.manual_seed(self.config.train.seed)
        self.model = self.built(job.vocabulary_size)
        self.optimizer = adamw(self.model, self.config.optim)

    @abstractmethod
    def built(self, vocabulary_size: int) -> torch.nn.Module:
        """The module on `self.here`, in training mode, with its initial weights."""

    @abstractmethod
    def mean_loss(self, batch: Labelled) -> torch.Tensor:
        """Nats per predicted gene of a micro batch."""

    def pad_multiple(self) -> int:
        """To what micro batches are padded; 0 is the full length, always."""
        return 0

    def batches(self, number: int) -> list[Batch]:
        return self.cells.micro_batches(
            number, self.micro_batch, self.pad_multiple(), self.by_length
        )

    def placed(self, batches: list[Batch]) -> list[Labelled]:
        # A mean over nothing is no number, and adds nothing.
        return [_labelled(batch, self.here) for batch in batches if len(batch.labels_M)]

    def step(self, placed: list[Labelled]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        num_predicted = sum(batch.num_predicted for batch in placed)
        total = torch.zeros((), device=self.here)
        for batch in placed:
            # Together the mean over the global batch, as ours: not a mean of means.
            loss = self.mean_loss(batch) * (batch.num_predicted / num_predicted)
            loss.backward()
            total += loss.detach().float()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step()
        return float(total)


def adamw(model: torch.nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW; matrices decay, biases and norms do not, as ours."""
    weights = list(model.parameters())
    groups = [
        {"params": [one for one in weights if one.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [one for one in weights if one.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )


def _labelled(batch: Batch, here: torch.device) -> Labelled:
    labels_BS = torch.full_like(batch.tokens_BS, IGNORED, dtype=torch.int64)
    labels_BS.view(-1)[batch.selected_M] = batch.labels_M
    return Labelled(
        batch.tokens_BS.long().to(here),
        (batch.tokens_BS != PAD).long().to(here),
        labels_BS.to(here),
        len(batch.labels_M),
    )
