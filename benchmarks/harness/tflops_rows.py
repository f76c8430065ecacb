"""One row of tflops.py: the settings, timed training steps, rates.

setting -> the card's settings with that changed -> possible here? -> model, prefetched batches
    -> [ wait -> zero, forward, backward, clip, AdamW ] per step -> row
       '---------------- wall clock ----------------'
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.harness import common
from benchmarks.harness.made_up import MEAN_TOKENS, token_cells
from benchmarks.harness.peers.steps import our_stages
from benchmarks.harness.step_cells import StepCells
from geneformer_mcore.config import Config, load, plan
from geneformer_mcore.data.loader import Feed, steps_on_device
from geneformer_mcore.distributed import groups
from geneformer_mcore.model import flops, fused, megatron_config
from geneformer_mcore.model.attention import select
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.training.step import Totals, train_step

_FILLED = 0.95
"""A packed step gets as many cells as fill its micro batch to this share on average, since cells of
a step may be longer than usual."""


@dataclass(frozen=True)
class Setting:
    """One row.

    micro_batch:  cells of a padded micro batch; a packed one has room for as many of full length
    compiled:     model.compile; None: its default, as with attention_dropout
    """

    model: str
    precision: str
    packing: str
    attention: str
    attention_dropout: float | None
    micro_batch: int
    compiled: bool | None = None

    @property
    def packed(self) -> bool:
        return self.packing == "packed"

    def cells(self, seq_length: int) -> Any:
        """Full cells where they are padded, those of real lengths where they are packed."""
        mean = min(MEAN_TOKENS, seq_length * MEAN_TOKENS // 2048) if self.packed else None
        return token_cells(mean, seq_length, common.VOCABULARY)

    def config(self, seq_length: int) -> Config:
        """All settings of the row. Raises ConfigError for what no run can have."""
        batch = self.micro_batch
        if self.packed:
            filled = _FILLED * batch * seq_length / self.cells(seq_length).mean_tokens
            batch = max(1, int(filled))
        changes = {
            "train.precision": self.precision,
            "train.micro_batch_size": self.micro_batch,
            "train.global_batch_size": batch,
            "data.seq_length": seq_length,
            "data.packing": self.packed,
            "model.attention": self.attention,
            "model.attention_dropout": self.attention_dropout,
            "model.compile": self.compiled,
        }
        given = {key: str(value).lower() for key, value in changes.items() if value is not None}
        words = [f"{key}={value}" for key, value in given.items()]
        config = load(common.CONFIGS[self.model], words)[0]
        plan(config, world_size=1)
        return config


@dataclass(frozen=True)
class Step:
    """One measured step.

    step_s:       wall clock; includes data_wait_s, the wait for its micro batches
    positions:    computed on, padding included
    """

    step_s: float
    data_wait_s: float
    positions: int
    totals: Totals


def measured_row(
    setting: Setting, seq_length: int, here: torch.device, warmup: int, steps: int, peak: float
) -> dict[str, Any]:
    """Build the model, train it, return the row. The process groups must be there.

    peak: FLOP/s of which MFU is a share
    """
    config, cells = setting.config(seq_length), setting.cells(seq_length)
    precision, packed = config.train.precision, config.data.packing
    timed, peak_mib = measure(config, cells, here, warmup, steps)
    return {
        **asdict(setting),
        "cells": f"made up, mean {cells.mean_tokens:,.0f} tokens",
        "attention": select.choose(config.model, here, precision, packed).value,
        "compiled": fused.is_compiled(config.model.compile, here),
        **numbers(config, timed, peak),
        "peak_mib": peak_mib,
    }


def measure(
    config: Config, cells: Any, here: torch.device, warmup: int, steps: int
) -> tuple[list[Step], float]:
    """The steps after the unmeasured ones, and the peak of memory in MiB."""
    common.forget_peak_mib(here)
    groups.seed_dropout(config.train.seed, groups.topology())
    parallel = config.parallel
    core = megatron_config.transformer_config(config.model, parallel, config.train.precision, here)
    stages = our_stages(config, core, here, common.VOCABULARY)
    trainable = optim.wrap(stages, config.optim, parallel)
    try:
        feed = StepCells(cells, config, common.VOCABULARY).feed(config)
        timed = _timed(trainable, feed, config, here, warmup + steps)
    finally:
        _let_go(trainable)
        del trainable, stages
        gc.collect()
    return timed[warmup:], common.peak_mib(here)


def _timed(
    trainable: optim.Trainable, feed: Feed, config: Config, here: torch.device, number: int
) -> list[Step]:
    stream: Any = steps_on_device(feed, 0, config.data.prefetch_steps, here)
    timed = []
    with closing(stream):
        for _ in range(number):
            began = time.perf_counter()
            batches = next(stream)
            waited = time.perf_counter() - began
            result = train_step(trainable, batches, config.optim.lr, groups.topology())
            # train_step has read the loss: a GPU is done with all but AdamW's last kernels, and
            # what is left of them is in the time of the next step.
            seconds = time.perf_counter() - began
            positions = sum(batch.tokens_BS.numel() for batch in batches)
            timed.append(Step(seconds, waited, positions, result.totals))
    return timed


def _let_go(trainable: optim.Trainable) -> None:
    """Take Megatron's hooks off the gradients: they hold the model, the model holds them, and
    Python cannot see the circle, since autograd is part of it. The next model needs the memory."""
    for chunk in trainable.chunks:
        for node in chunk.grad_accs:
            node.register_hook(lambda *_: None).hooks_dict_ref().clear()
        chunk.grad_accs.clear()


def numbers(config: Config, steps: Sequence[Step], peak: float) -> dict[str, Any]:
    """The measured part of a row. peak: FLOP/s of which MFU is a share."""
    model, length, number = config.model, config.data.seq_length, len(steps)
    shape = flops.ModelShape.of(model, common.VOCABULARY)
    all_ = sum((step.totals for step in steps), Totals())
    work = flops.Workload(all_.num_tokens, all_.sum_squared_lengths, all_.num_predicted)
    seconds, num_cells = _typical_s(steps), number * config.train.global_batch_size
    executed = flops.executed_flops(shape, work) / seconds
    padded = flops.padded_equivalent_flops(shape, length) * num_cells / seconds
    waited_s = number * statistics.median(step.data_wait_s for step in steps)
    return {
        "attention_dropout": model.attention_dropout,
        "cells_per_step": config.train.global_batch_size,
        "seq_length": length,
        "tokens_per_cell": all_.num_tokens / num_cells,
        "fill": all_.num_tokens / sum(step.positions for step in steps),
        "cells_per_s": num_cells / seconds,
        "tokens_per_s": all_.num_tokens / seconds,
        "mfu": executed / peak,
        "data_wait_fraction": waited_s / seconds,
        "step_s": seconds / number,
        "tflops_padded_equivalent": padded / 1e12,
        "tflops_executed": executed / 1e12,
        "tflops_peak": peak / 1e12,
        "step_s_each": [step.step_s for step in steps],
    }


def _typical_s(steps: Sequence[Step]) -> float:
    """The time of all steps together, were none slower or faster per token than the median: one
    slow moment means nothing for the code, and cells of many lengths differ in their work."""
    per_token = statistics.median(step.step_s / step.totals.num_tokens for step in steps)
    return per_token * sum(step.totals.num_tokens for step in steps)
