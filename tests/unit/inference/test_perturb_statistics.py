"""Controls, p and q of perturbations, by known numbers and by chance; the plot of many."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from geneformer_mcore.perturbation import outputs, statistics
from geneformer_mcore.perturbation.perturbed_cells import Mode
from geneformer_mcore.perturbation.question import GeneNames, Perturbation
from geneformer_mcore.perturbation.statistics import Survey
from geneformer_mcore.types import NUM_SPECIALS
from tests.support.small_cells import vocabulary_of

NUM_GENES = 2000
VOCABULARY = vocabulary_of(NUM_GENES)
NAMES = GeneNames(VOCABULARY, {}, {})


def surveyed(rng: np.random.Generator, unseen: int = 100) -> Survey:
    """Genes in 1 to 300 cells, the last `unseen` ones in none."""
    in_sentence = np.zeros(VOCABULARY.size, np.int64)
    in_sentence[NUM_SPECIALS:-unseen] = rng.integers(1, 301, NUM_GENES - unseen)
    ranks = np.where(in_sentence > 0, rng.random(VOCABULARY.size), np.nan)
    return Survey(300, in_sentence, in_sentence, ranks)


def singles(tokens: Iterable[int]) -> list[Perturbation]:
    return [NAMES.single(int(token)) for token in tokens]


def some_genes(rng: np.random.Generator, number: int) -> list[Perturbation]:
    return singles(rng.choice(np.arange(NUM_SPECIALS, NUM_GENES - 100), number, replace=False))


def draw(
    asked: list[Perturbation], found: Survey, number: int, seed: int = 0, **mode: Mode
) -> statistics.Controls:
    return statistics.draw(asked, found, NAMES, number, seed, NUM_SPECIALS, **mode)


def levels_of(found: Survey) -> np.ndarray:
    """log2 of the number of cells that each gene is in, rounded down; -1 in none."""
    return np.floor(np.log2(np.maximum(found.in_sentence_V, 0.5)))


def test_p_of_known_numbers() -> None:
    effects = np.array([3.0, 0.0, np.nan, 1.0, 2.0, 3.0, np.nan])
    mine = [np.array([3, 4, 5, 6]), np.array([3, 4, 5]), np.array([3, 4]), np.array([6])]
    p, q = statistics.p_values(effects, mine, two_sided=False)
    np.testing.assert_allclose(p, [2 / 4, 4 / 4, np.nan, np.nan])
    np.testing.assert_allclose(q, [1, 1, np.nan, np.nan])
    p, _ = statistics.p_values(effects, mine, two_sided=True)
    np.testing.assert_allclose(p, [1.0, 2 * 1 / 4, np.nan, np.nan])
    # Of Benjamini and Hochberg.
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(statistics.q_values(p), [0.02, 0.04, np.nan, 0.04, 0.02])
    assert np.isnan(statistics.q_values(np.array([np.nan]))).all()


@pytest.mark.parametrize("two_sided", [False, True])
def test_without_an_effect_p_is_uniform(two_sided: bool, rng: np.random.Generator) -> None:
    """Effects depend on how many cells a gene is in and where it stands, and on nothing else."""
    found = surveyed(rng)
    drawn = draw(some_genes(rng, 150), found, 60)
    tokens = [each.tokens[0] for each in drawn.all]
    scale = np.sqrt(found.in_sentence_V[tokens]) * np.exp(-found.rank_V[tokens])
    effects = scale + 3 * rng.normal(size=(20, len(tokens)))
    p = np.concatenate([statistics.p_values(each, drawn.of, two_sided)[0] for each in effects])
    assert stats.kstest(p, "uniform").statistic < 0.05
    # Of 60 controls p comes in steps of 1 / 61, two-sided of 2 / 61: 3 / 61 is the last below 0.05.
    below = np.mean(p <= 0.05)
    assert below == pytest.approx((2 if two_sided else 3) / 61, abs=0.01)


def test_a_planted_effect_is_found(rng: np.random.Generator) -> None:
    drawn = draw(some_genes(rng, 40), surveyed(rng), 400)
    effects = rng.normal(size=len(drawn.all))
    effects[[4, 9]] = 6, 7
    p, q = statistics.p_values(effects, drawn.of, two_sided=False)
    assert set(np.flatnonzero(q < 0.1)) == {4, 9}
    assert p[4] == 1 / (1 + len(drawn.of[4]))
    _, q = statistics.p_values(-effects, drawn.of, two_sided=True)
    assert set(np.flatnonzero(q < 0.2)) == {4, 9}


def test_controls_are_as_common_and_stand_as_high(rng: np.random.Generator) -> None:
    found = surveyed(rng)
    levels = levels_of(found)
    asked = singles([10, 500, 1200, VOCABULARY.size - 3])
    drawn = draw(asked, found, 50)
    assert drawn.all[:4] == asked
    for perturbation, mine in zip(asked, drawn.of, strict=True):
        (token,) = perturbation.tokens
        others = [drawn.all[number].tokens[0] for number in mine]
        assert 49 <= len(set(others)) <= 50
        assert token not in others
        assert min(others) >= NUM_SPECIALS
        assert set(levels[others]) == {levels[token]}
        if levels[token] >= 6:  # enough genes there for ranges of ranks
            assert np.abs(found.rank_V[others] - found.rank_V[token]).max() < 0.35
    assert draw(asked, found, 50).all == drawn.all
    assert draw(asked, found, 50, seed=1).all != drawn.all
    assert draw(asked, found, 0).all == asked
    seen = draw(asked, found, 50, mode=Mode.delete)
    assert [len(mine) for mine in seen.of] == [*(len(mine) for mine in drawn.of[:3]), 0]


def test_controls_of_a_group_are_groups(rng: np.random.Generator) -> None:
    found = surveyed(rng)
    group, levels = Perturbation("trio", (10, 500, 1200)), levels_of(found)
    drawn = draw([group], found, 30)
    assert len(drawn.of[0]) == 30
    for number in drawn.of[0]:
        tokens = drawn.all[number].tokens
        assert len(set(tokens)) == 3
        assert sorted(levels[list(tokens)]) == sorted(levels[list(group.tokens)])


@pytest.mark.parametrize("mode", list(Mode))
def test_a_set_of_genes_is_a_control_once(mode: Mode) -> None:
    """Four genes alike: six pairs, one of them asked for, in whatever order."""
    in_sentence = np.zeros(VOCABULARY.size, np.int64)
    in_sentence[10:14] = 40
    found = Survey(300, in_sentence, in_sentence, np.where(in_sentence > 0, 0.5, np.nan))
    asked = [Perturbation("pair", (13, 10)), Perturbation("other", (12, 11))]
    drawn = draw(asked, found, 200, mode=mode)
    for group, mine in zip(asked, drawn.of, strict=True):
        sets = [frozenset(drawn.all[number].tokens) for number in mine]
        assert len(sets) == len(set(sets)) == 5
        assert frozenset(group.tokens) not in sets
    p, _ = statistics.p_values(-np.arange(len(drawn.all)) * 1.0, drawn.of, two_sided=False)
    assert p[0] == 1 / 6, "a larger effect than that of all five"
    deleted = {frozenset(each.tokens) for each in drawn.all}
    assert mode is Mode.overexpress or len(deleted) == len(drawn.all), "nothing is deleted twice"


def test_a_gene_asked_for_may_be_a_control_and_is_perturbed_once(rng: np.random.Generator) -> None:
    found = surveyed(rng)
    drawn = draw(singles(found.genes[:300]), found, 500)
    tokens = [each.tokens for each in drawn.all]
    assert len(set(tokens)) == len(tokens) <= NUM_GENES
    assert min(drawn.of[0]) < 300, "some of the controls were asked for"


@pytest.mark.parametrize("goal", ["", "goal_"])
def test_a_plot_leaves_out_genes_without_p(goal: str) -> None:
    numbers = np.arange(1.0, 9.0)
    p = np.array([0.001, 0.002, 0.4, 0.5, 0.6, np.nan, np.nan, np.nan])
    q = np.where(p < 0.01, 0.01, p)
    shifts = {"shift": numbers, "control_shift": 2.0, "goal_shift": numbers}
    names = [f"gene{number}" for number in range(8)]
    rows = pd.DataFrame(shifts | {f"{goal}p": p, f"{goal}q": q}, index=names)
    axes = Figure().add_subplot()
    outputs._volcano(axes, rows, bool(goal))
    legend = axes.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["q >= 0.05: 3", "q < 0.05: 2", "no p, not shown: 3"]
    assert sorted(text.get_text() for text in axes.texts) == names[:5]
