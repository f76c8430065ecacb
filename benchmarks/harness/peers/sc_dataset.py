"""scDataset: blocks of 64 cells in random order, 16 batches fetched at once and mixed.

    BlockShuffling(64)  ->  1,024 sorted rows  ->  fetch_callback reads them  ->  batch_callback

over whatever can be read by row numbers: an h5ad file of counts or of tokens, a Hugging Face data
set, a numpy array on disk, our own SOMA store. fetch_factor 16 and prefetch_factor 17 are what its
documentation uses; with worker processes there are as many as cores here, two.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from benchmarks.harness.loader_cells import Prepared
from benchmarks.harness.peers import contestant
from benchmarks.harness.peers.ours import store_of_tokens
from geneformer_mcore.types import PAD

BLOCK_CELLS, FETCH_FACTOR = 64, 16


class _BlockShuffled(contestant.Contestant):
    """Batches are (rows, result of the batch callback)."""

    package = "scDataset"

    def __init__(self, data: Prepared) -> None:
        from scdataset import BlockShuffling, scDataset
        from torch.utils.data import DataLoader

        sizes = {"batch_size": contestant.BATCH_SIZE, "fetch_factor": FETCH_FACTOR}
        callbacks = {"fetch_callback": self.fetch, "batch_callback": self.batch}
        strategy = BlockShuffling(block_size=BLOCK_CELLS)
        known = {"seed": contestant.SEED, **sizes, **callbacks}
        dataset = scDataset(self.collection(data), strategy, **known)
        ahead = FETCH_FACTOR + 1 if self.num_workers else None
        workers: Any = {"num_workers": self.num_workers, "prefetch_factor": ahead}
        self._batches = DataLoader(dataset, batch_size=None, **workers)

    @abstractmethod
    def collection(self, data: Prepared) -> Any:
        """The object that is read by row numbers."""

    @abstractmethod
    def fetch(self, collection: Any, rows: np.ndarray) -> Any:
        """(rows, the cells of the ascending `rows`)."""

    def batch(self, fetched: Any, places: np.ndarray) -> Any:
        """(rows, batch) of some of the fetched cells: lists of tokens."""
        rows, cells = fetched
        return rows[places], contestant.padded([cells[place] for place in places])

    def epoch(self, number: int) -> Iterator[Any]:
        # It counts epochs by itself, in this process: an epoch is one pass over it.
        return iter(self._batches)


class BlocksOfCounts(_BlockShuffled):
    """CSR counts from a backed h5ad file."""

    label = "scDataset on h5ad, blocks of 64"
    table = contestant.COUNTS

    def collection(self, data: Prepared) -> Any:
        import anndata

        return anndata.read_h5ad(data.counts_file, backed="r")

    def fetch(self, collection: Any, rows: np.ndarray) -> Any:
        return rows, collection.X[rows]

    def batch(self, fetched: Any, places: np.ndarray) -> Any:
        rows, counts = fetched
        return rows[places], counts[places]


class BlocksOfTokens(BlocksOfCounts):
    """Tokens from a backed h5ad file of (cell, rank)."""

    label = "scDataset on h5ad of (cell, rank)"
    table = contestant.TOKENS
    formats = (contestant.tokens_h5ad,)

    def collection(self, data: Prepared) -> Any:
        import anndata

        return anndata.read_h5ad(data.place("tokens_h5ad"), backed="r")

    def batch(self, fetched: Any, places: np.ndarray) -> Any:
        rows, chosen = super().batch(fetched, places)
        return rows, contestant.padded(np.split(chosen.data, chosen.indptr[1:-1]), with_cls=False)


class BlocksOfArrow(_BlockShuffled):
    """Tokens from a Hugging Face data set."""

    label = "scDataset on a Hugging Face data set"
    table = contestant.TOKENS
    formats = (contestant.tokens_arrow,)

    def collection(self, data: Prepared) -> Any:
        import datasets

        return datasets.load_from_disk(data.place("tokens_arrow")).with_format("numpy")

    def fetch(self, collection: Any, rows: np.ndarray) -> Any:
        return rows, collection[rows]["input_ids"]


class BlocksOfArray(_BlockShuffled):
    """Tokens from a dense array on disk, padded to 2,048: one fancy index per fetch."""

    label = "scDataset on a dense .npy, 2,048 per cell"
    table = contestant.TOKENS
    formats = (contestant.tokens_dense,)

    def collection(self, data: Prepared) -> Any:
        return np.load(data.place("tokens_dense"), mmap_mode="r")

    def fetch(self, collection: Any, rows: np.ndarray) -> Any:
        tokens = np.asarray(collection[rows])
        return rows, tokens, (tokens != PAD).sum(1)

    def batch(self, fetched: Any, places: np.ndarray) -> Any:
        rows, tokens, lengths = fetched
        cells = [tokens[place, : lengths[place]] for place in places]
        return rows[places], contestant.padded(cells)


class BlocksOfOurStore(_BlockShuffled):
    """Our SOMA store, read in its way: one read per block of 64 cells."""

    label = "scDataset on our SOMA store"
    table = contestant.TOKENS
    formats = (store_of_tokens,)

    def collection(self, data: Prepared) -> Any:
        from geneformer_mcore.store.reader import TokenStore

        self._data = data
        return TokenStore.open(data.place("store_of_tokens"))

    def fetch(self, collection: Any, rows: np.ndarray) -> Any:
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        blocks = [collection.read(int(run[0]), int(run[-1]) + 1) for run in runs]
        split = (np.split(block.tokens_T, block.offsets[1:-1]) for block in blocks)
        return np.concatenate([block.keys_N for block in blocks]), list(chain(*split))

    def rows(self, cells: np.ndarray) -> np.ndarray:
        return self._data.rows_of(cells)
