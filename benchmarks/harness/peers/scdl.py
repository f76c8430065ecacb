"""bionemo-scdl: BioNeMo's memory-mapped rows, with torch's DataLoader and its own collation.

cells.h5ad   ->  SingleCellMemMapDataset  ->  row by row, uniformly shuffled  ->  torch CSR
tokens_h5ad  ->  the same (uint16)        ->  get_row                         ->  padded batch
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.harness.loader_cells import Prepared
from benchmarks.harness.peers import contestant


def scdl_counts(data: Prepared) -> None:
    """The raw counts as scdl's memory maps."""
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
        """The items of torch's DataLoader."""
        return self._data

    def collate(self, cells: list[Any]) -> Any:
        """A batch of items."""
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
    """Padded batches of its own items: tensors of (token, rank)."""

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
        return _Rows(self._data)

    def collate(self, cells: list[Any]) -> Any:
        return contestant.padded(cells, with_cls=False)


class _Rows:
    """The values of a row, without its columns."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._data.get_row(row)[0][0]
