"""Scores are scikit-learn's, and intervals have the width of their distribution."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from geneformer_mcore.celltypes.cross_validation import Scores, draws_macro_f1

LABELS = np.array(["a", "b", "c", "d"], object)


def predictions(rng: np.random.Generator, num_cells: int, right: float) -> list[np.ndarray]:
    truth = rng.choice(LABELS, num_cells, p=[0.6, 0.2, 0.15, 0.05])
    truth[:4] = LABELS
    guess = rng.choice(LABELS, num_cells)
    return [truth, np.where(rng.random(num_cells) < right, truth, guess)]


def test_they_are_those_of_scikit_learn(rng: np.random.Generator) -> None:
    truth, found = predictions(rng, 400, 0.7)
    folds = {"1": np.arange(150), "2": np.arange(150, 400)}
    scored = Scores(truth, 20, 0).of(found, folds, truth)
    assert scored["macro_f1"]["value"] == f1_score(truth, found, average="macro")
    assert scored["accuracy"]["value"] == accuracy_score(truth, found)
    assert scored["macro_f1_over_baseline"]["value"] == scored["macro_f1"]["value"] - 1
    parts = truth[150:], found[150:]
    expected = {"macro_f1": f1_score(*parts, average="macro"), "accuracy": accuracy_score(*parts)}
    assert scored["folds"]["2"] == {"cells": 250} | expected
    assert np.array(scored["confusion"]).sum() == 400
    assert np.trace(scored["confusion"]) == (truth == found).sum()


def test_draws_are_scored_as_scikit_learn_would(rng: np.random.Generator) -> None:
    truth = rng.integers(0, 6, (40, 30))
    found = np.where(rng.random((40, 30)) < 0.5, truth, rng.integers(0, 6, (40, 30)))
    truth[:10][truth[:10] == 5] = 2  # labels that a draw lacks, and some that are only guessed
    found[:5][found[:5] == 5] = 1
    expected = [f1_score(a, b, average="macro") for a, b in zip(truth, found, strict=True)]
    np.testing.assert_allclose(draws_macro_f1(truth, found, 6), expected, rtol=1e-12)
    assert draws_macro_f1(truth[0], found[0], 6) == pytest.approx(expected[0], rel=1e-12)


def test_intervals_are_as_wide_as_those_of_a_proportion(rng: np.random.Generator) -> None:
    truth, found = predictions(rng, 900, 0.6)
    scored = Scores(truth, 2000, 1).of(found, {}, found)
    share = scored["accuracy"]
    half = 1.96 * np.sqrt(share["value"] * (1 - share["value"]) / 900)
    assert share["high"] - share["low"] == pytest.approx(2 * half, rel=0.1)
    assert scored["macro_f1"]["low"] < scored["macro_f1"]["value"] < scored["macro_f1"]["high"]
    assert scored["macro_f1_over_baseline"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_they_repeat_by_seed(rng: np.random.Generator) -> None:
    truth, found = predictions(rng, 100, 0.6)
    first, again, other = (Scores(truth, 50, seed).of(found, {}, truth) for seed in (3, 3, 4))
    assert first == again != other
    assert "low" not in Scores(truth, 0, 3).of(found, {}, truth)["accuracy"]


def test_donors_are_drawn_with_all_their_cells(rng: np.random.Generator) -> None:
    """All cells of a donor alike: as many independent ones as there are donors."""
    donors = np.repeat([f"d{number}" for number in range(8)], 100).astype(object)
    truth = np.tile(LABELS, 200)
    is_right = np.isin(donors, ["d0", "d1", "d2", "d3", "d4"])
    found = np.where(is_right, truth, np.roll(truth, 1))
    cells = Scores(truth, 2000, 0).of(found, {}, truth)["accuracy"]
    drawn = Scores(truth, 2000, 0, donors).of(found, {}, truth)["accuracy"]
    assert drawn["value"] == cells["value"] == 5 / 8
    assert drawn["high"] - drawn["low"] > 8 * (cells["high"] - cells["low"])
    # 8 donors, 5 of them right: shares of 8, from 2 or 3 up to 7 or 8.
    assert drawn["low"] in (2 / 8, 3 / 8)
    assert drawn["high"] in (7 / 8, 1.0)


def test_few_donors_give_no_interval(rng: np.random.Generator) -> None:
    truth, found = predictions(rng, 100, 0.6)
    donors = np.tile(np.array(["a", "b", "c", "d"], object), 25)
    scored = Scores(truth, 50, 0, donors)
    assert "low" not in scored.of(found, {}, truth)["macro_f1"]
    assert "low" not in scored.gain(found, truth)
    donors[0] = "e"
    assert "low" in Scores(truth, 50, 0, donors).gain(found, truth)


def test_a_gain_is_that_over_the_other_method(rng: np.random.Generator) -> None:
    truth, found = predictions(rng, 300, 0.6)
    other = np.where(rng.random(300) < 0.9, truth, "a")
    scores = Scores(truth, 200, 0)
    gain = scores.gain(found, other)
    assert gain == scores.of(found, {}, other)["macro_f1_over_baseline"]
    expected = f1_score(truth, found, average="macro") - f1_score(truth, other, average="macro")
    assert gain["value"] == expected
    assert gain["high"] < 0
