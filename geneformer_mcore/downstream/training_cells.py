"""The cells that a model was trained on, wherever they still are, block by block.

--training-store, if it holds them | the run's store | its files (data.source=counts)
    ->  the rows of the train split  ->  blocks of cells, each with the data set it is of
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geneformer_mcore.config import Config
from geneformer_mcore.config.sections import Source
from geneformer_mcore.contracts import RaggedCells, TokenSource
from geneformer_mcore.downstream.pretrained import Pretrained
from geneformer_mcore.errors import DataError
from geneformer_mcore.feed.batch import truncate
from geneformer_mcore.feed.counts_source import CountsSource, find_inputs
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split import RandomSplit, SplitRule
from geneformer_mcore.store.split_table import SplitTable

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
