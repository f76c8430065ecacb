"""Every contestant of loader.py, with those that are short: backed AnnData, Hugging Face, masks.

    AnnData       permutation of all rows -> 64 of them, sorted -> X[rows] from the open file
    Hugging Face  permutation of all rows -> 64 of them by one read (numpy format) -> padded batch
    masks         padded tokens -> 15 % of the genes selected -> 80 % [MASK], 2 % a random gene

Importing this needs no peer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.harness.common import VOCABULARY
from benchmarks.harness.loader_cells import Prepared
from benchmarks.harness.peers import contestant, ours, sc_dataset, scdl, soma_ml
from geneformer_mcore.types import CLS, MASK, NUM_SPECIALS, PAD

IGNORED = -100
_SELECTED, _MASKED, _RANDOM = 0.15, 0.8, 0.02


class BackedAnnData(contestant.Contestant):
    """Uniformly shuffled; a batch is (rows, CSR)."""

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
        """(rows, padded tokens)."""
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


class MaskedArray(_Masked, sc_dataset.BlocksOfArray):
    """scDataset over a dense array."""

    label = "scDataset on a dense .npy, 2,048 per cell, then HF-style masks"


class MaskedScdl(_Masked, scdl.ScdlTokens):
    """bionemo-scdl's rows."""

    label = "bionemo-scdl, rows of token ids, then HF-style masks"


class MaskedArrow(_Masked, HFArrow):
    """Hugging Face's own way from end to end: Arrow, collation, masks."""

    label = "Hugging Face datasets, Arrow, random rows, then HF-style masks"


CONTESTANTS: dict[str, type[contestant.Contestant]] = {
    "counts_soma_dense": soma_ml.SomaDense,
    "counts_soma_sparse": soma_ml.SomaSparse,
    "counts_backed": BackedAnnData,
    "counts_scdataset": sc_dataset.BlocksOfCounts,
    "counts_scdataset_workers": contestant.two_workers(sc_dataset.BlocksOfCounts),
    "counts_scdl": scdl.ScdlCounts,
    "counts_scdl_workers": contestant.two_workers(scdl.ScdlCounts),
    "ours_store": ours.FromStore,
    "ours_flat": ours.FromFlatCopy,
    "ours_h5ad": ours.FromH5ad,
    "ours_experiment": ours.FromExperiment,
    "soma_tokenised": soma_ml.SomaTokenised,
    "tokens_soma": soma_ml.SomaTokens,
    "tokens_scdataset": sc_dataset.BlocksOfTokens,
    "tokens_scdataset_workers": contestant.two_workers(sc_dataset.BlocksOfTokens),
    "tokens_scdataset_arrow": sc_dataset.BlocksOfArrow,
    "tokens_scdataset_array": sc_dataset.BlocksOfArray,
    "tokens_scdataset_our_store": sc_dataset.BlocksOfOurStore,
    "tokens_scdl_items": scdl.ScdlTokenItems,
    "tokens_scdl": scdl.ScdlTokens,
    "tokens_arrow": HFArrow,
    "tokens_arrow_workers": contestant.two_workers(HFArrow),
    "masked_scdataset_array": MaskedArray,
    "masked_scdl": MaskedScdl,
    "masked_arrow": MaskedArrow,
}
"""In the order of the tables."""
