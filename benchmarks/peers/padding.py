"""Lists of tokens as one padded batch, by the rule of this project's own feed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.side_by_side.prepared import SEQ_LENGTH
from geneformer_mcore.data.collate import padded_length
from geneformer_mcore.types import PAD

PAD_MULTIPLE = 64


def padded(cells: Sequence[np.ndarray], with_cls: bool = True) -> torch.Tensor:
    """int32 [B, S]: [PAD] after the last token; S is the longest cell, rounded up to 64.

    with_cls: whether the lists start with [CLS]; if not, it is put in front
    """
    first = 0 if with_cls else 1
    longest = max(map(len, cells)) + first
    width = padded_length(longest, PAD_MULTIPLE, SEQ_LENGTH)
    tokens = np.full((len(cells), width), PAD, dtype=np.int32)
    tokens[:, :first] = 0
    for row, cell in enumerate(cells):
        tokens[row, first : first + len(cell)] = cell
    return torch.from_numpy(tokens)


def sums_of_padded(tokens_BS: torch.Tensor) -> np.ndarray:
    """float64 [B]: the sum of each cell's token ids."""
    return (tokens_BS * (tokens_BS != PAD)).sum(1).double().numpy()
