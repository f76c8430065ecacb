"""Packing as a pure function of lengths: who gets which cell, and how alike the ranks' work is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from geneformer_mcore.data import collate
from geneformer_mcore.data.collate import imbalance, pack
from geneformer_mcore.data.loader import Budget, Feed, Share
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.errors import DataError
from geneformer_mcore.types import CellViews, RaggedCells
from tests.unit.data.identified_cells import MASKING, Spanned, cell, ragged, views

SEQ_LENGTH = 2048
RANKS, CELLS_PER_RANK = 128, 16
BUDGET = CELLS_PER_RANK * SEQ_LENGTH
LENGTHS = st.lists(st.integers(1, 64), max_size=120)


def like_a_corpus(rng: np.random.Generator, num_cells: int) -> np.ndarray:
    """Lengths as four public data sets have them together: a third of the cells short, around 850
    tokens, the rest around 1,900, of which half are cut at the full length."""
    short = rng.random(num_cells) < 0.3
    drawn = np.where(short, rng.normal(850, 250, num_cells), rng.normal(2000, 350, num_cells))
    return np.clip(drawn.astype(np.int64), 20, SEQ_LENGTH)


def dealt_plainly(lengths_N: np.ndarray, budget: int, num_bins: int) -> list[list[int]] | None:
    """The cells of each bin, or None: longest first, each to the bin with the least cost so far (of
    equals, the first) that has room."""
    room, works = [budget] * num_bins, [0.0] * num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for one in np.argsort(-lengths_N, kind="stable").tolist():
        length = int(lengths_N[one])
        open_bins = [number for number in range(num_bins) if room[number] >= length]
        if not open_bins:
            return None
        number = min(open_bins, key=lambda each: works[each])
        works[number] += length * (1 + length / collate.SQUARES_LIKE_TOKENS)
        room[number] -= length
        bins[number].append(one)
    return [sorted(cells) for cells in bins]


def assert_plain(lengths_N: np.ndarray, budget: int, size: int, multiple: int = 1) -> None:
    """`pack` gives the micro batches of the plain version, in the fewest rounds."""
    found = pack(lengths_N, budget, size, multiple)
    num_bins = size * multiple * max(1, -(-int(lengths_N.sum()) // (budget * size * multiple)))
    while (bins := dealt_plainly(lengths_N, budget, num_bins)) is None:
        num_bins += size * multiple
    assert [cells.tolist() for cells in found.bins] == bins


@given(LENGTHS, st.integers(64, 400), st.integers(1, 9), st.integers(1, 3))
@example([10] * 12, 40, 4, 1)  # cells of one length keep their order
@example([5, 7], 10, 4, 1)  # fewer cells than micro batches
@example([], 10, 2, 2)
@example([8, 8, 8, 6], 15, 2, 1)  # 30 tokens for 2 x 15, but 8 + 8 is more than 15
# Two cells of 1,000 are less work than one of 1,700, and leave less room: 900 passes them over, 700
# fills what they leave.
@example([1700, 1000, 1000, 900, 700], 2700, 2, 1)
def test_every_cell_once_within_the_budget(cells, budget: int, size: int, multiple: int) -> None:
    """As the plain version packs them."""
    lengths = np.array(cells, np.int64)
    assert_plain(lengths, budget, size, multiple)
    found = pack(lengths, budget, size, multiple)
    shares = [found.of_rank(rank, size) for rank in range(size)]
    (number,) = {len(share) for share in shares}
    assert number >= 1
    assert number % multiple == 0
    bins = [cells for share in shares for cells in share]
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert max(int(lengths[cells].sum()) for cells in bins) == found.most_tokens <= budget
    assert all(cells.dtype == np.int64 for cells in bins)
    # No more than twice the fewest. Longest first, where a cell finds no room every micro batch is
    # more than half full: by longer cells, if it is longer than half the budget, else as it is not.
    fewest = -(-int(lengths.sum()) // (budget * size * multiple))
    assert number // multiple <= max(1, 2 * fewest)


def test_the_plain_version_packs_a_corpus_the_same(rng) -> None:
    """Also where it is tight: many micro batches are full, and more rounds are tried."""
    lengths = like_a_corpus(rng, RANKS * CELLS_PER_RANK)
    full = np.minimum(lengths + 1000, SEQ_LENGTH)
    assert_plain(lengths, BUDGET, RANKS)
    assert_plain(lengths, SEQ_LENGTH, 64)
    assert_plain(full, BUDGET, RANKS)
    assert_plain(full, 2 * SEQ_LENGTH, 8)


@pytest.mark.parametrize("ranks", [64, RANKS])
def test_the_work_of_ranks_is_alike(rng, ranks: int) -> None:
    """The project's bar: the fullest of 128 ranks has at most 3 % more tokens than the mean; cell
    i to rank i % 128 gives 20 % and more. Squares, which attention costs, are alike too."""
    for _ in range(50):
        lengths = like_a_corpus(rng, ranks * CELLS_PER_RANK)
        found = pack(lengths, BUDGET, ranks)
        assert len(found.bins) == ranks
        for work in (lengths, lengths**2):
            shares = [found.of_rank(rank, ranks) for rank in range(ranks)]
            assert imbalance([sum(int(work[c].sum()) for c in share) for share in shares]) <= 1.03
        assert imbalance([int(lengths[rank::ranks].sum()) for rank in range(ranks)]) > 1.1


def test_a_cell_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(DataError, match=r"a cell of 41 tokens .* of 40 tokens.*seq_length or more"):
        pack(np.array([3, 41]), 40, 2)


class KnowingCells(Spanned):
    """Cells that may be looked up, and that know their lengths: as a flat copy does."""

    def views(self, rows: np.ndarray) -> CellViews:
        self.touched = set(rows.tolist())
        return views(ragged([cell(row) for row in rows], rows))

    def read(self, start: int, stop: int) -> RaggedCells:
        raise AssertionError("cells are looked up one by one")


def test_a_rank_touches_no_cell_of_another() -> None:
    touched = []
    for rank in range(4):
        source = KnowingCells(96)
        share = Share(96, 8, rank, 4)
        feed = Feed(source, Sampler(0, 96, 8, 3, 7), MASKING, share, 40, 1, budget=Budget(400))
        batches = feed.step(0)
        touched += [int(key) for batch in batches for key in batch.keys_N]
        assert source.touched == set(touched[-24:])
        assert max(int(batch.lengths_N.max()) for batch in batches) == 40, "cut"
    assert sorted(touched) == list(range(96))
