"""Validation gives the same sums whatever the layout, and leaves training as it was."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from geneformer_mcore.train.evaluate import evaluate, validation_steps
from tests.distributed import toy
from tests.distributed.ranks import run_ranks

LAYOUTS = {
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2": (2,),
    "pp2-interleaved": (2, "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "tp2-sequence": (2, "parallel.tensor=2", "parallel.sequence=true"),
}


def sums(*overrides: str) -> tuple[tuple, bool]:
    run = toy.make("model.hidden_dropout=0.3", *overrides)
    before = torch.get_rng_state()
    totals = evaluate(run.trainable, run.feed, 100, run.topology, toy.CPU)
    again = evaluate(run.trainable, run.feed, 100, run.topology, toy.CPU)
    unchanged = torch.equal(before, torch.get_rng_state()) and totals == again
    return astuple(totals), unchanged


@pytest.fixture(scope="module")
def serial() -> tuple:
    ((totals, unchanged),) = run_ranks(sums, 1)
    assert unchanged, "no dropout in validation, and no random number is drawn"
    return totals


def test_every_cell_counts_once(serial: tuple) -> None:
    cells = toy.ToyCells().read(0, 120)
    masking = toy.Masking(0.15, (0.8, 0.02, 0.18), toy.VOCABULARY, 1234)
    labels, _ = masking.validation_positions(cells)
    assert serial[1] == len(labels)
    assert serial[3] <= 120


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_sums_in_every_layout(name: str, serial: tuple) -> None:
    world_size, *overrides = LAYOUTS[name]
    for totals, unchanged in run_ranks(sums, world_size, *overrides):
        assert unchanged
        assert totals == pytest.approx(serial, rel=1e-6)


def test_the_limit_and_the_last_partial_batch() -> None:
    assert run_ranks(numbers_of_steps, 1) == [(8, 3)]


def numbers_of_steps() -> tuple[int, int]:
    feed = toy.make().feed  # 120 cells in batches of 16
    return validation_steps(feed, 100), validation_steps(feed, 3)
