"""Baselines: a masked gene predicted without the cell.

    unigram          p(gene)                 how often it is expressed
    gene given rank  p(gene | its rank)      how often at about that rank

A model that does not beat the second one has learned nothing about cells. Both have an advantage:
smoothing and rank bins are chosen on the validation positions that they are scored on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from geneformer_mcore.types import NUM_SPECIALS, RaggedCells

ALPHAS = (0.01, 0.1, 1.0, 10.0)
"""Pseudo-counts per gene of the unigram."""
BIN_GROWTH = 1.03
"""Finest bins are at least one rank and about 3 % of their rank wide."""
MERGES = (1, 2, 4, 8, 16, 32)
"""Numbers of neighbouring finest bins to join."""
SHRINKAGES = (10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0, 30_000.0, 100_000.0)
"""Weights of the unigram in a bin, in tokens."""
COUNTED_AT_ONCE = 4096


@dataclass(frozen=True)
class GeneGivenRank:
    """p(gene | rank bin) = (count in bin + shrinkage x p(gene)) / (tokens in bin + shrinkage).

    edges_K:          int64, first position of each bin, ascending, starting at 1 ([CLS] is at 0)
    counts_KV:        int64, how often each token stood in each bin
    unigram_V:        float64, log p(gene)
    shrinkage:        tokens
    """

    edges_K: np.ndarray
    counts_KV: np.ndarray
    unigram_V: np.ndarray
    shrinkage: float

    def log_probabilities(self, labels_M: np.ndarray, positions_M: np.ndarray) -> np.ndarray:
        """float64 [M]: log p(label | position) of each pair."""
        bins_M = np.searchsorted(self.edges_K, positions_M, side="right") - 1
        prior_M = self.shrinkage * np.exp(self.unigram_V[labels_M])
        totals_K = self.counts_KV.sum(axis=1)
        counts_M = self.counts_KV[bins_M, labels_M]
        return np.log(counts_M + prior_M) - np.log(totals_K[bins_M] + self.shrinkage)

    def merged(self, every: int) -> GeneGivenRank:
        """The same with `every` neighbouring bins joined."""
        starts = np.arange(0, len(self.edges_K), every)
        counts = np.add.reduceat(self.counts_KV, starts, axis=0)
        return replace(self, edges_K=self.edges_K[starts], counts_KV=counts)


def unigram(train: RaggedCells, vocabulary_size: int, alpha: float = 1.0) -> np.ndarray:
    """float64 [V]: log p(gene) with `alpha` added to each gene's count; -inf for specials."""
    counts_V = np.bincount(train.tokens_T, minlength=vocabulary_size).astype(np.float64)
    counts_V[:NUM_SPECIALS] = 0
    counts_V[NUM_SPECIALS:] += alpha
    with np.errstate(divide="ignore"):
        return np.log(counts_V / counts_V.sum())


def gene_given_rank(
    train: RaggedCells,
    vocabulary_size: int,
    labels_M: np.ndarray,
    positions_M: np.ndarray,
    alpha: float = 1.0,
) -> GeneGivenRank:
    """The table that does best on labels (token ids) and positions (1 for the first gene)."""
    finest = _finest(train, vocabulary_size, alpha)
    candidates = [
        replace(table, shrinkage=shrinkage)
        for table in (finest.merged(every) for every in MERGES)
        for shrinkage in SHRINKAGES
    ]
    return min(
        candidates, key=lambda table: cross_entropy(table.log_probabilities(labels_M, positions_M))
    )


def cross_entropy(log_probabilities_M: np.ndarray) -> float:
    """Nats per label, given their log probabilities."""
    return -float(np.mean(log_probabilities_M))


def score(
    train: RaggedCells,
    vocabulary_size: int,
    labels_M: np.ndarray,
    positions_M: np.ndarray,
    max_cells: int = 50_000,
) -> dict[str, Any]:
    """The content of baselines.json: both cross entropies on the given positions, in nats.

    The first `max_cells` of `train`, whose rows are shuffled, are counted: 50,000 cells suffice for
    25,000 genes, and take seconds and a few hundred MB.
    """
    sample = train.first(max_cells)
    alpha, table = fit(sample, vocabulary_size, labels_M, positions_M)
    return {
        "unigram": cross_entropy(table.unigram_V[labels_M]),
        "gene_given_rank": cross_entropy(table.log_probabilities(labels_M, positions_M)),
        "cells": len(sample),
        "masked_tokens": len(labels_M),
        "alpha": alpha,
        "rank_bins": len(table.edges_K),
        "shrinkage": table.shrinkage,
    }


def fit(
    train: RaggedCells, vocabulary_size: int, labels_M: np.ndarray, positions_M: np.ndarray
) -> tuple[float, GeneGivenRank]:
    """The best smoothing of the unigram on (labels, positions), and the best table with it."""
    by_alpha = {
        alpha: cross_entropy(unigram(train, vocabulary_size, alpha)[labels_M]) for alpha in ALPHAS
    }
    alpha = min(by_alpha, key=lambda candidate: by_alpha[candidate])
    return alpha, gene_given_rank(train, vocabulary_size, labels_M, positions_M, alpha)


def _finest(train: RaggedCells, vocabulary_size: int, alpha: float) -> GeneGivenRank:
    """The table of the finest bins, with any shrinkage."""
    edges_K = _bin_edges(int(train.lengths.max(initial=2)) - 1)
    counts = np.zeros(len(edges_K) * vocabulary_size, dtype=np.int64)
    for start in range(0, len(train), COUNTED_AT_ONCE):
        offsets = train.offsets[start : start + COUNTED_AT_ONCE + 1]
        tokens_T = train.tokens_T[offsets[0] : offsets[-1]]
        positions_T = np.arange(offsets[0], offsets[-1])
        positions_T -= np.repeat(offsets[:-1], np.diff(offsets))
        genes = positions_T > 0
        bins_T = np.searchsorted(edges_K, positions_T[genes], side="right") - 1
        counts += np.bincount(bins_T * vocabulary_size + tokens_T[genes], minlength=len(counts))
    return GeneGivenRank(
        edges_K,
        counts.reshape(len(edges_K), vocabulary_size),
        unigram(train, vocabulary_size, alpha),
        SHRINKAGES[0],
    )


def _bin_edges(last_position: int) -> np.ndarray:
    """int64: 1, 2, 3, ..., then ever wider steps, up to `last_position`."""
    edges = [1]
    while (following := max(edges[-1] + 1, int(edges[-1] * BIN_GROWTH))) <= last_position:
        edges.append(following)
    return np.array(edges, dtype=np.int64)
