"""A store of given token lists, written by the code that writes all stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from geneformer_mcore.store.ingest.buckets import bucket_codes, by_bucket
from geneformer_mcore.store.ingest.merge import Merge, write_store
from geneformer_mcore.store.ingest.plan import Recipe, UnitReport, write_cells
from geneformer_mcore.store.ingest.staging import StagedFolder
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.split.table import SPLITS, RandomSplit
from geneformer_mcore.tokenizer.genes import InputOptions
from tests.support.small_cells import vocabulary_of


def cells_table(cells: list[list[int]]) -> pa.Table:
    """Cells c0, c1, ... of dataset "d" as a unit holds them, with a label "number"."""
    ids = [f"c{number}" for number in range(len(cells))]
    lengths = np.array([len(cell) for cell in cells], dtype=np.int32)
    return pa.table(
        {
            "tokens": pa.array(
                [np.array(cell, "<u2").tobytes() for cell in cells], pa.large_binary()
            ),
            "cell_id": pa.array(ids, pa.large_string()),
            "dataset_id": pa.array(["d"] * len(cells), pa.large_string()),
            "cell_key": pa.array(cell_keys("d", ids)),
            "n_counts": pa.array(lengths * 2.0),
            "n_genes": pa.array(lengths - 1),
            "n_tokens": pa.array(lengths),
            "number": pa.array(range(len(cells)), pa.int64()),
        }
    )


def write_unit(
    folder: Path, name: str, cells: pa.Table, split: RandomSplit, num_buckets: int = 1
) -> UnitReport:
    """One finished unit."""
    keys_N, datasets = cells["cell_key"].to_numpy(), cells["dataset_id"].to_pylist()
    splits_N = split.assign(keys_N, datasets)
    order, starts = by_bucket(bucket_codes(keys_N, splits_N, num_buckets), num_buckets)
    cells = cells.take(pa.array(order)).combine_chunks()
    sha256, offsets = write_cells(folder, name, cells, starts)
    lengths = np.bincount(cells["n_tokens"].to_numpy(), minlength=8)
    counted = np.bincount(splits_N, minlength=3).tolist()
    return UnitReport(
        sha256=sha256,
        offsets=offsets,
        cells_in=len(cells),
        cells_of_split=dict(zip(SPLITS, counted, strict=True)),
        tokens=int(cells["n_tokens"].to_numpy().sum()),
        skipped={},
        counts=1.0,
        known_counts=1.0,
        cells_cut=0,
        lengths=lengths.tolist(),
        datasets=["d"],
    )


def write_small_store(
    path: Path, cells: list[list[int]], num_genes: int, seq_length: int
) -> Manifest:
    """A store of cells c0, c1, ...: 10 % for validation, 5 % for test."""
    split = RandomSplit(0.1, 0.05)
    recipe = Recipe(vocabulary_of(num_genes), seq_length, InputOptions(), split)
    with StagedFolder(path) as staged:
        report = write_unit(staged.units, "unit", cells_table(cells), split)
        merge = Merge(staged.units, {"unit": report}, 1, {"number": pa.int64()})
        return write_store(staged, merge, recipe)
