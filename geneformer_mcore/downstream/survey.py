"""What the chosen cells hold: of every gene in how many sentences it stands, and how high.

chosen cells, one by one  ->  sums per gene of the vocabulary: only these are kept
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geneformer_mcore.downstream.chosen_cells import ChosenCells
from geneformer_mcore.downstream.perturbations import Sets


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
