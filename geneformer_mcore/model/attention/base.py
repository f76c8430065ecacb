"""Base class of core attention: Megatron's interface, and two shapes, both bidirectional.

padded  query, key, value [S, B, heads, width] + mask of padding    -> [S, B, heads * width]
packed  query, key, value [S, heads, width] + bounds between cells  -> [S, heads * width]
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
"""Bounds of the cells of a packed row."""
OneCell = Callable[[Tensor, Tensor, Tensor], Tensor]


class CoreAttention(MegatronModule):
    """Called by Megatron's SelfAttention with query, key and value."""

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
        # Tensor ranks have other heads and must drop other probabilities. Under sequence parallel
        # the whole block already runs in that random state.
        if self.config.sequence_parallel or self.probability == 0:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()


def cell_by_cell(
    query: Tensor, key: Tensor, value: Tensor, cells: PackedCells, attend: OneCell
) -> Tensor:
    """`attend`, of query, key and value [n, heads, width], for every cell; waits for the device."""
    sizes = cells.cu_seqlens_q.diff().tolist()
    # One split: slices would each have a gradient of full size.
    parts = (tensor.split(sizes) for tensor in (query, key, value))
    contexts = [attend(*one) for one in zip(*parts, strict=True)]
    return torch.cat(contexts).flatten(1)
