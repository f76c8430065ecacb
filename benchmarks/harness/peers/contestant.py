"""A contestant of loader.py, and what peers need: shuffles, padding, the same tokens as files.

    tokens_h5ad   AnnData, X (cell, rank) -> token, CSR uint16, without [CLS] (0 is no entry)
    tokens_arrow  Hugging Face dataset: `input_ids`, a list of uint16 per cell, and `row`
    tokens_dense  numpy's own format, uint16 [cells, 2048], [PAD] after the last token

Rows are in source order in all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from benchmarks.harness.common import SEQ_LENGTH
from benchmarks.harness.loader_cells import Prepared
from geneformer_mcore.data.collate import padded_length
from geneformer_mcore.types import PAD

BATCH_SIZE = 64
SEED = 0
PAD_MULTIPLE = 64

COUNTS, TOKENS = "counts", "tokens"
"""The two tables: raw counts out, or padded batches of the same tokens."""


Formats: TypeAlias = tuple[Callable[[Prepared], None], ...]


class Contestant(ABC):
    """One row of a table. An instance is an open loader.

    label:    its name in tables
    table:    COUNTS, or TOKENS if its batches are padded token ids
    package:  the distribution whose version is shown; "" for ourselves
    num_workers: of torch's DataLoader, where it reads by one
    formats:  functions that make its files, each run once, in this order; a function writes to the
              place that has its own name
    """

    label: ClassVar[str]
    table: ClassVar[str]
    package: ClassVar[str] = ""
    num_workers: ClassVar[int] = 0
    formats: ClassVar[Formats] = ()

    @abstractmethod
    def __init__(self, data: Prepared) -> None:
        """Open it. What a first batch waits for and a second does not, happens here or then."""

    @abstractmethod
    def epoch(self, number: int) -> Iterator[Any]:
        """The batches of epoch `number`, shuffled; as a rule (rows, content)."""

    def cells(self, batch: Any) -> np.ndarray:
        """The names of a batch's cells: their source rows, unless `rows` maps them."""
        return np.asarray(batch[0])

    def sums(self, batch: Any) -> np.ndarray:
        """float64 [B]: of each cell, the sum of its counts, or of its token ids."""
        if self.table == TOKENS:
            return sums_of_padded(batch[1])
        return np.asarray(batch[1].sum(axis=1, dtype=np.float64)).ravel()

    def rows(self, cells: np.ndarray) -> np.ndarray:
        """int64: the source rows of the result of `cells`."""
        return cells


def two_workers(kind: type[Contestant]) -> type[Contestant]:
    """The same contestant with two worker processes."""
    changes = {"label": f"{kind.label}, 2 workers", "num_workers": 2}
    return type(f"{kind.__name__}TwoWorkers", (kind,), changes)


def shuffled_batches(num_cells: int, epoch: int) -> list[np.ndarray]:
    """Rows of a uniform shuffle, in batches, for those peers that are read by row number."""
    order = np.random.default_rng([SEED, epoch]).permutation(num_cells)
    return [order[start : start + BATCH_SIZE] for start in range(0, num_cells, BATCH_SIZE)]


def padded(cells: Sequence[np.ndarray], with_cls: bool = True) -> torch.Tensor:
    """int32 [B, S] by the rule of our own feed: [PAD] after the last token; S is the longest cell,
    rounded up to 64.

    with_cls: whether the lists start with [CLS]; if not, it is put in front
    """
    first = 0 if with_cls else 1
    width = padded_length(max(map(len, cells)) + first, PAD_MULTIPLE, SEQ_LENGTH)
    tokens = np.full((len(cells), width), PAD, dtype=np.int32)
    tokens[:, :first] = 0
    for row, cell in enumerate(cells):
        tokens[row, first : first + len(cell)] = cell
    return torch.from_numpy(tokens)


def sums_of_padded(tokens_BS: torch.Tensor) -> np.ndarray:
    """float64 [B]: the sum of each cell's token ids."""
    return (tokens_BS * (tokens_BS != PAD)).sum(1).double().numpy()


def tokens_h5ad(data: Prepared) -> None:
    import anndata

    lengths = np.diff(data.offsets)
    is_gene = np.ones(len(data.tokens_T), dtype=bool)
    is_gene[data.offsets[:-1]] = False
    starts = np.repeat(data.offsets[:-1], lengths)
    rank = (np.arange(len(data.tokens_T)) - starts - 1)[is_gene].astype(np.int32)
    indptr = data.offsets - np.arange(len(data) + 1)
    shape = (len(data), SEQ_LENGTH - 1)
    ranks = sparse.csr_matrix((data.tokens_T[is_gene], rank, indptr), shape=shape)
    names = pd.Index([f"c{row:08d}" for row in range(len(data))])
    genes = pd.Index([f"rank{number:04d}" for number in range(SEQ_LENGTH - 1)])
    cells = anndata.AnnData(ranks, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=genes))
    cells.write_h5ad(data.place("tokens_h5ad"))


def experiment(data: Prepared) -> None:
    """The raw counts as a SOMA experiment, with tiledbsoma's own settings."""
    soma_of(data.place("experiment"), data.counts_file)


def soma_of(target: Path, source: Path) -> None:
    import tiledbsoma.io

    tiledbsoma.io.from_h5ad(str(target), str(source), measurement_name="RNA")


def tokens_arrow(data: Prepared) -> None:
    """tokens_arrow, through Arrow without a copy."""
    import datasets
    import pyarrow as pa

    offsets = pa.array(data.offsets.astype(np.int32))
    cells = pa.ListArray.from_arrays(offsets, pa.array(np.asarray(data.tokens_T)))
    table = pa.table({"input_ids": cells, "row": np.arange(len(data))})
    datasets.Dataset(table).save_to_disk(data.place("tokens_arrow"))


def tokens_dense(data: Prepared) -> None:
    path, shape = data.place("tokens_dense"), (len(data), SEQ_LENGTH)
    target = np.lib.format.open_memmap(path, "w+", np.uint16, shape)
    place = np.arange(SEQ_LENGTH)
    for start in range(0, len(data), 1024):
        offsets = data.offsets[start : start + 1025]
        here = place < np.diff(offsets)[:, None]
        rows = np.full(here.shape, PAD, np.uint16)
        rows[here] = data.tokens_T[offsets[0] : offsets[-1]]
        target[start : start + len(rows)] = rows
    target.flush()
