"""FlashAttention-2 as torch ships it: packed cells, dropout, 16 bits, NVIDIA GPUs since Ampere.

torch's public functions reach it either without dropout (varlen_attn) or without bounds (SDPA); the
operator beneath them takes both and has a gradient.
"""

from __future__ import annotations

import torch

from geneformer_mcore.model.cores.base import CoreAttention, PackedCells


class FlashAttention(CoreAttention):
    """Bounds for both shapes: padded, what follows a cell in its row is a piece of its own."""

    def padded(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding_B11S: torch.Tensor | None,
    ) -> torch.Tensor:
        """See CoreAttention."""
        num_positions, num_cells = query.shape[:2]
        bounds = bounds_of(padding_B11S, num_positions, num_cells, query.device)
        query, key, value = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
        context = self._attend(query, key, value, bounds, num_positions)
        return context.view(num_cells, num_positions, -1).transpose(0, 1)

    def packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cells: PackedCells
    ) -> torch.Tensor:
        """See CoreAttention."""
        bounds, longest = cells.cu_seqlens_q, cells.max_seqlen_q
        return self._attend(query, key, value, bounds, longest).flatten(1)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
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
    padding_B11S: torch.Tensor | None, num_positions: int, num_cells: int, device: torch.device
) -> torch.Tensor:
    """int32 [2 B + 1]: in B rows of S positions laid end to end, where each cell begins, and where
    its padding begins."""
    firsts = torch.arange(num_cells, device=device) * num_positions
    lengths = torch.full_like(firsts, num_positions)
    if padding_B11S is not None:
        lengths = num_positions - padding_B11S[:, 0, 0].sum(-1)
    bounds = torch.stack([firsts + lengths, firsts + num_positions], dim=1).flatten()
    return torch.cat([bounds.new_zeros(1), bounds]).int()
