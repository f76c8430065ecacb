"""Accuracy and F1 by scikit-learn from a table of counts [true, predicted] of all ranks' cells."""

from __future__ import annotations

from typing import Any

import numpy as np


def scores(counts_CC: np.ndarray) -> dict[str, float]:
    """accuracy: share of cells; macro_f1: mean over classes that occur, true or predicted.
    counts_CC: whole numbers, cells by true (row) and predicted class, one at least"""
    from sklearn import metrics

    true, predicted, weights = _pairs(counts_CC)
    accuracy = metrics.accuracy_score(true, predicted, sample_weight=weights)
    macro_f1 = metrics.f1_score(
        true, predicted, sample_weight=weights, average="macro", zero_division=0
    )
    return {"accuracy": float(accuracy), "macro_f1": float(macro_f1)}


def per_class(counts_CC: np.ndarray, classes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """{class: precision, recall, f1, cells}, 0 where nothing was predicted or is there."""
    from sklearn import metrics

    true, predicted, weights = _pairs(counts_CC)
    labels = np.arange(len(classes))
    *rates, cells = metrics.precision_recall_fscore_support(
        true, predicted, labels=labels, sample_weight=weights, zero_division=0
    )
    names = ("precision", "recall", "f1")
    return {
        name: dict(zip(names, map(float, of_class), strict=True)) | {"cells": round(number)}
        for name, number, *of_class in zip(classes, cells, *rates, strict=True)
    }


def majority(counts_CC: np.ndarray) -> dict[str, float]:
    """`scores` of always predicting the commonest class of these cells: the baseline."""
    always = np.zeros_like(counts_CC)
    always[:, counts_CC.sum(axis=1).argmax()] = counts_CC.sum(axis=1)
    return scores(always)


def _pairs(counts_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pair of classes that occurs, with its cells as weight."""
    true, predicted = np.nonzero(counts_CC)
    return true, predicted, counts_CC[true, predicted]
