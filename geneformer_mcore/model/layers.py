"""A pre-LN transformer layer whose residual stream stays in 32 bits.

    x (fp32) -> norm -> attention (bf16) -> dropout + x (fp32) -> norm -> MLP (bf16) -> dropout + x

Megatron's own norm and bias-dropout-add would cast the stream to bf16 after every block, whatever
`fp32_residual_connection` says; its norm also refuses sequence parallelism without apex.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from geneformer_mcore.config.sections import Attention
from geneformer_mcore.model.attention import core_attention


class LayerNorm(torch.nn.Module):
    """Layer normalisation with 32-bit arithmetic: fp32 or bf16 in, the parameters' dtype out.

    Under sequence parallel a rank normalises its share of the positions only, and its parameters
    are marked so that Megatron adds up their gradients over the tensor group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        sequence_parallel: bool | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        dtype = config.params_dtype
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))
        marked = config.sequence_parallel if sequence_parallel is None else sequence_parallel
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = marked  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., H]. Same shape out."""
        normed = F.layer_norm(
            hidden.float(),
            self.weight.shape,
            self.weight.float(),
            self.bias.float(),
            self.eps,
        )
        return normed.to(self.weight.dtype)


def bias_dropout_add(training: bool, fused: bool) -> Callable:
    """Megatron's factory interface: returns f((x, bias), residual, probability) -> the new
    residual, in the residual's dtype."""

    def add(
        x_with_bias: tuple[torch.Tensor, torch.Tensor | None],
        residual: torch.Tensor,
        probability: float,
    ) -> torch.Tensor:
        x, bias = x_with_bias
        if bias is not None:
            x = x + bias
        # fp32 + bf16 is fp32 in torch: this line is what keeps the stream in 32 bits.
        return residual + F.dropout(x, p=probability, training=training)

    return add


def layer_spec(attention: Attention) -> ModuleSpec:
    """One transformer layer: Transformer Engine's linears and attention for `te`, else
    Megatron-Core's. Both have the same parameters under the same names."""
    column, row = _linears(attention)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
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
            pre_mlp_layernorm=LayerNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
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
