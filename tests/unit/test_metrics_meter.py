"""Window sums, rates, and a meter that goes on after a restart as if nothing had happened."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from geneformer_mcore.metrics.meter import Meter
from geneformer_mcore.model.flops import (
    ModelShape,
    Workload,
    executed_flops,
    padded_equivalent_flops,
)

SHAPE = ModelShape(num_layers=2, hidden_size=64, ffn_hidden_size=128, vocabulary_size=1000)
SEQ_LENGTH = 256
KEYS = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "cells_seen",
    "tokens_seen",
    "cells_per_s",
    "tokens_per_s",
    "tflops_padded_equivalent",
    "tflops_executed",
    "mfu",
    "data_wait_fraction",
    "step_s",
}


def make_meter(world_size: int = 1, peak: float | None = None) -> Meter:
    return Meter(SHAPE, SEQ_LENGTH, world_size, peak)


def one_step(**changes: Any) -> dict[str, Any]:
    """Eight cells of 100 tokens, 20 of each predicted, in 2 s of which 0.5 s waited."""
    step = {
        "loss_sum": 960.0,
        "num_predicted": 160,
        "cells": 8,
        "tokens": 800,
        "sum_squared_lengths": 80_000,
        "data_wait_s": 0.5,
        "step_s": 2.0,
    }
    return step | changes


def record(meter: Meter, step: int = 1) -> dict[str, Any]:
    return meter.record(step=step, grad_norm=1.5, lr=1e-3)


def test_a_record_has_the_keys_of_metrics_jsonl() -> None:
    meter = make_meter()
    meter.add(**one_step())
    found = record(meter, step=7)
    assert set(found) == KEYS
    assert (found["step"], found["grad_norm"], found["lr"]) == (7, 1.5, 1e-3)


def test_loss_is_the_sum_over_the_count_and_not_a_mean_of_means() -> None:
    meter = make_meter()
    meter.add(**one_step(loss_sum=10.0, num_predicted=1))
    meter.add(**one_step(loss_sum=20.0, num_predicted=9))
    assert record(meter)["loss"] == 3.0


def test_a_window_that_predicts_nothing_has_no_loss() -> None:
    meter = make_meter()
    meter.add(**one_step(loss_sum=0.0, num_predicted=0))
    assert record(meter)["loss"] is None


def test_rates_and_shares() -> None:
    meter = make_meter()
    meter.add(**one_step())
    meter.add(**one_step(step_s=6.0))
    found = record(meter)
    assert found["cells_per_s"] == 16 / 8
    assert found["tokens_per_s"] == 1600 / 8
    assert found["data_wait_fraction"] == 1 / 8
    assert found["step_s"] == 4


def test_tflops_are_per_rank() -> None:
    meter = make_meter(world_size=4, peak=2e9)
    meter.add(**one_step())
    found = record(meter)
    padded = padded_equivalent_flops(SHAPE, SEQ_LENGTH, cells=8) / 2 / 4
    executed = executed_flops(SHAPE, Workload(800, 80_000, 160)) / 2 / 4
    assert found["tflops_padded_equivalent"] * 1e12 == pytest.approx(padded)
    assert found["tflops_executed"] * 1e12 == pytest.approx(executed)
    assert found["mfu"] == pytest.approx(executed / 2e9)


def test_mfu_is_unknown_where_the_peak_is() -> None:
    meter = make_meter(peak=None)
    meter.add(**one_step())
    assert record(meter)["mfu"] is None


def test_a_record_starts_a_new_window_and_totals_go_on() -> None:
    meter = make_meter()
    meter.add(**one_step())
    record(meter)
    meter.add(**one_step(loss_sum=16.0, num_predicted=8))
    found = record(meter, step=2)
    assert found["loss"] == 2
    assert (found["cells_seen"], found["tokens_seen"]) == (16, 1600)


def test_a_window_added_at_once_is_the_same_as_its_steps() -> None:
    apart, at_once = make_meter(), make_meter()
    for _ in range(4):
        apart.add(**one_step())
    at_once.add(**{name: 4 * value for name, value in one_step().items()}, steps=4)
    assert record(apart) == record(at_once)


def test_tensors_are_read_at_the_record_and_left_unchanged() -> None:
    meter = make_meter()
    loss_sum = torch.tensor(30.0, dtype=torch.float64)
    for _ in range(2):
        meter.add(**one_step(loss_sum=loss_sum, num_predicted=torch.tensor(10)))
    found = record(meter)
    assert found["loss"] == 3
    assert isinstance(found["loss"], float)
    assert loss_sum.item() == 30


def test_a_restarted_run_logs_what_an_undisturbed_one_does() -> None:
    undisturbed = make_meter()
    steps = [one_step(loss_sum=0.1 * n, num_predicted=n + 1) for n in range(6)]
    for step in steps[:3]:
        undisturbed.add(**step)
    # Through JSON, as a checkpoint keeps it, in the middle of a window.
    kept = json.loads(json.dumps(undisturbed.state_dict()))
    resumed = make_meter()
    resumed.load_state_dict(kept)
    for step in steps[3:]:
        undisturbed.add(**step)
        resumed.add(**step)
    assert record(resumed) == record(undisturbed)


def test_state_is_plain_numbers_even_of_tensors() -> None:
    meter = make_meter()
    meter.add(**one_step(loss_sum=torch.tensor(2.5), num_predicted=torch.tensor(4)))
    state = json.loads(json.dumps(meter.state_dict()))
    assert state["window"]["loss_sum"] == 2.5
    assert state["window"]["num_predicted"] == 4
