"""The attention that was chosen, compared with the formula before a step is made with it.

    a few random cells  ->  this stage's own core attention  --.
                        ->  softmax(Q K^T / sqrt(d)) V, fp64 --+--> largest differences, or an error

A kernel that does not fit the machine, the driver or the mask need not fail: it can return numbers,
and a gradient norm that explodes after days is how one learns of it.
"""

from __future__ import annotations

import math

import torch

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model.geneformer import Geneformer

_POSITIONS, _LENGTHS = 64, (64, 37, 1)
_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of values that are about 1: some roundings of the number format."""


def check(stage: Geneformer, device: torch.device) -> float:
    """The largest absolute difference, over outputs and gradients, to the plain formula in fp64.

    Draws no random number from the generators of training, and leaves all as it was. Raises
    ConfigError if the difference is more than the number format explains.
    """
    core = stage.encoder.layers[0].self_attention.core_attention
    config = stage.config
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    width = config.hidden_size // config.num_attention_heads
    draw = torch.Generator().manual_seed(0)
    shape = (4, _POSITIONS, len(_LENGTHS), heads, width)
    query, key, value, weight = torch.randn(shape, generator=draw).to(device, config.params_dtype)
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    lengths = torch.tensor(_LENGTHS, device=device)
    padding_B11S = (torch.arange(_POSITIONS, device=device) >= lengths[:, None])[:, None, None, :]
    was_training = core.training
    core.train(mode=False)  # no dropout
    with torch.enable_grad():
        mask_type = stage.encoder.layers[0].self_attention.attn_mask_type
        context = core(*inputs, attention_mask=padding_B11S, attn_mask_type=mask_type)
    core.train(was_training)
    return _compared(context, inputs, weight, padding_B11S)


def _compared(
    context_SBD: torch.Tensor,
    inputs: list[torch.Tensor],
    weight: torch.Tensor,
    padding_B11S: torch.Tensor,
) -> float:
    plain_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    plain_SBD = _plain(plain_inputs, padding_B11S)
    # What comes out at padding is never looked at.
    real_SB1 = ~padding_B11S[:, 0, 0].T[..., None]
    found = [context_SBD.double() * real_SB1]
    expected = [plain_SBD * real_SB1]
    weight_SBD = weight.flatten(2).double()
    found += torch.autograd.grad((found[0] * weight_SBD).sum(), inputs)
    expected += torch.autograd.grad((expected[0] * weight_SBD).sum(), plain_inputs)
    worst = max(
        float((mine.detach().double() - theirs.detach()).abs().max())
        for mine, theirs in zip(found, expected, strict=True)
    )
    tolerance = _TOLERANCES[inputs[0].dtype]
    # Written so that NaN fails too.
    if not worst <= tolerance:
        raise ConfigError(
            f"the attention that was chosen differs from the plain computation by {worst:.2g} on a "
            f"few random cells, and {tolerance:g} is what {inputs[0].dtype} explains. Choose "
            "another one: model.attention=sdpa or model.attention=plain."
        )
    return worst


def _plain(inputs: list[torch.Tensor], padding_B11S: torch.Tensor) -> torch.Tensor:
    """[S, B, heads * width] of query, key and value, each [S, B, heads, width]."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in inputs)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(padding_B11S, float("-inf"))
    return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)
