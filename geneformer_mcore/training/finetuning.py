"""The task of fine-tuning: cells are classified by a label, on top of a pretrained encoder.

obs column of all cells -> empty: left out           -> labelled cells, renumbered
                        -> classes of training cells -> a held-out class without one: left out
labelled cells, unmasked      -> encoder -> classifier -> loss per cell  -> training
pretrained weights + new ones -> frozen layers, LoRA                     -> stages
held-out cells                -> loss, accuracy, macro F1
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_mcore.backends import require
from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.config import Config
from geneformer_mcore.data.labelled import LabelledBatches, labelled_source
from geneformer_mcore.data.loader import Feed
from geneformer_mcore.distributed.collectives import sum_of_losses
from geneformer_mcore.distributed.groups import Topology
from geneformer_mcore.errors import DataError
from geneformer_mcore.metrics import classified
from geneformer_mcore.model import classifier, forward_only, geneformer, init, lora
from geneformer_mcore.model.classifier import CellClassifier
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.optim.optimizer import Trainable
from geneformer_mcore.store.ingest.labels import as_text
from geneformer_mcore.training import datasets
from geneformer_mcore.training.datasets import RunCells
from geneformer_mcore.training.run_folder import RunFolder
from geneformer_mcore.training.step import validation_steps
from geneformer_mcore.training.task import HeldOut
from geneformer_mcore.types import Batch

_FEW_CELLS = 2
"""Least training cells per class, on average: with fewer the column names cells."""


@dataclass(frozen=True)
class Labels:
    """The classes of the labelled cells.

    name:        the column of obs
    classes:     sorted names; a class is its index
    keys_N, classes_N:  uint64, int64: `cell_key` and class of every labelled cell
    counts:      {split: {class: cells}}
    unlabelled:  {split: cells without a value}, left out
    unseen:      {class: held-out cells} without a training cell, left out
    """

    name: str
    classes: tuple[str, ...]
    keys_N: np.ndarray
    classes_N: np.ndarray
    counts: dict[str, dict[str, int]]
    unlabelled: dict[str, int]
    unseen: dict[str, int]

    def described(self) -> dict[str, Any]:
        """The content of labels.json."""
        names = ("counts", "unlabelled", "unseen")
        parts = {name: getattr(self, name) for name in names}
        return {"label": self.name, "classes": list(self.classes)} | parts

    def told(self) -> list[str]:
        """Lines for the console."""
        cells = sum(self.counts["train"].values())
        lines = [
            f"{self.name}: {len(self.classes)} classes, {cells:,} training cells, the fewest "
            f"{min(self.counts['train'].values()):,} of a class"
        ]
        left_out = sum(self.unlabelled.values())
        if left_out:
            lines.append(f"{left_out:,} cell(s) without a value of {self.name} are left out")
        if self.unseen:
            found = ", ".join(f"{name} ({cells:,})" for name, cells in self.unseen.items())
            lines.append(
                "no training cell has these classes, so held-out cells of them are left out: "
                + found
            )
        return lines


def labelled(cells: RunCells, name: str) -> tuple[RunCells, Labels]:
    """The labelled cells and their classes. Raises DataError for a column without classes."""
    if cells.labels is None:
        raise DataError(f"{cells.name} has no labels. Remedy: name a token store.")
    table = cells.labels(name)
    text_N = as_text(table[name], cells.name, name)
    start, stop = cells.rows["train"]
    classes = np.unique([each for each in text_N[start:stop] if each])
    _check_classes(classes, stop - start, cells, name)
    places_N = np.minimum(np.searchsorted(classes, text_N), len(classes) - 1)
    is_known_N = classes[places_N] == text_N
    rows = np.flatnonzero(is_known_N)
    found = Labels(
        name,
        tuple(str(each) for each in classes),
        table["cell_key"].to_numpy()[rows].astype(np.uint64),
        places_N[rows].astype(np.int64),
        {s: _counted_names(text_N[a:b][is_known_N[a:b]]) for s, (a, b) in cells.rows.items()},
        {split: int((text_N[slice(*span)] == "").sum()) for split, span in cells.rows.items()},
        _counted_names(text_N[~is_known_N & (text_N != "")]),
    )
    return _renumbered(cells, rows), found


def _counted_names(text_N: np.ndarray) -> dict[str, int]:
    names, counts = np.unique(text_N, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def _check_classes(classes: np.ndarray, num_cells: int, cells: RunCells, name: str) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{cells.name}: training cells must have two values of {name!r} at least, to be "
            f"distinguished, and have {len(classes)}"
            + (f" ({classes[0]})" if len(classes) else "")
            + ". Remedy: another `label=`, or a store of more cells."
        )
    if len(classes) * _FEW_CELLS > num_cells:
        raise DataError(
            f"{cells.name}: {name!r} has {len(classes):,} values in {num_cells:,} training cells: "
            "that names cells, and not classes of them. Remedy: another `label=`."
        )


def _renumbered(cells: RunCells, rows: np.ndarray) -> RunCells:
    ends = {
        split: tuple(np.searchsorted(rows, span).tolist()) for split, span in cells.rows.items()
    }
    return replace(
        cells,
        rows=ends,
        source=labelled_source(cells.source, rows),
        names=lambda numbers: cells.names(rows[numbers]),
    )


@dataclass(frozen=True)
class Origin:
    """The checkpoint that fine-tuning begins with. name: with its hash."""

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
        # The table of counts, and the loss.
        sums = torch.zeros(size * size + 1, dtype=torch.float64, device=self.device)
        for number in range(validation_steps(self.feed, self.limit)):
            begun()
            batches = self.feed.validation_step(number * self.feed.share.global_batch_size)
            on_device = [batch.to(self.device) for batch in batches]
            for found in forward_only.through(trainable.stages, on_device, _counted):
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
    """fp64 [C * C + 1]: cells by true and predicted class, and the sum of losses."""
    assert isinstance(stage, CellClassifier)
    logits_MC = stage.asked_logits(hidden_SBH, batch)
    loss = torch.nn.functional.cross_entropy(logits_MC, batch.labels_M, reduction="sum")
    size = logits_MC.shape[1]
    pairs_M = batch.labels_M * size + logits_MC.argmax(dim=1)
    counts = torch.bincount(pairs_M, minlength=size * size)
    return torch.cat([counts.double(), loss.double()[None]])


class FineTuning:
    """Classes of cells (a Task)."""

    def __init__(self, config: Config, cells: RunCells, labels: Labels, origin: Origin) -> None:
        """cells: those that `labels` are of, see `opened`."""
        self.cells = cells
        self.config, self._labels, self._origin = config, labels, origin

    @classmethod
    def opened(cls, config: Config, origin: Origin) -> FineTuning:
        """Open the cells. Raises DataError for a wrong label or vocabulary; MissingBackendError."""
        require("sklearn")  # used at the first validation
        everything = datasets.open_cells(config)
        checksum = everything.vocabulary.checksum
        if checksum != origin.vocabulary:
            raise DataError(
                f"{everything.name}: its vocabulary (checksum {checksum[:12]}) must be the model's "
                f"({origin.vocabulary[:12]}): its token ids mean other genes. Remedy: build the "
                "store with the model's vocabulary.json."
            )
        cells, labels = labelled(everything, config.finetune.label)
        datasets.check_splits(config, cells)
        return cls(config, cells, labels, origin)

    @property
    def facts(self) -> dict[str, Any]:
        return {"pretrained": self._origin.name, "classes": list(self._labels.classes)}

    @property
    def shape(self) -> None:
        """None: the FLOPs depend on what is frozen."""
        return None

    def stages(self, device: torch.device) -> list[Geneformer]:
        config, tune = self.config, self.config.finetune
        size = self.cells.vocabulary.size
        stages = geneformer.build_for(config, device, size, kind=CellClassifier)
        weights_reader.load(stages, self._origin.folder)
        for stage in stages:
            assert isinstance(stage, CellClassifier)
            lora.attach(stage, tune)
            stage.add_head(len(self._labels.classes), tune)
            init.fill(stage, config.train.seed, classifier.is_new)
            classifier.freeze(stage, tune)
        return stages

    def feed(self, topology: Topology, device: torch.device) -> Feed:
        return self._feed("train", topology, device)

    def held_out(self, topology: Topology, device: torch.device) -> LabelledCells | None:
        train = self.config.train
        if train.validate_every_steps == 0:
            return None
        feed = self._feed("validation", topology, device)
        classes = len(self._labels.classes)
        return LabelledCells(feed, classes, train.validate_batches, topology, device)

    def _feed(self, split: str, topology: Topology, device: torch.device) -> Feed:
        maker = LabelledBatches(
            datasets.maker(self.config, device), self._labels.keys_N, self._labels.classes_N
        )
        return datasets.split_feed(
            self.config, self.cells, split, self.cells.source, topology, maker
        )

    def describe(self, folder: RunFolder, feed: Feed, held_out: HeldOut | None) -> list[str]:
        """Write labels.json."""
        folder.write_labels(json.dumps(self._labels.described(), indent=1) + "\n")
        return self._labels.told()
