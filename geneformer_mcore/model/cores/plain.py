"""Megatron-Core's own attention: every score is a number in memory. The yardstick of the others."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention

from geneformer_mcore.model.cores.base import PackedCells, cell_by_cell


class PlainAttention(DotProductAttention):
    """Megatron's refuses packed cells: it gets them one by one."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedCells | None = None,
    ) -> torch.Tensor:
        """See base.CoreAttention.forward."""

        def one_cell(*cell: torch.Tensor) -> torch.Tensor:
            query, key, value = (tensor[:, None] for tensor in cell)
            context = theirs(query, key, value, None, attn_mask_type, attention_bias)
            return context.view_as(cell[0])

        theirs = super().forward
        if packed_seq_params is None:
            return theirs(query, key, value, attention_mask, attn_mask_type, attention_bias)
        return cell_by_cell(query, key, value, packed_seq_params, one_cell)
