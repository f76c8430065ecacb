"""Masking of a cell's genes: a pure function of (seed, epoch, cell_key, position in the cell).

So a cell is masked alike in every layout and after every restart. A counter-based hash (SplitMix64,
see store/keys.py) gives each position its own random bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from geneformer_mcore.store.keys import GOLDEN, MIX_1, MIX_2, mix, mix_scalar
from geneformer_mcore.types import MASK, NUM_SPECIALS, RaggedCells

VALIDATION_EPOCH = 2**62
"""Validation masks its cells as in this epoch, each time: no training epoch comes here."""


@dataclass(frozen=True)
class Masking:
    """Selection of genes and their replacement.

    probability:  of a gene being selected, independent per gene; [CLS] never is
    fractions:    of the selected: shown as [MASK], as a random gene, unchanged
    """

    probability: float
    fractions: tuple[float, float, float]
    vocabulary_size: int
    seed: int

    def apply(self, cells: RaggedCells, epochs_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint16 [T] tokens with masks, and bool [T], True at the selected positions.
        epochs_N: int64 [N], the epoch of each cell"""
        lengths = cells.lengths
        first_T = np.repeat(cells.offsets[:-1], lengths)
        place_T = (np.arange(len(cells.tokens_T)) - first_T).astype(np.uint64)
        bits_T = mix(np.repeat(self.streams(cells.keys_N, epochs_N), lengths) + place_T * GOLDEN)
        selected_T = _unit(bits_T) < self.probability
        selected_T[cells.offsets[:-1]] = False  # [CLS]
        seen_T = cells.tokens_T.copy()
        here = np.flatnonzero(selected_T)
        seen_T[here] = self._shown(bits_T[here], cells.tokens_T[here])
        return seen_T, selected_T

    def streams(self, keys_N: np.ndarray, epochs_N: np.ndarray) -> np.ndarray:
        """uint64 [N], each cell's stream; bits of its position i: `mix(stream + i * GOLDEN)`."""
        return mix(mix(keys_N ^ self.seed_bits) + epochs_N.astype(np.uint64))

    @cached_property
    def seed_bits(self) -> np.uint64:
        return mix_scalar(self.seed)

    def bounds(self) -> tuple[np.uint64, np.uint64, np.uint64]:
        """Bounds on 53 random bits: selected; then shown as [MASK]; else as a random gene."""
        masked, random, _unchanged = self.fractions
        shares = (self.probability, masked, masked + random)
        # x * 2^-53 < p exactly where the whole number x < ceil(p * 2^53).
        selected_below, masked_below, random_below = (
            np.uint64(math.ceil(share * 2.0**53)) for share in shares
        )
        return selected_below, masked_below, random_below

    def validation_positions(self, cells: RaggedCells) -> tuple[np.ndarray, np.ndarray]:
        """int64 [M] twice: true token ids to predict, and their positions, 1 for the first gene."""
        labels_M, places_M, _ = self.validation_genes(cells)
        return labels_M, places_M

    def validation_genes(self, cells: RaggedCells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, and int64 [M] the number of each one's cell."""
        _, selected_T = self.apply(cells, np.full(len(cells), VALIDATION_EPOCH))
        here = np.flatnonzero(selected_T)
        cell_M = np.searchsorted(cells.offsets, here, side="right") - 1
        return cells.tokens_T[here].astype(np.int64), here - cells.offsets[cell_M], cell_M

    def _shown(self, bits_M: np.ndarray, tokens_M: np.ndarray) -> np.ndarray:
        # A second and a third hash of the same bits: independent of the first decision.
        action = _unit(mix(bits_M ^ MIX_1))
        genes = self.vocabulary_size - NUM_SPECIALS
        random_gene = NUM_SPECIALS + (_unit(mix(bits_M ^ MIX_2)) * genes).astype(np.uint16)
        masked, random, _unchanged = self.fractions
        shown = np.where(action < masked + random, random_gene, tokens_M)
        return np.where(action < masked, np.uint16(MASK), shown)


def _unit(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits."""
    return (bits >> np.uint64(11)) * 2.0**-53
