"""Histograms of values: the bound they promise, and sums that depend on nothing but the values."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geneformer_mcore.tokenizer.medians import RELATIVE_ERROR, Histograms, MedianCollector

NUM_GENES = 3

VALUES = st.lists(
    st.tuples(
        st.integers(0, NUM_GENES - 1),
        st.floats(2.0**-50, 16_000.0, exclude_min=True)
        | st.integers(1, 9).map(lambda count: count / 2_011 * 10_000),
    ),
    max_size=200,
)


def as_arrays(values: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    places, sizes = zip(*values, strict=True) if values else ((), ())
    return np.array(places, np.int32), np.array(sizes, np.float64)


def exact_medians(values: list[tuple[int, float]]) -> np.ndarray:
    return np.array(
        [
            np.median([size for place, size in values if place == gene] or [np.nan])
            for gene in range(NUM_GENES)
        ]
    )


@given(VALUES)
def test_medians_are_within_the_bound(values: list[tuple[int, float]]) -> None:
    histograms = Histograms()
    histograms.add_values(*as_arrays(values))
    found, exact = histograms.medians(NUM_GENES), exact_medians(values)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    # One more for the rounding of the comparison itself.
    np.testing.assert_allclose(found, exact, rtol=RELATIVE_ERROR * (1 + 2**-40), atol=0)


def test_the_bound_is_reached_and_is_what_it_says() -> None:
    histograms = Histograms()
    histograms.add_values(np.zeros(1, np.int32), np.array([1.0]))
    assert histograms.medians(1)[0] == 1 + RELATIVE_ERROR
    assert RELATIVE_ERROR == 1 / 1024


@given(VALUES, st.lists(st.integers(0, 200), max_size=5), st.randoms(use_true_random=False))
def test_order_and_parts_do_not_matter(values, cuts, random) -> None:  # type: ignore[no-untyped-def]
    whole = Histograms()
    whole.add_values(*as_arrays(values))
    shuffled = random.sample(values, len(values))
    sums = Histograms()
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    for number, (start, stop) in enumerate(pairwise(edges)):
        if number % 2:
            sums.add_values(*as_arrays(shuffled[start:stop]))
        else:
            part = Histograms()
            part.add_values(*as_arrays(shuffled[start:stop]))
            sums.add(part.bins())
    for found, expected in zip(
        vars(sums.bins()).values(), vars(whole.bins()).values(), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(sums.medians(NUM_GENES), whole.medians(NUM_GENES))


@given(VALUES, st.integers(0, 200))
def test_exact_until_the_limit_and_the_same_beyond(values, limit: int) -> None:  # type: ignore[no-untyped-def]
    collector = MedianCollector(limit)
    for start in range(0, len(values), 7):
        collector.add(*as_arrays(values[start : start + 7]))
    assert collector.num_values == len(values)
    assert collector.is_exact == (len(values) <= limit)
    assert collector.relative_error == (0 if collector.is_exact else RELATIVE_ERROR)
    if collector.is_exact:
        expected = exact_medians(values)
    else:
        at_once = Histograms()
        at_once.add_values(*as_arrays(values))
        expected = at_once.medians(NUM_GENES)
    for _ in range(2):
        np.testing.assert_array_equal(collector.medians(NUM_GENES), expected)


def test_values_out_of_range_count_as_the_nearest_bin() -> None:
    histograms = Histograms()
    values = np.array([1e-300, 2.0**-50, 1e300, 2.0**14 - 1])
    histograms.add_values(np.array([0, 1, 2, 3], np.int32), values)
    found = histograms.medians(4)
    assert found[0] == found[1] == pytest.approx(2.0**-50, rel=RELATIVE_ERROR)
    assert found[2] == found[3] == pytest.approx(2.0**14, rel=2 * RELATIVE_ERROR)


def test_many_genes_and_pages(rng: np.random.Generator) -> None:
    # More pages than are there at first, for genes that come later, added to by each block.
    places = rng.integers(0, 900, 60_000).astype(np.int32)
    values = rng.lognormal(1.0, 3.0, 60_000).clip(1e-9, 16_000)
    histograms = Histograms()
    for start in range(0, 60_000, 10_000):
        part = slice(start, start + 10_000)
        histograms.add_values(places[part] // (6 - start // 10_000), values[part])
    seen = np.concatenate([places[n * 10_000 : (n + 1) * 10_000] // (6 - n) for n in range(6)])
    exact = [np.median(values[seen == gene]) for gene in range(900)]
    np.testing.assert_allclose(histograms.medians(900), exact, rtol=RELATIVE_ERROR * (1 + 1e-9))
    assert histograms.bins().counts.sum() == 60_000
    again = pickle.loads(pickle.dumps(histograms))
    np.testing.assert_array_equal(again.medians(900), histograms.medians(900))
    again.add_values(places, values)
    assert again.bins().counts.sum() == 120_000
    assert again.num_bytes >= histograms.num_bytes > 1_000_000
