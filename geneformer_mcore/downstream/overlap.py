"""Whether cells that a model is judged on are among those that it was trained on, by content.

ranked tokens  ->  genes that both sides know  ->  the first 128  ->  windows of 4 neighbours
windows of a cell  x  windows of every training cell  ->  largest share in common  ->  same cell?

Names, data set ids and the order of genes differ from one copy of a data set to the next, and genes
are filtered; the order in which a cell expresses those that are left stays. Four genes in a row
are one number (4 x 16 bits), so two windows are equal exactly when their genes are. Of 2,638 cells
of 10x' PBMC 3k, from two sources with 32,738 and 13,714 genes, each shares 94 % to 100 % of its
windows with itself, and at most 2 % with any other cell of blood, marrow, heart or lung.

Not found: cells whose counts were changed (ambient RNA taken out, reads aligned anew), and cells of
which fewer than 19 genes are left. The genes of the training cells are those that occur in the
first GENES_FROM cells, which lie in a random order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from geneformer_mcore.config import Config
from geneformer_mcore.config.sections import Source
from geneformer_mcore.contracts import NUM_SPECIALS, RaggedCells, TokenSource
from geneformer_mcore.downstream.pretrained import Pretrained
from geneformer_mcore.errors import DataError
from geneformer_mcore.feed.batch import truncate
from geneformer_mcore.feed.counts_source import CountsSource, find_inputs
from geneformer_mcore.store.progress import Progress, no_progress
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split import RandomSplit, SplitRule
from geneformer_mcore.store.split_table import SplitTable


class NoTrainingCellsError(DataError):
    """The cells that a model was trained on are not to be had: nothing can be said."""


FIRST_GENES = 128
WINDOW = 4
"""Tokens of a window: as many uint16 as one uint64 holds."""
MIN_WINDOWS = 16
"""Cells with fewer cannot be told apart."""
SAME = 0.25
"""Share of windows in common, of the cell that has fewer, from which two cells are the same."""
BLOCK_CELLS = 8192
GENES_FROM = 131_072


@dataclass(frozen=True)
class Overlap:
    """What was found for every cell that was looked for.

    same_N:      bool, among the training cells
    share_N:     float32, the largest share of windows in common with a training cell
    too_short_N: bool, too few genes to tell
    num_training: training cells that they were compared with
    """

    same_N: np.ndarray
    share_N: np.ndarray
    too_short_N: np.ndarray
    num_training: int


@dataclass(frozen=True)
class TrainingCells:
    """Rows start..stop-1 of a source, cut to the model's seq_length.

    name: what messages call them
    """

    name: str
    source: TokenSource
    start: int
    stop: int
    seq_length: int

    def blocks(self, most: int) -> Iterator[RaggedCells]:
        """The first `most` of them, block by block."""
        stop = min(self.stop, self.start + most)
        for first in range(self.start, stop, BLOCK_CELLS):
            read = self.source.read(first, min(first + BLOCK_CELLS, stop))
            yield truncate(read, self.seq_length)


@contextmanager
def training_cells(model: Pretrained, store: Path | None = None) -> Iterator[TrainingCells]:
    """The cells that a model was trained on: those of the train split of its run's store or files.

    store: the run's token store, where it has moved
    Raises NoTrainingCellsError where they are not to be had.
    """
    source = _open(model, store)
    try:
        name = source.name if isinstance(source, CountsSource) else str(source.path)
        _check_same(name, _content_hash(source), model)
        yield TrainingCells(name, source, *source.rows("train"), model.config.data.seq_length)
    finally:
        source.close()


def _open(model: Pretrained, store: Path | None) -> CountsSource | TokenStore:
    if model.record.is_converted:
        raise NoTrainingCellsError(
            "its weights were converted, and do not say which cells made them"
        )
    data = model.config.data
    try:
        if store is None and data.source is Source.counts:
            return _counts(model.config, model)
        return TokenStore.open(store or data.store)
    except DataError as error:
        raise NoTrainingCellsError(str(error).rstrip(".")) from error


def _content_hash(source: CountsSource | TokenStore) -> str:
    if isinstance(source, CountsSource):
        return source.content_hash
    return source.manifest.content_hash


def _check_same(name: str, content_hash: str, model: Pretrained) -> None:
    wanted = model.record.identity.content
    if content_hash != wanted:
        raise NoTrainingCellsError(
            f"{name} holds other cells (content hash {content_hash[:12]}) than those that the "
            f"model was trained on ({wanted[:12]})"
        )


def _counts(config: Config, model: Pretrained) -> CountsSource:
    data = config.data
    rule: SplitRule = SplitTable.load(data.split) if data.split else RandomSplit()
    return CountsSource(find_inputs(data.store), model.vocabulary, data.seq_length, rule)


def find(
    cells: RaggedCells,
    has_gene_V: np.ndarray,
    training: TrainingCells,
    progress: Progress = no_progress,
) -> Overlap:
    """Which of `cells` are training cells.

    has_gene_V: bool [vocabulary size], the tokens of the genes that the cells' file has, expressed
    or not
    """
    seen_V = np.zeros(len(has_gene_V), bool)
    for block in training.blocks(GENES_FROM):
        seen_V[block.tokens_T] = True
    seen_V[:NUM_SPECIALS] = False
    both_V = seen_V & has_gene_V
    owners, windows = _windows(cells, both_V)
    known, columns = np.unique(windows, return_inverse=True)
    wanted = _matrix(owners, columns, (len(cells), len(known)))
    count_N = _row_sums(wanted)
    share_N = np.zeros(len(cells), np.float32)
    total = training.stop - training.start
    for number, block in enumerate(training.blocks(total)):
        progress("comparing with training cells", min(total, number * BLOCK_CELLS), total)
        np.maximum(share_N, _shares(wanted, count_N, known, block, both_V), out=share_N)
    return Overlap(share_N >= SAME, share_N, count_N < MIN_WINDOWS, total)


def _shares(
    wanted: sparse.csr_matrix,
    count_N: np.ndarray,
    known: np.ndarray,
    block: RaggedCells,
    both_V: np.ndarray,
) -> np.ndarray:
    """float32 [N]: with the training cell of `block` that has most in common."""
    share_N = np.zeros(wanted.shape[0], np.float32)
    owners, windows = _windows(block, both_V)
    if not len(known) or not len(windows):
        return share_N
    of_block = np.bincount(owners, minlength=len(block))
    columns = np.minimum(np.searchsorted(known, windows), len(known) - 1)
    is_known = known[columns] == windows
    shape = (len(block), len(known))
    common = (wanted @ _matrix(owners[is_known], columns[is_known], shape).T).tocoo()
    fewer = np.minimum(count_N[common.row], of_block[common.col])
    enough = fewer >= MIN_WINDOWS
    np.maximum.at(share_N, common.row[enough], (common.data[enough] / fewer[enough]))
    return share_N


def _windows(cells: RaggedCells, both_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cell int64, window uint64) of every window of every cell; none comes twice in a cell, since
    no gene does."""
    kept = both_V[cells.tokens_T]
    tokens = cells.tokens_T[kept].astype(np.uint64)
    owners = np.repeat(np.arange(len(cells)), cells.lengths)[kept]
    first = np.searchsorted(owners, np.arange(len(cells)))
    is_first = np.arange(len(owners)) - first[owners] < FIRST_GENES
    tokens, owners = tokens[is_first], owners[is_first]
    last = max(0, len(tokens) - WINDOW + 1)
    windows = np.zeros(last, np.uint64)
    for place in range(WINDOW):
        windows |= tokens[place : place + last] << np.uint64(16 * place)
    whole = owners[:last] == owners[WINDOW - 1 :][:last]
    return owners[:last][whole], windows[whole]


def _matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)


def _row_sums(matrix: sparse.csr_matrix) -> np.ndarray:
    return np.diff(matrix.indptr)
