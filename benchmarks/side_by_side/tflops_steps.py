"""Timed training steps of one setting, through the real feed, model, loss and optimizer.

build -> prefetched micro batches -> [ wait -> zero, forward, backward, clip, AdamW ] per step
                                       '---------------- wall clock ----------------'
                                              '-------- CUDA events -------------'
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass

import torch

from benchmarks.side_by_side.memory import forget_peak_mib, peak_mib, wait_for
from benchmarks.side_by_side.sizes import VOCABULARY
from benchmarks.side_by_side.tflops_cells import Cells
from geneformer_mcore.config import Config
from geneformer_mcore.data.loader import Feed, Share, steps_on_device
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.distributed import groups
from geneformer_mcore.model import geneformer, init, megatron_config
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.training.datasets import budget
from geneformer_mcore.training.step import Totals, train_step


@dataclass(frozen=True)
class Step:
    """One measured step.

    step_s:       wall clock; includes data_wait_s, the wait for its micro batches
    device_s:     between two events on the GPU, before the first kernel and behind the last one of
                  the step; None on a CPU
    positions:    computed on, padding included
    """

    step_s: float
    data_wait_s: float
    device_s: float | None
    positions: int
    totals: Totals


@dataclass(frozen=True)
class Measured:
    """Steps after the unmeasured ones, and the peak of memory from building the model on."""

    steps: list[Step]
    peak_mib: float


def measure(
    config: Config, cells: Cells, here: torch.device, num_warmup: int, num_steps: int
) -> Measured:
    """Builds the model and trains it. The process groups must be there."""
    forget_peak_mib(here)
    topology = groups.topology()
    groups.seed_dropout(config.train.seed, topology)
    trainable = _trainable(config, here)
    try:
        steps = _timed(trainable, _feed(config, cells), config, here, num_warmup + num_steps)
    finally:
        _let_go(trainable)
    return Measured(steps[num_warmup:], peak_mib(here))


def _timed(
    trainable: optim.Trainable, feed: Feed, config: Config, here: torch.device, number: int
) -> list[Step]:
    """The first `number` steps."""
    topology = groups.topology()
    timed, marks = [], []
    stream = steps_on_device(feed, 0, config.data.prefetch_steps, here)
    with closing(stream):  # type: ignore[type-var]
        for _ in range(number):
            began = time.perf_counter()
            batches = next(stream)
            waited = time.perf_counter() - began
            before = _mark(here)
            result = train_step(trainable, batches, config.optim.lr, topology)
            marks.append((before, _mark(here)))
            # train_step has read the loss: a GPU is done with all but AdamW's last kernels, and
            # what is left of them is in the time of the next step.
            seconds = time.perf_counter() - began
            positions = sum(batch.tokens_BS.numel() for batch in batches)
            timed.append((seconds, waited, positions, result.totals))
    wait_for(here)
    return [
        Step(seconds, waited, _between(*mark), positions, totals)
        for (seconds, waited, positions, totals), mark in zip(timed, marks, strict=True)
    ]


def _let_go(trainable: optim.Trainable) -> None:
    """Takes Megatron's hooks off the gradients: they hold the model, the model holds them, and
    Python cannot see the circle, since autograd is part of it. The next model needs the memory."""
    for chunk in trainable.chunks:
        for node in chunk.grad_accs:
            node.register_hook(lambda *_: None).hooks_dict_ref().clear()
        chunk.grad_accs.clear()


def _trainable(config: Config, here: torch.device) -> optim.Trainable:
    core = megatron_config.transformer_config(
        config.model, config.parallel, config.train.precision, here
    )
    stages = geneformer.build(
        config.model,
        core,
        here,
        VOCABULARY,
        config.data.seq_length,
        packed=config.data.packing,
    )
    for stage in stages:
        init.fill(stage, config.train.seed)
    return optim.wrap(stages, config.optim, config.parallel)


def _feed(config: Config, cells: Cells) -> Feed:
    data, batch = config.data, config.train.global_batch_size
    masked, random, kept = data.mask_fractions
    masking = Masking(data.mask_probability, (masked, random, kept), VOCABULARY, config.train.seed)
    num_cells = cells.source.num_cells
    order = Sampler(0, num_cells, data.span_cells, data.window_spans, config.train.seed)
    return Feed(
        cells.source,
        order,
        masking,
        Share(batch, config.train.micro_batch_size, data_rank=0, data_size=1),
        data.seq_length,
        data.pad_multiple,
        budget=budget(config),
    )


def _mark(here: torch.device) -> torch.cuda.Event | None:
    if here.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: torch.cuda.Event | None, last: torch.cuda.Event | None) -> float | None:
    """Seconds."""
    return None if first is None or last is None else first.elapsed_time(last) / 1000
