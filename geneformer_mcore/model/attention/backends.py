"""Core attention of torch and Megatron-Core.

FlashAttention  torch's FlashAttention-2: packed cells, dropout, 16 bits, NVIDIA GPUs since Ampere.
                Its operator is called, as varlen_attn has no dropout and SDPA no bounds
PlainAttention  Megatron-Core's own, with every score in memory: the reference
SdpaAttention   torch's scaled_dot_product_attention: fused on GPUs, and on CPUs without dropout
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from geneformer_mcore.model.attention.base import CoreAttention, PackedCells, cell_by_cell


class FlashAttention(CoreAttention):
    """With bounds for both shapes: in padded rows the padding is a piece of its own."""

    def padded(
        self, query: Tensor, key: Tensor, value: Tensor, padding_B11S: Tensor | None
    ) -> Tensor:
        num_positions, num_cells = query.shape[:2]
        bounds = bounds_of(padding_B11S, num_positions, num_cells, query.device)
        query, key, value = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
        context = self._attend(query, key, value, bounds, num_positions)
        return context.view(num_cells, num_positions, -1).transpose(0, 1)

    def packed(self, query: Tensor, key: Tensor, value: Tensor, cells: PackedCells) -> Tensor:
        bounds, longest = cells.cu_seqlens_q, cells.max_seqlen_q
        return self._attend(query, key, value, bounds, longest).flatten(1)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int
    ) -> Tensor:
        """query, key, value and result [positions, heads, width]."""
        context, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            self.probability,
            False,  # not causal
            False,  # no debug mask
            scale=self.softmax_scale,
        )
        return context


def bounds_of(
    padding_B11S: Tensor | None, num_positions: int, num_cells: int, device: torch.device
) -> Tensor:
    """int32 [2 B + 1]: in B rows of S positions end to end, the starts of each cell and padding."""
    firsts = torch.arange(num_cells, device=device) * num_positions
    lengths = torch.full_like(firsts, num_positions)
    if padding_B11S is not None:
        lengths = num_positions - padding_B11S[:, 0, 0].sum(-1)
    bounds = torch.stack([firsts + lengths, firsts + num_positions], dim=1).flatten()
    return torch.cat([bounds.new_zeros(1), bounds]).int()


class PlainAttention(DotProductAttention):
    """Packed cells one by one, as Megatron's refuses them."""

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

        def one_cell(*cell: Tensor) -> Tensor:
            query, key, value = (tensor[:, None] for tensor in cell)
            context = theirs(query, key, value, None, attn_mask_type, attention_bias)
            return context.view_as(cell[0])

        theirs = super().forward
        if packed_seq_params is None:
            return theirs(query, key, value, attention_mask, attn_mask_type, attention_bias)
        return cell_by_cell(query, key, value, packed_seq_params, one_cell)


class SdpaAttention(CoreAttention):
    """Padded cells with a mask, packed ones one by one, as torch's kernels take no bounds."""

    def padded(
        self, query: Tensor, key: Tensor, value: Tensor, padding_B11S: Tensor | None
    ) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = self._attend(query, key, value, padding_B11S)
        return context.permute(2, 0, 1, 3).flatten(2)

    def packed(self, query: Tensor, key: Tensor, value: Tensor, cells: PackedCells) -> Tensor:
        return cell_by_cell(query, key, value, cells, self._one_cell)

    def _one_cell(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return self._attend(query, key, value, None)[0].transpose(0, 1)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding_B11S: Tensor | None
    ) -> Tensor:
        """All [B, heads, S, width]."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if padding_B11S is None else ~padding_B11S,
            dropout_p=self.probability,
            scale=self.softmax_scale,
        )
