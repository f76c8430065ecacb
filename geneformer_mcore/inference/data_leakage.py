"""Data leakage: cells of an evaluation that the model was trained on, found by content.

--training-store | the run's store | its files  ->  cells of the train split, in blocks
ranked tokens  ->  genes that both sides know  ->  the first 128  ->  windows of 4 neighbours
windows of a cell x windows of every training cell  ->  largest share in common  ->  same cell?
Overlap  ->  Facts (JSON)  |  notes  |  DataError

Names, data set ids and the order of genes differ between copies of a data set, and genes are
filtered; the order in which a cell expresses the remaining genes stays. Four tokens in a row are
one number (4 x 16 bits), so two windows are equal exactly when their genes are.

The genes that a training cell could have are those of all training cells of its data set: one cell
may have half the genes of another. Data sets with nearly all genes of the cells are compared
together, any other by itself, as the genes that it lacks would break every window.

Not found: cells with changed counts (ambient RNA removed, reads aligned again), cells of fewer than
19 common genes, and those of a data set of fewer than MIN_DATASET_CELLS training cells that also
has fewer genes than the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from geneformer_mcore.checkpoint.record import ORIGIN
from geneformer_mcore.config.sections import Source
from geneformer_mcore.data.collate import truncate
from geneformer_mcore.data.counts_source import CountsSource, find_inputs
from geneformer_mcore.errors import DataError, shown
from geneformer_mcore.inference.cells import CountedCells
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.progress import Progress, no_progress
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split.table import RandomSplit, SplitRule, SplitTable
from geneformer_mcore.types import NUM_SPECIALS, RaggedCells, TokenSource

BLOCK_CELLS = 8192
FIRST_GENES = 128
WINDOW = 4
"""Tokens of a window: as many uint16 as one uint64 holds."""
MIN_WINDOWS = 16
"""Of a cell that can be compared."""
SAME = 0.25
"""Share of windows in common, of the cell with fewer, from which two cells are the same."""
MOST_GENES = 0.95
"""Of the cells' first genes, by frequency: a data set with these counts as having all."""
MIN_DATASET_CELLS = 32
"""Training cells that reveal which genes their data set has."""


class NoTrainingCellsError(DataError):
    """The training cells of a model are not available."""


@dataclass(frozen=True)
class TrainingCells:
    """Rows start..stop-1 of a source, truncated to the model's seq_length.

    name:      in messages
    datasets:  (start, stop) -> the data set of each of these rows; None if all are of one
    """

    name: str
    source: TokenSource
    start: int
    stop: int
    seq_length: int
    datasets: Callable[[int, int], list[str]] | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def blocks(self) -> Iterator[tuple[RaggedCells, np.ndarray]]:
        """(cells, object [cells], the data set of each), block by block."""
        for first in range(self.start, self.stop, BLOCK_CELLS):
            last = min(first + BLOCK_CELLS, self.stop)
            datasets = self.datasets(first, last) if self.datasets else [""] * (last - first)
            cells = truncate(self.source.read(first, last), self.seq_length)
            yield cells, np.array(datasets, object)


@contextmanager
def training_cells(model: Pretrained, store: Path | None = None) -> Iterator[TrainingCells]:
    """The train split of the store or files that a model was trained on.

    store: a token store to use in place of the run's, if it holds the same cells
    Raises NoTrainingCellsError where they are not available.
    """
    with closing(_open(model, store)) as source:
        if isinstance(source, CountsSource):
            name, found = source.name, source.content_hash
        else:
            name, found = str(source.path), source.manifest.content_hash
        expected = model.record.identity.content
        if found != expected:
            raise NoTrainingCellsError(
                f"{name} holds other cells (content hash {found[:12]}) than those that the model "
                f"was trained on ({expected[:12]})"
            )
        seq_length = model.config.data.seq_length
        yield TrainingCells(name, source, *source.rows("train"), seq_length, source.datasets)


def _open(model: Pretrained, store: Path | None) -> CountsSource | TokenStore:
    if model.record.is_converted:
        raise NoTrainingCellsError(
            "its weights were converted, and do not say which cells made them"
        )
    data = model.config.data
    try:
        if store is not None and Manifest.load(store).content_hash == model.record.identity.content:
            return TokenStore.open(store)
        if data.source is not Source.counts:
            return TokenStore.open(data.store)
        rule: SplitRule = SplitTable.load(data.split) if data.split else RandomSplit()
        return CountsSource(find_inputs(data.store), model.vocabulary, data.seq_length, rule)
    except DataError as error:
        raise NoTrainingCellsError(str(error).rstrip(".")) from error


class Queries(Protocol):
    """The cells of the evaluation."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1."""
        ...


@dataclass(frozen=True)
class Overlap:
    """Result for every cell of the evaluation.

    same_N:        bool, among the training cells
    share_N:       float32, the largest share of windows in common with a training cell
    too_short_N:   bool, not found, with too few genes to be compared
    num_training:  training cells that were compared
    num_training_too_short: further ones with too few genes to be compared
    """

    same_N: np.ndarray
    share_N: np.ndarray
    too_short_N: np.ndarray
    num_training: int
    num_training_too_short: int


@dataclass(frozen=True)
class _Index:
    """The windows of a block of cells, of some genes only.

    first:    number of the first cell
    known_K:  uint64, all windows that occur, ascending
    of_KN:    1 where a cell has a window
    count_N:  windows of each cell
    """

    first: int
    known_K: np.ndarray
    of_KN: sparse.csr_matrix
    count_N: np.ndarray

    @classmethod
    def of(cls, first: int, cells: RaggedCells, both_V: np.ndarray) -> _Index:
        """Index `cells`, the first of which has the number `first`."""
        owners, windows = _windows(cells, both_V[None], np.zeros(len(cells), np.int64))
        known, rows = np.unique(windows, return_inverse=True)
        matrix = _matrix(rows, owners, (len(known), len(cells)))
        return cls(first, known, matrix, np.bincount(owners, minlength=len(cells)))

    def raise_shares(
        self, share_N: np.ndarray, owners: np.ndarray, windows: np.ndarray, of_block: np.ndarray
    ) -> None:
        """Raise share_N (in place) to the shares in common with a block of training cells.

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
    cells: Queries,
    has_gene_V: np.ndarray,
    training: TrainingCells,
    progress: Progress = no_progress,
) -> Overlap:
    """Find the training cells among `cells`.

    has_gene_V: bool [vocabulary size], the genes that the cells' file has, expressed or not
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


def _blocks(cells: Queries) -> Iterator[tuple[int, RaggedCells]]:
    """(number of the first cell, cells) of every block."""
    for first in range(0, len(cells), BLOCK_CELLS):
        yield first, cells.read(first, min(first + BLOCK_CELLS, len(cells)))


def _groups(
    cells: Queries, has_gene_V: np.ndarray, training: TrainingCells, progress: Progress
) -> tuple[dict[str, int], np.ndarray]:
    """({data set: its group}, bool [G, V], genes that both a group and the cells' file have)."""
    number_of, genes_DV, num_cells_D = _genes_of_datasets(training, has_gene_V, progress)
    union_GV = genes_DV.max(axis=0, keepdims=True, initial=False)
    often_V = np.zeros(len(has_gene_V), np.int64)
    for _, block in _blocks(cells):
        tokens, _ = _first_genes(block, union_GV, np.zeros(len(block), np.int64))
        often_V += np.bincount(tokens, minlength=len(often_V))
    lacks_D = genes_DV @ often_V < MOST_GENES * often_V.sum()
    alone_D = lacks_D & (num_cells_D >= MIN_DATASET_CELLS)
    genes_GV = np.concatenate([genes_DV[~alone_D].any(axis=0, keepdims=True), genes_DV[alone_D]])
    group_D = np.where(alone_D, np.cumsum(alone_D), 0)
    return {name: int(group_D[number]) for name, number in number_of.items()}, genes_GV


def _genes_of_datasets(
    training: TrainingCells, has_gene_V: np.ndarray, progress: Progress
) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """({data set: number}, bool [D, V], genes that both it and the cells' file have, int64 [D], its
    cells)."""
    number_of: dict[str, int] = {}
    genes_DV = np.zeros((0, len(has_gene_V)), bool)
    num_cells_D = np.zeros(0, np.int64)
    done = 0
    for block, datasets in training.blocks():
        progress("genes of training cells", done, len(training))
        done += len(block)
        numbers_N = np.array([number_of.setdefault(each, len(number_of)) for each in datasets])
        new = len(number_of) - len(genes_DV)
        genes_DV = np.pad(genes_DV, ((0, new), (0, 0)))
        num_cells_D = np.pad(num_cells_D, (0, new))
        genes_DV[np.repeat(numbers_N, block.lengths), block.tokens_T] = True
        num_cells_D += np.bincount(numbers_N, minlength=len(number_of))
    genes_DV[:, :NUM_SPECIALS] = False
    return number_of, genes_DV & has_gene_V, num_cells_D


def _first_genes(
    cells: RaggedCells, genes_GV: np.ndarray, groups_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, int64 cells): the first FIRST_GENES tokens of every cell among its group's genes."""
    owners = np.repeat(np.arange(len(cells)), cells.lengths)
    kept = genes_GV[groups_N[owners], cells.tokens_T]
    tokens, owners = cells.tokens_T[kept], owners[kept]
    first = np.searchsorted(owners, np.arange(len(cells)))
    is_first = np.arange(len(owners)) - first[owners] < FIRST_GENES
    return tokens[is_first], owners[is_first]


def _windows(
    cells: RaggedCells, genes_GV: np.ndarray, groups_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(int64 cell, uint64 window) of every window, of genes of its group; a cell has none twice, as
    it has no gene twice."""
    tokens, owners = _first_genes(cells, genes_GV, groups_N)
    last = max(0, len(tokens) - WINDOW + 1)
    windows = np.zeros(last, np.uint64)
    for shift in range(WINDOW):
        windows |= tokens[shift : shift + last].astype(np.uint64) << np.uint64(16 * shift)
    whole = owners[:last] == owners[WINDOW - 1 :][:last]
    return owners[:last][whole], windows[whole]


def _matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)


Facts = dict[str, Any]
"""Overlap of one model's training cells with the cells, as plain JSON.

cells, of:                 found among the training cells, and all cells of the evaluation
too_short_to_tell:         not found, with too few genes in common to be compared
training_cells, training_cells_too_short:  compared, and with too few genes to be compared
largest_share_of_others:   of windows in common, of cells that were not found
pretraining_unknown:       the model was fine-tuned, and only those cells were compared
"""


def check(
    source: str,
    models: Mapping[str, Pretrained],
    open_cells: Callable[[Pretrained], CountedCells],
    store: Path | None,
    allow: bool,
    progress: Progress,
) -> tuple[dict[str, Facts | None], list[str]]:
    """({model: Facts, None without training cells}, notes).

    source:      name of the cells in messages;  open_cells: the cells for a model
    store:       token store to use for the models that were trained on its cells
    Raises DataError for cells that a model was trained on, unless `allow`, and for a `store` that
    is none.
    """
    found: dict[str, Facts | None] = {}
    notes: list[str] = []
    trained = {name: model for name, model in models.items() if model.initial_seed is None}
    contents = {model.record.identity.content for model in trained.values()}
    if store is not None and Manifest.load(store).content_hash not in contents:
        moved = shown(f"`training_store={store}`")
        notes.append(f"{moved}: none of the models was trained on its cells.")
    for name, model in trained.items():
        notes += _origin(name, model)
        try:
            seen, where = _compare(model, open_cells, store, progress)
        except NoTrainingCellsError as error:
            found[name] = None
            notes.append(
                f"whether {name} was trained on these cells could not be checked: {error}. If it "
                f"was, its figures flatter it. Remedy: {shown('`training_store=STORE`')}."
            )
            continue
        if seen["cells"] and not allow:
            raise DataError(_refusal(source, name, seen, where))
        found[name] = seen
        notes += _notes(name, seen)
    return found, notes


def _origin(name: str, model: Pretrained) -> list[str]:
    """Notes on training before the run."""
    notes = []
    task = model.record.identity.task
    if task:
        pretrained = task.get("pretrained")
        began = f" it began with ({pretrained})" if pretrained else ""
        notes.append(
            f"{name} was fine-tuned, and only the cells of that were looked at: whether the "
            f"pretraining{began} has seen these cells was not checked. If it has, its figures "
            "flatter it. Remedy: judge the pretrained checkpoint, too."
        )
    if not model.record.is_converted and (model.folder.parent.parent / ORIGIN).is_file():
        notes.append(f"{name} began with converted weights: who knows which cells made them.")
    return notes


def _compare(
    model: Pretrained,
    open_cells: Callable[[Pretrained], CountedCells],
    store: Path | None,
    progress: Progress,
) -> tuple[Facts, str]:
    """(facts, name of the training cells)."""
    with training_cells(model, store) as training, closing(open_cells(model)) as cells:
        has_gene_V = np.zeros(model.vocabulary.size, bool)
        has_gene_V[cells.genes.token_of_column] = True
        seen = find(cells, has_gene_V, training, progress)
    return {
        "cells": int(seen.same_N.sum()),
        "of": len(seen.same_N),
        "too_short_to_tell": int(seen.too_short_N.sum()),
        "training_cells": seen.num_training,
        "training_cells_too_short": seen.num_training_too_short,
        "largest_share_of_others": float(seen.share_N[~seen.same_N].max(initial=0.0)),
        "pretraining_unknown": bool(model.record.identity.task),
    }, training.name


def summary(seen: Facts) -> str:
    """How many cells a model was trained on, for its line of the table."""
    short, which = seen["too_short_to_tell"], "trained on"
    if seen["pretraining_unknown"]:
        which = "fine-tuned on, its pretraining not checked"
    compared = seen["of"] - short
    if not compared:
        return f"no cell has genes enough to tell whether it was {which}"
    unknown = f", {short:,} with too few genes to tell" if short else ""
    return f"{seen['cells']:,} of {compared:,} cells {which}{unknown}"


def _notes(name: str, seen: Facts) -> list[str]:
    notes = []
    if seen["cells"]:
        allowed = shown("`allow_overlap=True`")
        notes.append(f"{_overlap_text(name, seen)}: its figures flatter it ({allowed}).")
    if seen["too_short_to_tell"]:
        notes.append(
            f"{seen['too_short_to_tell']:,} of {seen['of']:,} cells have too few genes in common "
            f"with the training cells of {name} to tell whether they are among them."
        )
    if seen["training_cells_too_short"]:
        notes.append(
            f"{seen['training_cells_too_short']:,} training cells of {name} have too few genes in "
            "common with these cells to be compared with them."
        )
    return notes


def _overlap_text(name: str, seen: Facts) -> str:
    tuned = "fine-tuned" if seen["pretraining_unknown"] else "trained"
    return (
        f"{seen['cells']:,} of {seen['of']:,} cells are among the {seen['training_cells']:,} that "
        f"{name} was {tuned} on"
    )


def _refusal(source: str, name: str, seen: Facts, where: str) -> str:
    return (
        f"{source}: {_overlap_text(name, seen)} ({where}), by the order of their genes, whatever "
        "they are called: a model must be judged on cells that it has not seen. Remedy: give other "
        "cells, or a model trained without them; `allow_overlap=True` judges it all the same."
    )
