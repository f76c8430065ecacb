"""Validation gives the same sums whatever the layout, and leaves training as it was."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from geneformer_mcore.training.step import evaluate, validation_steps
from tests.distributed import toy
from tests.distributed.parity import INTERLEAVED, PP2, SEQUENCE, TP2
from tests.distributed.ranks import in_turn, run_ranks

LAYOUTS = {"dp2": (), "tp2": (TP2,), "pp2": (PP2,), "interleaved": INTERLEAVED, "seq": SEQUENCE}
"""Of two ranks."""


def sums(*overrides: str) -> tuple:
    """Totals of the held-out cells; twice, as no random number is drawn and nothing dropped out."""
    run = toy.make("model.hidden_dropout=0.3", "train.micro_batch_size=8", *overrides)
    before = torch.get_rng_state()
    totals, again = (evaluate(run.trainable, run.feed, 100, run.topology, toy.CPU) for _ in "12")
    assert totals == again
    assert torch.equal(before, torch.get_rng_state())
    return astuple(totals)


def numbers_of_steps() -> tuple[int, int]:
    feed = toy.make().feed  # 120 cells in batches of 16
    return validation_steps(feed, 100), validation_steps(feed, 3)


def test_every_cell_counts_once_in_every_layout() -> None:
    ((serial, numbers),) = run_ranks(in_turn, 1, (sums, ()), (numbers_of_steps, ()))
    assert numbers == (8, 3), "the last batch is a partial one"
    masking = toy.Masking(0.15, (0.8, 0.02, 0.18), toy.VOCABULARY, 1234)
    labels, _ = masking.validation_positions(toy.ToyCells().read(0, 120))
    assert serial[1] == len(labels)
    assert serial[3] <= 120
    for found in run_ranks(in_turn, 2, *((sums, layout) for layout in LAYOUTS.values())):
        assert dict(zip(LAYOUTS, found, strict=True)) == {
            name: pytest.approx(serial, rel=1e-6) for name in LAYOUTS
        }
