"""Order, masks and batches as pure functions: no ranks and no store."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from geneformer_mcore.data.collate import PermutedGenes, make_batch, padded_length, truncate
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.types import CLS, MASK, NUM_SPECIALS, PAD
from tests.unit.data.identified_cells import MASKING, VOCABULARY, Cells, cell, feed, ragged, views


@pytest.mark.parametrize("num_cells", [1, 7, 8, 9, 100, 1000])
def test_each_epoch_sees_each_cell_once_in_an_order_of_its_own(num_cells: int) -> None:
    order = Sampler(5, num_cells, span_cells=8, window_spans=3, seed=7)
    rows, epochs = order.rows(0, 3 * num_cells)
    for epoch in range(3):
        assert sorted(rows[epochs == epoch]) == list(range(5, 5 + num_cells))
    if num_cells > 50:
        assert (rows[epochs == 0] != rows[epochs == 1]).mean() > 0.9


def test_the_order_is_the_seeds_and_can_be_asked_from_anywhere() -> None:
    def rows(start: int, stop: int, seed: int = 7) -> list[int]:
        order = Sampler(0, 100, span_cells=8, window_spans=3, seed=seed)
        return order.rows(start, stop)[0].tolist()

    whole = rows(0, 500)
    assert whole != rows(0, 500, seed=8)
    for start, stop in itertools.pairwise([0, 1, 17, 99, 100, 101, 333, 500]):
        assert rows(start, stop) == whole[start:stop]


def test_order_and_masks_never_change() -> None:
    """Golden values, because both are part of every checkpoint's meaning: others would break exact
    resume. They are what these very lines gave at version 0.1.0; print them to make them again."""
    assert Sampler(0, 20, 4, 2, 7).rows(0, 20)[0].tolist() == [
        *(13, 4, 15, 7, 14, 5, 12, 6, 10, 18, 9, 16, 8, 17, 11, 19, 0, 1, 3, 2)
    ]
    seen, selected = MASKING.apply(ragged([cell(49)], np.array([49])), np.array([3]))
    positions = np.flatnonzero(selected)
    assert positions.tolist() == [1, 3, 4, 10, 11, 13, 19, 29, 40, 49]
    assert seen[positions].tolist() == [1, 1, 195, 117, 124, 1, 1, 1, 32, 1]


def test_masks_depend_on_seed_epoch_and_cell_and_on_nothing_else() -> None:
    def masked(*keys: int, cells: tuple = (), epoch: int = 0, by: Masking = MASKING) -> list[tuple]:
        """Tokens and selection of each cell."""
        block = ragged([cell(key) for key in cells or keys], np.array(keys))
        found = by.apply(block, np.full(len(keys), epoch))
        bounds = itertools.pairwise(block.offsets)
        return [tuple(part[start:stop].tolist() for part in found) for start, stop in bounds]

    first, second, again = masked(49, 30, 49)
    assert first == again, "the same cell in the same epoch"
    assert masked(30) == [second], "by itself"
    other_seed = Masking(0.15, MASKING.fractions, VOCABULARY, seed=2)
    others = masked(49, epoch=1), masked(30, cells=(49,)), masked(49, by=other_seed)
    assert first[1] not in [selected for ((_, selected),) in others]


def test_mask_statistics_are_the_cards() -> None:
    genes = np.arange(NUM_SPECIALS, VOCABULARY, dtype=np.uint16)
    cells = [np.concatenate([[CLS], genes]).astype(np.uint16)] * 2000
    block = ragged(cells, np.arange(2000))
    seen, selected = MASKING.apply(block, np.zeros(2000, np.int64))
    true, shown = block.tokens_T[selected], seen[selected]
    num_genes = 2000 * len(genes)
    assert selected.sum() / num_genes == pytest.approx(0.15, abs=0.002)
    assert (shown == MASK).mean() == pytest.approx(0.80, abs=0.006)
    assert (shown == true).mean() == pytest.approx(0.18, abs=0.006)
    random = shown[(shown != MASK) & (shown != true)]
    assert len(random) / len(shown) == pytest.approx(0.02, abs=0.003)
    assert random.min() >= NUM_SPECIALS, "specials are never shown as a random gene"
    assert len(np.unique(random)) > 0.9 * len(genes), "uniform over all genes"
    assert np.array_equal(seen[~selected], block.tokens_T[~selected])
    assert not selected[block.offsets[:-1]].any(), "[CLS] is never selected"


def test_validation_predicts_the_same_positions_of_each_cell_once() -> None:
    """And fills the last batch with idle cells."""
    source = Cells(30)
    block = source.read(0, 30)
    _, selected = MASKING.apply(block, np.full(30, 2**62))
    labels, positions = MASKING.validation_positions(block)
    assert positions.min() >= 1
    batches = [b for start in (0, 24) for b in feed(source).validation_step(start)]
    assert [len(batch.keys_N) for batch in batches] == [24, 24]
    assert sorted(label for b in batches for label in b.labels_M.tolist()) == sorted(labels)
    predicted = np.zeros(30)
    for batch in batches:
        cells, counts = np.unique(batch.selected_M // batch.tokens_BS.shape[1], return_counts=True)
        np.add.at(predicted, batch.keys_N[cells].astype(int), counts)
    assert np.array_equal(predicted, np.add.reduceat(selected, block.offsets[:-1]))


def test_a_batch_holds_its_cells_and_labels() -> None:
    block = ragged([cell(k) for k in (3, 40)], np.array([3, 40]))
    batch = make_batch(views(block), np.zeros(2, np.int64), np.array([False, False]), MASKING, 48)
    assert (batch.lengths_N.tolist(), batch.num_tokens) == ([5, 42], 47)
    assert (batch.tokens_BS[0, 5:] == PAD).all()
    truth = np.full(2 * 48, PAD)
    truth[:5], truth[48 : 48 + 42] = cell(3), cell(40)
    assert batch.labels_M.tolist() == truth[batch.selected_M].tolist()
    unselected = np.setdiff1d(np.arange(96), batch.selected_M)
    assert np.array_equal(batch.tokens_BS.flatten()[unselected], truth[unselected])


def test_truncation_keeps_the_first_tokens() -> None:
    block = ragged([cell(k) for k in (3, 40, 20)], np.array([3, 40, 20]))
    short = truncate(block, 10)
    assert short.lengths.tolist() == [5, 10, 10]
    assert np.array_equal(short.tokens_T[5:15], cell(40)[:10])
    assert truncate(block, 64) is block


@pytest.mark.parametrize(
    ("arguments", "padded"),
    [((65, 64, 2048), 128), ((64, 64, 2048), 64), ((5, 0, 2048), 2048), ((90, 64, 100), 100)],
)
def test_padded_length(arguments: tuple[int, int, int], padded: int) -> None:
    assert padded_length(*arguments) == padded


def test_the_control_shuffles_genes_within_each_cell() -> None:
    source = Cells(60)
    plain, shuffled = source.read(40, 60), PermutedGenes(source, 1, 64).read(40, 60)
    assert np.array_equal(plain.offsets, shuffled.offsets)
    for start, stop in itertools.pairwise(plain.offsets):
        assert shuffled.tokens_T[start] == CLS
        assert sorted(plain.tokens_T[start:stop]) == sorted(shuffled.tokens_T[start:stop])
    assert (plain.tokens_T != shuffled.tokens_T).mean() > 0.8
    part = PermutedGenes(source, 1, 64).read(45, 46)
    assert np.array_equal(part.tokens_T, shuffled.tokens_T[slice(*plain.offsets[5:7])])
