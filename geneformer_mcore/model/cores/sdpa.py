"""torch's scaled_dot_product_attention: fused on GPUs, and on CPUs without dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from geneformer_mcore.model.cores.base import CoreAttention, PackedCells, cell_by_cell


class SdpaAttention(CoreAttention):
    """Padded cells with a mask, packed ones one by one: torch's kernels know no bounds."""

    def padded(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding_B11S: torch.Tensor | None,
    ) -> torch.Tensor:
        """See CoreAttention."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = self._attend(query, key, value, padding_B11S)
        return context.permute(2, 0, 1, 3).flatten(2)

    def packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cells: PackedCells
    ) -> torch.Tensor:
        """See CoreAttention."""
        return cell_by_cell(query, key, value, cells, self._one_cell)

    def _one_cell(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return self._attend(query, key, value, None)[0].transpose(0, 1)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding_B11S: torch.Tensor | None,
    ) -> torch.Tensor:
        """All [B, heads, S, width]."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if padding_B11S is None else ~padding_B11S,
            dropout_p=self.probability,
            scale=self.softmax_scale,
        )
