"""Cross-validation of cell type classifiers, and their scores.

cells  ->  folds: 5, stratified by label | one per donor
training cells  ->  PCA (of counts)  ->  classifier  ->  predicted labels of the fold's other cells
                    both fitted in every fold to its training cells only
true, predicted labels  ->  macro F1, accuracy, F1 per label, confusion (scikit-learn)
1,000 resamples of cells, or of donors with all their cells  ->  95 % intervals (scipy's bootstrap)

Intervals cover the choice of evaluated cells or donors, not that of training cells. scikit-learn
needs 5 ms to score 2,600 cells, too long for 1,000 resamples of every method: `draws_macro_f1`
scores them at once; tests hold it equal to scikit-learn's score.
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
"""Of the model card's baseline."""
NUM_NEIGHBOURS = 5
FOREST = "random forest"
"""The model card's classifier."""
MOST_ITERATIONS = 5000
BY_DONOR = "leave one donor out"
CONFIDENCE = 0.95
BATCH = 100
"""Resamples that are scored together."""
MIN_DONORS = 5
"""Donors needed for an interval."""


@dataclass(frozen=True)
class Features:
    """Input of classifiers.

    values:     float32 [cells, features], a CSR matrix of log counts or an array of embeddings
    is_counts:  PCA comes first
    """

    name: str
    values: Any
    is_counts: bool = False


@dataclass(frozen=True)
class Scheme:
    """Folds of cells: every cell of `cells` is predicted exactly once.

    cells:     int64, rows of the file
    folds:     {name: (training rows, rows to predict)}
    left_out:  {label: cells} of labels that are too rare
    """

    name: str
    cells: np.ndarray
    folds: dict[str, tuple[np.ndarray, np.ndarray]]
    left_out: dict[str, int]


def stratified(labels_N: np.ndarray, usable_N: np.ndarray, seed: int) -> Scheme:
    """5 folds stratified by label. Labels with fewer than 5 usable cells are left out. Raises
    DataError if fewer than two remain."""
    counted = Counter(labels_N[usable_N])
    rare = {label: number for label, number in counted.items() if number < NUM_FOLDS}
    cells = np.flatnonzero(usable_N & ~np.isin(labels_N, list(rare)))
    found = sorted(set(labels_N[cells]))
    if len(found) < 2:
        raise DataError(
            f"at least 2 labels with {NUM_FOLDS} cells each are needed to tell them apart, and "
            f"there are {len(found)} ({', '.join(found) or 'none'}); {len(rare):,} labels have "
            "fewer. Remedy: name a coarser `label=`, or give more cells."
        )
    splitter = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    parts = splitter.split(cells, labels_N[cells])
    folds = {str(n + 1): (cells[train], cells[test]) for n, (train, test) in enumerate(parts)}
    return Scheme("stratified 5-fold", cells, folds, _sorted(rare))


def by_donor(labels_N: np.ndarray, donors_N: np.ndarray, cells: np.ndarray) -> Scheme | str:
    """A fold per donor, or the reason why that is impossible, as a sentence.

    Of `cells` (rows) those without a donor are left out, and labels of a single donor.
    """
    cells = cells[donors_N[cells] != ""]
    donors_of = {label: set(donors_N[cells][labels_N[cells] == label]) for label in set(labels_N)}
    lone = [label for label, donors in donors_of.items() if len(donors) == 1]
    counted = Counter(labels_N[cells])
    cells = cells[~np.isin(labels_N[cells], lone)]
    if len(set(donors_N[cells])) < 2 or len(set(labels_N[cells])) < 2:
        return "no two donors share two labels"
    parts = LeaveOneGroupOut().split(cells, groups=donors_N[cells])
    folds = {str(donors_N[cells[test[0]]]): (cells[train], cells[test]) for train, test in parts}
    lonely = [donor for donor, (train, _) in folds.items() if len(set(labels_N[train])) < 2]
    if lonely:
        return f"without donor {lonely[0]} only one label is left"
    donor, (least, _) = min(folds.items(), key=lambda fold: len(fold[1][0]))
    if len(least) < NUM_NEIGHBOURS:
        return (
            f"without donor {donor} {len(least):,} cells are left to learn from, and "
            f"{NUM_NEIGHBOURS} are needed"
        )
    left_out = {label: counted[label] for label in lone}
    return Scheme(BY_DONOR, cells, folds, _sorted(left_out))


def classifiers(seed: int) -> dict[str, Callable[[], Any]]:
    """{name: constructor}, with scikit-learn's defaults except as given."""
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
    constructors = classifiers(seed)
    found = {name: np.full(len(scheme.cells), "", object) for name in constructors}
    for number, (train, test) in enumerate(scheme.folds.values()):
        progress(f"{features.name}, {scheme.name}", number, len(scheme.folds))
        of_train, of_test = features.values[train], features.values[test]
        if features.is_counts:
            pca = principal_components(of_train, seed)
            of_train, of_test = pca.transform(of_train), pca.transform(of_test)
        for name, construct in constructors.items():
            fitted = construct().fit(of_train, labels_N[train].astype(str))
            found[name][place[test]] = fitted.predict(of_test)
    return found


def principal_components(values: sparse.csr_matrix, seed: int) -> PCA:
    """PCA fitted to `values`: 10 components, fewer for very few cells or genes."""
    most = min(NUM_COMPONENTS, min(values.shape) - 1)
    return PCA(most, svd_solver="arpack", random_state=seed).fit(values)


def _sorted(counted: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


class Scores:
    """Scores of predictions for the same cells. labels: all true ones, sorted."""

    def __init__(
        self, truth_N: np.ndarray, resamples: int, seed: int, donors_N: np.ndarray | None = None
    ) -> None:
        """truth_N: object, the true labels;  resamples: of the bootstrap; 0 gives no intervals
        donors_N: object, resampled instead of cells; below MIN_DONORS there are no intervals
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
        """Scores of all cells as {"value", "low", "high"}, and of each fold.

        folds: {name: positions among the cells};  baseline_N: labels predicted by another method
        """
        truth, found = self._truth_N, self._codes(predicted_N)
        per_label = f1_score(truth, found, average=None, zero_division=0)
        value, accuracy = macro_f1(truth, found), float(accuracy_score(truth, found))
        return {
            "macro_f1": {"value": value} | self._interval(self._f1, truth, found),
            "accuracy": {"value": accuracy} | self._interval(_accuracy, truth, found),
            "macro_f1_over_baseline": self.gain(predicted_N, baseline_N),
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
        """Macro F1 of one method less that of another, as {"value", "low", "high"}."""
        truth, found, other = self._truth_N, self._codes(predicted_N), self._codes(other_N)
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
        """{"low", "high"}; {} without intervals."""
        if not self._resamples:
            return {}
        if self._rows_of_donor:
            score = self._over_donors(score, samples)
            samples = (np.arange(len(self._rows_of_donor)),)
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
        """The score of all cells of the resampled donors."""

        def of_draw(drawn: np.ndarray) -> np.ndarray:
            rows = np.concatenate([self._rows_of_donor[number] for number in drawn])
            return score(*(sample[rows] for sample in samples))

        return lambda drawn, axis=-1: np.apply_along_axis(of_draw, axis, drawn)


def macro_f1(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean F1 of the labels that occur as truth or as prediction."""
    return float(f1_score(truth, found, average="macro", zero_division=0))


def draws_macro_f1(truth: np.ndarray, found: np.ndarray, num_labels: int) -> np.ndarray:
    """float64 [draws], `macro_f1` of every row of int64 [draws, cells], or of one of [cells]."""
    rows, guesses = np.atleast_2d(truth), np.atleast_2d(found)
    first = np.arange(len(rows))[:, None] * num_labels

    def per_label(labels: np.ndarray, kept: np.ndarray | slice = slice(None)) -> np.ndarray:
        flat = np.bincount((first + labels)[kept].ravel(), minlength=len(rows) * num_labels)
        return flat.reshape(len(rows), num_labels)

    right = per_label(rows, rows == guesses)
    either = per_label(rows) + per_label(guesses)
    f1 = 2 * right / np.maximum(1, either)
    means = f1.sum(axis=1) / (either > 0).sum(axis=1)
    return means if np.ndim(truth) > 1 else means[0]


def _accuracy(truth: np.ndarray, found: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(truth == found, axis=-1)
