"""Transformer layers whose residual stream stays in 32 bits.

    pre-LN   x (fp32) -> norm -> attention (bf16) -> dropout + x (fp32) -> norm -> MLP (bf16)
                      -> dropout + x (fp32)                   and a norm after the last layer
    post-LN  x (fp32) -> attention (bf16) -> dropout + x -> norm (fp32) -> MLP (bf16)
                      -> dropout + x -> norm (fp32)           and a norm after the embedding

Megatron's own norm and bias-dropout-add cast the stream to bf16 after every block, in spite of
`fp32_residual_connection`; its norm also refuses sequence parallelism without apex.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from geneformer_mcore.config.sections import Attention, Norm
from geneformer_mcore.model import fused
from geneformer_mcore.model.attention.select import core_attention

# It warns of every feed-forward block that is not its own.
logging.getLogger(transformer_layer.__name__).setLevel(logging.ERROR)


class LayerNorm(torch.nn.Module):
    """Layer normalisation with 32-bit arithmetic: fp32 or bf16 [..., H] in, the parameters' dtype
    out. Under sequence parallel a rank normalises its share of the positions, and its parameters
    are marked, so that Megatron adds up their gradients over the tensor group."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        sequence_parallel: bool | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.norm = fused.chosen(fused.layer_norm, config.bias_dropout_fusion)
        dtype = config.params_dtype
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))
        marked = config.sequence_parallel if sequence_parallel is None else sequence_parallel
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = marked  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden, self.weight, self.bias, self.eps)


class StreamNorm(LayerNorm):
    """A norm in the residual stream, whose dtype it keeps."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden, self.weight, self.bias, self.eps, hidden.dtype)


class ToWeights(torch.nn.Module):
    """In place of pre-LN's norm: the residual stream in the dtype of the weights."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.dtype = config.params_dtype

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.dtype)


class PostNormLayer(TransformerLayer):
    """Megatron's layer with a norm after each of its two sums."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.post_attention_layernorm = StreamNorm(config, size, eps)
        self.post_mlp_layernorm = StreamNorm(config, size, eps)

    def _forward_attention(self, *arguments: Any, **named: Any) -> tuple[Tensor, Any]:
        hidden_SBH, context = super()._forward_attention(*arguments, **named)
        return self.post_attention_layernorm(hidden_SBH), context

    def _forward_mlp(self, *arguments: Any, **named: Any) -> Tensor:
        return self.post_mlp_layernorm(super()._forward_mlp(*arguments, **named))


def norm_embedding(embedding: Any, config: TransformerConfig) -> None:
    """Give Megatron's embedding a norm before its dropout, as in BERT."""
    embedding.layer_norm = StreamNorm(config, config.hidden_size, config.layernorm_epsilon)
    embedding.embedding_dropout.register_forward_pre_hook(
        lambda _dropout, inputs: embedding.layer_norm(*inputs)
    )


class FeedForward(MLP):
    """Megatron's block with bias and activation in one function."""

    def forward(self, hidden: Tensor, **_nothing: Any) -> tuple[Tensor, Any]:
        config = self.config
        add = fused.chosen(fused.bias_activation, config.bias_dropout_fusion)
        x, bias = self.linear_fc1(hidden)
        return self.linear_fc2(add(x, bias, self.activation_func))


def bias_dropout_add(training: bool, is_compiled: bool) -> Callable:
    """Megatron's factory of f((x, bias), residual, probability) -> the new residual."""
    join = fused.chosen(fused.bias_dropout_residual, is_compiled)

    def add(
        x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
    ) -> Tensor:
        return join(*x_with_bias, residual, probability, training)

    return add


def final_norm(norm: Norm) -> type[torch.nn.Module]:
    """Module after the last layer."""
    return LayerNorm if norm is Norm.pre else ToWeights


def layer_spec(attention: Attention, norm: Norm) -> ModuleSpec:
    """One layer, by Transformer Engine for `te`, else Megatron-Core, with the same parameters."""
    column, row = _linears(attention)
    is_pre = norm is Norm.pre
    before_block = LayerNorm if is_pre else ToWeights
    return ModuleSpec(
        module=TransformerLayer if is_pre else PostNormLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before_block,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=core_attention(attention),
                    linear_proj=row,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=before_block,
            mlp=ModuleSpec(
                module=FeedForward, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)
            ),
            mlp_bda=bias_dropout_add,
        ),
    )


def _linears(attention: Attention) -> tuple[type, type]:
    if attention is not Attention.te:
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TERowParallelLinear,
    )

    return TEColumnParallelLinear, TERowParallelLinear
