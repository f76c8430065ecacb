"""Hugging Face datasets: lists of token ids in Arrow files, as Geneformer's own tokeniser leaves.

permutation of all rows  ->  64 of them by one read (numpy format)  ->  padded batch
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.peers.contestant import TOKENS, Contestant, shuffled_batches
from benchmarks.peers.padding import padded, sums_of_padded
from benchmarks.peers.token_files import tokens_arrow
from benchmarks.side_by_side.prepared import Prepared


class HFArrow(Contestant):
    """torch's DataLoader over batches of row numbers, as its documentation advises for speed."""

    label = "Hugging Face datasets, Arrow, random rows"
    table = TOKENS
    package = "datasets"
    formats = (tokens_arrow,)
    num_workers = 0

    def __init__(self, data: Prepared) -> None:
        import datasets

        found = datasets.load_from_disk(data.place("tokens_arrow"))
        self._data = found.with_format("numpy")
        self._num_cells = len(data)

    def epoch(self, number: int) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        order = [rows.tolist() for rows in shuffled_batches(self._num_cells, number)]
        return iter(
            DataLoader(
                self._data,
                sampler=order,
                batch_size=None,
                collate_fn=_collate,
                num_workers=self.num_workers,
            )
        )

    def cells(self, batch: Any) -> np.ndarray:
        return np.asarray(batch[0])

    def sums(self, batch: Any) -> np.ndarray:
        return sums_of_padded(batch[1])


class HFArrowTwoWorkers(HFArrow):
    """The same with two worker processes."""

    label = "Hugging Face datasets, Arrow, random rows, 2 workers"
    num_workers = 2


def _collate(batch: Any) -> Any:
    return batch["row"], padded(batch["input_ids"])
