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
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.progress import Progress, no_progress

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
