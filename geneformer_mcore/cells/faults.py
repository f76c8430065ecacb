"""What a matrix of counts may not hold: one pass over its entries, before anything uses them.

CSR block  ->  is every column one of the file's, every value a count?  ->  the first that isn't
"""

from __future__ import annotations

import numpy as np

from geneformer_mcore.cells.compiled import compiled
from geneformer_mcore.cells.normalise import CountBlock

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


def first_fault(block: CountBlock, num_columns: int, whole_numbers: bool) -> int | None:
    """The first entry that is negative, NaN, infinite, not whole (where asked) or off the matrix.

    None where there is none. Entries count from the block's first.
    """
    entry = _first_fault(block.data, block.indices, num_columns, whole_numbers)
    return None if entry == _NONE else int(entry)


def describe_value(value: float) -> str:
    """Why `value` is no count: "negative", "NaN", "infinite" or "not a whole number"."""
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "infinite"
    return "negative" if value < 0 else "not a whole number"


def looks_normalised(data: np.ndarray) -> bool:
    """Whether the values are plainly no counts: most of those above zero are not whole.

    Told apart from a count matrix with a damaged value, which must be refused, not passed over.
    """
    positive = data[np.isfinite(data) & (data != 0)]
    return len(positive) > 0 and float(np.mean(positive != np.floor(positive))) > 0.5
