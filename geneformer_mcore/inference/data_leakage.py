"""What is told of cells that a model may have been trained on, before it is judged on them.

model, cells  ->  overlap  ->  Seen: what was compared, what was found, what nobody could tell
Seen          ->  facts (JSON)  |  notes  |  a refusal
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from geneformer_mcore.checkpoint.record import ORIGIN
from geneformer_mcore.config import Config
from geneformer_mcore.config.sections import Source
from geneformer_mcore.data.collate import truncate
from geneformer_mcore.data.counts_source import CountsSource, find_inputs
from geneformer_mcore.errors import DataError
from geneformer_mcore.inference.cells import CountedCells
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.progress import Progress, no_progress
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split.table import RandomSplit, SplitRule, SplitTable
from geneformer_mcore.types import NUM_SPECIALS, RaggedCells, TokenSource

# The cells that a model was trained on, wherever they still are, block by block.
#
# --training-store, if it holds them | the run's store | its files (data.source=counts)
#     ->  the rows of the train split  ->  blocks of cells, each with the data set it is of

BLOCK_CELLS = 8192


class NoTrainingCellsError(DataError):
    """The cells that a model was trained on are not to be had: nothing can be said."""


@dataclass(frozen=True)
class TrainingCells:
    """Rows start..stop-1 of a source, cut to the model's seq_length.

    name: what messages call them
    datasets: (start, stop) -> the data set of each of these rows; None if all are of one
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
        """All of them, block by block: (cells, object [cells], the data set of each)."""
        for first in range(self.start, self.stop, BLOCK_CELLS):
            last = min(first + BLOCK_CELLS, self.stop)
            datasets = self.datasets(first, last) if self.datasets else [""] * (last - first)
            cells = truncate(self.source.read(first, last), self.seq_length)
            yield cells, np.array(datasets, object)


def content_hash(store: Path) -> str:
    """Of the cells of a token store. Raises DataError if it is none."""
    return Manifest.load(store).content_hash


@contextmanager
def training_cells(model: Pretrained, store: Path | None = None) -> Iterator[TrainingCells]:
    """The cells that a model was trained on: those of the train split of its run's store or files.

    store: a token store that is taken in place of the run's, if it holds these very cells
    Raises NoTrainingCellsError where they are not to be had.
    """
    source = _open(model, store)
    try:
        name = source.name if isinstance(source, CountsSource) else str(source.path)
        _check_same(name, _content_hash(source), model)
        seq_length = model.config.data.seq_length
        start, stop = source.rows("train")
        yield TrainingCells(name, source, start, stop, seq_length, source.datasets)
    finally:
        source.close()


def _open(model: Pretrained, store: Path | None) -> CountsSource | TokenStore:
    if model.record.is_converted:
        raise NoTrainingCellsError(
            "its weights were converted, and do not say which cells made them"
        )
    data = model.config.data
    try:
        if store is not None and content_hash(store) == model.record.identity.content:
            return TokenStore.open(store)
        if data.source is Source.counts:
            return _counts(model.config, model)
        return TokenStore.open(data.store)
    except DataError as error:
        raise NoTrainingCellsError(str(error).rstrip(".")) from error


def _content_hash(source: CountsSource | TokenStore) -> str:
    if isinstance(source, CountsSource):
        return source.content_hash
    return source.manifest.content_hash


def _check_same(name: str, found: str, model: Pretrained) -> None:
    wanted = model.record.identity.content
    if found != wanted:
        raise NoTrainingCellsError(
            f"{name} holds other cells (content hash {found[:12]}) than those that the model was "
            f"trained on ({wanted[:12]})"
        )


def _counts(config: Config, model: Pretrained) -> CountsSource:
    data = config.data
    rule: SplitRule = SplitTable.load(data.split) if data.split else RandomSplit()
    return CountsSource(find_inputs(data.store), model.vocabulary, data.seq_length, rule)


# Whether cells that a model is judged on are among those that it was trained on, by content.
#
# ranked tokens  ->  genes that both sides know  ->  the first 128  ->  windows of 4 neighbours
# windows of a cell  x  windows of every training cell  ->  largest share in common  ->  same cell?
#
# Names, data set ids and the order of genes differ from one copy of a data set to the next, and
# genes are filtered; the order in which a cell expresses those that are left stays. Four genes in a
# row are one number (4 x 16 bits), so two windows are equal exactly when their genes are.
#
# Which genes a training cell could have is told by all training cells of its data set: one of them
# may have half the genes of another. Data sets that have nearly all that is asked for are compared
# together, any other by itself, or the genes that it lacks would break every window.
#
# Not found: cells whose counts were changed (ambient RNA taken out, reads aligned anew), cells of
# which fewer than 19 genes are left, and those of a data set of fewer than MIN_DATASET_CELLS
# training cells that also has fewer genes than the others.

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


Facts = dict[str, Any]
"""Of one model and the cells: plain JSON.

cells, of: found among the training cells, of those that were looked for
too_short_to_tell: of those that were not found, with too few genes in common with these
training_cells, training_cells_too_short: compared, and with too few genes to be compared
largest_share_of_others: of windows in common, where a cell was not found
pretraining_unknown: the model was fine-tuned, and of these cells alone anything is known
"""


def check(
    source: str,
    models: Mapping[str, Pretrained],
    open_cells: Callable[[Pretrained], CountedCells],
    store: Path | None,
    allow: bool,
    progress: Progress,
) -> tuple[dict[str, Facts | None], list[str]]:
    """({model: Facts, None where there was nothing to compare with}, notes).

    source: what messages call the cells;  open_cells: the cells for a model
    store: taken for those models that were trained on its cells
    Raises DataError for cells that a model was trained on, unless `allow`, and for a `store` that
    is none.
    """
    found: dict[str, Facts | None] = {}
    notes: list[str] = []
    given = content_hash(store) if store is not None else ""
    trained = {name: model for name, model in models.items() if model.initial_seed is None}
    if store is not None and given not in _contents(trained):
        notes.append(f"--training-store {store}: none of the models was trained on its cells.")
    for name, model in trained.items():
        notes += _origin(name, model)
        try:
            seen, where = _compare(model, open_cells, store, progress)
        except NoTrainingCellsError as error:
            found[name] = None
            notes.append(
                f"whether {name} was trained on these cells could not be checked: {error}. If it "
                "was, its figures flatter it. Remedy: --training-store STORE."
            )
            continue
        if seen["cells"] and not allow:
            raise DataError(_refusal(source, name, seen, where))
        found[name] = seen
        notes += _notes(name, seen)
    return found, notes


def _contents(models: Mapping[str, Pretrained]) -> set[str]:
    return {model.record.identity.content for model in models.values()}


def _origin(name: str, model: Pretrained) -> list[str]:
    """Of what came before the run."""
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
    """(what was found, where the training cells are)."""
    with ExitStack() as stack:
        training = stack.enter_context(training_cells(model, store))
        cells = open_cells(model)
        stack.callback(cells.close)
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
    """For the line of a model: how many cells it was trained on, as far as that could be told."""
    short, which = seen["too_short_to_tell"], "trained on"
    if seen["pretraining_unknown"]:
        which = "fine-tuned on, its pretraining not checked"
    told = seen["of"] - short
    if not told:
        return f"no cell has genes enough to tell whether it was {which}"
    unknown = f", {short:,} with too few genes to tell" if short else ""
    return f"{seen['cells']:,} of {told:,} cells {which}{unknown}"


def _notes(name: str, seen: Facts) -> list[str]:
    notes = []
    if seen["cells"]:
        notes.append(f"{_told(name, seen)}: its figures flatter it (--allow-overlap).")
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


def _told(name: str, seen: Facts) -> str:
    tuned = "fine-tuned" if seen["pretraining_unknown"] else "trained"
    return (
        f"{seen['cells']:,} of {seen['of']:,} cells are among the {seen['training_cells']:,} that "
        f"{name} was {tuned} on"
    )


def _refusal(source: str, name: str, seen: Facts, where: str) -> str:
    return (
        f"{source}: {_told(name, seen)} ({where}), by the order of their genes, whatever they are "
        "called: a model must be judged on cells that it has not seen. Remedy: give other cells, "
        "or a model that was trained without them; --allow-overlap judges it all the same."
    )
