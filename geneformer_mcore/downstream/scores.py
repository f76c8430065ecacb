"""How good predicted cell types are: scikit-learn's scores, with intervals by scipy's bootstrap.

true, predicted of every cell  ->  macro F1, accuracy, F1 per label, confusion
cells drawn anew, 1,000 times  ->  the same scores of each draw  ->  2.5 % and 97.5 % of them
(or donors, each with all cells)

The intervals say how much the scores depend on which cells, or donors, were judged. They do not
know that the classifiers could have been trained on other cells.

scikit-learn takes 5 ms to score 2,600 cells, which 1,000 draws of every method cannot wait for: the
draws are scored by `draws_macro_f1`, all at once, which tests hold to be scikit-learn's score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

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
