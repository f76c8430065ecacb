"""A small model on made-up cells: enough to tell a right layout from a wrong one in a second."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_mcore.checkpoint import state
from geneformer_mcore.config import Config, load, plan
from geneformer_mcore.data.collate import Collator, make_batch
from geneformer_mcore.data.loader import Feed, Share, budget
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.distributed import groups
from geneformer_mcore.model import geneformer, init, megatron_config
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.training.step import StepResult, train_step
from geneformer_mcore.types import NUM_SPECIALS, RaggedCells

VOCABULARY = 700
SEQ_LENGTH = 96
CPU = torch.device("cpu")
LONE = groups.Topology(0, 1, 0, 0, 1, 0, 1)
"""Where the only rank stands."""

SETTINGS = (
    f"data.seq_length={SEQ_LENGTH}",
    "data.packing=false",
    "data.pad_multiple=8",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=4",
    "model.hidden_dropout=0",
    "model.attention_dropout=0",
    "train.precision=fp32",
    "train.micro_batch_size=4",
    "train.global_batch_size=16",
    "optim.lr=3e-3",
)


class ToyCells:
    """`num_cells` made-up cells of 3 to SEQ_LENGTH tokens: genes near the top are likelier low."""

    def __init__(self, num_cells: int = 120) -> None:
        rng = np.random.default_rng(5)
        lengths = rng.integers(3, SEQ_LENGTH + 1, num_cells)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = np.zeros(self.offsets[-1], np.uint16)
        for i, length in enumerate(lengths):
            order = np.argsort(rng.gumbel(size=VOCABULARY - NUM_SPECIALS) + self._weight())
            self.tokens[self.offsets[i] + 1 : self.offsets[i + 1]] = (
                order[::-1][: length - 1] + NUM_SPECIALS
            )
        self.keys = rng.integers(0, 2**63, num_cells).astype(np.uint64)
        self.num_cells = num_cells

    @staticmethod
    def _weight() -> np.ndarray:
        return np.linspace(3, 0, VOCABULARY - NUM_SPECIALS)

    def read(self, start: int, stop: int) -> RaggedCells:
        first, last = self.offsets[start], self.offsets[stop]
        return RaggedCells(
            self.tokens[first:last], self.offsets[start : stop + 1] - first, self.keys[start:stop]
        )


@dataclass
class Toy:
    config: Config
    topology: groups.Topology
    trainable: optim.Trainable
    feed: Feed
    position: int = 0

    def steps(self, count: int) -> list[StepResult]:
        return [self.step() for _ in range(count)]

    def step(self) -> StepResult:
        batches = self.feed.step(self.position)
        self.position += self.config.train.global_batch_size
        return train_step(self.trainable, batches, self.config.optim.lr, self.topology)

    def losses(self, count: int) -> list[float]:
        return [result.totals.loss for result in self.steps(count)]

    def write(self, folder: str) -> None:
        if self.topology.rank == 0:
            Path(folder).mkdir()
        torch.distributed.barrier()
        state.save(self.trainable, Path(folder), self.topology.rank)

    def digest(self, trained: bool | None = None) -> dict[str, str]:
        """{name: SHA-256} of this rank's weights: all, the trained or the frozen ones."""
        return {
            name: hashlib.sha256(weights.detach().float().numpy()).hexdigest()
            for stage in self.trainable.stages
            for name, weights in stage.named_parameters()
            if trained is None or weights.requires_grad == trained
        }


def make(*overrides: str) -> Toy:
    """A toy run on the ranks that are here; groups of an earlier one are left first."""
    return assembled([*SETTINGS, *overrides], stages, feed)


def assembled(
    given: list[str],
    stages: Callable[[Config], list[geneformer.Geneformer]],
    feed: Callable[[Config, groups.Topology], Feed],
) -> Toy:
    """The same with other settings, stages and cells."""
    groups.stop(stay=True)
    config, _ = load(None, given)
    plan(config, torch.distributed.get_world_size())
    topology = groups.build_groups(config.parallel)
    groups.seed_dropout(config.train.seed, topology)
    trainable = optim.wrap(stages(config), config.optim, config.parallel)
    return Toy(config, topology, trainable, feed(config, topology))


def losses(count: int, *overrides: str) -> list[float]:
    return make(*overrides).losses(count)


def loaded(
    folder: str, steps: int, *overrides: str, same_layout: bool = False, kind: Any = None
) -> Toy:
    """A run that continues from a checkpoint of `steps` steps; its own seed must not matter.
    same_layout: with the random states of this rank; kind: the module that makes it, if another."""
    kind = kind or sys.modules[__name__]
    run = kind.make("train.seed=99", *overrides)
    state.load(run.trainable, Path(folder), run.topology.rank if same_layout else None)
    run.feed = kind.feed(load(None, [*kind.SETTINGS, *overrides])[0], run.topology)
    run.position = steps * run.config.train.global_batch_size
    return run


def stages(config: Config, **build: Any) -> list[geneformer.Geneformer]:
    core = megatron_config.transformer_config(
        config.model, config.parallel, config.train.precision, CPU
    )
    built = geneformer.build(config.model, core, CPU, VOCABULARY, SEQ_LENGTH, **build)
    for stage in built:
        init.fill(stage, config.train.seed)
    return built


def feed(config: Config, topology: groups.Topology, maker: Collator = make_batch) -> Feed:
    train, cells = config.train, ToyCells()
    return Feed(
        cells,
        Sampler(0, cells.num_cells, 16, 2, train.seed),
        Masking(0.15, (0.8, 0.02, 0.18), VOCABULARY, train.seed),
        Share(
            train.global_batch_size, train.micro_batch_size, topology.data_rank, topology.data_size
        ),
        SEQ_LENGTH,
        config.data.pad_multiple,
        maker,
        budget(config),
    )
