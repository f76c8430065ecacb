"""Whether cells that a model is judged on are among those that it was trained on, by content.

ranked tokens  ->  genes that both sides know  ->  the first 128  ->  windows of 4 neighbours
windows of a cell  x  windows of every training cell  ->  largest share in common  ->  same cell?

Names, data set ids and the order of genes differ from one copy of a data set to the next, and genes
are filtered; the order in which a cell expresses those that are left stays. Four genes in a row
are one number (4 x 16 bits), so two windows are equal exactly when their genes are.

Which genes a training cell could have is told by all training cells of its data set: one of them
may have half the genes of another. Data sets that have nearly all that is asked for are compared
together, any other by itself, or the genes that it lacks would break every window.

Not found: cells whose counts were changed (ambient RNA taken out, reads aligned anew), cells of
which fewer than 19 genes are left, and those of a data set of fewer than MIN_DATASET_CELLS training
cells that also has fewer genes than the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import sparse

from geneformer_mcore.contracts import NUM_SPECIALS, RaggedCells
from geneformer_mcore.downstream.training_cells import BLOCK_CELLS, TrainingCells
from geneformer_mcore.store.progress import Progress, no_progress

FIRST_GENES = 128
WINDOW = 4
"""Tokens of a window: as many uint16 as one uint64 holds."""
MIN_WINDOWS = 16
"""Cells with fewer cannot be told apart."""
SAME = 0.25
"""Share of windows in common, of the cell that has fewer, from which two cells are the same."""
MOST_GENES = 0.95
"""Of the cells' first genes, by how often they occur: a data set that has these has them all."""
MIN_DATASET_CELLS = 32
"""From fewer cells nobody can tell which genes their data set has."""


class Wanted(Protocol):
    """The cells that are looked for."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1."""
        ...


@dataclass(frozen=True)
class Overlap:
    """What was found for every cell that was looked for.

    same_N:      bool, among the training cells
    share_N:     float32, the largest share of windows in common with a training cell
    too_short_N: bool, not found, and too few genes to tell
    num_training: training cells that they were compared with
    num_training_too_short: training cells, besides, that have too few genes to tell
    """

    same_N: np.ndarray
    share_N: np.ndarray
    too_short_N: np.ndarray
    num_training: int
    num_training_too_short: int


@dataclass(frozen=True)
class _Index:
    """The windows of some of the cells, for one choice of genes.

    first:   the first cell
    known_K: uint64, all windows that occur, ascending
    of_KN:   1 where a cell has a window
    count_N: windows of each cell
    """

    first: int
    known_K: np.ndarray
    of_KN: sparse.csr_matrix
    count_N: np.ndarray

    @classmethod
    def of(cls, first: int, cells: RaggedCells, both_V: np.ndarray) -> _Index:
        """cells: those from the first on."""
        owners, windows = _windows(cells, both_V[None], np.zeros(len(cells), np.int64))
        known, rows = np.unique(windows, return_inverse=True)
        matrix = _matrix(rows, owners, (len(known), len(cells)))
        return cls(first, known, matrix, np.bincount(owners, minlength=len(cells)))

    def raise_shares(
        self, share_N: np.ndarray, owners: np.ndarray, windows: np.ndarray, of_block: np.ndarray
    ) -> None:
        """Raises those of share_N that training cells have more in common with.

        owners, windows: of training cells (see _windows);  of_block: windows of each of these
        """
        if not len(self.known_K):
            return
        rows = np.minimum(np.searchsorted(self.known_K, windows), len(self.known_K) - 1)
        is_known = self.known_K[rows] == windows
        block = _matrix(owners[is_known], rows[is_known], (len(of_block), len(self.known_K)))
        common = (block @ self.of_KN).tocoo()
        fewer = np.minimum(of_block[common.row], self.count_N[common.col])
        enough = fewer >= MIN_WINDOWS
        shares = common.data[enough] / fewer[enough]
        np.maximum.at(share_N, self.first + common.col[enough], shares.astype(np.float32))


def find(
    cells: Wanted,
    has_gene_V: np.ndarray,
    training: TrainingCells,
    progress: Progress = no_progress,
) -> Overlap:
    """Which of `cells` are training cells.

    has_gene_V: bool [vocabulary size], the tokens of the genes that the cells' file has, expressed
    or not
    """
    group_of, genes_GV = _groups(cells, has_gene_V, training, progress)
    indexes = [
        [_Index.of(first, block, both_V) for first, block in _blocks(cells)] for both_V in genes_GV
    ]
    share_N = np.zeros(len(cells), np.float32)
    compared_G = np.zeros(len(genes_GV), np.int64)
    done = 0
    for block, datasets in training.blocks():
        progress("comparing with training cells", done, len(training))
        done += len(block)
        groups_N = np.array([group_of[dataset] for dataset in datasets])
        owners, windows = _windows(block, genes_GV, groups_N)
        of_block = np.bincount(owners, minlength=len(block))
        compared_G += np.bincount(groups_N[of_block >= MIN_WINDOWS], minlength=len(genes_GV))
        for group in np.unique(groups_N):
            here = groups_N[owners] == group
            for index in indexes[group]:
                index.raise_shares(share_N, owners[here], windows[here], of_block)
    same_N, num_training = share_N >= SAME, int(compared_G.sum())
    too_short_N = np.full(len(cells), not num_training)
    for group in np.flatnonzero(compared_G):
        too_short_N |= np.concatenate([each.count_N for each in indexes[group]]) < MIN_WINDOWS
    return Overlap(
        same_N, share_N, too_short_N & ~same_N, num_training, len(training) - num_training
    )


def _blocks(cells: Wanted) -> Iterator[tuple[int, RaggedCells]]:
    """(first cell, block) of them all."""
    for first in range(0, len(cells), BLOCK_CELLS):
        yield first, cells.read(first, min(first + BLOCK_CELLS, len(cells)))


def _groups(
    cells: Wanted, has_gene_V: np.ndarray, training: TrainingCells, progress: Progress
) -> tuple[dict[str, int], np.ndarray]:
    """({data set: group}, bool [G, V], the genes that a group of them and the cells' file have)."""
    number_of, seen_DV, num_cells_D = _seen(training, has_gene_V, progress)
    union_GV = seen_DV.max(axis=0, keepdims=True, initial=False)
    often_V = np.zeros(len(has_gene_V), np.int64)
    for _, block in _blocks(cells):
        tokens, _ = _first_genes(block, union_GV, np.zeros(len(block), np.int64))
        often_V += np.bincount(tokens, minlength=len(often_V))
    lacks_D = seen_DV @ often_V < MOST_GENES * often_V.sum()
    alone_D = lacks_D & (num_cells_D >= MIN_DATASET_CELLS)
    genes_GV = np.concatenate([seen_DV[~alone_D].any(axis=0, keepdims=True), seen_DV[alone_D]])
    group_D = np.where(alone_D, np.cumsum(alone_D), 0)
    return {name: int(group_D[number]) for name, number in number_of.items()}, genes_GV


def _seen(
    training: TrainingCells, has_gene_V: np.ndarray, progress: Progress
) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """({data set: number}, bool [D, V], the genes of each that the cells' file has, too, int64 [D],
    the cells of each)."""
    number_of: dict[str, int] = {}
    seen_DV = np.zeros((0, len(has_gene_V)), bool)
    num_cells_D = np.zeros(0, np.int64)
    done = 0
    for block, datasets in training.blocks():
        progress("genes of training cells", done, len(training))
        done += len(block)
        numbers_N = np.array([number_of.setdefault(each, len(number_of)) for each in datasets])
        new = len(number_of) - len(seen_DV)
        seen_DV = np.concatenate([seen_DV, np.zeros((new, len(has_gene_V)), bool)])
        num_cells_D = np.concatenate([num_cells_D, np.zeros(new, np.int64)])
        seen_DV[np.repeat(numbers_N, block.lengths), block.tokens_T] = True
        num_cells_D += np.bincount(numbers_N, minlength=len(number_of))
    seen_DV[:, :NUM_SPECIALS] = False
    return number_of, seen_DV & has_gene_V, num_cells_D


def _first_genes(
    cells: RaggedCells, genes_GV: np.ndarray, groups_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, int64 cells): the first of every cell that are genes of its group."""
    owners = np.repeat(np.arange(len(cells)), cells.lengths)
    kept = genes_GV[groups_N[owners], cells.tokens_T]
    tokens, owners = cells.tokens_T[kept], owners[kept]
    first = np.searchsorted(owners, np.arange(len(cells)))
    is_first = np.arange(len(owners)) - first[owners] < FIRST_GENES
    return tokens[is_first], owners[is_first]


def _windows(
    cells: RaggedCells, genes_GV: np.ndarray, groups_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(cell int64, window uint64) of every window of every cell, of genes of its group; none comes
    twice in a cell, since no gene does."""
    tokens, owners = _first_genes(cells, genes_GV, groups_N)
    last = max(0, len(tokens) - WINDOW + 1)
    windows = np.zeros(last, np.uint64)
    for place in range(WINDOW):
        windows |= tokens[place : place + last].astype(np.uint64) << np.uint64(16 * place)
    whole = owners[:last] == owners[WINDOW - 1 :][:last]
    return owners[:last][whole], windows[whole]


def _matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)
