"""Cell types predicted for cells that the classifier has not seen.

cells  ->  folds: 5, stratified by label | one per donor
training cells  ->  PCA (of counts)  ->  classifier  ->  predicted labels of the fold's other cells
                    ^ fitted in every fold anew: of the cells to predict it knows nothing
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse, stats
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from sklearn.model_selection import LeaveOneGroupOut, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.progress import Progress, no_progress

NUM_FOLDS = 5
NUM_COMPONENTS = 10
"""Of the card's baseline."""
NUM_NEIGHBOURS = 5
FOREST = "random forest"
"""The card's classifier."""
MOST_ITERATIONS = 5000
BY_DONOR = "leave one donor out"


@dataclass(frozen=True)
class Features:
    """What a classifier is given of the cells.

    values:     float32 [cells, features], a CSR matrix of log counts or an array of embeddings
    is_counts:  whether PCA comes first
    """

    name: str
    values: Any
    is_counts: bool = False


@dataclass(frozen=True)
class Scheme:
    """How cells are dealt: every cell of `cells` is predicted exactly once.

    cells:     int64, rows
    folds:     {name: (training rows, rows to predict)}, rows of the file
    left_out:  {label: cells} that are too few here
    """

    name: str
    cells: np.ndarray
    folds: dict[str, tuple[np.ndarray, np.ndarray]]
    left_out: dict[str, int]


def stratified(labels_N: np.ndarray, usable_N: np.ndarray, seed: int) -> Scheme:
    """5 folds with every label in each, as evenly as can be.

    Labels with fewer than 5 usable cells are left out. DataError if fewer than two are left.
    """
    counted = Counter(labels_N[usable_N])
    rare = {label: number for label, number in counted.items() if number < NUM_FOLDS}
    cells = np.flatnonzero(usable_N & ~np.isin(labels_N, list(rare)))
    found = sorted(set(labels_N[cells]))
    if len(found) < 2:
        raise DataError(
            f"at least 2 labels with {NUM_FOLDS} cells each are needed to tell them apart, and "
            f"there are {len(found)} ({', '.join(found) or 'none'}); {len(rare):,} labels have "
            "fewer. Remedy: name a coarser --label, or give more cells."
        )
    splitter = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    parts = splitter.split(cells, labels_N[cells])
    folds = {str(n + 1): (cells[train], cells[test]) for n, (train, test) in enumerate(parts)}
    return Scheme("stratified 5-fold", cells, folds, _sorted(rare))


def by_donor(labels_N: np.ndarray, donors_N: np.ndarray, cells: np.ndarray) -> Scheme | str:
    """Each donor predicted from the others, or a sentence that says why that cannot be.

    Of `cells` (rows) those without a donor are left out, and labels that one donor alone has: they
    could not be learned from others.
    """
    cells = cells[donors_N[cells] != ""]
    donors_of = {label: set(donors_N[cells][labels_N[cells] == label]) for label in set(labels_N)}
    lone = [label for label, donors in donors_of.items() if len(donors) == 1]
    counted = Counter(labels_N[cells])
    cells = cells[~np.isin(labels_N[cells], lone)]
    if len(set(donors_N[cells])) < 2 or len(set(labels_N[cells])) < 2:
        return "no two donors share two labels"
    parts = LeaveOneGroupOut().split(cells, groups=donors_N[cells])
    folds = {}
    for train, test in parts:
        folds[str(donors_N[cells[test[0]]])] = cells[train], cells[test]
    lonely = [donor for donor, (train, _) in folds.items() if len(set(labels_N[train])) < 2]
    if lonely:
        return f"without donor {lonely[0]} only one label is left"
    left_out = {label: counted[label] for label in lone}
    return Scheme(BY_DONOR, cells, folds, _sorted(left_out))


def classifiers(seed: int) -> dict[str, Callable[[], Any]]:
    """{name: makes it}, each with scikit-learn's settings but for what is said here."""
    cores = len(os.sched_getaffinity(0))
    return {
        FOREST: lambda: RandomForestClassifier(random_state=seed, n_jobs=cores),
        "logistic regression": lambda: make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=MOST_ITERATIONS)
        ),
        f"{NUM_NEIGHBOURS} nearest neighbours": lambda: KNeighborsClassifier(NUM_NEIGHBOURS),
    }


def predict(
    features: Features,
    labels_N: np.ndarray,
    scheme: Scheme,
    seed: int,
    progress: Progress = no_progress,
) -> Mapping[str, np.ndarray]:
    """{classifier: object [len(scheme.cells)], the label predicted for each of its cells}."""
    place = np.full(len(labels_N), -1)
    place[scheme.cells] = np.arange(len(scheme.cells))
    made = classifiers(seed)
    found = {name: np.full(len(scheme.cells), "", object) for name in made}
    for number, (train, test) in enumerate(scheme.folds.values()):
        progress(f"{features.name}, {scheme.name}", number, len(scheme.folds))
        seen, unseen = _in_fold(features, train, test, seed)
        for name, make in made.items():
            fitted = make().fit(seen, labels_N[train].astype(str))
            found[name][place[test]] = fitted.predict(unseen)
    return found


def _in_fold(
    features: Features, train: np.ndarray, test: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the classifier is given of both parts of a fold."""
    seen, unseen = features.values[train], features.values[test]
    if not features.is_counts:
        return seen, unseen
    pca = principal_components(seen, seed)
    return pca.transform(seen), pca.transform(unseen)


def principal_components(values: sparse.csr_matrix, seed: int) -> PCA:
    """Fitted to `values`, 10 of them, or as many as so few cells and genes have."""
    most = min(NUM_COMPONENTS, min(values.shape) - 1)
    return PCA(most, svd_solver="arpack", random_state=seed).fit(values)


def _sorted(counted: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


# How good predicted cell types are: scikit-learn's scores, with intervals by scipy's bootstrap.
#
# true, predicted of every cell  ->  macro F1, accuracy, F1 per label, confusion
# cells drawn anew, 1,000 times  ->  the same scores of each draw  ->  2.5 % and 97.5 % of them
# (or donors, each with all cells)
#
# The intervals say how much the scores depend on which cells, or donors, were judged. They do not
# know that the classifiers could have been trained on other cells.
#
# scikit-learn takes 5 ms to score 2,600 cells, which 1,000 draws of every method cannot wait for:
# the draws are scored by `draws_macro_f1`, all at once, which tests hold to be scikit-learn's
# score.

CONFIDENCE = 0.95
BATCH = 100
"""Draws that are scored together."""
MIN_DONORS = 5
"""Fewer give no interval: what could be drawn of them is too little to say how others differ."""


class Scores:
    """Scores of predictions for the same cells.

    labels: all true ones, sorted
    """

    def __init__(
        self, truth_N: np.ndarray, resamples: int, seed: int, donors_N: np.ndarray | None = None
    ) -> None:
        """truth_N: object, the true labels;  resamples: draws; 0 gives no intervals
        donors_N: object; donors are drawn then, and fewer than MIN_DONORS give no intervals
        """
        self.labels = sorted(set(truth_N))
        self._numbers = {label: number for number, label in enumerate(self.labels)}
        self._truth_N = self._codes(truth_N)
        self._resamples, self._seed = resamples, seed
        self._rows_of_donor: list[np.ndarray] = []
        if donors_N is not None:
            names = np.unique(donors_N.astype(str))
            self._rows_of_donor = [np.flatnonzero(donors_N == name) for name in names]
            self._resamples = resamples if len(names) >= MIN_DONORS else 0

    def of(
        self, predicted_N: np.ndarray, folds: Mapping[str, np.ndarray], baseline_N: np.ndarray
    ) -> dict[str, Any]:
        """Scores over all cells, and of each fold; those over all with {"value", "low", "high"}.

        folds: {name: places among the cells};  baseline_N: what another method predicted
        """
        truth, found, other = self._truth_N, self._codes(predicted_N), self._codes(baseline_N)
        per_label = f1_score(truth, found, average=None, zero_division=0)
        value, accuracy = macro_f1(truth, found), float(accuracy_score(truth, found))
        return {
            "macro_f1": {"value": value} | self._interval(self._f1, truth, found),
            "accuracy": {"value": accuracy} | self._interval(_accuracy, truth, found),
            "macro_f1_over_baseline": self._gain_of(truth, found, other),
            "folds": {
                name: {
                    "cells": len(places),
                    "macro_f1": macro_f1(truth[places], found[places]),
                    "accuracy": float(accuracy_score(truth[places], found[places])),
                }
                for name, places in folds.items()
            },
            "f1_of_label": dict(zip(self.labels, per_label.tolist(), strict=True)),
            "confusion": confusion_matrix(truth, found).tolist(),
        }

    def gain(self, predicted_N: np.ndarray, other_N: np.ndarray) -> dict[str, float]:
        """{"value", "low", "high"}: macro F1 of one method less that of another."""
        return self._gain_of(self._truth_N, self._codes(predicted_N), self._codes(other_N))

    def _gain_of(self, truth: np.ndarray, found: np.ndarray, other: np.ndarray) -> dict[str, float]:
        value = macro_f1(truth, found) - macro_f1(truth, other)
        return {"value": value} | self._interval(self._gain, truth, found, other)

    def _codes(self, labels_N: np.ndarray) -> np.ndarray:
        return np.array([self._numbers[label] for label in labels_N])

    def _f1(self, truth: np.ndarray, found: np.ndarray, axis: int = -1) -> np.ndarray:
        return draws_macro_f1(truth, found, len(self.labels))

    def _gain(
        self, truth: np.ndarray, found: np.ndarray, other: np.ndarray, axis: int = -1
    ) -> np.ndarray:
        return self._f1(truth, found) - self._f1(truth, other)

    def _interval(self, score: Callable[..., np.ndarray], *samples: np.ndarray) -> dict[str, float]:
        """{"low", "high"}: cells are drawn together with all that is said of them, or donors with
        all their cells."""
        if not self._resamples:
            return {}
        if self._rows_of_donor:
            score, samples = (
                self._over_donors(score, samples),
                (np.arange(len(self._rows_of_donor)),),
            )
        found = stats.bootstrap(
            samples,
            score,
            n_resamples=self._resamples,
            batch=BATCH,
            paired=True,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(self._seed),
        ).confidence_interval
        return {"low": float(found.low), "high": float(found.high)}

    def _over_donors(
        self, score: Callable[..., np.ndarray], samples: tuple[np.ndarray, ...]
    ) -> Callable[..., np.ndarray]:
        """The score of all cells of the donors whose numbers are drawn."""

        def of_draw(drawn: np.ndarray) -> np.ndarray:
            rows = np.concatenate([self._rows_of_donor[number] for number in drawn])
            return score(*(sample[rows] for sample in samples))

        return lambda drawn, axis=-1: np.apply_along_axis(of_draw, axis, drawn)


def macro_f1(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean over the labels that occur, as truth or as prediction: scikit-learn's own rule."""
    return float(f1_score(truth, found, average="macro", zero_division=0))


def draws_macro_f1(truth: np.ndarray, found: np.ndarray, num_labels: int) -> np.ndarray:
    """float64 [draws], `macro_f1` of every row of int64 [draws, cells], or of one of [cells]."""
    rows = np.atleast_2d(truth)
    draw = np.arange(len(rows))[:, None] * num_labels

    def per_label(labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
        places = (draw + labels)[kept]
        flat = np.bincount(places, minlength=len(rows) * num_labels)
        return flat.reshape(len(rows), num_labels)

    everywhere = np.ones(rows.shape, bool)
    guesses = np.atleast_2d(found)
    right = per_label(rows, rows == guesses)
    either = per_label(rows, everywhere) + per_label(guesses, everywhere)
    f1 = 2 * right / np.maximum(1, either)
    means = f1.sum(axis=1) / (either > 0).sum(axis=1)
    return means if np.ndim(truth) > 1 else means[0]


def _accuracy(truth: np.ndarray, found: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(truth == found, axis=-1)
