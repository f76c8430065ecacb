"""Elementwise parts of the model, each one pass over memory if compiled.

    bias + activation              between the two matrices of a feed-forward block
    bias + dropout + residual      where a block joins the residual stream, which stays in fp32
    layer norm                     fp32 in, the parameters' type out
    cross entropy                  of logits of any type, in fp32

Megatron's own fused kernels have no relu, and cast the residual stream to bf16.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geneformer_mcore.backends import is_available


def bias_activation(x: Tensor, bias: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(x + bias); x [..., F], bias [F]."""
    return activation(x + bias)


def bias_dropout_residual(
    x: Tensor, bias: Tensor | None, residual: Tensor, probability: float, training: bool
) -> Tensor:
    """residual + dropout(x + bias), in the residual's dtype; all [..., H] but bias [H]."""
    if bias is not None:
        x = x + bias
    # fp32 + bf16 is fp32 in torch, which keeps the stream in 32 bits.
    return residual + F.dropout(x, p=probability, training=training)


def layer_norm(
    hidden: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Computed in fp32; hidden [..., H] of any dtype, the result in `dtype` or the weight's."""
    normed = F.layer_norm(hidden.float(), weight.shape, weight.float(), bias.float(), eps)
    return normed.to(dtype or weight.dtype)


def cross_entropy(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """fp32 [M], nats, computed in fp32; logits of any dtype, -inf where there is no token."""
    return F.cross_entropy(logits_MV.float(), labels_M, reduction="none")


def is_compiled(asked: bool | None, device: torch.device) -> bool:
    """The meaning of `model.compile` on this device."""
    if asked is not None:
        return asked
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    has_compiler = any(name and shutil.which(name) for name in compilers)
    return device.type == "cuda" and has_compiler and is_available("triton")


def chosen(function: Callable[..., Any], is_compiled: bool) -> Callable[..., Any]:
    """One of the functions above, compiled if `is_compiled`."""
    return _compiled(function) if is_compiled else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # dynamic: shapes change from step to step.
    return torch.compile(function, dynamic=True)
