"""Scores from a table of counts are scikit-learn's of the cells one by one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from geneformer_mcore.metrics import classified

COUNTS = np.array([[5, 1, 0, 0], [2, 0, 3, 0], [0, 0, 7, 0], [0, 0, 0, 0]])
"""Class 1 is never told right, class 3 does not occur."""


def test_scores() -> None:
    true, predicted = np.nonzero(COUNTS)
    times = COUNTS[true, predicted]
    labels, answers = np.repeat(true, times), np.repeat(predicted, times)
    found = classified.scores(COUNTS)
    assert found["accuracy"] == pytest.approx(12 / 18)
    expected = metrics.f1_score(labels, answers, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)


def test_each_class() -> None:
    found = classified.per_class(COUNTS, ("a", "b", "c", "d"))
    assert found["a"] == pytest.approx(
        {"precision": 5 / 7, "recall": 5 / 6, "f1": 10 / 13, "cells": 6}
    )
    assert found["b"] == {"precision": 0, "recall": 0, "f1": 0, "cells": 5}
    assert found["d"] == {"precision": 0, "recall": 0, "f1": 0, "cells": 0}


def test_the_commonest_class() -> None:
    found = classified.majority(COUNTS)
    assert found["accuracy"] == pytest.approx(7 / 18)
    assert found["macro_f1"] == pytest.approx(2 * 7 / 25 / 3)
    # The commonest true one, not the one that is predicted most.
    assert classified.majority(np.array([[1, 5], [0, 3]]))["accuracy"] == pytest.approx(6 / 9)
