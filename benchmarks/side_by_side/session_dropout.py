"""Whether attention dropout drops what it is asked to, and the backward pass the same.

query = key = 0: every probability is 1 / keys    value of key k = the k-th unit vector
    -> context[query, k] is the probability of key k, dropped or enlarged
gradient of the sum of all context, of the value of key k = what is left of its probabilities
"""

from __future__ import annotations

from typing import Any

import torch

from geneformer_mcore.model.attention.select import packed_pieces
from geneformer_mcore.model.geneformer import Geneformer

TOLERANCE = 0.006
"""Of the share that is dropped: FlashAttention-2 knows probabilities in steps of 1/256 only, and
there are some 10^5 draws at least."""
_NUM_CELLS = 2


def statistics(stage: Geneformer, packed: bool, num_keys: int, here: torch.device) -> dict:
    """What the first layer's attention does with cells of `num_keys` tokens.

    dropped:    share of the probabilities, in training;  asked: what it should be
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


def sound(found: dict[str, float]) -> bool:
    """Whether the numbers are what they should be."""
    asked = found["asked"]
    return (
        abs(found["dropped"] - asked) < TOLERANCE
        and abs(found["kept_scale"] - 1) < 0.01
        and abs(found["fresh"] - 2 * asked * (1 - asked)) < 2 * TOLERANCE
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
    shape = (_NUM_CELLS, num_keys, heads, width)
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
