"""This project's own feed, over each of its sources, with the settings it has by default.

    store      SOMA token store, SHA-256 checked, spans and windows  ->  Feed  ->  masked, padded
    flat copy  made of the store once per node, checked when touched ->  the same
    counts     h5ad file or SOMA experiment, tokenised when read     ->  the same

A batch is complete: padded tokens with masks, places and labels; peers' batches are padded only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.harness.common import SEQ_LENGTH, step
from benchmarks.harness.loader_cells import Prepared
from benchmarks.harness.peers import contestant
from benchmarks.harness.step_cells import StepCells
from geneformer_mcore.config import Config
from geneformer_mcore.data.counts_source import MIN_SPAN_CELLS, CountsSource
from geneformer_mcore.data.loader import Feed
from geneformer_mcore.store import local_cache
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split.table import RandomSplit
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import Batch, TokenSource


def store_of_tokens(data: Prepared) -> None:
    """The token store, by the project's own command; all cells are training cells."""
    step(
        *("data_prep/build_store.py", "--out", data.place("store_of_tokens")),
        *("--vocabulary", data.vocabulary_file),
        *("--validation-fraction", "0", "--test-fraction", "0", data.counts_file),
    )


def flat_copy(data: Prepared) -> None:
    with TokenStore.open(data.place("store_of_tokens")) as store:
        _flat(store, data)


def _flat(store: TokenStore, data: Prepared) -> local_cache.FlatCopy:
    known = store.manifest
    return local_cache.ensure(store, known.content_hash, known.tokens, data.place("flat_copy"))


class FromStore(contestant.Contestant):
    label = "ours, SOMA token store"
    table = contestant.TOKENS
    formats: ClassVar[contestant.Formats] = (store_of_tokens,)

    def __init__(self, data: Prepared) -> None:
        self._data, self._feed = data, self.feed(data)

    def feed(self, data: Prepared) -> Feed:
        store = TokenStore.open(data.place("store_of_tokens"))
        return make_feed(store, store.vocabulary)

    def epoch(self, number: int) -> Iterator[Any]:
        stream: Any = self._feed.steps(number * len(self._data), Config().data.prefetch_steps)
        with closing(stream) as steps:
            for _ in range(len(self._data) // contestant.BATCH_SIZE):
                (batch,) = next(steps)
                yield batch

    def cells(self, batch: Batch) -> np.ndarray:
        return batch.keys_N

    def rows(self, cells: np.ndarray) -> np.ndarray:
        return self._data.rows_of(cells)

    def sums(self, batch: Batch) -> np.ndarray:
        tokens = batch.tokens_BS.clone()
        tokens.view(-1)[batch.selected_M] = batch.labels_M.to(tokens.dtype)
        return contestant.sums_of_padded(tokens)


class FromFlatCopy(FromStore):
    label = "ours, flat copy of it"
    formats = (store_of_tokens, flat_copy)

    def feed(self, data: Prepared) -> Feed:
        store = TokenStore.open(data.place("store_of_tokens"))
        return make_feed(_flat(store, data), store.vocabulary)


class FromH5ad(FromStore):
    label = "ours on the fly, counts in h5ad"
    formats: ClassVar[contestant.Formats] = ()

    def feed(self, data: Prepared) -> Feed:
        names = [str(self.counts(data))]
        source = CountsSource(names, data.vocabulary, SEQ_LENGTH, RandomSplit(0.0, 0.0))
        return make_feed(source, data.vocabulary, MIN_SPAN_CELLS)

    def counts(self, data: Prepared) -> Path:
        return data.counts_file


class FromExperiment(FromH5ad):
    """On the fly, from the very SOMA experiment of counts that tiledbsoma-ml reads."""

    label = "ours on the fly, counts in SOMA"
    formats = (contestant.experiment,)

    def counts(self, data: Prepared) -> Path:
        return data.place("experiment")


def make_feed(source: TokenSource, vocabulary: Vocabulary, span_cells: int = 0) -> Feed:
    """A feed as a run makes it: default spans and windows, the model card's masks."""
    config = Config()
    data, train = config.data, config.train
    train.global_batch_size = train.micro_batch_size = contestant.BATCH_SIZE
    train.seed, data.pad_multiple = contestant.SEED, contestant.PAD_MULTIPLE
    if span_cells:
        data.window_spans = max(1, data.window_spans * data.span_cells // span_cells)
        data.span_cells = span_cells
    return StepCells(source, config, vocabulary.size).feed(config)
