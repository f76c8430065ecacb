"""Writing a store: shuffled out of core, hashed, consolidated, and published whole.

    CellTable ...  ->  buckets on disk  ->  rows in order  ->  tokens + obs (SOMA), content hash
                   ->  one fragment each  ->  vocabulary.json, manifest.json  ->  rename

The rows of the finished store are a pure function of the set of cells: the order and the size of
the tables they come in, and the number of buckets, leave no trace.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_mcore import __version__
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.errors import DataError
from geneformer_mcore.store.buckets import CELLS_PER_BUCKET, Buckets
from geneformer_mcore.store.content_hash import ContentHash
from geneformer_mcore.store.layout import (
    OBS_COLUMNS,
    TOKENS,
    VOCABULARY_FILE,
    Manifest,
)
from geneformer_mcore.store.soma_io import SomaWriter
from geneformer_mcore.store.split import SPLITS, SplitRule
from geneformer_mcore.store.staging import StagedFolder

ROWS_PER_WRITE = 16_384
"""Rows written at a time, or more: a bucket is written whole."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, cells done, cells in all)."""


def no_progress(what: str, done: int, total: int) -> None:
    """Says nothing."""


class StoreWriter:
    """Writes one store; a context manager. Nothing is at `path` until `finish` returns.

    Cells come as Arrow tables with `schema`: `tokens` (large_binary: little-endian uint16, [CLS]
    first), obs' own columns except `split`, and the label columns.
    """

    def __init__(
        self,
        path: str | Path,
        vocabulary: Vocabulary,
        seq_length: int,
        split_rule: SplitRule,
        label_kinds: dict[str, pa.DataType],
        num_cells: int,
        overwrite: bool = False,
        cells_per_bucket: int = CELLS_PER_BUCKET,
    ) -> None:
        """num_cells: about how many will come, for the number of buckets."""
        self.vocabulary = vocabulary
        self.seq_length = seq_length
        self._split_rule = split_rule
        self._labels = label_kinds
        self._num_cells = num_cells
        self._cells_per_bucket = cells_per_bucket
        self._staged = StagedFolder(Path(path), overwrite)
        own = {name: kind for name, kind in OBS_COLUMNS.items() if name != "split"}
        self.schema = pa.schema({TOKENS: pa.large_binary(), **own, **label_kinds})

    def __enter__(self) -> StoreWriter:
        self._staged.__enter__()
        folder = self._staged.path / "buckets"
        try:
            self._buckets = Buckets(folder, self._num_cells, self._cells_per_bucket)
        except OSError:
            self._staged.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._staged.__exit__(kind, error, trace)

    def add(self, cells: pa.Table) -> None:
        """Takes in cells, in any order. Their split is assigned here."""
        cells = cells.select(self.schema.names).cast(self.schema)
        keys_N = cells["cell_key"].to_numpy()
        codes = self._split_rule.assign(keys_N, cells["dataset_id"].to_pylist())
        self._buckets.add(cells, codes)

    def finish(
        self,
        sources: Sequence[dict[str, Any]],
        skipped: dict[str, int],
        progress: Progress = no_progress,
    ) -> Manifest:
        """Writes all rows and publishes the store. DataError if there is no cell, or one twice."""
        num_cells = sum(self._buckets.cells_of_split.values())
        if num_cells == 0:
            raise DataError(
                f"no cell is left to store; skipped: {skipped or 'none'}. Remedy: check that the "
                "inputs hold counts of genes that are in the vocabulary."
            )
        folder = self._staged.path
        store = folder / "store"
        num_tokens, content_hash = self._write_rows(store, num_cells, progress)
        # The collection becomes the staged folder itself: its members are named relative to it.
        shutil.rmtree(folder / "buckets")
        for item in store.iterdir():
            item.rename(folder / item.name)
        store.rmdir()
        manifest = Manifest(
            cells=num_cells,
            tokens=num_tokens,
            rows=_row_ranges(self._buckets.cells_of_split),
            seq_length=self.seq_length,
            content_hash=content_hash,
            vocabulary_hash=self.vocabulary.checksum,
            labels={name: str(kind) for name, kind in self._labels.items()},
            split=self._split_rule.describe(),
            sources=list(sources),
            skipped=skipped,
            versions=_versions(),
        )
        self.vocabulary.save(folder / VOCABULARY_FILE)
        manifest.save(folder)
        self._staged.publish()
        return manifest

    def _write_rows(self, store: Path, num_cells: int, progress: Progress) -> tuple[int, str]:
        """(token ids written, content hash)."""
        obs_columns = {**OBS_COLUMNS, **self._labels}
        self._staged.check_room()
        writer = SomaWriter(store, num_cells, obs_columns)
        hasher = ContentHash()
        row = num_tokens = 0
        for cells in _gathered(self._buckets.sorted_tables()):
            hasher.update(cells)
            writer.write(row, cells[TOKENS], cells.select(list(obs_columns)))
            row += len(cells)
            num_tokens += int(np.sum(cells["n_tokens"].to_numpy(), dtype=np.int64))
            progress("writing rows", row, num_cells)
        writer.consolidate()
        return num_tokens, hasher.hexdigest()


def _gathered(tables: Iterator[tuple[str, pa.Table]]) -> Iterator[pa.Table]:
    """The tables with their split as a column, small ones joined: each write makes a fragment."""
    held: list[pa.Table] = []
    for split, cells in tables:
        held.append(cells.append_column("split", pa.array([split] * len(cells), pa.large_string())))
        if sum(map(len, held)) >= ROWS_PER_WRITE:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _row_ranges(cells_of_split: dict[str, int]) -> dict[str, list[int]]:
    stops = np.cumsum([cells_of_split[split] for split in SPLITS]).tolist()
    return {
        split: [stop - cells_of_split[split], stop]
        for split, stop in zip(SPLITS, stops, strict=True)
    }


def _versions() -> dict[str, str]:
    found = {"geneformer_mcore": __version__}
    for name in ("tiledbsoma", "numpy", "numba", "anndata", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
