"""Keys, order and split of a cell depend on its names alone, and never change."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.keys import cell_keys, order_keys, split_draws
from geneformer_mcore.store.split.table import RandomSplit

IDS = [f"c{number}" for number in range(40_000)]


def test_key_is_the_documented_hash_for_ever() -> None:
    digest = blake2b(b"d1\x00c\xc3\xa9ll", digest_size=8).digest()
    found = cell_keys(["d1"], ["céll"])
    assert (found.tolist(), found.dtype) == ([int.from_bytes(digest, "little")], np.uint64)
    # Stores on disk rely on these: a change here is a new schema version.
    keys = cell_keys("dataset", ["a", "b"])
    assert keys.tolist() == [3660635600760975601, 2902617256591395322]
    assert order_keys(keys).tolist() == [9913352854663150811, 1363690745472820514]
    assert split_draws(keys).tolist() == [0.12179033763116542, 0.15845588322558646]


def test_both_names_matter_and_where_they_part() -> None:
    keys = [cell_keys(d, [c])[0] for d, c in (("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"))]
    assert len(set(keys)) == 4
    apart = [cell_keys(*names)[0] for names in (("a", ["x"]), ("b", ["x"]), ("a", ["y"]))]
    assert cell_keys(["a", "b", "a"], ["x", "x", "y"]).tolist() == apart


def test_order_is_one_to_one_and_looks_random() -> None:
    order = order_keys(cell_keys("d", IDS))
    assert len(np.unique(order)) == len(IDS)
    place = np.argsort(order)
    assert abs(np.corrcoef(place[:-1], place[1:])[0, 1]) < 0.02
    # Consecutive keys are spread evenly.
    upper = order_keys(np.arange(64_000, dtype=np.uint64)) >> np.uint64(58)
    counts = np.bincount(upper.astype(int), minlength=64)
    assert 850 < counts.min() <= counts.max() < 1150


def test_split_fractions_and_independence_of_order() -> None:
    keys = cell_keys("d", IDS)
    codes = RandomSplit(0.1, 0.2).assign(keys, ["d"] * len(keys))
    shares = np.bincount(codes) / len(codes)
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    early = order_keys(keys) < np.uint64(2**63)
    assert (codes[early] == 1).mean() == pytest.approx(0.1, abs=0.01)
    np.testing.assert_array_equal(codes[5:9], RandomSplit(0.1, 0.2).assign(keys[5:9], ["d"] * 4))


@pytest.mark.parametrize("fractions", [(-0.1, 0.1), (0.5, 0.5), (0.1, float("nan"))])
def test_wrong_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="together below 1"):
        RandomSplit(*fractions)
