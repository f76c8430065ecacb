"""The two checks of an attention: its numbers in a small model, and its dropout.

Numbers, of a few cells padded or packed, weights in bf16 or fp32:
    this attention                       -> logits, loss, every gradient --.
    Megatron-Core's plain attention      -> the same                     --+-> alike?
    tests/reference.py in fp64           =  the truth

    Rounding explains as much as it does to plain attention in the same number format.

Dropout: query = key = 0, so every probability is 1 / keys; the value of key k is the k-th unit
vector, so context[query, k] is the probability of key k, dropped or enlarged; and the gradient of
the value of key k, of the sum of all context, is what is left of its probabilities.
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
from geneformer_mcore.model.attention.select import packed_pieces
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.types import CLS, NUM_SPECIALS, Batch, CellViews
from tests.reference import Reference

VOCABULARY = 1000
MANY_TIMES, SLACK = 3.0, 1e-6
"""A difference may be so many times that of plain attention, and so much more: a fused kernel
rounds elsewhere, not oftener."""
_SPREAD = 4.0
"""Initial weights are so small that attention would be almost uniform, right or wrong."""
DROPOUT_TOLERANCE = 0.006
"""Of the dropped share: FlashAttention-2 knows probabilities in steps of 1/256 only, and there are
some 10^5 draws at least."""


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


def batch_of(seq_length: int, packed: bool) -> Batch:
    """The same cells, masked alike, in either form: full, of odd length, short, [CLS] alone."""
    lengths = [seq_length, seq_length * 5 // 8 + 1, seq_length, seq_length // 3 + 2, 9, 1]
    lengths_N, rng = np.array(lengths), np.random.default_rng(3)
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
    weights = {name: _exact(tensor) for name, tensor in stage_of(config, here).named_parameters()}
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
    squares = []
    for name, weights in stage.named_parameters():
        expected = truth.gradients[name]
        squares.append((_square(_exact(weights.grad) - expected), _square(expected)))
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
    """True if rounding explains the differences; never for NaN."""
    norms = all(
        found[name] <= MANY_TIMES * plain[name] + SLACK
        for name in ("logits", "gradients", "worst_gradient")
    )
    # Roundings cancel out in a sum, at times nearly all of them: no measure for another loss.
    return norms and found["loss"] <= plain["logits"] + SLACK


# Dropout


def dropout_of(stage: Geneformer, packed: bool, num_keys: int, here: torch.device) -> dict:
    """Statistics of the first layer's attention, with cells of `num_keys` tokens.

    dropped:    share of the probabilities, in training;  asked: the setting
    kept_scale: mean of those that are kept, as a multiple of what it should be
    fresh:      share that two calls treat differently;  expected: 2 p (1 - p)
    backward:   largest relative difference of the gradient from what was kept in the forward pass
    dropped_in_evaluation: must be 0
    """
    core = stage.encoder.layers[0].self_attention.core_attention
    core.train()
    first, gradient_error = _kept_and_gradient_error(stage, packed, num_keys, here)
    second, _ = _kept_and_gradient_error(stage, packed, num_keys, here)
    core.train(mode=False)
    still, _ = _kept_and_gradient_error(stage, packed, num_keys, here)
    core.train()
    asked = float(stage.config.attention_dropout)
    is_kept = first != 0
    return {
        "asked": asked,
        "dropped": 1 - float(is_kept.double().mean()),
        "kept_scale": float(first[is_kept].double().mean()) * num_keys * (1 - asked),
        "fresh": float((is_kept != (second != 0)).double().mean()),
        "backward": gradient_error,
        "dropped_in_evaluation": float((still == 0).double().mean()),
    }


def dropout_is_sound(found: dict[str, float]) -> bool:
    """True if the statistics are as they should be."""
    asked = found["asked"]
    return (
        abs(found["dropped"] - asked) < DROPOUT_TOLERANCE
        and abs(found["kept_scale"] - 1) < 0.01
        and abs(found["fresh"] - 2 * asked * (1 - asked)) < 2 * DROPOUT_TOLERANCE
        and found["backward"] < 0.02
        and found["dropped_in_evaluation"] == 0
    )


def _kept_and_gradient_error(
    stage: Geneformer, packed: bool, num_keys: int, here: torch.device
) -> tuple[torch.Tensor, float]:
    """([cells, queries, heads, width], the error): probabilities of the first `width` keys."""
    config = stage.config
    heads = config.num_attention_heads
    width = config.hidden_size // heads
    shape = (2, num_keys, heads, width)
    query = torch.zeros(shape, dtype=config.params_dtype, device=here)
    value = query.clone()
    value[:, :width] = torch.eye(width, device=here, dtype=value.dtype)[:, None]
    value.requires_grad_()
    context = _attended(stage, query, value, packed).view(shape)
    context.sum().backward()
    assert value.grad is not None
    kept = context.detach().double().sum(1)  # [cells, heads, width]: of each key, over the queries
    found = value.grad[:, :width].double().mean(-1).transpose(1, 2)  # the same, by the gradient
    return context.detach(), float(((found - kept) / kept.mean()).abs().max())


def _attended(
    stage: Geneformer, query: torch.Tensor, value: torch.Tensor, packed: bool
) -> torch.Tensor:
    """[cells * queries, heads * width] of query (and key) and value [cells, n, heads, width]."""
    layer: Any = stage.encoder.layers[0].self_attention
    num_cells, num_keys = query.shape[:2]
    kind = {"attn_mask_type": layer.attn_mask_type}
    if packed:
        bounds = torch.arange(num_cells + 1, device=query.device, dtype=torch.int32) * num_keys
        rows = [each.flatten(0, 1) for each in (query, query, value)]
        cells = packed_pieces(bounds, num_keys)
        return layer.core_attention(*rows, None, packed_seq_params=cells, **kind).flatten(1)
    mask_B11S = torch.zeros(num_cells, 1, 1, num_keys, dtype=torch.bool, device=query.device)
    rows = [each.transpose(0, 1).contiguous() for each in (query, query, value)]
    return layer.core_attention(*rows, mask_B11S, **kind).transpose(0, 1).flatten(0, 1)
