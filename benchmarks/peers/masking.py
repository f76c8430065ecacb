"""Masks as a Hugging Face collator makes them, for peers that give padded tokens and no more.

padded tokens  ->  15 % of the genes selected  ->  80 % [MASK], 2 % a random gene, 18 % kept
               ->  (tokens as seen, labels: -100 where nothing is asked)

Whole-batch torch calls with torch's own generator, written afresh after the published way. With it
a peer's batch is as complete as ours, whose masks moreover depend on the cell and epoch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.peers.hf_arrow import HFArrow
from benchmarks.peers.padding import sums_of_padded
from benchmarks.peers.sc_dataset import BlocksOfArray
from benchmarks.peers.scdl import ScdlTokens
from geneformer_mcore.types import CLS, MASK, NUM_SPECIALS, PAD

IGNORED = -100
_SELECTED, _MASKED, _RANDOM = 0.15, 0.8, 0.02
_LARGEST = 25_429


def masked(tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(seen, labels), both of the shape and type of `tokens_BS`. One thread, as in a worker."""
    torch.set_num_threads(1)
    probability = torch.full(tokens_BS.shape, _SELECTED)
    probability.masked_fill_((tokens_BS == PAD) | (tokens_BS == CLS), 0.0)
    selected = torch.bernoulli(probability).bool()
    labels = torch.where(selected, tokens_BS, IGNORED)
    hidden = torch.bernoulli(torch.full(tokens_BS.shape, _MASKED)).bool() & selected
    seen = tokens_BS.masked_fill(hidden, MASK)
    share = _RANDOM / (1 - _MASKED)  # of the selected that are not hidden
    random = torch.bernoulli(torch.full(tokens_BS.shape, share)).bool() & selected & ~hidden
    genes = torch.randint(NUM_SPECIALS, _LARGEST, tokens_BS.shape, dtype=tokens_BS.dtype)
    return torch.where(random, genes, seen), labels


def sums_of_masked(batch: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    """float64 [B]: the sum of each cell's true token ids."""
    seen, labels = batch
    return sums_of_padded(torch.where(labels == IGNORED, seen, labels))


class MaskedArray(BlocksOfArray):
    """scDataset over a dense array, then masked."""

    label = "scDataset on a dense .npy, 2,048 per cell, then HF-style masks"

    def epoch(self, number: int) -> Iterator[Any]:
        return ((rows, masked(tokens)) for rows, tokens in super().epoch(number))

    def sums(self, batch: Any) -> np.ndarray:
        return sums_of_masked(batch[1])


class MaskedScdl(ScdlTokens):
    """bionemo-scdl's rows, then masked."""

    label = "bionemo-scdl, rows of token ids, then HF-style masks"

    def epoch(self, number: int) -> Iterator[Any]:
        return ((rows, masked(tokens)) for rows, tokens in super().epoch(number))

    def sums(self, batch: Any) -> np.ndarray:
        return sums_of_masked(batch[1])


class MaskedArrow(HFArrow):
    """Hugging Face's own way from end to end: Arrow, collation, masks."""

    label = "Hugging Face datasets, Arrow, random rows, then HF-style masks"

    def epoch(self, number: int) -> Iterator[Any]:
        return ((rows, masked(tokens)) for rows, tokens in super().epoch(number))

    def sums(self, batch: Any) -> np.ndarray:
        return sums_of_masked(batch[1])
