"""Packing as a pure function of lengths: who gets which cell, and how alike the ranks' work is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geneformer_mcore.data import collate
from geneformer_mcore.data.collate import Packing, imbalance, pack
from geneformer_mcore.data.loader import Budget, Feed, Share
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.errors import DataError
from geneformer_mcore.types import CellViews, RaggedCells
from tests.unit.data.identified_cells import MASKING

SEQ_LENGTH = 2048
RANKS, CELLS_PER_RANK = 128, 16
BUDGET = CELLS_PER_RANK * SEQ_LENGTH

layouts = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 64), max_size=120),
        "budget": st.integers(64, 400),
        "data_size": st.integers(1, 9),
        "multiple": st.integers(1, 3),
    }
)


def like_a_corpus(rng: np.random.Generator, num_cells: int) -> np.ndarray:
    """Lengths as four public data sets have them together: a third of the cells short, around 850
    tokens, the rest around 1,900, of which half are cut at the full length."""
    short = rng.random(num_cells) < 0.3
    lengths = np.where(
        short, rng.normal(850, 250, num_cells), rng.normal(2000, 350, num_cells)
    ).astype(np.int64)
    return np.clip(lengths, 20, SEQ_LENGTH)


def tokens_of_ranks(lengths_N: np.ndarray, found: Packing, data_size: int) -> list[int]:
    """Tokens of each rank's micro batches."""
    return [
        sum(int(lengths_N[cells].sum()) for cells in found.of_rank(rank, data_size))
        for rank in range(data_size)
    ]


def dealt_plainly(lengths_N: np.ndarray, budget: int, num_bins: int) -> list[int] | None:
    """The bin of each cell, or None: longest first, each to the bin with the least cost so far (of
    equals, the first) that has room."""
    room, works, bins = [budget] * num_bins, [0.0] * num_bins, [-1] * len(lengths_N)
    for cell in np.argsort(-lengths_N, kind="stable").tolist():
        length = int(lengths_N[cell])
        open_bins = [number for number in range(num_bins) if room[number] >= length]
        if not open_bins:
            return None
        number = min(open_bins, key=lambda each: works[each])
        works[number] += length * (1 + length / collate.SQUARES_LIKE_TOKENS)
        room[number] -= length
        bins[cell] = number
    return bins


def assert_plain(lengths_N: np.ndarray, budget: int, size: int, multiple: int = 1) -> None:
    """`pack` gives the micro batches of the plain version, in the fewest rounds."""
    found = pack(lengths_N, budget, size, multiple)
    num_bins = size * multiple * max(1, -(-int(lengths_N.sum()) // (budget * size * multiple)))
    while (bins := dealt_plainly(lengths_N, budget, num_bins)) is None:
        num_bins += size * multiple
    assert [cells.tolist() for cells in found.bins] == [
        np.flatnonzero(np.array(bins) == number).tolist() for number in range(num_bins)
    ]


@given(layouts)
def test_every_cell_once_within_the_budget_the_same_number_for_every_rank(layout: dict) -> None:
    lengths = np.array(layout["lengths"], np.int64)
    size, multiple = layout["data_size"], layout["multiple"]
    found = pack(lengths, layout["budget"], size, multiple)
    shares = [found.of_rank(rank, size) for rank in range(size)]
    (number,) = {len(share) for share in shares}
    assert number >= 1
    assert number % multiple == 0
    bins = [cells for share in shares for cells in share]
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert max(int(lengths[cells].sum()) for cells in bins) == found.most_tokens
    assert found.most_tokens <= layout["budget"]
    assert all(np.all(np.diff(cells) > 0) for cells in bins), "cells of a micro batch ascend"
    assert all(cells.dtype == np.int64 for cells in bins)
    # No more than twice the fewest. Longest first, where a cell finds no room every micro batch is
    # more than half full: by longer cells, if it is longer than half the budget, else as it is not.
    fewest = -(-int(lengths.sum()) // (layout["budget"] * size * multiple))
    assert number // multiple <= max(1, 2 * fewest)


@given(layouts)
def test_the_plain_version_packs_the_same(layout: dict) -> None:
    lengths = np.array(layout["lengths"], np.int64)
    assert_plain(lengths, layout["budget"], layout["data_size"], layout["multiple"])


def test_the_plain_version_packs_a_corpus_the_same(rng: np.random.Generator) -> None:
    """Also where it is tight: many micro batches are full, and more rounds are tried."""
    lengths = like_a_corpus(rng, RANKS * CELLS_PER_RANK)
    full = np.minimum(lengths + 1000, SEQ_LENGTH)
    assert_plain(lengths, BUDGET, RANKS)
    assert_plain(lengths, SEQ_LENGTH, 64)
    assert_plain(full, BUDGET, RANKS)
    assert_plain(full, 2 * SEQ_LENGTH, 8)


@pytest.mark.parametrize("ranks", [64, RANKS])
def test_the_work_of_ranks_is_alike(rng: np.random.Generator, ranks: int) -> None:
    """The project's bar: the fullest of 128 ranks has at most 3 % more tokens than the mean; cell
    i to rank i % 128 gives 20 % and more. Squares, which attention costs, are alike too."""
    for _ in range(50):
        lengths = like_a_corpus(rng, ranks * CELLS_PER_RANK)
        found = pack(lengths, BUDGET, ranks)
        assert len(found.bins) == ranks
        tokens = tokens_of_ranks(lengths, found, ranks)
        squares = tokens_of_ranks(lengths**2, found, ranks)
        dealt = [int(lengths[rank::ranks].sum()) for rank in range(ranks)]
        assert imbalance(tokens) <= 1.03
        assert imbalance(squares) <= 1.03
        assert imbalance(dealt) > 1.1


def test_cells_of_one_length_keep_their_order() -> None:
    found = pack(np.full(12, 10), 40, 4)
    assert [cells.tolist() for cells in found.bins] == [[b, b + 4, b + 8] for b in range(4)]


def test_fewer_cells_than_micro_batches_leave_some_empty() -> None:
    found = pack(np.array([5, 7]), 10, 4)
    assert [cells.tolist() for cells in found.bins] == [[1], [0], [], []]
    assert found.most_tokens == 7
    nothing = pack(np.zeros(0, np.int64), 10, 2, multiple=2)
    assert [len(cells) for cells in nothing.bins] == [0, 0, 0, 0]
    assert nothing.most_tokens == 0


def test_another_round_where_tokens_would_fit_but_cells_do_not() -> None:
    # 30 tokens for 2 x 15, but 8 + 8 is more than 15.
    found = pack(np.array([8, 8, 8, 6]), 15, 2)
    assert len(found.of_rank(0, 2)) == len(found.of_rank(1, 2)) == 2


def test_a_micro_batch_passed_over_takes_the_shortest_cell_that_just_fits() -> None:
    """Two cells of 1,000 are less work than one of 1,700, and leave less room: 900 passes them
    over, 700 fills what they leave."""
    found = pack(np.array([1700, 1000, 1000, 900, 700]), 2700, 2)
    assert [cells.tolist() for cells in found.bins] == [[0, 3], [1, 2, 4]]


def test_a_cell_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(DataError, match=r"a cell of 41 tokens .* of 40 tokens.*seq_length or more"):
        pack(np.array([3, 41]), 40, 2)


class KnowingCells:
    """Cells that may be looked up, and that know their lengths: as a flat copy does."""

    def __init__(self, lengths: np.ndarray) -> None:
        self._lengths = lengths
        self._starts = np.cumsum(lengths) - lengths
        self.touched: set[int] = set()

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self._lengths[rows]

    def views(self, rows: np.ndarray) -> CellViews:
        self.touched |= set(rows.tolist())
        tokens = np.full(int(self._lengths.sum()), 7, np.uint16)
        return CellViews(tokens, self._starts[rows], self._lengths[rows], rows.astype(np.uint64))

    def read(self, start: int, stop: int) -> RaggedCells:
        raise AssertionError("cells are looked up one by one")


def test_a_rank_touches_no_cell_of_another(rng: np.random.Generator) -> None:
    lengths = rng.integers(2, 60, 96)
    touched = []
    for rank in range(4):
        source = KnowingCells(lengths)
        share = Share(96, 8, rank, 4)
        feed = Feed(source, Sampler(0, 96, 8, 3, 7), MASKING, share, 50, 1, budget=Budget(400))
        batches = feed.step(0)
        keys = {int(key) for batch in batches for key in batch.keys_N}
        assert source.touched == keys
        seen = np.concatenate([batch.lengths_N.numpy() for batch in batches])
        assert seen.max() <= 50, "cut"
        touched.append(keys)
    assert sorted(cell for keys in touched for cell in keys) == list(range(96))
