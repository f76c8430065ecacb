"""What benchmarks/scaling.py simulates: lengths of cells, and the work of ranks they go to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from benchmarks.scaling_model import deals, lengths, pages
from benchmarks.scaling_model.hardware import MODELS, SEQ_LENGTH
from geneformer_mcore.model.flops import ModelShape, Work, train_flops
from tests.small_cells import write_h5ad

LENGTHS = lengths.made_up()


def test_what_a_rank_executes_by_hand() -> None:
    """Both ranks have rows of 128 positions. Of the second's, 98 hold nothing: one
    more piece for attention."""
    costs = deals.Costs(1000, 10, 1)
    found = deals.packed(np.array([100, 30]), 2, SEQ_LENGTH, costs)
    assert found.tokens.tolist() == [100, 30]
    assert found.squares.tolist() == [10_000, 900]
    first = 128_000 + 10 * (100**2 + 28**2) + 0.15 * 99
    second = 128_000 + 10 * (30**2 + 98**2) + 0.15 * 29
    assert found.flops == pytest.approx([first, second])
    assert found.useful == pytest.approx([200_000 + 0.15 * 99, 39_000 + 0.15 * 29])
    dealt = deals.dealt(np.array([100, 30]), 2, SEQ_LENGTH, costs)
    assert dealt.flops == pytest.approx([first, 64_000 + 10 * (30**2 + 34**2) + 0.15 * 29])


def test_flops_are_linear_in_what_a_cell_is_of() -> None:
    shape = ModelShape(6, 256, 512, 25_429)
    costs = deals.Costs.of(shape)
    by_hand = train_flops(shape, Work(1001, 1001**2, 150))
    assert costs.of_cells(np.array([1001]))[0] == pytest.approx(by_hand, rel=1e-12)


def test_simulated_ranks_are_the_real_packing() -> None:
    model = MODELS["106m"]
    steps = list(deals.batches(LENGTHS, 2048, 3, seed=1))
    packed, dealt = deals.simulate(steps, 128, 16 * SEQ_LENGTH, model)
    assert packed.tokens.max() <= pages.BAR
    assert packed.micro_batches == dealt.micro_batches == 1
    for values, ranks_of in ((dealt.tokens, 1), (dealt.squares, 2)):
        work = [(cells.astype(float) ** ranks_of).reshape(16, 128).sum(0) for cells in steps]
        assert values == pytest.approx([load.max() / load.mean() for load in work])
    assert 1 < packed.factor < 1.02 < 1.1 < dealt.factor
    assert dealt.factor > dealt.flops.mean() * 0.99


def test_full_cells_are_perfectly_balanced() -> None:
    steps = [np.full(256, SEQ_LENGTH)]
    for deal in deals.simulate(steps, 16, 16 * SEQ_LENGTH, MODELS["10m"]):
        assert deal.factor == pytest.approx(1)
        assert deal.tokens.max() == 1


def test_an_epoch_repeats_no_cell() -> None:
    first, second, third = deals.batches(np.arange(24), 16, 3, seed=0)
    assert sorted([*first, *second[:8]]) == list(range(24))
    assert sorted([*second[8:], *third]) == list(range(24))
    again = next(deals.batches(np.arange(24), 16, 1, seed=0))
    assert np.array_equal(first, again)


def test_lengths_of_counts(tmp_path: Path) -> None:
    counts = sparse.csr_matrix(np.array([[1, 0, 2], [0, 0, 0], [3, 4, 5]], np.float32))
    counts.data[0] = 0  # explicit
    path = write_h5ad(tmp_path / "a.h5ad", counts)
    found = lengths.corpus([path], None)
    assert found.lengths.tolist() == [2, 1, 4]
    assert found.source == "a.h5ad"
    assert found.as_json()["tokens_mean"] == pytest.approx(7 / 3)


def test_without_cells_they_are_made_up_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "DEMO_STORE", tmp_path / "none")
    found = lengths.corpus([], None)
    assert found.source.startswith("made up")
    assert 1000 < found.lengths.mean() < 2000
    assert found.lengths.max() == SEQ_LENGTH
