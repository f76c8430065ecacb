"""Shifts of many cells as one row per perturbation.

float32 [cells, perturbations and controls, COLUMNS]  ->  means, spread, p, q of those asked for
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from geneformer_mcore.downstream.controls import Controls, p_values
from geneformer_mcore.downstream.perturbations import GeneNames, Perturbation
from geneformer_mcore.model.shifts import COLUMNS

COPIED_VALUES = 1 << 22
"""Numbers that are copied as float64 at once, about."""


@dataclass(frozen=True)
class Tested:
    """asked: the perturbations asked for;  detected_P, in_sentence_P: int64, cells that have one of
    its genes counted, and in their sentence."""

    asked: list[Perturbation]
    detected_P: np.ndarray
    in_sentence_P: np.ndarray


def table(
    tested: Tested, names: GeneNames, controls: Controls, values_NPC: np.ndarray, has_goal: bool
) -> pd.DataFrame:
    """A row per perturbation asked for, in that order, by its name.

    feature_ids, n_genes       of its genes
    n_detected, n_cells        cells with a count of one of them; cells that were perturbed
    shift, shift_sd            1 - cosine of the cell's vectors: mean over cells, their spread
    gene_shift                 the same of the states of the genes that stay, mean over genes
    control_shift, n_controls  mean of its controls' mean shifts; controls that are in a cell
    p, q                       of a shift as large as this among the controls', and by
                               Benjamini-Hochberg
    goal_shift, goal_shift_sd  cosine with the goal after, less that before: above 0 is toward it
    goal_p, goal_q             the same, two-sided
    """
    shift_NP, genes_NP, goal_NP = (values_NPC[:, :, number] for number in range(len(COLUMNS)))
    num_tested = len(tested.asked)
    shift_P, goal_P = _mean(shift_NP), _mean(goal_NP)
    p, q = p_values(shift_P, controls.of, two_sided=False)
    columns = {
        "feature_ids": [" ".join(map(names.id_of, each.tokens)) for each in tested.asked],
        "n_genes": [len(each.tokens) for each in tested.asked],
        "n_detected": tested.detected_P,
        "n_cells": (~np.isnan(shift_NP[:, :num_tested])).sum(axis=0),
        "shift": shift_P[:num_tested],
        "shift_sd": _spread(shift_NP[:, :num_tested]),
        "gene_shift": _mean(genes_NP[:, :num_tested]),
        "control_shift": [float(_mean(shift_P[mine][:, None])[0]) for mine in controls.of],
        "n_controls": [int((~np.isnan(shift_P[mine])).sum()) for mine in controls.of],
        "p": p,
        "q": q,
    }
    if has_goal:
        goal_p, goal_q = p_values(goal_P, controls.of, two_sided=True)
        columns |= {
            "goal_shift": goal_P[:num_tested],
            "goal_shift_sd": _spread(goal_NP[:, :num_tested]),
            "goal_p": goal_p,
            "goal_q": goal_q,
        }
    index = pd.Index([each.name for each in tested.asked], name="perturbation")
    return pd.DataFrame(columns, index=index)


def _mean(values_NP: np.ndarray) -> np.ndarray:
    """float64 [P], over what is not NaN; NaN where all is."""
    return _some_at_once(np.nanmean, values_NP)


def _spread(values_NP: np.ndarray) -> np.ndarray:
    return _some_at_once(partial(np.nanstd, ddof=1), values_NP)


def _some_at_once(of_columns: Callable[..., Any], values_NP: np.ndarray) -> np.ndarray:
    """Of float64 copies that are small beside the values."""
    size = max(1, COPIED_VALUES // max(1, len(values_NP)))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of means of nothing, spread of one cell
        for start in range(0, values_NP.shape[1], size):
            some_NP = values_NP[:, start : start + size].astype(np.float64)
            found.append(of_columns(some_NP, axis=0))
    return np.concatenate([np.empty(0), *found])
