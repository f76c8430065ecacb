"""No cell is predicted by what has seen it: neither its fold, nor its donor, nor the PCA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier

from geneformer_mcore.celltypes import cross_validation
from geneformer_mcore.celltypes.cross_validation import FOREST, Features, Scheme
from geneformer_mcore.errors import DataError

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
