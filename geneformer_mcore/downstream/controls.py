"""Random genes to compare with, and how unlikely a perturbation's effect is among theirs.

genes of the chosen cells  ->  strata: in as many cells (within a factor of two), as high up
perturbation  ->  strata of its genes  ->  as many genes drawn from the same strata  ->  controls
mean effects of perturbation and controls  ->  p  ->  Benjamini-Hochberg q

The null hypothesis is about genes, not about cells: that a gene is like any other which is detected
in about as many cells and stands about as high. Tests over cells (Wilcoxon's) ask whether a gene
differs from the average gene, which with enough cells every gene does.
p = (1 + controls with at least its effect) / (1 + controls), of Phipson and Smyth 2010,
doi:10.2202/1544-6115.1585: no p is 0, and none is below 1 / (1 + controls).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from geneformer_mcore.downstream.perturbations import GeneNames, Perturbation, what_is_done
from geneformer_mcore.downstream.survey import Survey
from geneformer_mcore.downstream.variants import Mode

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
