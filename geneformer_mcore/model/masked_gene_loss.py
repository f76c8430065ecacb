"""The prediction head and the loss of masked genes, at the selected positions only.

hidden [S, B, H] -> rows of the selected positions [M, H] -> dense -> activation -> norm
    -> product with the word embedding + bias -> logits [M, V of this rank] -> cross entropy [M]

Six positions in seven are never predicted: skipping them saves 12 % (106M) to 35 % (10M) of a
step's arithmetic and nearly all of its memory for logits. The losses of all ranks are summed and
divided once, by the number of masked genes of the global batch (training/step.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import get_linear_layer
from torch import Tensor

from geneformer_mcore.model import fused
from geneformer_mcore.model.layers import LayerNorm


class PredictionHead(MegatronModule):
    """dense(H, H) -> activation -> LayerNorm, the same on every tensor rank.

    It sees gathered rows, so its gradients are whole on every rank, and its parameters have no
    `sequence_parallel` mark, which would make them TP times too large.
    """

    def __init__(
        self, hidden_size: int, config: TransformerConfig, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(config=config)
        self.dense = get_linear_layer(hidden_size, hidden_size, config.init_method)
        self.dense.to(config.params_dtype)
        self.activation = activation
        self.layer_norm = LayerNorm(
            config, hidden_size, config.layernorm_epsilon, sequence_parallel=False
        )

    def forward(self, rows_MH: Tensor) -> Tensor:
        """rows_MH: [M, H]. Same shape out."""
        return self.layer_norm(self.activation(self.dense(rows_MH)))


def selected_rows(hidden_SBH: Tensor, selected_M: Tensor, config: TransformerConfig) -> Tensor:
    """[M, H]: the hidden states at the flat positions `b * S + s` of `selected_M` (int64)."""
    if config.sequence_parallel:
        # What follows is equal on every tensor rank, so the gradient of a gathered row is whole:
        # it is split in the backward pass, not added up.
        hidden_SBH = gather_from_sequence_parallel_region(
            hidden_SBH, tensor_parallel_output_grad=False
        )
    num_positions, num_cells, width = hidden_SBH.shape
    place = (selected_M % num_positions) * num_cells + selected_M // num_positions
    return hidden_SBH.reshape(-1, width).index_select(0, place)


def padding_bias(first_id: int, num_here: int, num_real: int) -> Tensor:
    """fp32 [num_here]: 0 for real tokens, -inf for the rows that pad the vocabulary. Added to the
    output bias (it is no parameter, as that must be finite), it gives padding probability 0."""
    ids = torch.arange(first_id, first_id + num_here)
    return torch.where(ids < num_real, 0.0, float("-inf"))


def masked_gene_loss(logits_MV: Tensor, labels_M: Tensor, config: TransformerConfig) -> Tensor:
    """fp32 [M], nats for every selected gene; logits_MV: this tensor rank's columns."""
    if is_fused(config):
        return fused.chosen(fused.cross_entropy, True)(logits_MV, labels_M)
    return tensor_parallel.vocab_parallel_cross_entropy(logits_MV, labels_M)


def is_fused(config: TransformerConfig) -> bool:
    """Whether the cross entropy is compiled: with `model.compile`, without tensor parallelism."""
    return config.bias_dropout_fusion and config.tensor_model_parallel_size == 1
