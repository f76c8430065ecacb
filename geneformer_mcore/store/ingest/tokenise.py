"""Tokenising a unit of work: rows read, rank-encoded, and written by bucket.

    counts, block by block  ->  rank tokens  ->  cells with a known gene, their obs  ->  buckets
                            ->  the unit's file, its report

A unit that is there and sound is kept.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.io.h5ad import Counts
from geneformer_mcore.io.workers import Advance
from geneformer_mcore.store.ingest.buckets import bucket_codes, by_bucket
from geneformer_mcore.store.ingest.labels import label_columns
from geneformer_mcore.store.ingest.plan import (
    Recipe,
    Unit,
    UnitReport,
    read_sound_report,
    write_cells,
    write_report,
)
from geneformer_mcore.store.ingest.sources import assign_splits
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.layout import OBS_COLUMNS, TOKENS
from geneformer_mcore.store.split.table import SPLITS
from geneformer_mcore.tokenizer.rank_encoder import RankedCells, RankEncoder

EMPTY = "no counts"
NO_KNOWN_GENE = "no gene of the vocabulary"
ROWS_PER_BLOCK = 2048

_open: dict[str, Counts] = {}
"""The input that this process read last: its next unit is probably of the same one."""


@dataclass(frozen=True)
class Tokenising:
    """Writes one unit to `folder` (a workers.Work)."""

    recipe: Recipe
    num_buckets: int
    folder: Path

    def __call__(self, job: Unit, advance: Advance) -> UnitReport:
        """Raises DataError at values that are no counts or unreadable; OSError if writing fails."""
        report = read_sound_report(self.folder, job.name)
        if report is not None:
            advance(len(job))
            return report
        counts = _opened(job, self.recipe)
        unit = _UnitCells(job, self.recipe, counts)
        cells, splits_N = unit.read(advance)
        codes = bucket_codes(cells["cell_key"].to_numpy(), splits_N, self.num_buckets)
        order, starts = by_bucket(codes, self.num_buckets)
        cells = cells.take(pa.array(order)).combine_chunks()
        sha256, offsets = write_cells(self.folder, job.name, cells, starts)
        report = unit.report(sha256, offsets, np.bincount(splits_N, minlength=len(SPLITS)))
        write_report(self.folder, job.name, report)
        return report


def _opened(unit: Unit, recipe: Recipe) -> Counts:
    address = unit.source.address
    if address not in _open:
        close_inputs()
        _open[address] = recipe.options.open(unit.source.name)
    return _open[address]


def close_inputs() -> None:
    """Closes the input of this process' last unit."""
    while _open:
        with suppress(OSError):
            _open.popitem()[1].close()


@dataclass
class _UnitCells:
    """The cells of one unit, and the numbers of its report."""

    unit: Unit
    recipe: Recipe
    counts: Counts
    skipped: Counter[str] = field(default_factory=Counter)
    sums: np.ndarray = field(default_factory=lambda: np.zeros(2))
    cells_cut: int = 0

    def read(self, advance: Advance) -> tuple[pa.Table, np.ndarray]:
        """(cells to store, in one chunk; int8 code of each one's split)."""
        encoder = RankEncoder(self.recipe.vocabulary, self.recipe.seq_length)
        pieces = []
        for block in self.counts.blocks(ROWS_PER_BLOCK, self.unit.start, self.unit.stop):
            ranked = encoder.encode(block, self.unit.source.gene_map.token_of_column)
            kept_N = self._count(ranked)
            cells = self._table(block, ranked)
            pieces.append(cells if kept_N.all() else cells.filter(pa.array(kept_N)))
            advance(len(block))
        cells = pa.concat_tables(pieces).combine_chunks()
        datasets = cells["dataset_id"].to_pylist()
        self.datasets = sorted(set(datasets))
        self.lengths = np.bincount(cells["n_tokens"], minlength=self.recipe.seq_length + 1)
        keys_N, name = cells["cell_key"].to_numpy(), self.unit.source.name
        return cells, assign_splits(self.recipe.split_rule, keys_N, datasets, name)

    def _count(self, ranked: RankedCells) -> np.ndarray:
        """bool [N], the cells to keep; adds the block to the report's numbers."""
        is_empty_N, kept_N = ranked.n_genes_N == 0, ranked.n_known_N > 0
        self.skipped[EMPTY] += int(is_empty_N.sum())
        self.skipped[NO_KNOWN_GENE] += int((~kept_N & ~is_empty_N).sum())
        self.sums += ranked.n_counts_N.sum(), ranked.known_counts_N.sum()
        self.cells_cut += int((ranked.n_known_N > self.recipe.seq_length - 1).sum())
        return kept_N

    def _table(self, block: CountBlock, ranked: RankedCells) -> pa.Table:
        start, stop = block.start, block.start + len(block)
        obs = self.counts.read_obs(start, stop)
        cell_ids = [str(name) for name in obs.index]
        datasets = self.counts.read_dataset_ids(start, stop)
        own = {
            "cell_id": cell_ids,
            "dataset_id": datasets,
            "cell_key": cell_keys(datasets, cell_ids),
            "n_counts": ranked.n_counts_N,
            "n_genes": ranked.n_genes_N,
            "n_tokens": np.diff(ranked.offsets),
        }
        columns = {name: pa.array(values, OBS_COLUMNS[name]) for name, values in own.items()}
        labels = label_columns(obs, self.unit.source.kinds, str(self.unit))
        return pa.table({TOKENS: _token_column(ranked), **columns, **labels})

    def report(self, sha256: str, offsets: list[int], cells_of_split: np.ndarray) -> UnitReport:
        """The report, once `read` is done."""
        counts, known_counts = self.sums.tolist()
        return UnitReport(
            sha256=sha256,
            offsets=offsets,
            cells_in=len(self.unit),
            cells_of_split=dict(zip(SPLITS, cells_of_split.tolist(), strict=True)),
            tokens=int(np.arange(len(self.lengths)) @ self.lengths),
            skipped={reason: number for reason, number in self.skipped.items() if number},
            counts=counts,
            known_counts=known_counts,
            cells_cut=self.cells_cut,
            lengths=self.lengths.tolist(),
            datasets=self.datasets,
        )


def _token_column(ranked: RankedCells) -> pa.LargeBinaryArray:
    tokens = ranked.tokens_T.astype("<u2", copy=False)
    buffers = [None, pa.py_buffer(ranked.offsets * 2), pa.py_buffer(tokens)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(ranked), buffers)
