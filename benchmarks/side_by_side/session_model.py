"""A small model on a few cells against plain arithmetic in fp64: logits, loss, every gradient.

    weights in bf16 or fp32 -> this attention, padded or packed -> differences -.
                            -> Megatron-Core's plain attention  -> differences -+-> alike?
                            -> tests/reference.py in fp64  = the truth

What rounding explains is what it does to plain attention in the same number format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from geneformer_mcore.config import Config, load
from geneformer_mcore.config.sections import ParallelConfig
from geneformer_mcore.data.collate import make_batch
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.model import geneformer, init, megatron_config
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.types import CLS, NUM_SPECIALS, Batch, CellViews
from tests.reference import Reference

VOCABULARY = 1000
MANY_TIMES, SLACK = 3.0, 1e-6
"""A difference may be so many times that of plain attention, and so much more: a fused kernel
rounds elsewhere, not oftener."""

_SPREAD = 4.0
"""Initial weights are so small that attention would be almost uniform, right or wrong."""


def config_of(attention: str, precision: str, seq_length: int, dropout: float = 0.0) -> Config:
    """Two layers of the 10M model's width."""
    changes = (
        "model.activation=gelu",  # smooth: relu's kinks make of a rounding what they please
        *("model.num_layers=2", "model.hidden_dropout=0", f"model.attention_dropout={dropout}"),
        *(f"model.attention={attention}", f"train.precision={precision}"),
        f"data.seq_length={seq_length}",
    )
    return load(None, changes)[0]


def stage_of(config: Config, here: torch.device) -> Geneformer:
    """The model with enlarged weights, the same ones whatever the attention."""
    core = megatron_config.transformer_config(
        config.model, ParallelConfig(), config.train.precision, here
    )
    length = config.data.seq_length
    (stage,) = geneformer.build(config.model, core, here, VOCABULARY, length)
    init.fill(stage, config.train.seed)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weights in sorted(stage.named_parameters()):
            if weights.dim() > 1:
                weights.mul_(_SPREAD)
            else:
                weights.add_(0.1 * torch.randn(weights.shape, generator=draw).to(weights))
    return stage


def lengths_of(seq_length: int) -> list[int]:
    """Full, of no round number, short, and [CLS] alone."""
    return [seq_length, seq_length * 5 // 8 + 1, seq_length, seq_length // 3 + 2, 9, 1]


def batch_of(seq_length: int, packed: bool) -> Batch:
    """The same cells, masked alike, in either form."""
    lengths_N = np.array(lengths_of(seq_length))
    rng = np.random.default_rng(3)
    tokens_T = rng.integers(NUM_SPECIALS, VOCABULARY, int(lengths_N.sum())).astype(np.uint16)
    starts_N = np.cumsum(lengths_N) - lengths_N
    tokens_T[starts_N] = CLS
    cells = CellViews(tokens_T, starts_N, lengths_N, np.arange(len(lengths_N), dtype=np.uint64))
    nothing = np.zeros(len(lengths_N), np.int64)
    room = -(-int(lengths_N.sum()) // 64) * 64 + 64 if packed else seq_length
    masking = Masking(0.15, (0.8, 0.02, 0.18), VOCABULARY, 1)
    return make_batch(cells, nothing, nothing.astype(bool), masking, room, packed=packed)


@dataclass(frozen=True)
class Truth:
    """By plain arithmetic in fp64, of the weights as the number format has them."""

    logits_MV: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]


@cache
def truth_of(precision: str, seq_length: int, here: torch.device) -> Truth:
    """Computed once, on the CPU: the weights are the same whatever the attention."""
    config = config_of("plain", precision, seq_length)
    stage = stage_of(config, here)
    weights = {name: _exact(tensor) for name, tensor in stage.named_parameters()}
    heads = config.model.num_attention_heads
    model = Reference(weights, heads, VOCABULARY, torch.nn.functional.gelu)
    cells = batch_of(seq_length, packed=False)
    logits_MV = model.logits(cells.tokens_BS, cells.lengths_N).flatten(0, 1)[cells.selected_M]
    loss = torch.nn.functional.cross_entropy(logits_MV, cells.labels_M, reduction="sum")
    loss.backward()
    gradients = {name: _exact(tensor.grad) for name, tensor in model.w.items()}
    return Truth(logits_MV.detach(), float(loss.detach()), gradients)


def differences(config: Config, packed: bool, here: torch.device) -> dict[str, float]:
    """Relative to the truth: of the logits and of all gradients together (norms), of the loss, and
    of the gradient of the parameter that differs most."""
    seq_length = config.data.seq_length
    truth = truth_of(config.train.precision.value, seq_length, here)
    stage = stage_of(config, here).train()  # nothing is dropped, but the kernels are those
    # Padded and packed, the selected positions are the same ones in the same order.
    batch = batch_of(seq_length, packed).to(here)
    logits_MV = stage.logits(stage.encode(batch), batch.selected_M).detach()[:, :VOCABULARY]
    loss = stage(batch).sum()
    loss.backward()
    pairs = [
        (_exact(weights.grad), truth.gradients[name]) for name, weights in stage.named_parameters()
    ]
    squares = [(_square(mine - theirs), _square(theirs)) for mine, theirs in pairs]
    off = (_exact(logits_MV) - truth.logits_MV).norm() / truth.logits_MV.norm()
    return {
        "logits": float(off),
        "loss": abs(float(loss.detach()) - truth.loss) / truth.loss,
        "gradients": math.sqrt(sum(off for off, _ in squares) / sum(all_ for _, all_ in squares)),
        "worst_gradient": max(math.sqrt(off / all_) for off, all_ in squares),
    }


def _exact(tensor: Any) -> torch.Tensor:
    return tensor.detach().double().cpu()


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.square().sum())


def alike(found: dict[str, float], plain: dict[str, float]) -> bool:
    """Whether differences are such as rounding explains; NaN is not."""
    norms = all(
        found[name] <= MANY_TIMES * plain[name] + SLACK
        for name in ("logits", "gradients", "worst_gradient")
    )
    # Roundings cancel out in a sum, at times nearly all of them: no measure for another loss.
    return norms and found["loss"] <= plain["logits"] + SLACK
