"""Baselines of the loss, on cells whose distribution is known; scores from a table of counts."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from geneformer_mcore.metrics import baselines, classified
from geneformer_mcore.types import CLS, NUM_SPECIALS, RaggedCells
from tests.unit.data.identified_cells import ragged

VOCABULARY = 60


def cells_of(*rows: np.ndarray | list[int]) -> RaggedCells:
    """Cells with the given genes, [CLS] put before each."""
    cells = [np.array([CLS, *row], np.uint16) for row in rows]
    return ragged(cells, np.arange(len(rows)))


def ranked_cells(rng: np.random.Generator, count: int, genes: int = 40) -> RaggedCells:
    """Cells in which gene g tends to have rank g: the ranks are g + noise."""
    places = np.arange(genes) + rng.normal(0, 3, (count, genes))
    return cells_of(*(NUM_SPECIALS + np.argsort(row) for row in places))


def masked(cells: RaggedCells) -> tuple[np.ndarray, np.ndarray]:
    """Every gene of the cells as something to predict: labels and positions."""
    starts = np.repeat(cells.offsets[:-1], cells.lengths)
    positions = np.arange(len(cells.tokens_T)) - starts
    genes = positions > 0
    return cells.tokens_T[genes].astype(np.int64), positions[genes]


def test_the_unigram_is_a_distribution_over_genes() -> None:
    log_probabilities = baselines.unigram(cells_of([5, 6, 7], [5, 6], [5]), VOCABULARY, alpha=0.5)
    smoothed = 6 + 0.5 * (VOCABULARY - NUM_SPECIALS)
    assert np.exp(log_probabilities).sum() == pytest.approx(1)
    assert np.exp(log_probabilities[5:9]) * smoothed == pytest.approx([3.5, 2.5, 1.5, 0.5])
    assert np.all(np.isneginf(log_probabilities[:NUM_SPECIALS])), "a special is never predicted"


def test_every_bin_is_a_distribution_over_genes(rng) -> None:
    table = baselines.gene_given_rank(
        ranked_cells(rng, 50), VOCABULARY, *masked(ranked_cells(rng, 20))
    )
    every_gene = np.arange(NUM_SPECIALS, VOCABULARY)
    for position in (1, 17, 40, 5000):
        found = table.log_probabilities(every_gene, np.full(len(every_gene), position))
        assert np.exp(found).sum() == pytest.approx(1)


def test_counts_are_those_of_each_position(rng, monkeypatch) -> None:
    """However many cells are counted at once."""
    train = cells_of([5, 6, 7], [6, 5])
    table = baselines.gene_given_rank(train, VOCABULARY, np.array([5]), np.array([1]))
    finest = baselines._finest(train, VOCABULARY, alpha=1.0)
    assert finest.edges_K.tolist() == [1, 2, 3]
    assert finest.counts_KV[:, 5:8].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert finest.counts_KV.sum() == table.counts_KV.sum() == 5, "[CLS] is not counted"
    train = ranked_cells(rng, 30)
    at_once = baselines._finest(train, VOCABULARY, alpha=1.0).counts_KV
    monkeypatch.setattr(baselines, "COUNTED_AT_ONCE", 7)
    assert np.array_equal(at_once, baselines._finest(train, VOCABULARY, alpha=1.0).counts_KV)


def test_bins_grow_with_the_rank() -> None:
    edges = baselines._bin_edges(2047)
    widths = np.diff(edges)
    assert (edges[0], widths[0]) == (1, 1)
    assert np.all(np.diff(widths) >= 0)
    assert edges[-1] <= 2047
    assert widths[-1] > 40
    assert len(edges) < 200


def test_the_rank_predicts_genes_that_have_one(rng) -> None:
    judged = masked(ranked_cells(rng, 100))
    scores = baselines.score(ranked_cells(rng, 400), VOCABULARY, *judged)
    # 40 genes, each as frequent as the other.
    assert scores["unigram"] == pytest.approx(np.log(40), abs=0.01)
    # The rank of a gene is about normal around its own place: the entropy of the place given the
    # rank, ln(sigma sqrt(2 pi e)), at the sigma of 3.
    expected = np.log(3 * np.sqrt(2 * np.pi * np.e))
    assert scores["gene_given_rank"] == pytest.approx(expected, abs=0.2)


def test_the_rank_predicts_nothing_where_genes_have_none(rng) -> None:
    cells = [rng.permutation(40) + NUM_SPECIALS for _ in range(500)]
    judged = masked(cells_of(*cells[400:]))
    scores = baselines.score(cells_of(*cells[:400]), VOCABULARY, *judged)
    assert scores["gene_given_rank"] == pytest.approx(scores["unigram"], abs=0.02)


def test_only_the_first_cells_are_counted(rng) -> None:
    train = ranked_cells(rng, 100)
    labels, positions = masked(ranked_cells(rng, 20))
    scores = baselines.score(train, VOCABULARY, labels, positions, max_cells=10)
    assert (scores["cells"], scores["masked_tokens"]) == (10, len(labels))
    assert scores == baselines.score(train.first(10), VOCABULARY, labels, positions)


def test_a_gene_never_seen_in_training_has_a_finite_loss() -> None:
    scores = baselines.score(cells_of([5, 6, 7]), VOCABULARY, np.array([50]), np.array([2000]))
    assert np.isfinite([scores["unigram"], scores["gene_given_rank"]]).all()
    assert baselines.cross_entropy(np.log([0.5, 0.5, 0.5])) == pytest.approx(np.log(2))


COUNTS = np.array([[5, 1, 0, 0], [2, 0, 3, 0], [0, 0, 7, 0], [0, 0, 0, 0]])
"""Cells of each class by predicted class: 1 is never predicted correctly, 3 does not occur."""


def test_scores_of_counts_are_those_of_cells() -> None:
    true, predicted = np.nonzero(COUNTS)
    times = COUNTS[true, predicted]
    labels, answers = np.repeat(true, times), np.repeat(predicted, times)
    expected = metrics.f1_score(labels, answers, average="macro", zero_division=0)
    found = {key: classified.scores(COUNTS)[key] for key in ("accuracy", "macro_f1")}
    assert found == pytest.approx({"accuracy": 12 / 18, "macro_f1": expected})
    of_class = classified.per_class(COUNTS, ("a", "b", "c", "d"))
    of_a = {"precision": 5 / 7, "recall": 5 / 6, "f1": 10 / 13, "cells": 6}
    assert of_class["a"] == pytest.approx(of_a)
    assert of_class["b"] == {"precision": 0, "recall": 0, "f1": 0, "cells": 5}
    assert of_class["d"] == {"precision": 0, "recall": 0, "f1": 0, "cells": 0}
    commonest = classified.majority(COUNTS)
    assert commonest["accuracy"] == pytest.approx(7 / 18)
    assert commonest["macro_f1"] == pytest.approx(2 * 7 / 25 / 3)
    # The commonest true one, not the one that is predicted most.
    assert classified.majority(np.array([[1, 5], [0, 3]]))["accuracy"] == pytest.approx(6 / 9)
