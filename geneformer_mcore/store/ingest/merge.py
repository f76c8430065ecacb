"""From the files of all units to a published store, bucket after bucket.

    one bucket of every unit  ->  label columns unified  ->  sorted, no cell twice  ->  + split
                              ->  tokens and obs (SOMA), content hash
    write_store: rows  ->  vocabulary.json, manifest.json  ->  rename

The rows are a pure function of the set of cells, independent of units. A thread gathers and sorts a
bucket while the one before it is written.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pyarrow as pa

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.progress import Progress, no_progress
from geneformer_mcore.store.ingest.buckets import sorted_cells
from geneformer_mcore.store.ingest.labels import unify_labels
from geneformer_mcore.store.ingest.plan import Recipe, UnitReader, UnitReport, remove_others
from geneformer_mcore.store.ingest.sources import Refusal
from geneformer_mcore.store.ingest.staging import StagedFolder
from geneformer_mcore.store.layout import (
    OBS_COLUMNS,
    TOKENS,
    VOCABULARY_FILE,
    ContentHash,
    Manifest,
    describe_files,
)
from geneformer_mcore.store.report import SourceReport, sum_skipped
from geneformer_mcore.store.soma_io import SomaWriter
from geneformer_mcore.store.split.table import SPLITS
from geneformer_mcore.version import __version__

ROWS_PER_WRITE = 8192
_FILES_KEPT_OPEN = 256


@dataclass(frozen=True)
class Merge:
    """Finished units in `folder`.

    units:  {name: report}, of at least one cell together
    kinds:  {label column: its type} of the store
    """

    folder: Path
    units: Mapping[str, UnitReport]
    num_buckets: int
    kinds: Mapping[str, pa.DataType]

    @property
    def cells_of_split(self) -> dict[str, int]:
        """Cells by split."""
        return {
            split: sum(unit.cells_of_split[split] for unit in self.units.values())
            for split in SPLITS
        }

    def write_rows(self, store: Path, progress: Progress) -> str:
        """Writes tokens and obs of a new store; its content hash.

        Raises DataError if two cells have the same dataset_id and cell_id.
        """
        num_cells = sum(self.cells_of_split.values())
        hasher, row = ContentHash(), 0
        with SomaWriter(store, num_cells, {**OBS_COLUMNS, **self.kinds}) as writer:
            for cells in _one_ahead(self._tables()):
                for start in range(0, len(cells), ROWS_PER_WRITE):
                    part = cells.slice(start, ROWS_PER_WRITE)
                    hasher.update(part)
                    writer.write(row, part)
                    row += len(part)
                    progress("writing rows", row, num_cells)
        return hasher.hexdigest()

    def _tables(self) -> Generator[pa.Table, None, None]:
        """The store's rows in order, a table per bucket, each in one chunk."""
        with ExitStack() as stack:
            readers = []
            for place, (name, report) in enumerate(self.units.items()):
                if report.cells_stored:
                    reader = UnitReader(self.folder, name, report, place < _FILES_KEPT_OPEN)
                    stack.callback(reader.close)
                    readers.append(reader)
            for code in range(len(SPLITS) * self.num_buckets):
                cells = self._gather(readers, code)
                if len(cells):
                    split = SPLITS[code // self.num_buckets]
                    cells = sorted_cells(cells)
                    column = pa.array([split] * len(cells), OBS_COLUMNS["split"])
                    yield cells.append_column("split", column)

    def _gather(self, readers: Sequence[UnitReader], code: int) -> pa.Table:
        # Units of sources with the same columns are joined first: most are, and casts cost time.
        batches: dict[pa.Schema, list[pa.RecordBatch]] = {}
        for reader in readers:
            try:
                batch = reader.read(code)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise DataError(
                    f"{reader.path}: cannot be read: {error}. Remedy: start the command again, the "
                    "unit is then done once more."
                ) from error
            if len(batch):
                batches.setdefault(reader.schema, []).append(batch)
        tables = [
            unify_labels(pa.Table.from_batches(parts), self.kinds) for parts in batches.values()
        ]
        if not tables:
            return pa.table({TOKENS: pa.array([], pa.large_binary())})
        return pa.concat_tables(tables).combine_chunks()


def _one_ahead(tables: Generator[pa.Table, None, None]) -> Iterator[pa.Table]:
    """The same tables, each prepared while the one before it is used."""
    with closing(tables), ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = thread.submit(next, tables, None)
            yield table


def write_store(
    staged: StagedFolder,
    merge: Merge,
    recipe: Recipe,
    reports: Sequence[SourceReport] = (),
    refusals: Sequence[Refusal] = (),
    progress: Progress = no_progress,
) -> Manifest:
    """Merges all units into the store and publishes it.

    Raises DataError if there is no cell, or one twice.
    """
    skipped = sum_skipped(report.skipped for report in reports)
    cells_of_split = merge.cells_of_split
    if not sum(cells_of_split.values()):
        remove_others(staged.units, [])
        raise DataError(
            f"no cell is left to store; skipped: {skipped or 'none'}. Remedy: check that the "
            "inputs hold counts of genes that are in the vocabulary."
        )
    # Rows take no more room than units, whose text is not compressed.
    staged.check_room(sum(unit.num_bytes for unit in merge.units.values()))
    content_hash = merge.write_rows(staged.store, progress)
    recipe.vocabulary.save(staged.store / VOCABULARY_FILE)
    manifest = Manifest(
        cells=sum(cells_of_split.values()),
        tokens=sum(unit.tokens for unit in merge.units.values()),
        rows=_row_ranges(cells_of_split),
        seq_length=recipe.seq_length,
        content_hash=content_hash,
        vocabulary_hash=recipe.vocabulary.checksum,
        labels={name: str(kind) for name, kind in merge.kinds.items()},
        split=recipe.split_rule.describe(),
        sources=[asdict(report) for report in reports],
        skipped=skipped,
        versions=_versions(),
        refused=[refusal.describe() for refusal in refusals],
        files=describe_files(staged.store),
    )
    manifest.save(staged.store)
    staged.publish()
    return manifest


def _row_ranges(cells_of_split: dict[str, int]) -> dict[str, tuple[int, int]]:
    stops = np.cumsum([cells_of_split[split] for split in SPLITS]).tolist()
    return {
        split: (stop - cells_of_split[split], stop)
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
