"""The task of fine-tuning: cells are told apart by a label, on top of a pretrained encoder.

labelled cells, nothing hidden -> encoder -> classifier -> loss per cell -> training
pretrained weights + new ones  -> what is frozen, what is corrected      -> stages
held-out cells                 -> loss, accuracy, macro F1
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from geneformer_mcore.backends import require
from geneformer_mcore.checkpoint import weights
from geneformer_mcore.config import Config
from geneformer_mcore.contracts import Batch
from geneformer_mcore.errors import DataError
from geneformer_mcore.feed.labelled import LabelledBatches
from geneformer_mcore.feed.loader import Feed
from geneformer_mcore.metrics import classified
from geneformer_mcore.model import (
    classifier,
    geneformer,
    inference,
    initial_weights,
    lora,
    settings,
)
from geneformer_mcore.model.classifier import CellClassifier
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.optim.optimizer import Trainable
from geneformer_mcore.parallel.collectives import sum_of_losses
from geneformer_mcore.parallel.groups import Topology
from geneformer_mcore.train import data
from geneformer_mcore.train.data import Cells
from geneformer_mcore.train.evaluate import validation_steps
from geneformer_mcore.train.labels import Labels, labelled
from geneformer_mcore.train.run_folder import RunFolder
from geneformer_mcore.train.task import HeldOut


@dataclass(frozen=True)
class Origin:
    """The checkpoint that fine-tuning begins with. name: as people call it, with its hash."""

    folder: Path
    name: str
    vocabulary: str


@dataclass(frozen=True)
class LabelledCells:
    """Held-out cells with their classes (a HeldOut)."""

    feed: Feed
    num_classes: int
    limit: int
    topology: Topology
    device: torch.device

    def evaluate(
        self, trainable: Trainable, is_last: bool, begun: Callable[[], None]
    ) -> dict[str, Any]:
        """Implements HeldOut. val_loss: nats per cell."""
        trainable.complete_weights()
        size = self.num_classes
        # One more number than the table of counts: the loss.
        sums = torch.zeros(size * size + 1, dtype=torch.float64, device=self.device)
        for number in range(validation_steps(self.feed, self.limit)):
            begun()
            batches = self.feed.validation_step(number * self.feed.share.global_batch_size)
            on_device = [batch.to(self.device) for batch in batches]
            for found in inference.through(trainable.stages, on_device, _counted):
                sums += found
        *counts, loss = sum_of_losses(sums, self.topology).tolist()
        counts_CC = torch.tensor(counts).view(size, size).long().numpy()
        scores = classified.scores(counts_CC)
        cells = int(counts_CC.sum())
        return {
            "val_loss": loss / cells,
            "val_accuracy": scores["accuracy"],
            "val_macro_f1": scores["macro_f1"],
            "val_cells": cells,
        }


def _counted(hidden_SBH: torch.Tensor, batch: Batch, stage: Geneformer) -> torch.Tensor:
    """fp64 [C * C + 1]: cells by true and predicted class, and the sum of losses (an
    inference.Finish)."""
    assert isinstance(stage, CellClassifier)
    logits_MC = stage.asked_logits(hidden_SBH, batch)
    loss = torch.nn.functional.cross_entropy(logits_MC, batch.labels_M, reduction="sum")
    size = logits_MC.shape[1]
    pairs_M = batch.labels_M * size + logits_MC.argmax(dim=1)
    counts = torch.bincount(pairs_M, minlength=size * size)
    return torch.cat([counts.double(), loss.double()[None]])


class FineTuning:
    """Classes of cells (a Task)."""

    def __init__(self, config: Config, cells: Cells, labels: Labels, origin: Origin) -> None:
        """cells: those that `labels` are of, see `opened`."""
        self.cells = cells
        self.config, self._labels, self._origin = config, labels, origin

    @classmethod
    def opened(cls, config: Config, origin: Origin) -> FineTuning:
        """Opens the cells. Raises DataError if they have no such label, or are not of the
        vocabulary that the model knows; MissingBackendError without scikit-learn."""
        # Found missing at the first validation, it would cost what came before.
        require("sklearn")
        everything = data.open_cells(config)
        checksum = everything.vocabulary.checksum
        if checksum != origin.vocabulary:
            raise DataError(
                f"{everything.name}: its vocabulary (checksum {checksum[:12]}) must be the model's "
                f"({origin.vocabulary[:12]}): its token ids mean other genes. Remedy: build the "
                "store with --vocabulary and the model's vocabulary.json."
            )
        cells, labels = labelled(everything, config.finetune.label)
        data.check_splits(config, cells)
        return cls(config, cells, labels, origin)

    @property
    def facts(self) -> dict[str, Any]:
        """Implements Task."""
        return {"pretrained": self._origin.name, "classes": list(self._labels.classes)}

    @property
    def shape(self) -> None:
        """Implements Task: how much of a step is left out depends on what is frozen, and no formula
        of ours says it."""
        return None

    def stages(self, device: torch.device) -> list[Geneformer]:
        """Implements Task: pretrained weights, and new ones that are drawn by the seed."""
        config, tune = self.config, self.config.finetune
        core = settings.transformer_config(
            config.model, config.parallel, config.train.precision, device
        )
        size, length = self.cells.vocabulary.size, config.data.seq_length
        packed = config.data.packing
        stages = geneformer.build(
            config.model, core, device, size, length, packed=packed, kind=CellClassifier
        )
        weights.load(stages, self._origin.folder)
        for stage in stages:
            assert isinstance(stage, CellClassifier)
            lora.attach(stage, tune)
            stage.add_head(len(self._labels.classes), tune)
            initial_weights.fill(stage, config.train.seed, classifier.is_new)
            classifier.freeze(stage, tune)
        return stages

    def feed(self, topology: Topology, device: torch.device) -> Feed:
        """Implements Task."""
        return self._feed("train", topology, device)

    def held_out(self, topology: Topology, device: torch.device) -> LabelledCells | None:
        """Implements Task."""
        train = self.config.train
        if train.validate_every_steps == 0:
            return None
        feed = self._feed("validation", topology, device)
        classes = len(self._labels.classes)
        return LabelledCells(feed, classes, train.validate_batches, topology, device)

    def _feed(self, split: str, topology: Topology, device: torch.device) -> Feed:
        maker = LabelledBatches(
            data.maker(self.config, device), self._labels.keys_N, self._labels.classes_N
        )
        return data.split_feed(self.config, self.cells, split, self.cells.source, topology, maker)

    def describe(self, folder: RunFolder, feed: Feed, held_out: HeldOut | None) -> list[str]:
        """Implements Task: which number means which class, and how many cells have it."""
        folder.write_labels(json.dumps(self._labels.described(), indent=1) + "\n")
        return self._labels.told()
