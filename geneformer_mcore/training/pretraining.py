"""The task of pretraining: masked genes are predicted.

cells -> masked -> loss per masked gene         -> training
held-out cells -> the same masks each time      -> validation loss, and baselines
               -> their genes in a random order -> permutation control, after the last step
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from geneformer_mcore.config import Config
from geneformer_mcore.data.collate import truncate
from geneformer_mcore.data.loader import Feed
from geneformer_mcore.distributed.groups import Topology
from geneformer_mcore.errors import DataError
from geneformer_mcore.metrics import baselines
from geneformer_mcore.model import geneformer, init
from geneformer_mcore.model.flops import ModelShape
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.optim.optimizer import Trainable
from geneformer_mcore.training import datasets
from geneformer_mcore.training.datasets import RunCells
from geneformer_mcore.training.run_folder import RunFolder
from geneformer_mcore.training.step import evaluate
from geneformer_mcore.training.task import HeldOut

BASELINE_CELLS = 20_000
"""Training cells that the baselines are counted on, at most."""


@dataclass(frozen=True)
class MaskedGenes:
    """Held-out cells with masked genes (a HeldOut). control: the same, genes permuted."""

    validation: Feed
    control: Feed
    limit: int
    topology: Topology
    device: torch.device

    def evaluate(
        self, trainable: Trainable, is_last: bool, begun: Callable[[], None]
    ) -> dict[str, Any]:
        """Implements HeldOut. val_loss: nats per masked gene."""
        rest = (self.limit, self.topology, self.device, begun)
        totals = evaluate(trainable, self.validation, *rest)
        assert totals.num_predicted, "validation predicted nothing"
        record = {
            "val_loss": totals.loss,
            "val_loss_cell_mean": totals.cell_mean,
            "val_cells": totals.num_cells,
            "val_predicted": totals.num_predicted,
        }
        if is_last:
            record["val_loss_shuffled_genes"] = evaluate(trainable, self.control, *rest).loss
        return record


class Pretraining:
    """Masked genes (a Task)."""

    def __init__(self, config: Config, cells: RunCells) -> None:
        self.cells = cells
        self.config = config

    @property
    def facts(self) -> dict[str, Any]:
        return {}

    @property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.config.model, self.cells.vocabulary.size)

    def stages(self, device: torch.device) -> list[Geneformer]:
        """Initial weights, all trained."""
        stages = geneformer.build_for(self.config, device, self.cells.vocabulary.size)
        for stage in stages:
            init.fill(stage, self.config.train.seed)
        return stages

    def feed(self, topology: Topology, device: torch.device) -> Feed:
        return datasets.feed(self.config, self.cells, topology, device)

    def held_out(self, topology: Topology, device: torch.device) -> MaskedGenes | None:
        train = self.config.train
        if train.validate_every_steps == 0:
            return None
        feeds = datasets.validation_feeds(self.config, self.cells, topology, device)
        return MaskedGenes(*feeds, train.validate_batches, topology, device)

    def describe(self, folder: RunFolder, feed: Feed, held_out: HeldOut | None) -> list[str]:
        """Score the baselines on the very positions that validation predicts."""
        if held_out is None:
            return []
        assert isinstance(held_out, MaskedGenes)
        cells, train = self.cells, self.config.train
        first = feed.order.first_row
        last = first + min(feed.order.num_cells, BASELINE_CELLS)
        seen = truncate(cells.source.read(first, last), self.config.data.seq_length)
        asked = held_out.validation.validation_cells(train.validate_batches)
        labels, places = held_out.validation.masking.validation_positions(asked)
        if len(labels) == 0:
            raise DataError(
                f"validation would predict no gene in its {len(asked)} cell(s) with "
                f"data.mask_probability={self.config.data.mask_probability}. Raise that or "
                "train.validate_batches, or set train.validate_every_steps=0."
            )
        scores = baselines.score(seen, cells.vocabulary.size, labels, places)
        folder.write_baselines(json.dumps(scores, indent=1) + "\n")
        return []
