"""Out-of-core shuffle: cells are assigned to buckets by their order key, and sorted in each.

    cells of a unit  ->  bucket: split and upper bits of the order key  ->  ordered by bucket
    one bucket of all units  ->  sorted by (order key, dataset_id, cell_id)

Buckets are ranges of the order key, so the result is that of one sort over all cells: it depends on
the set of cells alone, not on the number of buckets nor on the order of inputs.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.keys import order_keys
from geneformer_mcore.store.split.table import SPLITS

CELLS_PER_BUCKET = 32_768
"""Expected maximum of cells per bucket: about 110 MB, of which a merge holds a few."""


def count_buckets(num_cells: int) -> int:
    """Buckets for a split of `num_cells` cells: a power of two, so that units rarely change when an
    input is added or removed."""
    return 1 << max(0, -(-num_cells // CELLS_PER_BUCKET) - 1).bit_length()


def bucket_codes(keys_N: np.ndarray, splits_N: np.ndarray, num_buckets: int) -> np.ndarray:
    """int64 [N]: split * num_buckets + bucket of each cell, ascending with (split, order key).

    keys_N: uint64 cell keys; splits_N: int8 codes; num_buckets: a power of two.
    """
    shift = np.uint64(64 - (num_buckets.bit_length() - 1))
    # A shift by all 64 bits is undefined.
    buckets = order_keys(keys_N) >> shift if num_buckets > 1 else np.zeros(len(keys_N))
    return splits_N.astype(np.int64) * num_buckets + buckets.astype(np.int64)


def by_bucket(codes_N: np.ndarray, num_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [N] rows in the buckets' order, int64 [all buckets + 1] where each starts)."""
    order = np.argsort(codes_N, kind="stable")
    cells = np.bincount(codes_N, minlength=len(SPLITS) * num_buckets)
    return order, np.concatenate([[0], np.cumsum(cells)])


def sorted_cells(cells: pa.Table) -> pa.Table:
    """The cells of one bucket in order. Needs the columns `cell_key`, `dataset_id`, `cell_id`.

    Raises DataError if two cells have the same dataset_id and cell_id.
    """
    keys = order_keys(cells["cell_key"].to_numpy())
    order = np.argsort(keys, kind="stable")
    cells = cells.take(pa.array(order))
    same = np.flatnonzero(np.diff(keys[order]) == 0)
    return _settle_equal_keys(cells) if len(same) else cells


def _settle_equal_keys(cells: pa.Table) -> pa.Table:
    """Sorts cells of one key by their ids: two cells may share a key, but not their ids."""
    keys = order_keys(cells["cell_key"].to_numpy())
    # A table of its own, for a label may have any name.
    ids = {name: cells[name] for name in ("dataset_id", "cell_id")}
    by = [(name, "ascending") for name in ("order_key", "dataset_id", "cell_id")]
    cells = cells.take(pc.sort_indices(pa.table({"order_key": keys, **ids}), sort_keys=by))
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
