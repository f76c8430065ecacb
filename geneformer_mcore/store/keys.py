"""Numbers that depend on a cell alone, never on files, order, ranks or library versions.

    dataset_id, cell_id  ->  cell_key  ->  order key (shuffle), split draw

Both, and the masks of data/masking.py, are drawn by SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
"""SplitMix64's constants. Stores and checkpoints rely on them: they never change."""

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
    return mix(keys_N ^ np.uint64(_ORDER_SALT))


def split_draws(keys_N: np.ndarray) -> np.ndarray:
    """float64 [N], uniform in [0, 1) and independent of the order keys."""
    # The upper 53 bits, as many as a float64 holds exactly.
    return (mix(keys_N ^ np.uint64(_SPLIT_SALT)) >> np.uint64(11)) * 2.0**-53


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: every input bit reaches every output bit.

    uint64 in and out; multiplication wraps modulo 2^64, as intended.
    """
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * MIX_1
    x = (x ^ (x >> np.uint64(27))) * MIX_2
    return x ^ (x >> np.uint64(31))


def mix_scalar(value: int) -> np.uint64:
    """`mix` of one number."""
    return mix(np.array([value], dtype=np.uint64))[0]
