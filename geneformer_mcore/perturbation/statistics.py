"""Statistics of perturbations: random controls, p and q.

chosen cells, one by one  ->  Survey: per gene, in how many cells it is and how high
genes of the chosen cells ->  strata: in as many cells (within a factor of two), as high up
perturbation  ->  strata of its genes  ->  as many genes drawn from the same strata  ->  controls
float32 [cells, perturbations and controls, COLUMNS]  ->  means  ->  p  ->  Benjamini-Hochberg q

The null hypothesis is about genes, not about cells: that a gene is like any other which is detected
in about as many cells and ranks about as high. Tests over cells (Wilcoxon's) ask whether a gene
differs from the average gene, which with enough cells every gene does. p = (1 + controls with at
least its effect) / (1 + controls), of Phipson and Smyth 2010, doi:10.2202/1544-6115.1585: no p is
0, and none is below 1 / (1 + controls).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from geneformer_mcore.inference.cells import ChosenCells
from geneformer_mcore.model.forward_only import DISPLACEMENT_COLUMNS
from geneformer_mcore.perturbation.perturbed_cells import Mode
from geneformer_mcore.perturbation.question import GeneNames, Perturbation, Sets, effect_key

RANK_BINS = 4
"""Most strata by rank of genes in about as many cells."""
UNSEEN = 0
"""The stratum of genes in no sentence."""
COPIED_VALUES = 1 << 22
"""Numbers that are copied as float64 at once, about."""


@dataclass(frozen=True)
class Survey:
    """Genes of the chosen cells, per token of the vocabulary (specials: 0).

    num_cells:      chosen cells with a known gene
    detected_V:     int64, cells with a count of it
    in_sentence_V:  int64, cells with it among their tokens
    rank_V:         float64, its mean rank there as a share of the cell: 0 first, 1 last; NaN in
                    none
    """

    num_cells: int
    detected_V: np.ndarray
    in_sentence_V: np.ndarray
    rank_V: np.ndarray

    @property
    def genes(self) -> np.ndarray:
        """int64, the tokens of any cell, ascending."""
        return np.flatnonzero(self.in_sentence_V)

    def most_common(self, number: int) -> list[int]:
        """The tokens of most cells; of equals those with the smaller id."""
        order = np.argsort(-self.in_sentence_V, kind="stable")
        return order[: min(number, len(self.genes))].tolist()


def survey(cells: ChosenCells, vocabulary_size: int) -> Survey:
    """Count the genes of the chosen cells, one cell at a time."""
    token_of_column = cells.cells.genes.token_of_column
    detected_V, in_sentence_V = (np.zeros(vocabulary_size, np.int64) for _ in range(2))
    ranks_V = np.zeros(vocabulary_size)
    num_cells = 0
    for cell in cells.counted(0, len(cells)):
        found = np.unique(token_of_column[cell.columns_E[cell.counts_E != 0]])
        detected_V[found[found > 0]] += 1
        genes = cell.tokens_T[1:].astype(np.int64)
        num_cells += len(genes) > 0
        in_sentence_V[genes] += 1
        ranks_V[genes] += np.arange(len(genes)) / max(1, len(genes) - 1)
    with np.errstate(invalid="ignore"):
        rank_V = ranks_V / in_sentence_V
    return Survey(num_cells, detected_V, in_sentence_V, rank_V)


def presence(cells: ChosenCells, sets: Sets) -> tuple[np.ndarray, np.ndarray]:
    """(cells with a count, cells with a token), int64 per perturbation: of any of its genes."""
    token_of_column = cells.cells.genes.token_of_column
    detected_P, in_sentence_P = (np.zeros(len(sets), np.int64) for _ in range(2))
    for cell in cells.counted(0, len(cells)):
        detected_P += sets.in_sentence(token_of_column[cell.columns_E[cell.counts_E != 0]])
        in_sentence_P += sets.in_sentence(cell.tokens_T)
    return detected_P, in_sentence_P


@dataclass(frozen=True)
class Controls:
    """all: the tested perturbations, then their controls;  of: for each tested one the numbers of
    its controls in `all` (int64)."""

    all: list[Perturbation]
    of: list[np.ndarray]


def strata(survey: Survey, least: int) -> np.ndarray:
    """int64 per token, the stratum of every gene: by the power of two of its number of cells, then
    by its mean rank in up to RANK_BINS ranges of equally many genes, at least `least` each; UNSEEN
    in no cell."""
    genes = survey.genes
    found = np.full(len(survey.in_sentence_V), UNSEEN, np.int64)
    detection = np.log2(survey.in_sentence_V[genes]).astype(np.int64)
    for level in np.unique(detection):
        members = genes[detection == level]
        bins = min(RANK_BINS, max(1, len(members) // max(1, least)))
        order = np.argsort(survey.rank_V[members], kind="stable")
        found[members[order]] = (
            1 + level * RANK_BINS + np.arange(len(members)) * bins // len(members)
        )
    return found


def draw(
    asked: list[Perturbation],
    survey: Survey,
    names: GeneNames,
    number: int,
    seed: int,
    first_gene: int,
    mode: Mode = Mode.overexpress,
) -> Controls:
    """Draw up to `number` controls for each perturbation; those of the same strata share theirs.

    A control that is also tested is perturbed once. None is its own control, and no set of genes is
    a control twice.

    first_gene:  the smallest token of a gene
    mode:        deleted genes in no cell have no controls; overexpressed ones have those like them
    """
    stratum_V = strata(survey, number + 1)
    stratum_V[:first_gene] = -1
    position = {
        effect_key(each.tokens, mode): where for where, each in reversed([*enumerate(asked)])
    }
    everything = list(asked)
    shared: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    of = []
    for perturbation in asked:
        kinds = tuple(sorted(stratum_V[list(perturbation.tokens)].tolist()))
        if kinds not in shared:
            has_any = mode is Mode.overexpress or set(kinds) != {UNSEEN}
            shared[kinds] = _drawn(kinds, stratum_V, number, seed) if has_any else []
        own = []
        for tokens in shared[kinds]:
            if set(tokens) == set(perturbation.tokens):
                continue
            key = effect_key(tokens, mode)
            if key not in position:
                position[key] = len(everything)
                name = " ".join(names.symbol(token) for token in tokens[:3])
                everything.append(Perturbation(name, tokens))
            own.append(position[key])
        of.append(np.array(own, np.int64))
    return Controls(everything, of)


def _drawn(
    kinds: tuple[int, ...], stratum_V: np.ndarray, number: int, seed: int
) -> list[tuple[int, ...]]:
    """Distinct sets with one gene of each of the strata `kinds`, each in one order: two orders of
    the same genes are one control, or p would be too small in small strata."""
    rng = np.random.default_rng([seed, len(kinds), *kinds])
    if len(kinds) == 1:
        members = np.flatnonzero(stratum_V == kinds[0])
        some = rng.choice(members, min(number, len(members)), replace=False)
        return [(int(token),) for token in np.sort(some)]
    found: dict[frozenset[int], tuple[int, ...]] = {}
    for _ in range(number):
        genes: list[int] = []
        for kind in sorted(set(kinds)):
            members = np.flatnonzero(stratum_V == kind)
            genes += rng.choice(members, kinds.count(kind), replace=False).tolist()
        found.setdefault(frozenset(genes), tuple(rng.permutation(genes).tolist()))
    return list(found.values())


def p_values(
    effects_P: np.ndarray, controls: Sequence[np.ndarray], two_sided: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(p, q), float64 per tested perturbation, NaN where its effect or that of all controls is.

    effects_P:  of Controls.all
    two_sided:  large and small effects; else large ones only
    """
    found = np.full(len(controls), np.nan)
    for number, mine in enumerate(controls):
        others, effect = effects_P[mine], effects_P[number]
        others = others[~np.isnan(others)]
        if np.isnan(effect) or not len(others):
            continue
        above = (1 + np.sum(others >= effect)) / (1 + len(others))
        below = (1 + np.sum(others <= effect)) / (1 + len(others))
        found[number] = min(1.0, 2 * min(above, below)) if two_sided else above
    return found, q_values(found)


def q_values(p_P: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's, of the p that are not NaN."""
    known = ~np.isnan(p_P)
    found = np.full(len(p_P), np.nan)
    if known.any():
        found[known] = stats.false_discovery_control(p_P[known], method="bh")
    return found


@dataclass(frozen=True)
class Tested:
    """asked: the requested perturbations;  detected_P, in_sentence_P: int64, cells with a count of
    any of its genes, and with any among their tokens."""

    asked: list[Perturbation]
    detected_P: np.ndarray
    in_sentence_P: np.ndarray


def table(
    tested: Tested, names: GeneNames, controls: Controls, values_NPC: np.ndarray, has_goal: bool
) -> pd.DataFrame:
    """A row per tested perturbation, in their order, by name.

    feature_ids, n_genes       of its genes
    n_detected, n_cells        cells with a count of any of them; perturbed cells
    shift, shift_sd            1 - cosine of the cell's vectors: mean over cells, their spread
    gene_shift                 the same of the states of the remaining genes, mean over genes
    control_shift, n_controls  mean of its controls' mean shifts; controls in any cell
    p, q                       of a shift as large among the controls', and by Benjamini-Hochberg
    goal_shift, goal_shift_sd  cosine with the goal after less before: above 0 is toward it
    goal_p, goal_q             the same, two-sided
    """
    shift_NP, genes_NP, goal_NP = (
        values_NPC[:, :, number] for number in range(len(DISPLACEMENT_COLUMNS))
    )
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
    """float64 [P], of the values that are not NaN."""
    return _some_at_once(np.nanmean, values_NP)


def _spread(values_NP: np.ndarray) -> np.ndarray:
    return _some_at_once(partial(np.nanstd, ddof=1), values_NP)


def _some_at_once(of_columns: Callable[..., Any], values_NP: np.ndarray) -> np.ndarray:
    """[P] `of_columns`, computed on float64 copies of some columns at a time."""
    size = max(1, COPIED_VALUES // max(1, len(values_NP)))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of means of nothing, spread of one cell
        for start in range(0, values_NP.shape[1], size):
            some_NP = values_NP[:, start : start + size].astype(np.float64)
            found.append(of_columns(some_NP, axis=0))
    return np.concatenate([np.empty(0), *found])
