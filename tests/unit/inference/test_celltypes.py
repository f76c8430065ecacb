"""Cell types from labelled files: no cell is predicted by what has seen it, and scores are
scikit-learn's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import accuracy_score, f1_score

from geneformer_mcore.celltypes import cross_validation, labelled
from geneformer_mcore.celltypes.cross_validation import (
    FOREST,
    Features,
    Scheme,
    Scores,
    draws_macro_f1,
)
from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer.genes import InputOptions
from tests.support.small_cells import random_counts, write_h5ad

NUM_CELLS, NUM_GENES = 90, 40


@pytest.fixture
def labels(rng: np.random.Generator) -> np.ndarray:
    """Three common labels, one of 4 cells, and a cell without one."""
    found = rng.permutation(["a"] * 40 + ["b"] * 30 + ["c"] * 15 + ["rare"] * 4 + [""])
    return found.astype(object)


@pytest.fixture
def counts(labels: np.ndarray, rng: np.random.Generator) -> Features:
    """Log counts by which labels can be distinguished, in part."""
    rates = rng.gamma(1.0, 1.0, (5, NUM_GENES))
    numbers = np.unique(labels, return_inverse=True)[1]
    values = np.log1p(rng.poisson(rates[numbers])).astype(np.float32)
    return Features("counts", sparse.csr_matrix(values), is_counts=True)


@pytest.fixture
def small_forests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten trees on one core where it is not the forest that is tested."""

    def small(**settings: Any) -> RandomForestClassifier:
        return RandomForestClassifier(**settings | {"n_estimators": 10, "n_jobs": None})

    monkeypatch.setattr(cross_validation, "RandomForestClassifier", small)


@pytest.fixture
def scheme(labels: np.ndarray) -> Scheme:
    return cross_validation.stratified(labels, labels != "", seed=0)


def test_every_cell_is_predicted_once_by_others(labels: np.ndarray, scheme: Scheme) -> None:
    assert scheme.left_out == {"rare": 4}
    assert sorted(labels[scheme.cells]) == ["a"] * 40 + ["b"] * 30 + ["c"] * 15
    predicted = np.concatenate([test for _, test in scheme.folds.values()])
    assert sorted(predicted) == sorted(scheme.cells)
    assert len(scheme.folds) == 5
    for train, test in scheme.folds.values():
        assert not set(train) & set(test)
        assert sorted(set(labels[test])) == ["a", "b", "c"]
        assert sum(labels[test] == "c") == 3


@pytest.mark.parametrize("wrong", [["a"] * 30 + ["rare"] * 4, list("abcd") * 4])
def test_too_few_labels_are_refused(wrong: list[str]) -> None:
    with pytest.raises(DataError, match="at least 2 labels with 5 cells"):
        cross_validation.stratified(np.array(wrong, object), np.ones(len(wrong), bool), 0)


@pytest.mark.usefixtures("small_forests")
def test_pca_never_sees_the_cells_to_predict(
    labels: np.ndarray, counts: Features, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[np.ndarray] = []

    class Watched(PCA):
        def fit(self, X: sparse.csr_matrix, y: None = None) -> PCA:
            fitted.append(X.toarray())
            return super().fit(X, y)

    monkeypatch.setattr(cross_validation, "PCA", Watched)
    found, again = (cross_validation.predict(counts, labels, scheme, seed=0) for _ in range(2))
    assert len(fitted) == 2 * 5, "again in every fold, and once for all classifiers"
    for values, (train, _) in zip(fitted, [*scheme.folds.values()] * 2, strict=True):
        np.testing.assert_array_equal(values, counts.values[train].toarray())
    for name, predicted in found.items():
        np.testing.assert_array_equal(predicted, again[name])
    assert np.mean(found[FOREST] == labels[scheme.cells]) > 0.6


def test_predictions_are_those_of_a_forest_on_the_training_folds_components(
    labels: np.ndarray, counts: Features, scheme: Scheme
) -> None:
    predicted = cross_validation.predict(counts, labels, scheme, 7)[FOREST]
    found = dict(zip(scheme.cells, predicted, strict=True))
    train, test = scheme.folds["3"]
    pca = PCA(10, svd_solver="arpack", random_state=7).fit(counts.values[train])
    forest = RandomForestClassifier(random_state=7)
    forest.fit(pca.transform(counts.values[train]), labels[train].astype(str))
    expected = forest.predict(pca.transform(counts.values[test]))
    assert [found[row] for row in test] == expected.tolist()


@pytest.mark.usefixtures("small_forests")
def test_a_donor_is_predicted_from_the_others_alone(rng: np.random.Generator) -> None:
    labels = np.array((["a", "b"] * 30) + ["only one has it"] * 6, object)
    donors = np.array(["x", "y", "z"] * 20 + ["x"] * 6, object)
    donors[7] = ""
    scheme = cross_validation.by_donor(labels, donors, np.arange(66))
    assert isinstance(scheme, Scheme)
    assert sorted(scheme.folds) == ["x", "y", "z"]
    assert scheme.left_out == {"only one has it": 6}
    assert 7 not in scheme.cells
    for donor, (train, test) in scheme.folds.items():
        assert set(donors[test]) == {donor}
        assert donor not in set(donors[train])
    # What sets labels apart in x and z is the wrong way round in y: only its own cells know that.
    turned = (labels == "b") ^ (donors == "y")
    values = np.stack([turned, donors == "y"], axis=1).astype(np.float32)
    found = cross_validation.predict(Features("marks", values), labels, scheme, 0)[FOREST]
    is_y = donors[scheme.cells] == "y"
    assert not (found == labels[scheme.cells])[is_y].any()
    mixed = cross_validation.stratified(labels, (donors != "") & (labels != "only one has it"), 0)
    seen = cross_validation.predict(Features("marks", values), labels, mixed, 0)[FOREST]
    assert (seen == labels[mixed.cells]).all()


def test_labels_of_one_donor_each_are_no_scheme() -> None:
    labels, donors = (np.repeat(np.array(names, object), 10) for names in (["a", "b"], ["x", "y"]))
    refused = cross_validation.by_donor(labels, donors, np.arange(20))
    assert refused == "no two donors share two labels"


@pytest.mark.parametrize(("number", "is_scheme"), [(4, False), (5, True)])
def test_every_donor_leaves_the_neighbours_to_learn_from(number: int, is_scheme: bool) -> None:
    labels = np.array([*"ab" * 20, *"ababa"[:number]], object)
    donors = np.array([*"x" * 40, *"y" * number], object)
    found = cross_validation.by_donor(labels, donors, np.arange(len(labels)))
    assert isinstance(found, Scheme) == is_scheme
    assert is_scheme or found == "without donor x 4 cells are left to learn from, and 5 are needed"


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


def test_they_repeat_by_seed_and_few_donors_give_no_interval(rng: np.random.Generator) -> None:
    truth, found = predictions(rng, 100, 0.6)
    first, again, other = (Scores(truth, 50, seed).of(found, {}, truth) for seed in (3, 3, 4))
    assert first == again != other
    donors = np.tile(np.array(["a", "b", "c", "d"], object), 25)
    for scores in (Scores(truth, 0, 3), Scores(truth, 50, 0, donors)):
        assert "low" not in scores.of(found, {}, truth)["macro_f1"]
        assert "low" not in scores.gain(found, truth)
    donors[0] = "e"
    assert "low" in Scores(truth, 50, 0, donors).gain(found, truth)


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


def test_a_gain_is_that_over_the_other_method(rng: np.random.Generator) -> None:
    truth, found = predictions(rng, 300, 0.6)
    other = np.where(rng.random(300) < 0.9, truth, "a")
    scores = Scores(truth, 200, 0)
    gain = scores.gain(found, other)
    assert gain == scores.of(found, {}, other)["macro_f1_over_baseline"]
    mine, theirs = (f1_score(truth, each, average="macro") for each in (found, other))
    assert gain["value"] == mine - theirs
    assert gain["high"] < 0


OBS = {
    "Cell.Type": pd.Categorical(["T", "B", None, " T"] * 3),
    "Patient_ID": ["p1"] * 6 + ["p2"] * 6,
    "batch": np.arange(12),
}


def read(path: Path, label: str = "", donor: str = "", layer: Any = None) -> labelled.Labelled:
    return labelled.read(str(path), label, donor, InputOptions(layer=layer))


@pytest.fixture
def h5ad(rng: np.random.Generator, tmp_path: Path) -> Path:
    """12 cells with labels."""
    return write_h5ad(tmp_path / "a.h5ad", random_counts(rng, 12, 30), obs=dict(OBS))


def test_columns_are_found_by_usual_names_or_are_those_requested(h5ad: Path) -> None:
    found = read(h5ad)
    assert (found.label, found.donor) == ("Cell.Type", "Patient_ID")
    assert found.labels_N.tolist() == ["T", "B", "", "T"] * 3
    assert found.donors_N is not None
    assert found.donors_N.tolist() == OBS["Patient_ID"]
    assert found.names[3] == "c3"
    found = read(h5ad, "batch", "Cell.Type")
    assert found.labels_N.tolist() == [str(number) for number in range(12)]
    assert found.donor == "Cell.Type"


def test_columns_that_are_missing_or_of_one_donor(h5ad: Path, tmp_path: Path) -> None:
    plain = write_h5ad(tmp_path / "b.h5ad", np.ones((2, 3)), obs={"n": [1, 2]})
    obs = {"cell_type": ["a", "b"], "donor": ["d", "d"]}
    one = write_h5ad(tmp_path / "c.h5ad", np.ones((2, 3)), obs=obs)
    assert read(one).donors_N is None
    for path, request, error in (
        (h5ad, {"label": "x"}, r"no column 'x'; its columns: Cell\.Type, Patient_ID"),
        (h5ad, {"donor": "x"}, r"no column 'x'.*name one with `donor=`"),
        (plain, {}, r"no column called celltype, .*its columns: n.*name one with `label=`"),
        (one, {"donor": "donor"}, r"at least 2 donors, and names 1 \(d\)"),
    ):
        with pytest.raises(DataError, match=error):
            read(path, **request)


def test_counts_are_those_that_the_models_read(tmp_path: Path) -> None:
    counts = np.array([[1, 0, 3], [0, 2, 2]], np.float32)
    obs = {"cell_type": ["a", "b"]}
    path = write_h5ad(tmp_path / "b.h5ad", np.log1p(counts), obs=obs, layers={"counts": counts})
    found = read(path)
    np.testing.assert_array_equal(found.counts_NG.toarray(), counts)
    logs = labelled.log_counts(found.counts_NG, np.ones(2, bool))
    expected = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 10_000)
    np.testing.assert_allclose(logs.toarray(), expected, rtol=1e-6)
    np.testing.assert_array_equal(found.counts_NG.toarray(), counts)
    second = labelled.log_counts(found.counts_NG, np.array([False, True]))
    np.testing.assert_allclose(second.toarray(), expected * [[0], [1]], rtol=1e-6)
    empty = found.without_counts().counts_NG
    assert (empty.nnz, empty.shape) == (0, counts.shape)
    with pytest.raises(DataError, match=r"not a whole number.*`counts_layer=`"):
        read(path, layer="X")
