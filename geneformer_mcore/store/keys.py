"""Numbers that depend on a cell alone: its key, its place in the shuffle, its draw for the split.

    dataset_id, cell_id  ->  cell_key  ->  order key, split draw

Nothing here depends on files, order, ranks or library versions, so stores can be made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_ORDER_SALT = 0x6F72646572000001
_SPLIT_SALT = 0x73706C6974000001


def cell_keys(dataset_ids: str | Sequence[str], cell_ids: Sequence[str]) -> np.ndarray:
    """uint64 [N]: the first eight bytes (little-endian) of BLAKE2b over dataset_id, NUL, cell_id.

    BLAKE2b with digest size 8, over UTF-8; dataset_ids is one per cell, or one for all.
    """
    if isinstance(dataset_ids, str):
        dataset_ids = [dataset_ids] * len(cell_ids)
    started = {name: blake2b(f"{name}\0".encode(), digest_size=8) for name in set(dataset_ids)}
    digests = []
    for dataset_id, cell_id in zip(dataset_ids, cell_ids, strict=True):
        state = started[dataset_id].copy()
        state.update(cell_id.encode())
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def order_keys(keys_N: np.ndarray) -> np.ndarray:
    """uint64 [N]: rows of a split are sorted by it. One-to-one with the cell key."""
    return _mix(keys_N ^ np.uint64(_ORDER_SALT))


def split_draws(keys_N: np.ndarray) -> np.ndarray:
    """float64 [N], uniform in [0, 1) and independent of the order keys."""
    # The upper 53 bits, as many as a float64 holds exactly.
    return (_mix(keys_N ^ np.uint64(_SPLIT_SALT)) >> np.uint64(11)) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output.

    Multiplication wraps modulo 2^64, as intended.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
