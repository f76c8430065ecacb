"""Blocks of counts as CSR rows, and the check that every one passes before anything uses it.

CountBlock  ->  check_counts: is every column one of the file's, every value a count?
            ->  the block | DataError with row, cell, gene, value and remedy
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geneformer_mcore.backends import compiled
from geneformer_mcore.errors import DataError

BLOCK_ENTRIES = 12 << 20
"""Entries of a block at most (144 MiB), unless one row alone has more."""


@dataclass(frozen=True)
class CountBlock:
    """Some rows of a count matrix, as CSR; row i is entries indptr[i] .. indptr[i + 1] - 1.

    data:       float64 [entries], counts
    indices:    int32 [entries], column (gene of the file) of each
    indptr:     int64 [rows + 1], starting at 0
    start:      the first row's number in the file
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    start: int = 0

    def __len__(self) -> int:
        return len(self.indptr) - 1


READ_FAILURES = (
    OSError,
    RuntimeError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions that h5py and zarr raise on a damaged file."""

_NONE = -1


@compiled
def _first_fault(data: np.ndarray, indices: np.ndarray, num_columns: int, whole: bool) -> int:
    for entry in range(len(data)):
        value = data[entry]
        if indices[entry] < 0 or indices[entry] >= num_columns:
            return entry
        if not (value >= 0.0 and value < np.inf):  # NaN fails every comparison.
            return entry
        if whole and value != np.floor(value):
            return entry
    return _NONE


def check_counts(
    block: CountBlock, counts: Any, name: str, whole_numbers: bool, layers: Sequence[str]
) -> None:
    """Raises DataError with row, cell, gene, value and remedy at the first entry that is no count.

    counts:  the h5ad.Counts that the block is of;  name: the matrix, in the message
    layers:  those that the remedy offers
    """
    # Compiled loops go by indptr and check no bounds: other memory would be read as counts.
    assert len(block.data) == len(block.indices) == block.indptr[-1], name
    entry = _first_fault(block.data, block.indices, counts.num_columns, whole_numbers)
    if entry == _NONE:
        return
    column, value = int(block.indices[entry]), float(block.data[entry])
    row = block.start + int(np.searchsorted(block.indptr, entry, side="right")) - 1
    if not 0 <= column < counts.num_columns:
        raise DataError(
            f"{name} is damaged: row {row} names column {column} of {counts.num_columns:,}. "
            "Remedy: get or write the file again."
        )
    (cell,) = counts.read_cell_ids(row, row + 1)
    raise DataError(
        f"{name} must hold counts, and row {row} (cell {cell}), gene "
        f"{counts.gene_columns()['index'][column]} holds {value:g}: {_describe(value)}. "
        f"{_remedy(value, layers)}"
    )


def _describe(value: float) -> str:
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "infinite"
    return "negative" if value < 0 else "not a whole number"


def _remedy(value: float, layers: Sequence[str]) -> str:
    if not np.isfinite(value):
        return "Remedy: correct the value, or leave the cell out."
    named = f" (the file has: {', '.join(layers)})" if layers else ""
    return (
        'Remedy: put the raw counts into layers["counts"] or raw, or name their layer with '
        f"`counts_layer=`{named}. Counts scaled per cell, not logarithms, pass with "
        "`allow_normalised=True`."
    )


def looks_normalised(data: np.ndarray) -> bool:
    """Whether most values above zero are not whole numbers. A count matrix with a damaged value is
    none of these: it must be refused, not passed over."""
    positive = data[np.isfinite(data) & (data != 0)]
    return len(positive) > 0 and float(np.mean(positive != np.floor(positive))) > 0.5
