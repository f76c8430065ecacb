"""The out-of-core shuffle: cells go to files by their order key, and come back sorted by it.

    tables of cells, any order, any size
        ->  split and upper bits of the order key name a bucket  ->  appended to the bucket's file
        ->  bucket after bucket: read whole, sorted by (order key, dataset_id, cell_id)

Buckets are ranges of the order key, so the order that comes out is that of one sort over all cells:
it depends on the set of cells alone, not on the buckets' number nor on how the cells came in.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.keys import order_keys
from geneformer_mcore.store.split import SPLITS

CELLS_PER_BUCKET = 16_384
"""Expected cells of a bucket: about 60 MB in memory while it is sorted."""

CELLS_HELD = 32_768
"""Cells gathered in memory before they are appended to the buckets' files."""


class Buckets:
    """Cells on disk, by split and range of order key. Tables need the columns `cell_key`,
    `dataset_id` and `cell_id`, and all the same schema."""

    def __init__(
        self, folder: Path, num_cells: int, cells_per_bucket: int = CELLS_PER_BUCKET
    ) -> None:
        """folder: made, and used for the buckets' files; num_cells: about how many will come."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._num_buckets = max(1, -(-num_cells // cells_per_bucket))
        self._held: list[pa.Table] = []
        self._held_splits: list[np.ndarray] = []
        self._num_held = 0
        self.cells_of_split = dict.fromkeys(SPLITS, 0)

    def add(self, cells: pa.Table, split_codes: np.ndarray) -> None:
        """Takes in cells; split_codes: int8, one per row."""
        self._held.append(cells)
        self._held_splits.append(split_codes)
        self._num_held += len(cells)
        for code, split in enumerate(SPLITS):
            self.cells_of_split[split] += int((split_codes == code).sum())
        if self._num_held >= CELLS_HELD:
            self._flush()

    def sorted_tables(self) -> Iterator[tuple[str, pa.Table]]:
        """(split, cells of one bucket in order), bucket after bucket, splits in SPLITS' order.

        Raises DataError if two cells have the same dataset_id and cell_id. A bucket's file is
        removed once its cells are out.
        """
        self._flush()
        for code, split in enumerate(SPLITS):
            for bucket in range(self._num_buckets):
                path = self._path(code, bucket)
                if path.exists():
                    yield split, _sorted_cells(_read_streams(path))
                    path.unlink()

    def _flush(self) -> None:
        if not self._held:
            return
        cells = pa.concat_tables(self._held)
        splits = np.concatenate(self._held_splits).astype(np.int64)
        self._held, self._held_splits, self._num_held = [], [], 0
        codes = splits * self._num_buckets + self._bucket_of(_keys(cells))
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
        cells = cells.take(pa.array(order))
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(codes)], strict=True):
            split, bucket = divmod(int(codes[start]), self._num_buckets)
            _append_stream(self._path(split, bucket), cells.slice(start, stop - start))

    def _bucket_of(self, keys_N: np.ndarray) -> np.ndarray:
        # The upper 32 bits are enough to deal evenly, and leave room for the product.
        upper = order_keys(keys_N) >> np.uint64(32)
        return (upper * np.uint64(self._num_buckets) >> np.uint64(32)).astype(np.int64)

    def _path(self, split: int, bucket: int) -> Path:
        return self._folder / f"{SPLITS[split]}_{bucket:06d}.arrows"


def _keys(cells: pa.Table) -> np.ndarray:
    return cells["cell_key"].to_numpy()


def _append_stream(path: Path, cells: pa.Table) -> None:
    # Arrow streams laid end to end in a file: each says its own schema and end.
    with path.open("ab") as file, pa.ipc.new_stream(file, cells.schema) as stream:
        stream.write_table(cells.combine_chunks())


def _read_streams(path: Path) -> pa.Table:
    tables = []
    size = path.stat().st_size
    with pa.OSFile(str(path), "rb") as file:
        while file.tell() < size:
            tables.append(pa.ipc.open_stream(file).read_all())
    return pa.concat_tables(tables)


def _sorted_cells(cells: pa.Table) -> pa.Table:
    keys = order_keys(_keys(cells))
    order = np.argsort(keys, kind="stable")
    cells = cells.take(pa.array(order))
    same = np.flatnonzero(np.diff(keys[order]) == 0)
    return _settle_equal_keys(cells) if len(same) else cells


def _settle_equal_keys(cells: pa.Table) -> pa.Table:
    """Sorts cells of one key by their ids: two cells may share a key, but not their ids."""
    cells = cells.append_column("order_key", pa.array(order_keys(_keys(cells))))
    by = [(name, "ascending") for name in ("order_key", "dataset_id", "cell_id")]
    cells = cells.sort_by(by).drop_columns("order_key")
    names = list(zip(cells["dataset_id"].to_pylist(), cells["cell_id"].to_pylist(), strict=True))
    for first, second in pairwise(names):
        if first == second:
            raise duplicate_error(*first)
    return cells


def duplicate_error(dataset_id: str, cell_id: str) -> DataError:
    """The error for two cells of one name."""
    return DataError(
        f"two cells are called {cell_id!r} in dataset {dataset_id!r}: names must be unique within "
        "a dataset. Remedy: make the obs names unique (adata.obs_names_make_unique()), give each "
        "file its own `dataset_id` column, or leave the second copy out."
    )
