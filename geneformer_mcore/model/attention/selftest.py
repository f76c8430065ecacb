"""The chosen attention, compared with the formula before the first step.

    a few random cells  ->  this stage's own core attention  --.
                        ->  softmax(Q K^T / sqrt(d)) V, fp64 --+--> largest differences, or an error

A kernel that does not fit the machine, the driver or the mask may return wrong numbers silently.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geneformer_mcore.data.collate import pieces
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model.attention.select import packed_pieces
from geneformer_mcore.model.geneformer import Geneformer

_POSITIONS, _LENGTHS, _PADDING = 64, (64, 37, 1), 10
_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""For values of about 1: some roundings of the number format."""
_REMEDY = "Remedy: another one: model.attention=flash, sdpa or plain."


def check(stage: Geneformer, device: torch.device, packed: bool) -> float:
    """The largest absolute difference, over outputs and gradients, to the plain formula in fp64.
    Leaves training's generators alone. Raises ConfigError if it exceeds the number format's
    tolerance."""
    layer = stage.encoder.layers[0].self_attention
    config = stage.config
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    width = config.hidden_size // config.num_attention_heads
    draw = torch.Generator().manual_seed(0)
    shape = (4, len(_LENGTHS), _POSITIONS, heads, width)
    drawn = torch.randn(shape, generator=draw).to(device, config.params_dtype)
    real_BS = torch.arange(_POSITIONS) < torch.tensor(_LENGTHS)[:, None]
    query, key, value, weight = drawn * real_BS[..., None, None].to(drawn)
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    was_training = layer.core_attention.training
    layer.core_attention.train(mode=False)  # no dropout
    attend = _packed if packed else _padded
    try:
        with torch.enable_grad():
            context_BSD = attend(layer, inputs, real_BS.to(device))
            return _compared(context_BSD, inputs, weight, real_BS.to(device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of a library that does not fit this machine
        raise ConfigError(
            f"the attention that was chosen does not run here: {_first_line(error)}. {_REMEDY}"
        ) from error
    finally:
        layer.core_attention.train(was_training)


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _padded(layer: Any, inputs: list[Tensor], real_BS: Tensor) -> Tensor:
    """Core attention of [B, S, heads, width] each: [B, S, heads * width]."""
    rows = [tensor.transpose(0, 1).contiguous() for tensor in inputs]  # Megatron's layout
    mask_B11S = ~real_BS[:, None, None, :]
    context_SBD = layer.core_attention(*rows, mask_B11S, attn_mask_type=layer.attn_mask_type)
    return context_SBD.transpose(0, 1)


def _packed(layer: Any, inputs: list[Tensor], real_BS: Tensor) -> Tensor:
    """The same with cells end to end, and padding after the last one."""
    bounds, longest = pieces(np.array(_LENGTHS), sum(_LENGTHS) + _PADDING)
    rows = [
        torch.nn.functional.pad(tensor[real_BS], (0, 0, 0, 0, 0, _PADDING)) for tensor in inputs
    ]
    context_SD = layer.core_attention(
        *rows,
        None,
        attn_mask_type=layer.attn_mask_type,
        packed_seq_params=packed_pieces(torch.from_numpy(bounds).to(real_BS.device), longest),
    ).flatten(1)
    context_BSD = context_SD.new_zeros(*real_BS.shape, context_SD.shape[-1])
    return context_BSD.masked_scatter(real_BS[..., None], context_SD[: sum(_LENGTHS)])


def _compared(context_BSD: Tensor, inputs: list[Tensor], weight: Tensor, real_BS: Tensor) -> float:
    plain_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found = [context_BSD.double() * real_BS[..., None]]
    expected = [_plain(plain_inputs, real_BS) * real_BS[..., None]]
    weight_BSD = weight.flatten(2).double()
    found += torch.autograd.grad((found[0] * weight_BSD).sum(), inputs)
    expected += torch.autograd.grad((expected[0] * weight_BSD).sum(), plain_inputs)
    worst = max(
        float((mine.detach().double() - theirs.detach()).abs().max())
        for mine, theirs in zip(found, expected, strict=True)
    )
    tolerance = _TOLERANCES[inputs[0].dtype]
    if not worst <= tolerance:  # or NaN
        raise ConfigError(
            f"the attention that was chosen differs from the plain computation by {worst:.2g} on a "
            f"few random cells, and {tolerance:g} is what {inputs[0].dtype} explains. {_REMEDY}"
        )
    return worst


def _plain(inputs: list[Tensor], real_BS: Tensor) -> Tensor:
    """[B, S, heads * width] of query, key and value, each [B, S, heads, width]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~real_BS[:, None, None, :], float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
