"""Validation gives the same sums whatever the layout, and leaves training as it was."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from geneformer_mcore.distributed import groups
from geneformer_mcore.training.step import evaluate, validation_steps
from tests.distributed import toy
from tests.distributed.ranks import run_ranks

LAYOUTS = {
    "dp2": (),
    "tp2": ("parallel.tensor=2",),
    "pp2": ("parallel.pipeline=2",),
    "pp2-interleaved": ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "tp2-sequence": ("parallel.tensor=2", "parallel.sequence=true"),
}
"""Of two ranks."""


def sums(*overrides: str) -> tuple[tuple, bool]:
    run = toy.make("model.hidden_dropout=0.3", "train.micro_batch_size=8", *overrides)
    before = torch.get_rng_state()
    totals = evaluate(run.trainable, run.feed, 100, run.topology, toy.CPU)
    again = evaluate(run.trainable, run.feed, 100, run.topology, toy.CPU)
    unchanged = torch.equal(before, torch.get_rng_state()) and totals == again
    groups.stop(stay=True)
    return astuple(totals), unchanged


def sums_of_layouts() -> dict[str, tuple[tuple, bool]]:
    return {name: sums(*overrides) for name, overrides in LAYOUTS.items()}


def alone() -> tuple[tuple[tuple, bool], tuple[int, int]]:
    return sums(), numbers_of_steps()


@pytest.fixture(scope="module")
def of_one() -> tuple[tuple, tuple[int, int]]:
    (((totals, unchanged), steps),) = run_ranks(alone, 1)
    assert unchanged, "no dropout in validation, and no random number is drawn"
    return totals, steps


@pytest.fixture(scope="module")
def serial(of_one: tuple[tuple, tuple[int, int]]) -> tuple:
    return of_one[0]


def test_every_cell_counts_once(serial: tuple) -> None:
    cells = toy.ToyCells().read(0, 120)
    masking = toy.Masking(0.15, (0.8, 0.02, 0.18), toy.VOCABULARY, 1234)
    labels, _ = masking.validation_positions(cells)
    assert serial[1] == len(labels)
    assert serial[3] <= 120


def test_same_sums_in_every_layout(serial: tuple) -> None:
    for found in run_ranks(sums_of_layouts, 2):
        for name, (totals, unchanged) in found.items():
            assert unchanged, name
            assert totals == pytest.approx(serial, rel=1e-6), name


def test_the_limit_and_the_last_partial_batch(of_one: tuple[tuple, tuple[int, int]]) -> None:
    assert of_one[1] == (8, 3)


def numbers_of_steps() -> tuple[int, int]:
    feed = toy.make().feed  # 120 cells in batches of 16
    return validation_steps(feed, 100), validation_steps(feed, 3)
