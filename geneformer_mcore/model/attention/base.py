"""What our core-attention modules have in common: Megatron's interface, and the two shapes.

    padded  query, key, value [S, B, heads, width] + mask of padding    -> [S, B, heads * width]
    packed  query, key, value [S, heads, width] + bounds between cells  -> [S, heads * width]

A module says how it computes each; both are bidirectional.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

PackedCells: TypeAlias = PackedSeqParams
"""Where the cells of a packed row begin and end."""
OneCell = Callable[[Tensor, Tensor, Tensor], Tensor]


class CoreAttention(MegatronModule):
    """Megatron's SelfAttention calls one of these with query, key and value."""

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
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedCells | None = None,
    ) -> Tensor:
        """attention_mask: bool [B, 1, 1, S], True = not attended to; None if packed."""
        assert attention_bias is None
        with self._split_dropout():
            if packed_seq_params is not None:
                return self.packed(query, key, value, packed_seq_params)
            return self.padded(query, key, value, attention_mask)

    def padded(
        self, query: Tensor, key: Tensor, value: Tensor, padding_B11S: Tensor | None
    ) -> Tensor:
        """[S, B, heads * width]; what stands at padding is finite and of no account."""
        raise NotImplementedError

    def packed(self, query: Tensor, key: Tensor, value: Tensor, cells: PackedCells) -> Tensor:
        """[S, heads * width]."""
        raise NotImplementedError

    @property
    def probability(self) -> float:
        return self.dropout if self.training else 0.0

    def _split_dropout(self) -> contextlib.AbstractContextManager:
        # Each tensor rank has other heads and must drop other probabilities. Under sequence
        # parallel the whole block already runs in that random state.
        if self.config.sequence_parallel or self.probability == 0:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()


def cell_by_cell(
    query: Tensor, key: Tensor, value: Tensor, cells: PackedCells, attend: OneCell
) -> Tensor:
    """`attend` for every cell of a packed row: its query, key and value [n, heads, width] give
    [n, heads, width]. Waits for the device, which has to say where cells end."""
    sizes = cells.cu_seqlens_q.diff().tolist()
    # One split and one concatenation: a slice per cell would each have a gradient of full size.
    parts = (tensor.split(sizes) for tensor in (query, key, value))
    contexts = [attend(*one) for one in zip(*parts, strict=True)]
    return torch.cat(contexts).flatten(1)
