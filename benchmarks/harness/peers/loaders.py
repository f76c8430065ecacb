"""Every contestant of loader.py, peers in the way their documentation has them.

    tiledbsoma-ml  SOMA experiment of (cell, gene) or (cell, rank) -> ExperimentDataset: shuffled in
                   chunks of 64 cells, default I/O batches, no workers (sparse batches cannot cross)
    scDataset      BlockShuffling(64) -> 1,024 sorted rows -> fetch_callback -> batch_callback, over
                   whatever is read by row numbers; fetch_factor 16, prefetch_factor 17, two workers
    bionemo-scdl   memory-mapped rows, uniformly shuffled by torch's DataLoader, its own collation
    AnnData        permutation of all rows -> 64 of them, sorted -> X[rows] from the open file
    Hugging Face   permutation of all rows -> 64 of them by one read (numpy format) -> padded batch
    masks          padded tokens -> 15 % of the genes selected -> 80 % [MASK], 2 % a random gene

Importing this needs no peer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.harness.common import SEQ_LENGTH, VOCABULARY
from benchmarks.harness.loader_cells import Prepared
from benchmarks.harness.peers import contestant, ours
from benchmarks.harness.peers.tokenisers import HFTokeniser
from geneformer_mcore.types import CLS, MASK, NUM_SPECIALS, PAD


def token_experiment(data: Prepared) -> None:
    """The tokens as a SOMA experiment: ranks in place of genes, token ids in place of counts."""
    contestant.soma_of(data.place("token_experiment"), data.place("tokens_h5ad"))


class SomaSparse(contestant.Contestant):
    """Batches are (obs, CSR counts)."""

    label = "tiledbsoma-ml, sparse batches"
    table = contestant.COUNTS
    package = "tiledbsoma-ml"
    formats: ClassVar[contestant.Formats] = (contestant.experiment,)
    folder = "experiment"
    is_sparse = True

    def __init__(self, data: Prepared) -> None:
        import tiledbsoma
        from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

        self._experiment = tiledbsoma.Experiment.open(str(data.place(self.folder)))
        self._dataset = ExperimentDataset(
            self._experiment.axis_query(measurement_name="RNA"),
            layer_name="data",
            batch_size=contestant.BATCH_SIZE,
            shuffle=True,
            seed=contestant.SEED,
            return_sparse_X=self.is_sparse,
        )
        self._batches = experiment_dataloader(self._dataset)

    def epoch(self, number: int) -> Iterator[Any]:
        self._dataset.set_epoch(number)
        return ((obs, self.batch(counts)) for counts, obs in self._batches)

    def batch(self, counts: Any) -> Any:
        return counts

    def cells(self, batch: Any) -> np.ndarray:
        return batch[0]["soma_joinid"].to_numpy()


class SomaDense(SomaSparse):
    label = "tiledbsoma-ml, dense batches"
    is_sparse = False


class SomaTokenised(SomaSparse):
    """Raw counts, tokenised by the leaner of the HF-style tokenisers, and padded."""

    label = "tiledbsoma-ml on counts, then HF-style tokenising"
    table = contestant.TOKENS

    def __init__(self, data: Prepared) -> None:
        super().__init__(data)
        medians = data.vocabulary.medians_of_token
        self._tokeniser = HFTokeniser(data.token_of_column, medians, SEQ_LENGTH)

    def batch(self, counts: Any) -> Any:
        return contestant.padded(self._tokeniser.lean(counts))


class SomaTokens(SomaSparse):
    label = "tiledbsoma-ml, X of (cell, rank)"
    table = contestant.TOKENS
    formats = (contestant.tokens_h5ad, token_experiment)
    folder = "token_experiment"

    def batch(self, counts: Any) -> Any:
        return contestant.padded(np.split(counts.data, counts.indptr[1:-1]), with_cls=False)


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
        rows, cells = fetched
        return rows[places], contestant.padded([cells[place] for place in places])

    def epoch(self, number: int) -> Iterator[Any]:
        # It counts epochs by itself, in this process: an epoch is one pass over it.
        return iter(self._batches)


class BlocksOfCounts(_BlockShuffled):
    label = "scDataset on h5ad, blocks of 64"
    table = contestant.COUNTS

    def collection(self, data: Prepared) -> Any:
        import anndata

        is_counts = self.table == contestant.COUNTS
        file = data.counts_file if is_counts else data.place("tokens_h5ad")
        return anndata.read_h5ad(file, backed="r")

    def fetch(self, collection: Any, rows: np.ndarray) -> Any:
        return rows, collection.X[rows]

    def batch(self, fetched: Any, places: np.ndarray) -> Any:
        rows, counts = fetched
        return rows[places], counts[places]


class BlocksOfTokens(BlocksOfCounts):
    label = "scDataset on h5ad of (cell, rank)"
    table = contestant.TOKENS
    formats = (contestant.tokens_h5ad,)

    def batch(self, fetched: Any, places: np.ndarray) -> Any:
        rows, chosen = super().batch(fetched, places)
        return rows, contestant.padded(np.split(chosen.data, chosen.indptr[1:-1]), with_cls=False)


class BlocksOfArrow(_BlockShuffled):
    label = "scDataset on a Hugging Face data set"
    table = contestant.TOKENS
    formats = (contestant.tokens_arrow,)

    def collection(self, data: Prepared) -> Any:
        import datasets

        return datasets.load_from_disk(data.place("tokens_arrow")).with_format("numpy")

    def fetch(self, collection: Any, rows: np.ndarray) -> Any:
        return rows, collection[rows]["input_ids"]


class BlocksOfArray(_BlockShuffled):
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
    formats = (ours.store_of_tokens,)

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


def scdl_counts(data: Prepared) -> None:
    _memory_map(data.place("scdl_counts"), str(data.counts_file), use_X_not_raw=True).save()


def scdl_tokens(data: Prepared) -> None:
    """The tokens as scdl's memory maps: ranks in place of genes, token ids in place of counts."""
    known: Any = {"use_X_not_raw": True, "data_dtype": "uint16"}
    _memory_map(data.place("scdl_tokens"), str(data.place("tokens_h5ad")), **known).save()


def _memory_map(folder: Path, *source: str, **known: Any) -> Any:
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    return SingleCellMemMapDataset(str(folder), *source, **known)


class ScdlCounts(contestant.Contestant):
    """Batches are torch CSR tensors."""

    label = "bionemo-scdl, CSR collate"
    table = contestant.COUNTS
    package = "bionemo-scdl"
    formats: ClassVar[contestant.Formats] = (scdl_counts,)
    folder = "scdl_counts"

    def __init__(self, data: Prepared) -> None:
        self._data = _memory_map(data.place(self.folder))
        self._num_cells = len(data)

    def dataset(self) -> Any:
        return self._data

    def collate(self, cells: list[Any]) -> Any:
        from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

        return collate_sparse_matrix_batch(cells)

    def epoch(self, number: int) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        batches = contestant.shuffled_batches(self._num_cells, number)
        # As with shuffle=True, but by an order that is known: batches do not name their cells.
        order = [rows.tolist() for rows in batches]
        known: Any = {"batch_sampler": order, "num_workers": self.num_workers}
        loader = DataLoader(self.dataset(), collate_fn=self.collate, **known)
        return zip(batches, loader, strict=True)

    def sums(self, batch: Any) -> np.ndarray:
        if self.table == contestant.TOKENS:
            return super().sums(batch)
        values, ends = batch[1].values().double(), batch[1].crow_indices().numpy()
        return np.add.reduceat(values.numpy(), ends[:-1])


class ScdlTokenItems(ScdlCounts):
    label = "bionemo-scdl, items of (token, rank)"
    table = contestant.TOKENS
    formats = (contestant.tokens_h5ad, scdl_tokens)
    folder = "scdl_tokens"

    def collate(self, cells: list[Any]) -> Any:
        return contestant.padded([cell[0].numpy() for cell in cells], with_cls=False)


class ScdlTokens(ScdlTokenItems):
    """Padded batches of token ids alone, by get_row: as lean as it can be had."""

    label = "bionemo-scdl, rows of token ids"

    def dataset(self) -> Any:
        return range(self._num_cells)

    def collate(self, cells: list[Any]) -> Any:
        rows = [self._data.get_row(cell)[0][0] for cell in cells]
        return contestant.padded(rows, with_cls=False)


IGNORED = -100
_SELECTED, _MASKED, _RANDOM = 0.15, 0.8, 0.02


class BackedAnnData(contestant.Contestant):
    label = "anndata backed, random rows"
    table = contestant.COUNTS
    package = "anndata"

    def __init__(self, data: Prepared) -> None:
        import anndata

        self._matrix = anndata.read_h5ad(data.counts_file, backed="r").X
        self._num_cells = len(data)

    def epoch(self, number: int) -> Iterator[Any]:
        batches = map(np.sort, contestant.shuffled_batches(self._num_cells, number))
        return ((rows, self._matrix[rows]) for rows in batches)


class HFArrow(contestant.Contestant):
    """Lists of token ids in Arrow files, as Geneformer's own tokeniser leaves them; torch's
    DataLoader over batches of row numbers, as its documentation advises for speed."""

    label = "Hugging Face datasets, Arrow, random rows"
    table = contestant.TOKENS
    package = "datasets"
    formats = (contestant.tokens_arrow,)

    def __init__(self, data: Prepared) -> None:
        import datasets

        found = datasets.load_from_disk(data.place("tokens_arrow"))
        self._data = found.with_format("numpy")
        self._num_cells = len(data)

    def epoch(self, number: int) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        order = [rows.tolist() for rows in contestant.shuffled_batches(self._num_cells, number)]
        known: Any = {"batch_size": None, "num_workers": self.num_workers}
        return iter(DataLoader(self._data, sampler=order, collate_fn=self.collate, **known))

    def collate(self, batch: Any) -> Any:
        return batch["row"], contestant.padded(batch["input_ids"])


def masked(tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens as seen, labels: IGNORED where nothing is predicted) as a Hugging Face collator makes
    them: whole-batch calls, torch's own generator, one thread as in a worker. With it a peer's
    batch is as complete as ours, whose masks moreover depend on the cell and epoch alone."""
    torch.set_num_threads(1)
    probability = torch.full(tokens_BS.shape, _SELECTED)
    probability.masked_fill_((tokens_BS == PAD) | (tokens_BS == CLS), 0.0)
    selected = torch.bernoulli(probability).bool()
    labels = torch.where(selected, tokens_BS, IGNORED)
    hidden = torch.bernoulli(torch.full(tokens_BS.shape, _MASKED)).bool() & selected
    seen = tokens_BS.masked_fill(hidden, MASK)
    share = _RANDOM / (1 - _MASKED)  # of the selected that do not become [MASK]
    random = torch.bernoulli(torch.full(tokens_BS.shape, share)).bool() & selected & ~hidden
    genes = torch.randint(NUM_SPECIALS, VOCABULARY, tokens_BS.shape, dtype=tokens_BS.dtype)
    return torch.where(random, genes, seen), labels


def sums_of_masked(batch: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    """float64 [B]: the sum of each cell's true token ids."""
    seen, labels = batch
    return contestant.sums_of_padded(torch.where(labels == IGNORED, seen, labels))


class _Masked(contestant.Contestant):
    """Batches of padded tokens of the class named next, then masked."""

    def epoch(self, number: int) -> Iterator[Any]:
        batches: Iterator[Any] = super().epoch(number)  # type: ignore[safe-super]
        return ((rows, masked(tokens)) for rows, tokens in batches)

    def sums(self, batch: Any) -> np.ndarray:
        return sums_of_masked(batch[1])


class MaskedArray(_Masked, BlocksOfArray):
    label = "scDataset on a dense .npy, 2,048 per cell, then HF-style masks"


class MaskedScdl(_Masked, ScdlTokens):
    label = "bionemo-scdl, rows of token ids, then HF-style masks"


class MaskedArrow(_Masked, HFArrow):
    label = "Hugging Face datasets, Arrow, random rows, then HF-style masks"


CONTESTANTS: dict[str, type[contestant.Contestant]] = {
    "counts_soma_dense": SomaDense,
    "counts_soma_sparse": SomaSparse,
    "counts_backed": BackedAnnData,
    "counts_scdataset": BlocksOfCounts,
    "counts_scdataset_workers": contestant.two_workers(BlocksOfCounts),
    "counts_scdl": ScdlCounts,
    "counts_scdl_workers": contestant.two_workers(ScdlCounts),
    "ours_store": ours.FromStore,
    "ours_flat": ours.FromFlatCopy,
    "ours_h5ad": ours.FromH5ad,
    "ours_experiment": ours.FromExperiment,
    "soma_tokenised": SomaTokenised,
    "tokens_soma": SomaTokens,
    "tokens_scdataset": BlocksOfTokens,
    "tokens_scdataset_workers": contestant.two_workers(BlocksOfTokens),
    "tokens_scdataset_arrow": BlocksOfArrow,
    "tokens_scdataset_array": BlocksOfArray,
    "tokens_scdataset_our_store": BlocksOfOurStore,
    "tokens_scdl_items": ScdlTokenItems,
    "tokens_scdl": ScdlTokens,
    "tokens_arrow": HFArrow,
    "tokens_arrow_workers": contestant.two_workers(HFArrow),
    "masked_scdataset_array": MaskedArray,
    "masked_scdl": MaskedScdl,
    "masked_arrow": MaskedArrow,
}
"""In the order of the tables."""
