"""BioNeMo style: one cell at a time, every gene looked up in a dictionary by its name.

    (columns, counts) of a cell  ->  names of its genes  ->  token and median from dictionaries
                                 ->  / total * 10,000 / median  ->  argsort

Divides by the total of the genes that have a token: a constant per cell, so the same ranks but for
rounding. Written afresh from the published method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from scipy import sparse

from geneformer_mcore.types import CLS


class BioNeMoTokeniser:
    """Tokenises cells by dictionaries {gene id: token} and {gene id: median}."""

    def __init__(
        self,
        gene_ids: Sequence[str],
        tokens: Mapping[str, int],
        medians: Mapping[str, float],
        seq_length: int,
    ) -> None:
        self._gene_ids = np.array(gene_ids, dtype=object)
        self._tokens = tokens
        self._medians = medians
        self._room = seq_length

    def encode(self, counts: sparse.csr_matrix) -> list[np.ndarray]:
        """Tokens of every cell."""
        ends = counts.indptr
        return [
            self._cell(counts.indices[start:stop], counts.data[start:stop])
            for start, stop in pairwise(ends)
        ]

    def _cell(self, columns: np.ndarray, counts: np.ndarray) -> np.ndarray:
        token_of, median_of = self._tokens, self._medians
        tokens, medians, places = [], [], []
        for place, gene in enumerate(self._gene_ids[columns].tolist()):
            if gene in token_of:
                tokens.append(token_of[gene])
                medians.append(median_of[gene])
                places.append(place)
        known = counts[places].astype(np.float64)
        value = known / known.sum() * 10_000 / np.array(medians)
        order = np.argsort(-value)[: self._room - 1]
        return np.concatenate([[CLS], np.array(tokens)[order]]).astype(np.uint16)
