"""Trained encoder on all ranks: build it, load it, send cells through it.

Pretrained -> process groups -> stages with their weights, truncated behind the chosen layer
blocks of rows, assigned to data-parallel ranks -> packed -> states -> numbers per cell
                                                                    -> in input order, on rank 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.config import plan
from geneformer_mcore.config.sections import Pooling, Precision
from geneformer_mcore.data.collate import make_batch, pack, padded_length
from geneformer_mcore.data.masking import VALIDATION_EPOCH, Masking
from geneformer_mcore.distributed import collectives, device, groups
from geneformer_mcore.distributed.groups import Topology
from geneformer_mcore.errors import ConfigError, DataError, GeneformerError
from geneformer_mcore.inference.cells import Cells
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.progress import Progress, ProgressLine, no_progress
from geneformer_mcore.model import forward_only, geneformer, init, lora, megatron_config
from geneformer_mcore.model.classifier import CellClassifier
from geneformer_mcore.types import Batch, CellViews

BLOCK_CELLS = 1024
"""Most cells that are read and packed together."""
TOKENS_ON_CPU, TOKENS_ON_GPU = 8192, 65_536
"""Default of tokens_per_batch."""
PAD_MULTIPLE = 64
WAIT_S = 24 * 3600.0
"""Timeout of collectives: a rank that is done waits for those that have more to do."""


@dataclass(frozen=True)
class Encoder:
    """One stage of the model on this rank. tokens_per_batch: most tokens of a packed batch."""

    pretrained: Pretrained
    stages: list[geneformer.Geneformer]
    topology: Topology
    device: torch.device
    precision: Precision
    tokens_per_batch: int

    @property
    def holds_states(self) -> bool:
        """Whether this rank returns the results of its cells: one per model replica does."""
        return self.topology.is_last_stage and self.topology.tensor_rank == 0


@dataclass(frozen=True)
class CellFunction:
    """A function of cells that `per_cell` computes.

    name:        for the progress line
    width:       numbers per cell
    masking:     of the cells; probability 0 masks nothing
    of_batches:  [cells, width] of each batch, on ranks with the last stage
    """

    name: str
    width: int
    masking: Masking
    of_batches: Callable[[list[geneformer.Geneformer], list[Batch]], list[torch.Tensor]]


def no_masking(encoder: Encoder) -> Masking:
    """Masking with probability 0."""
    return Masking(0.0, (1.0, 0.0, 0.0), encoder.pretrained.vocabulary.size, 0)


def embedding(encoder: Encoder, pooling: Pooling) -> CellFunction:
    """One vector per cell, without masking."""
    return CellFunction(
        "embedding",
        encoder.pretrained.config.model.hidden_size,
        no_masking(encoder),
        partial(forward_only.cell_embeddings, pooling=pooling),
    )


@contextmanager
def started(
    pretrained: Pretrained,
    precision: Precision | None = None,
    tokens_per_batch: int = 0,
    layers: int | None = None,
    num_classes: int = 0,
) -> Iterator[Encoder]:
    """The model with its weights, on the process groups of all ranks while the context lasts.

    precision:    None takes fp32 on a CPU, and on a GPU the one of training (bf16 for fp8)
    layers:       number of layers kept; None keeps all, and the final norm
    num_classes:  of a fine-tuned model; 0 leaves its classifier out
    Raises ConfigError where the layout does not suit the model or the ranks, or a cell may not fit
    a batch.
    """
    config = pretrained.config
    _check_budget(tokens_per_batch, config.data.seq_length)
    here = device.start()
    default = TOKENS_ON_GPU if here.type == "cuda" else TOKENS_ON_CPU
    tokens = tokens_per_batch or max(config.data.seq_length, default)
    config.data.packing, config.data.tokens_per_micro_batch = True, tokens
    config.train.precision = chosen = _precision(pretrained, precision, here)
    if chosen is Precision.fp32:
        config.model.fp32_residual = True
    was_initialized = torch.distributed.is_initialized()
    topology = _join(pretrained, here)
    try:
        with torch.random.fork_rng(devices=[]):
            groups.seed_dropout(0, topology)
            stages = _stages(pretrained, chosen, here, num_classes)
        if pretrained.initial_seed is None:
            weights_reader.load(stages, pretrained.folder)
        else:
            for stage in stages:
                init.fill(stage, pretrained.initial_seed)
        if layers is not None:
            forward_only.cut(stages, layers)
        yield Encoder(pretrained, stages, topology, here, chosen, tokens)
    finally:
        groups.stop(stay=was_initialized)


def _stages(
    pretrained: Pretrained, precision: Precision, here: torch.device, num_classes: int
) -> list[geneformer.Geneformer]:
    config = pretrained.config
    core = megatron_config.transformer_config(config.model, config.parallel, precision, here)
    size, length = pretrained.vocabulary.size, config.data.seq_length
    kind = CellClassifier if num_classes else None
    stages = geneformer.build(config.model, core, here, size, length, packed=True, kind=kind)
    for stage in stages:
        lora.attach(stage, config.finetune)
        if isinstance(stage, CellClassifier):
            stage.add_head(num_classes, config.finetune)
    return stages


def _check_budget(tokens: int, seq_length: int) -> None:
    if tokens < 0 or 0 < tokens < seq_length:
        raise ConfigError(
            f"tokens per batch ({tokens}) must be at least the {seq_length} tokens that a cell may "
            "have for this model, or 0 for what suits the device. Remedy: "
            f"`tokens_per_batch={seq_length}` or more."
        )


def _join(pretrained: Pretrained, here: torch.device) -> Topology:
    parallel = pretrained.config.parallel
    if torch.distributed.is_initialized():
        plan(pretrained.config, torch.distributed.get_world_size(), trains=False)
        return groups.build_groups(parallel, WAIT_S)
    meeting = groups.meet(parallel)
    plan(pretrained.config, meeting.world_size, trains=False)
    return groups.join(meeting, here, parallel, WAIT_S)


def _precision(pretrained: Pretrained, given: Precision | None, here: torch.device) -> Precision:
    if given is not None:
        return given
    if here.type != "cuda":
        return Precision.fp32
    trained = pretrained.config.train.precision
    return Precision.bf16 if trained is Precision.fp8 else trained


@contextmanager
def progress_line(unit: str, is_shown: bool) -> Iterator[Progress]:
    """A ProgressLine's update on the rank that shows it, `no_progress` on the others."""
    if not is_shown:
        yield no_progress
        return
    with ProgressLine(unit) as line:
        yield line.update


def per_cell(
    encoder: Encoder, cells: Cells, work: CellFunction, dtype: type[np.floating], progress: Progress
) -> np.ndarray | None:
    """[cells, work.width] on rank 0, in the order of the cells, NaN for those without a known gene;
    None on other ranks.

    Blocks of neighbouring rows are assigned to ranks in turn. Every rank raises the error of any,
    such as the DataError of `check_finite`.
    """
    rows = [np.empty(0, np.int64)]
    values = [np.empty((0, work.width), dtype)]
    with all_ranks_raise():
        for found_N, found_NW in _of_this_rank(encoder, cells, work, dtype, progress):
            rows.append(found_N)
            values.append(found_NW)
        rows_N, values_NW = np.concatenate(rows), np.concatenate(values)
        # At the end, as other ranks of this model would wait for one that stops.
        check_finite(encoder, np.isfinite(values_NW).all(axis=1), rows_N)
    return collectives.rows_on_first_rank(rows_N, values_NW, len(cells), encoder.device)


def check_finite(encoder: Encoder, is_finite_N: np.ndarray, rows_N: np.ndarray) -> None:
    """Raise DataError for cells that have known genes, and numbers that are not finite."""
    wrong_N = rows_N[~is_finite_N]
    if len(wrong_N):
        raise DataError(
            f"the model's numbers must be finite, and for {len(wrong_N):,} of {len(rows_N):,} "
            f"cells with known genes are not, the first in row {wrong_N[0]:,}. Its weights are, so "
            f"they overflow in {encoder.precision.value}. Remedy: `precision=fp32`, or another "
            "checkpoint."
        )


@contextmanager
def all_ranks_raise() -> Iterator[None]:
    """Raise DataError on every rank, where any met a GeneformerError within the context."""
    problem = ""
    try:
        yield
    except GeneformerError as error:
        problem = str(error)
    problem = collectives.first_problem(problem)
    if problem:
        raise DataError(problem)


def _of_this_rank(
    encoder: Encoder, cells: Cells, work: CellFunction, dtype: type[np.floating], progress: Progress
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    topology, total = encoder.topology, len(cells)
    size = min(BLOCK_CELLS, -(-total // topology.data_size))
    starts = range(topology.data_rank * size, total, topology.data_size * size)
    for number, start in enumerate(starts):
        # Of all ranks' cells: each has done about as much as this one.
        progress(work.name, min(total, number * size * topology.data_size), total)
        block = cells.read(start, min(start + size, total))
        known_N = np.flatnonzero(block.lengths > 1)
        if len(known_N):
            views = CellViews(block.tokens_T, block.offsets[:-1], block.lengths, block.keys_N)
            values_NW = _block(encoder, views.part(known_N), work, dtype)
            if encoder.holds_states:
                yield start + known_N, values_NW
    progress(work.name, total, total)


def _block(
    encoder: Encoder, cells: CellViews, work: CellFunction, dtype: type[np.floating]
) -> np.ndarray:
    """[cells, width], NaN on ranks without the last stage."""
    bins, packed = batches(encoder, cells, work.masking)
    found = work.of_batches(encoder.stages, packed)
    values_NW = np.full((len(cells), work.width), np.nan, dtype)
    for members, of_batch in zip(bins, found, strict=False):
        values_NW[members] = of_batch.cpu().numpy()
    return values_NW


def batches(
    encoder: Encoder, cells: CellViews, masking: Masking
) -> tuple[list[np.ndarray], list[Batch]]:
    """(numbers of the cells of each batch, the packed batches: all of one shape, on the device)."""
    # Longest cells first, each to the batch with the least work so far that has room.
    packing = pack(cells.lengths_N, encoder.tokens_per_batch, 1)
    multiple = int(np.lcm(PAD_MULTIPLE, encoder.pretrained.config.parallel.tensor))
    num_positions = padded_length(packing.most_tokens, multiple, encoder.tokens_per_batch)
    bins = [members for members in packing.bins if len(members)]
    packed = []
    for members in bins:
        epochs = np.full(len(members), VALIDATION_EPOCH)
        idle = np.full(len(members), masking.probability == 0)
        batch = make_batch(cells.part(members), epochs, idle, masking, num_positions, packed=True)
        packed.append(batch.to(encoder.device))
    return bins, packed


def number_of_layer(layer: str, num_layers: int) -> int | None:
    """Layers to keep for `last` (None: all, and the final norm), `second-to-last`, or a number.
    Raises ConfigError for any other text."""
    if layer == "last":
        return None
    if layer == "second-to-last":
        return num_layers - 1
    if layer.isdecimal() and int(layer) <= num_layers:
        return int(layer)
    raise ConfigError(
        f"the layer must be last, second-to-last or a number from 0 (the embedding) to "
        f"{num_layers}, the layers of this model, and is {layer}."
    )
