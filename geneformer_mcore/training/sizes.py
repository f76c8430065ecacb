"""The sizes of a run, estimated before anything is built, against the machine that is to hold them.

settings, plan, cells  ->  bytes of a rank: model | activations | cells    -> memory of device, host
                       ->  FLOPs of a rank and step                        -> its peak, timeout_s
                       ->  ConfigError with the estimate and the machine's size

An estimate leaves out what it cannot know (fragments, libraries, padding): what is refused cannot
work, and what is not may still be too much.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from geneformer_mcore.config import Config, Plan
from geneformer_mcore.config.sections import Precision, Recompute
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.io.workers import memory_bytes
from geneformer_mcore.model.flops import (
    TRAIN_OVER_FORWARD,
    ModelShape,
    Workload,
    forward_flops,
    num_parameters,
)
from geneformer_mcore.training.datasets import RunCells
from geneformer_mcore.types import RandomAccess

_HASTE = 4.0
"""The peak is measured in an instant in which other programs may have had the processor."""
_BYTES_OF_PLACE = 24
"""Row, epoch and window of a cell; row, length and key of one that is read."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of one rank, at least.

    model:        weights, gradients, and this rank's share of the optimizer's numbers
    activations:  what the forward pass of one micro batch keeps for the backward pass
    cells:        global batches prepared ahead
    window:       room for the cells that are shuffled into each other
    flops:        of a step
    """

    model: int
    activations: int
    cells: int
    window: int
    flops: int


def check(config: Config, plan: Plan, cells: RunCells, device: torch.device, peak: float) -> None:
    """Raise ConfigError where the run cannot fit into the memory of `device` and this machine, or
    no step into parallel.timeout_s. peak: FLOP/s of the device."""
    found = estimate(config, plan, cells)
    ranks, host = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), memory_bytes()
    of_model = {
        "weights, gradients and optimizer (model.*, shared by parallel.*)": found.model,
        "activations (train.micro_batch_size, data.seq_length, parallel.recompute)": (
            found.activations
        ),
    }
    of_cells = {
        "prepared cells (train.global_batch_size, data.prefetch_steps)": found.cells * ranks,
        "cells to shuffle (data.span_cells, data.window_spans)": found.window,
    }
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        _check_room(of_model, total, "this GPU")
    else:
        of_cells |= {name: size * ranks for name, size in of_model.items()}
    _check_room(of_cells, host, f"this machine, for {ranks} rank(s)")
    limit_s, step_s = config.parallel.timeout_s, found.flops / peak
    if step_s > _HASTE * limit_s:
        raise ConfigError(
            f"a step must be done within parallel.timeout_s ({limit_s} s), and takes about "
            f"{step_s:,.0f} s here: {found.flops / 1e12:,.0f} TFLOP for each rank, at "
            f"{peak / 1e12:.2f} TFLOP/s, the most that was measured. Remedy: lower "
            f"train.global_batch_size ({config.train.global_batch_size}) or the sizes of the "
            "model, or start more ranks."
        )


def _check_room(parts: dict[str, int], room: int, where: str) -> None:
    needed = sum(parts.values())
    if needed > room:
        listed = ", ".join(f"{size / 1e9:,.1f} GB of {name}" for name, size in parts.items())
        raise ConfigError(
            f"these settings need {needed / 1e9:,.1f} GB at least, and there are "
            f"{room / 1e9:,.1f} GB in {where}: {listed}. Remedy: lower the settings of the largest "
            "part, or start more ranks on more machines."
        )


def estimate(config: Config, plan: Plan, cells: RunCells) -> Sizes:
    """The sizes of a rank, for the cells of a run."""
    data, train, parallel = config.data, config.train, config.parallel
    shared = parallel.tensor * parallel.pipeline
    shape = ModelShape.of(config.model, cells.vocabulary.size)
    of_rank = train.global_batch_size / plan.data_parallel
    cell_bytes = cells.mean_tokens * (4 + 16 * data.mask_probability) + _BYTES_OF_PLACE
    tokens = of_rank * cells.mean_tokens
    work = Workload(round(tokens), 0, round(tokens * data.mask_probability))
    trains_all = not (config.finetune.frozen_layers or config.finetune.lora_rank)
    return Sizes(
        model=round(num_parameters(shape, data.seq_length) / shared * _bytes_each(config, plan)),
        activations=round(_activations(config, plan, cells)),
        cells=round(of_rank * cell_bytes * (data.prefetch_steps + 1)),
        window=_window(config, cells),
        flops=forward_flops(shape, work) // shared * (TRAIN_OVER_FORWARD if trains_all else 1),
    )


def _bytes_each(config: Config, plan: Plan) -> float:
    """Bytes per parameter: of 16 bits with a copy of 32, gradients, two moments; the optimizer's
    are shared by data-parallel ranks."""
    is_exact = config.train.precision is Precision.fp32
    weights, of_optimizer = (4, 8) if is_exact else (2, 12)
    if config.finetune.frozen_layers or config.finetune.lora_rank:
        return weights
    return weights + 4 + of_optimizer / plan.data_parallel


def _activations(config: Config, plan: Plan, cells: RunCells) -> float:
    """Inputs of the matrix products of every layer, or of the layers alone if all is computed
    again (Korthikanti et al. 2022, without dropout, norms and scores)."""
    model, train, parallel = config.model, config.train, config.parallel
    if config.finetune.frozen_layers or config.finetune.lora_rank:
        return 0
    tokens = plan.tokens_per_micro_batch or train.micro_batch_size * cells.mean_tokens
    # Packing fills no micro batch with more than there is.
    tokens = min(tokens, train.global_batch_size / plan.data_parallel * cells.mean_tokens)
    kept = 6 * model.hidden_size + 2 * model.ffn_hidden_size
    if parallel.recompute is Recompute.full:
        kept = model.hidden_size
    width = 4 if train.precision is Precision.fp32 else 2
    layers = model.num_layers / parallel.pipeline
    return tokens * layers * kept * width / parallel.tensor


def _window(config: Config, cells: RunCells) -> int:
    """As data/shuffle_buffer.py lays it out: slots for the longest cells."""
    if isinstance(cells.source, RandomAccess):
        return 0
    slots = min(-(-cells.count("train") // cells.span_cells), 2 * cells.window_spans)
    return slots * cells.span_cells * (2 * config.data.seq_length + _BYTES_OF_PLACE)
