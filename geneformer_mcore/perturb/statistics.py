"""Shifts of many cells as one row per perturbation.

float32 [cells, perturbations and controls, COLUMNS]  ->  means, spread, p, q of those asked for
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
from geneformer_mcore.perturb.perturbed_cells import Mode
from geneformer_mcore.perturb.question import GeneNames, Perturbation, Sets, what_is_done

# What the chosen cells hold: of every gene in how many sentences it stands, and how high.
#
# chosen cells, one by one  ->  sums per gene of the vocabulary: only these are kept


@dataclass(frozen=True)
class Survey:
    """Of every token of the vocabulary (specials: 0), and of every perturbation asked for.

    num_cells:      chosen cells with a known gene
    detected_V:     int64, cells with a count of it
    in_sentence_V:  int64, cells in whose sentence it stands, as far as that goes
    rank_V:         float64, its mean place there as a share of the sentence: 0 first, 1 last; NaN
                    where it stands in none
    """

    num_cells: int
    detected_V: np.ndarray
    in_sentence_V: np.ndarray
    rank_V: np.ndarray

    @property
    def genes(self) -> np.ndarray:
        """int64, the tokens that stand in some sentence, ascending."""
        return np.flatnonzero(self.in_sentence_V)

    def most_common(self, number: int) -> list[int]:
        """The tokens that stand in most sentences; of equals those with the smaller id."""
        order = np.argsort(-self.in_sentence_V, kind="stable")
        return order[: min(number, len(self.genes))].tolist()


def survey(cells: ChosenCells, vocabulary_size: int) -> Survey:
    """Looks at every chosen cell once."""
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
    """(cells with a count, cells in whose sentence it stands), int64 per perturbation: of one of
    its genes, at least."""
    token_of_column = cells.cells.genes.token_of_column
    detected_P, in_sentence_P = (np.zeros(len(sets), np.int64) for _ in range(2))
    for cell in cells.counted(0, len(cells)):
        detected_P += sets.in_sentence(token_of_column[cell.columns_E[cell.counts_E != 0]])
        in_sentence_P += sets.in_sentence(cell.tokens_T)
    return detected_P, in_sentence_P


# Random genes to compare with, and how unlikely a perturbation's effect is among theirs.
#
# genes of the chosen cells  ->  strata: in as many cells (within a factor of two), as high up
# perturbation  ->  strata of its genes  ->  as many genes drawn from the same strata  ->  controls
# mean effects of perturbation and controls  ->  p  ->  Benjamini-Hochberg q
#
# The null hypothesis is about genes, not about cells: that a gene is like any other which is
# detected in about as many cells and stands about as high. Tests over cells (Wilcoxon's) ask
# whether a gene differs from the average gene, which with enough cells every gene does. p = (1 +
# controls with at least its effect) / (1 + controls), of Phipson and Smyth 2010,
# doi:10.2202/1544-6115.1585: no p is 0, and none is below 1 / (1 + controls).

RANK_BINS = 4
"""By how many ranges of its place in the sentence a range of detection is split, at most."""
UNSEEN = 0
"""The stratum of genes that stand in no sentence."""


@dataclass(frozen=True)
class Controls:
    """all: the perturbations asked for, then those that are only compared with;  of: for each one
    asked for the numbers of its controls among them (int64)."""

    all: list[Perturbation]
    of: list[np.ndarray]


def strata(survey: Survey, least: int) -> np.ndarray:
    """int64 per token, the stratum of every gene: by the power of two of the cells that it stands
    in, and within these by its mean place, in up to RANK_BINS ranges of equally many genes, as long
    as each has `least`. UNSEEN where it stands in none; -1 for the specials."""
    genes = survey.genes
    found = np.full(len(survey.in_sentence_V), UNSEEN, np.int64)
    detection = np.log2(survey.in_sentence_V[genes]).astype(np.int64)
    for level in np.unique(detection):
        members = genes[detection == level]
        bins = min(RANK_BINS, max(1, len(members) // max(1, least)))
        # Ranks of ranks: ranges of equally many genes, whatever the distribution.
        place = np.argsort(np.argsort(survey.rank_V[members], kind="stable"), kind="stable")
        found[members] = 1 + level * RANK_BINS + place * bins // len(members)
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
    """Up to `number` controls for each perturbation; those of the same strata share theirs.

    A gene that was asked for and is drawn as a control of another is perturbed once. None is its
    own control, and no set of genes is a control twice.

    first_gene:  the smallest token of a gene
    mode:        with delete, genes that stand in no sentence have no controls; else those of their
                 kind
    """
    unseen_too = mode is Mode.overexpress
    stratum_V = strata(survey, number + 1)
    stratum_V[:first_gene] = -1
    place = {
        what_is_done(each.tokens, mode): where for where, each in reversed([*enumerate(asked)])
    }
    everything = list(asked)
    shared: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    of = []
    for perturbation in asked:
        kinds = tuple(sorted(stratum_V[list(perturbation.tokens)].tolist()))
        if kinds not in shared:
            has_any = unseen_too or set(kinds) != {UNSEEN}
            shared[kinds] = _drawn(kinds, stratum_V, number, seed) if has_any else []
        mine = []
        for tokens in shared[kinds]:
            if set(tokens) == set(perturbation.tokens):
                continue
            done = what_is_done(tokens, mode)
            if done not in place:
                place[done] = len(everything)
                everything.append(Perturbation(_name(tokens, names), tokens))
            mine.append(place[done])
        of.append(np.array(mine, np.int64))
    return Controls(everything, of)


def _drawn(
    kinds: tuple[int, ...], stratum_V: np.ndarray, number: int, seed: int
) -> list[tuple[int, ...]]:
    """Different sets with one gene of each of the strata `kinds`, each in one order: the same genes
    in two orders are no two controls, or p would be too small where strata are."""
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


def _name(tokens: Sequence[int], names: GeneNames) -> str:
    return " ".join(names.symbol(token) for token in tokens[:3])


def p_values(
    effects_P: np.ndarray, controls: Sequence[np.ndarray], two_sided: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(p, q), float64 per perturbation asked for, NaN where it or all of its controls have no
    effect that is known.

    effects_P:  of everything in Controls.all
    two_sided:  effects may be large or small; else only large ones count
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
