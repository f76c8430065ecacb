"""A small model with a classifier on the toy cells, whose label can be learned in a few steps."""

from __future__ import annotations

import numpy as np

from geneformer_mcore.config import Config
from geneformer_mcore.data.collate import make_batch
from geneformer_mcore.data.labelled import LabelledBatches
from geneformer_mcore.data.loader import Feed
from geneformer_mcore.distributed import groups
from geneformer_mcore.model import classifier, geneformer, init, lora
from geneformer_mcore.model.classifier import CellClassifier
from tests.distributed import parity, toy

CLASSES = 3
SETTINGS = (*toy.SETTINGS, "finetune.label=kind", "finetune.dropout=0")
LORA = ("finetune.lora_rank=4", "finetune.lora_feed_forward=true", "finetune.lora_alpha=8")
LORA_SCALE = 2.0


def make(*overrides: str) -> toy.Toy:
    """A fine-tuning run on the ranks that are here, with weights that depend on no layout."""
    return toy.assembled([*SETTINGS, *overrides], stages, feed)


def enlarged(*overrides: str) -> toy.Toy:
    run = make(*overrides)
    parity.enlarge(run, drawn=0.16)
    return run


def stages(config: Config) -> list[geneformer.Geneformer]:
    """The one stage, as FineTuning makes it."""
    built = toy.stages(config, packed=config.data.packing, kind=CellClassifier)
    for stage in built:
        assert isinstance(stage, CellClassifier)
        lora.attach(stage, config.finetune)
        stage.add_head(CLASSES, config.finetune)
        init.fill(stage, config.train.seed)
        classifier.freeze(stage, config.finetune)
    return built


def classes() -> np.ndarray:
    """int64 [cells]: which third of the genes the highest-ranked gene of a cell is of."""
    cells = toy.ToyCells()
    return cells.tokens[cells.offsets[:-1] + 1].astype(np.int64) % CLASSES


def feed(config: Config, topology: groups.Topology) -> Feed:
    return toy.feed(config, topology, LabelledBatches(make_batch, toy.ToyCells().keys, classes()))
