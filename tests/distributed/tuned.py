"""A small model with a classifier on the toy cells, whose label can be learned in a few steps."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from geneformer_mcore.config import Config, load, plan
from geneformer_mcore.data.collate import make_batch
from geneformer_mcore.data.labelled import LabelledBatches
from geneformer_mcore.data.loader import Feed
from geneformer_mcore.distributed import groups
from geneformer_mcore.model import classifier, geneformer, init, lora, megatron_config
from geneformer_mcore.model.classifier import CellClassifier
from geneformer_mcore.model.init import sharded_parameters, slice_of
from geneformer_mcore.optim import optimizer as optim
from tests.distributed import toy

CLASSES = 3
SETTINGS = (*toy.SETTINGS, "finetune.label=kind", "finetune.dropout=0")
LORA = ("finetune.lora_rank=4", "finetune.lora_feed_forward=true", "finetune.lora_alpha=8")
LORA_SCALE = 2.0


def make(*overrides: str) -> toy.Toy:
    """A fine-tuning run on the ranks that are here, with weights that depend on no layout."""
    config, _ = load(None, [*SETTINGS, *overrides])
    plan(config, torch.distributed.get_world_size())
    topology = groups.build_groups(config.parallel)
    groups.seed_dropout(config.train.seed, topology)
    built = stages(config)
    trainable = optim.wrap(built, config.optim, config.parallel)
    return toy.Toy(config, topology, trainable, feed(config, topology))


def stages(config: Config) -> list[geneformer.Geneformer]:
    """The one stage, as FineTuning makes it."""
    core = megatron_config.transformer_config(
        config.model, config.parallel, config.train.precision, toy.CPU
    )
    built = geneformer.build(
        config.model,
        core,
        toy.CPU,
        toy.VOCABULARY,
        toy.SEQ_LENGTH,
        packed=config.data.packing,
        kind=CellClassifier,
    )
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
    """The toy cells as this rank sees them, with their classes."""
    plain = toy.feed(config, topology)
    cells = toy.ToyCells()
    return Feed(
        cells,
        plain.order,
        plain.masking,
        plain.share,
        plain.seq_length,
        plain.pad_multiple,
        LabelledBatches(make_batch, cells.keys, classes()),
        plain.budget,
    )


def redraw(run: toy.Toy) -> None:
    """Larger weights, none of them 0, the same ones in every layout."""
    with torch.no_grad():
        for stage in run.trainable.stages:
            for entry in sharded_parameters(stage):
                seed = int.from_bytes(hashlib.sha256(entry.key.encode()).digest()[:7], "little")
                drawn = torch.randn(
                    entry.global_shape, generator=torch.Generator().manual_seed(seed)
                )
                if len(entry.global_shape) > 1:
                    entry.data.copy_(slice_of(entry, drawn * 0.16))
                else:
                    entry.data.add_(slice_of(entry, drawn * 0.1))
    run.trainable.optimizer.reload_model_params()


def digest(run: toy.Toy, trained: bool | None = None) -> dict[str, str]:
    """{name: SHA-256} of this rank's weights: all, the trained or the frozen ones."""
    return {
        name: hashlib.sha256(parameter.detach().float().numpy().tobytes()).hexdigest()
        for stage in run.trainable.stages
        for name, parameter in stage.named_parameters()
        if trained is None or parameter.requires_grad == trained
    }
