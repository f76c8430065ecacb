"""softmax(QK)V, by whichever code suits the machine.

te     Transformer Engine's fused kernels (NVIDIA GPUs)
sdpa   torch's scaled_dot_product_attention: fused on GPUs, and on CPUs without dropout
plain  Megatron-Core's own: every score is a number in memory
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from geneformer_mcore import backends
from geneformer_mcore.config.sections import Attention, ModelConfig


def choose(model: ModelConfig, device: torch.device) -> Attention:
    """What `model.attention` means on this machine: never `auto`.

    Raises MissingBackendError if Transformer Engine is asked for and is not installed.
    """
    if model.attention is Attention.te:
        backends.require("transformer_engine")
    if model.attention is not Attention.auto:
        return model.attention
    if device.type == "cuda":
        here = backends.is_available("transformer_engine")
        return Attention.te if here else Attention.sdpa
    # With dropout torch's CPU attention leaves its fused kernel and is slower than the plain code.
    return Attention.plain if model.attention_dropout > 0 else Attention.sdpa


def core_attention(attention: Attention) -> type[torch.nn.Module]:
    """The module class that Megatron's SelfAttention calls with query, key and value."""
    if attention is Attention.te:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return SdpaAttention if attention is Attention.sdpa else DotProductAttention


class SdpaAttention(MegatronModule):
    """torch's scaled dot product attention under Megatron's interface. Bidirectional."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query, key, value: [S, B, heads, width]; attention_mask: bool, broadcasts to
        [B, heads, S, S], True = not attended to. Returns [S, B, heads * width]."""
        assert attention_bias is None
        assert packed_seq_params is None
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        with self._split_dropout():
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.softmax_scale,
            )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _split_dropout(self) -> contextlib.AbstractContextManager:
        # Each tensor rank has other heads and must drop other probabilities. Under sequence
        # parallel the whole block already runs in that random state.
        if self.config.sequence_parallel or not self.training or self.dropout == 0:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()
