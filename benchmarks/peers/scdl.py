"""bionemo-scdl: BioNeMo's memory-mapped rows, with torch's DataLoader and its own collation.

cells.h5ad   ->  SingleCellMemMapDataset  ->  row by row, uniformly shuffled  ->  torch CSR
tokens_h5ad  ->  the same (uint16)        ->  get_row                         ->  padded batch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.contestant import COUNTS, TOKENS, Contestant, shuffled_batches
from benchmarks.peers.padding import padded, sums_of_padded
from benchmarks.peers.token_files import tokens_h5ad
from benchmarks.side_by_side.prepared import Prepared


def scdl_counts(data: Prepared) -> None:
    """The raw counts as scdl's memory maps."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    target = str(data.place("scdl_counts"))
    SingleCellMemMapDataset(target, str(data.counts_file), use_X_not_raw=True).save()


def scdl_tokens(data: Prepared) -> None:
    """The tokens as scdl's memory maps: ranks in place of genes, token ids in place of counts."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    target, source = str(data.place("scdl_tokens")), str(data.place("tokens_h5ad"))
    SingleCellMemMapDataset(target, source, use_X_not_raw=True, data_dtype="uint16").save()


class _MemoryMapped(Contestant):
    package = "bionemo-scdl"
    folder = "scdl_counts"
    num_workers = 0

    def __init__(self, data: Prepared) -> None:
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

        self._data = SingleCellMemMapDataset(str(data.place(self.folder)))
        self._num_cells = len(data)

    def dataset(self) -> Any:
        """What torch's DataLoader takes its items from."""
        return self._data

    def collate(self, cells: list[Any]) -> Any:
        """A batch of items."""
        from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

        return collate_sparse_matrix_batch(cells)

    def epoch(self, number: int) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        batches = shuffled_batches(self._num_cells, number)
        # As with shuffle=True, but by an order that is known: batches do not name their cells.
        order: Sequence[list[int]] = [rows.tolist() for rows in batches]
        loader = DataLoader(
            self.dataset(),
            batch_sampler=order,
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )
        return zip(batches, loader, strict=True)

    def cells(self, batch: Any) -> np.ndarray:
        return batch[0]


class ScdlCounts(_MemoryMapped):
    """Batches are torch CSR tensors."""

    label = "bionemo-scdl, CSR collate"
    table = COUNTS
    formats = (scdl_counts,)

    def sums(self, batch: Any) -> np.ndarray:
        values, ends = batch[1].values().double(), batch[1].crow_indices().numpy()
        return np.add.reduceat(values.numpy(), ends[:-1])


class ScdlCountsTwoWorkers(ScdlCounts):
    """The same with two worker processes."""

    label = "bionemo-scdl, CSR collate, 2 workers"
    num_workers = 2


class ScdlTokenItems(_MemoryMapped):
    """Padded batches of its own items: tensors of (token, rank)."""

    label = "bionemo-scdl, items of (token, rank)"
    table = TOKENS
    formats = (tokens_h5ad, scdl_tokens)
    folder = "scdl_tokens"

    def collate(self, cells: list[Any]) -> Any:
        return padded([cell[0].numpy() for cell in cells], with_cls=False)

    def sums(self, batch: Any) -> np.ndarray:
        return sums_of_padded(batch[1])


class ScdlTokens(ScdlTokenItems):
    """Padded batches of token ids alone, by get_row: as lean as it can be had."""

    label = "bionemo-scdl, rows of token ids"

    def dataset(self) -> Any:
        return _Rows(self._data)

    def collate(self, cells: list[Any]) -> Any:
        return padded(cells, with_cls=False)


class _Rows:
    """The values of a row, without its columns."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._data.get_row(row)[0][0]
