"""From settings to Megatron-Core's TransformerConfig."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from geneformer_mcore.config.sections import (
    Activation,
    ModelConfig,
    ParallelConfig,
    Precision,
    Recompute,
)
from geneformer_mcore.model import fused

LAYERNORM_EPSILON = 1e-12
"""The card's value."""
INIT_STD = 0.02
"""BERT's; Megatron divides it by sqrt(2 x layers) for the matrices that write to the residual."""

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.relu: F.relu,
    Activation.gelu: F.gelu,
    Activation.gelu_tanh: partial(F.gelu, approximate="tanh"),
}

DTYPES = {
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp8: torch.bfloat16,
}
"""Of weights and activations."""


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision, device: torch.device
) -> TransformerConfig:
    """Megatron-Core's settings of this model in this layout."""
    dtype = DTYPES[precision]
    return TransformerConfig(
        **_shape(model),
        **_layout(parallel),
        **_recompute(parallel.recompute),
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        # E4M3 forward, E5M2 for gradients, which need the range.
        fp8="hybrid" if precision is Precision.fp8 else None,
        fp32_residual_connection=model.fp32_residual and dtype != torch.float32,
        # The dtype of the residual stream between stages; a wrong one would end gloo in C++.
        pipeline_dtype=torch.float32 if model.fp32_residual else dtype,
        attention_softmax_in_fp32=True,
        # Sums, divided once by the number of predicted tokens of the global batch.
        calculate_per_token_loss=True,
        use_cpu_initialization=device.type == "cpu",
        # Not Megatron's kernel: read by our layers (see fused.py).
        bias_dropout_fusion=fused.is_compiled(model.compile, device),
        # Fusions written for causal GPT layers, or that need apex.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
    )


def precision_of(config: TransformerConfig) -> Precision:
    """The `train.precision` that a TransformerConfig was made with."""
    if config.fp8:
        return Precision.fp8
    return next(name for name, dtype in DTYPES.items() if dtype is config.params_dtype)


def _shape(model: ModelConfig) -> dict:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "activation_func": ACTIVATIONS[model.activation],
        "layernorm_epsilon": LAYERNORM_EPSILON,
        "init_method_std": INIT_STD,
    }


def _layout(parallel: ParallelConfig) -> dict:
    interleaved = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "sequence_parallel": parallel.sequence,
        # With two interleaved stages the previous and the next rank are the same: batched, gloo
        # would pair an activation with a gradient.
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": False,
    }


def _recompute(recompute: Recompute) -> dict:
    if recompute is Recompute.none:
        return {}
    if recompute is Recompute.selective:
        return {"recompute_granularity": "selective"}
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    return full | {"recompute_num_layers": 1}
