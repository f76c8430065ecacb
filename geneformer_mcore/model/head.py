"""From hidden states to gene logits, at the selected positions only.

    hidden [S, B, H] -> rows of the selected positions [M, H] -> dense -> activation -> norm
                     -> product with the word embedding + bias -> logits [M, V of this rank]

Six positions in seven are never predicted: leaving them out saves 12 % (106M) to 35 % (10M) of a
step's arithmetic and nearly all of its memory for logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import get_linear_layer

from geneformer_mcore.model.layers import LayerNorm


class PredictionHead(MegatronModule):
    """dense(H, H) -> activation -> LayerNorm, the same on every tensor rank.

    It sees rows gathered from all positions, so its parameters get their whole gradient on every
    rank and carry no `sequence_parallel` mark: with the mark they would be TP times too large.
    """

    def __init__(
        self,
        hidden_size: int,
        config: TransformerConfig,
        activation: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__(config=config)
        self.dense = get_linear_layer(hidden_size, hidden_size, config.init_method)
        self.dense.to(config.params_dtype)
        self.activation = activation
        self.layer_norm = LayerNorm(
            config, hidden_size, config.layernorm_epsilon, sequence_parallel=False
        )

    def forward(self, rows_MH: torch.Tensor) -> torch.Tensor:
        """rows_MH: [M, H]. Same shape out."""
        return self.layer_norm(self.activation(self.dense(rows_MH)))


def selected_rows(
    hidden_SBH: torch.Tensor, selected_M: torch.Tensor, config: TransformerConfig
) -> torch.Tensor:
    """[M, H]: the hidden states at the flat places `b * S + s` of `selected_M` (int64)."""
    if config.sequence_parallel:
        # What follows is computed alike on every tensor rank, so the gradient of a gathered row is
        # already whole: split it in the backward pass, do not add it up.
        hidden_SBH = gather_from_sequence_parallel_region(
            hidden_SBH, tensor_parallel_output_grad=False
        )
    num_positions, num_cells, width = hidden_SBH.shape
    place = (selected_M % num_positions) * num_cells + selected_M // num_positions
    return hidden_SBH.reshape(-1, width).index_select(0, place)


def padding_bias(first_id: int, num_here: int, num_real: int) -> torch.Tensor:
    """fp32 [num_here]: 0 for real tokens, -inf for the rows that pad the vocabulary.

    Added to the output bias, it takes the padding out of every softmax, probability 0 and gradient
    0, at no cost. It is no parameter: a parameter of -inf would not be finite.
    """
    ids = torch.arange(first_id, first_id + num_here)
    return torch.where(ids < num_real, 0.0, float("-inf"))
