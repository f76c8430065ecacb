"""Window sums and rates; a meter that resumes as if nothing had happened; the measured peak."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from geneformer_mcore.metrics import peak_flops
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
    "step", "loss", "grad_norm", "lr", "cells_seen", "tokens_seen", "cells_per_s", "tokens_per_s",
    "tflops_padded_equivalent", "tflops_executed", "mfu", "data_wait_fraction", "step_s",
}  # fmt: skip
STEP = {
    "loss_sum": 960.0, "num_predicted": 160, "cells": 8, "tokens": 800,
    "sum_squared_lengths": 80_000, "data_wait_s": 0.5, "step_s": 2.0,
}  # fmt: skip
"""Eight cells of 100 tokens, 20 of each predicted, in 2 s of which 0.5 s waited."""
CPU = torch.device("cpu")


def meter_of(*steps: dict[str, Any], world_size: int = 1, peak: float | None = None) -> Meter:
    """After steps that differ from STEP by these values."""
    meter = Meter(SHAPE, SEQ_LENGTH, world_size, peak)
    for step in steps:
        meter.add(**STEP | step)
    return meter


def record(meter: Meter, step: int = 1) -> dict[str, Any]:
    return meter.record(step=step, grad_norm=1.5, lr=1e-3)


@pytest.mark.parametrize(
    ("sums", "loss"),
    [(((10.0, 1), (20.0, 9)), 3.0), (((0.0, 0),), None)],
    ids=["the sum over the count and no mean of means", "nothing predicted"],
)
def test_the_loss(sums: tuple[tuple[float, int], ...], loss: float | None) -> None:
    steps = [{"loss_sum": loss_sum, "num_predicted": number} for loss_sum, number in sums]
    assert record(meter_of(*steps))["loss"] == loss


def test_a_record_has_the_rates_and_shares_of_its_window_and_totals() -> None:
    meter = meter_of({}, {"step_s": 6.0})
    found = record(meter, step=7)
    assert set(found) == KEYS
    assert (found["step"], found["grad_norm"], found["lr"]) == (7, 1.5, 1e-3)
    assert (found["cells_per_s"], found["tokens_per_s"]) == (16 / 8, 1600 / 8)
    assert (found["data_wait_fraction"], found["step_s"]) == (1 / 8, 4)
    meter.add(**STEP | {"loss_sum": 16.0, "num_predicted": 8})
    found = record(meter, step=8)
    assert found["loss"] == 2
    assert (found["cells_seen"], found["tokens_seen"]) == (24, 2400)


def test_tflops_are_per_rank() -> None:
    found = record(meter_of({}, world_size=4, peak=2e9))
    padded = padded_equivalent_flops(SHAPE, SEQ_LENGTH, cells=8) / 2 / 4
    executed = executed_flops(SHAPE, Workload(800, 80_000, 160)) / 2 / 4
    assert found["tflops_padded_equivalent"] * 1e12 == pytest.approx(padded)
    assert found["tflops_executed"] * 1e12 == pytest.approx(executed)
    assert found["mfu"] == pytest.approx(executed / 2e9)
    assert record(meter_of({}, peak=None))["mfu"] is None


def test_a_window_added_at_once_is_the_same_as_its_steps() -> None:
    at_once = meter_of()
    at_once.add(**{name: 4 * value for name, value in STEP.items()}, steps=4)
    assert record(meter_of(*[{}] * 4)) == record(at_once)


def test_tensors_are_read_at_the_record_and_left_unchanged() -> None:
    loss_sum = torch.tensor(30.0, dtype=torch.float64)
    meter = meter_of(*[{"loss_sum": loss_sum, "num_predicted": torch.tensor(10)}] * 2)
    state = json.loads(json.dumps(meter.state_dict()))
    assert (state["window"]["loss_sum"], state["window"]["num_predicted"]) == (60.0, 20)
    found = record(meter)
    assert found["loss"] == 3
    assert isinstance(found["loss"], float)
    assert loss_sum.item() == 30


def test_a_restarted_run_logs_what_an_undisturbed_one_does() -> None:
    steps = [{"loss_sum": 0.1 * n, "num_predicted": n + 1} for n in range(6)]
    undisturbed, resumed = meter_of(*steps[:3]), meter_of()
    # Through JSON, as a checkpoint keeps it, in the middle of a window.
    resumed.load_state_dict(json.loads(json.dumps(undisturbed.state_dict())))
    for step in steps[3:]:
        undisturbed.add(**STEP | step)
        resumed.add(**STEP | step)
    assert record(resumed) == record(undisturbed)


def test_the_peak_is_measured_quickly_and_leaves_the_random_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    start = time.perf_counter()
    peak = peak_flops.measured_peak(CPU, torch.float32, budget_s=0.3)
    # The budget bounds what is started, and one product may take longer than was expected.
    assert time.perf_counter() - start < 3
    assert 1e8 < peak < 1e14, "from a slow shared core to a big server"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seconds_of_512", [1e-4, 1.0])
def test_sizes_grow_while_time_is_left(monkeypatch, seconds_of_512: float) -> None:
    tried = []

    def product_s(size: int, *_: object) -> float:
        tried.append(size)
        return seconds_of_512 * (size / 512) ** 3

    monkeypatch.setattr(peak_flops, "_fastest_product_s", product_s)
    peak = peak_flops.measured_peak(CPU, torch.float32, budget_s=0.8)
    assert peak == pytest.approx(2 * 512**3 / seconds_of_512)
    # 2 x 0.41 s for size 8192 would be over the budget; so would 2 x 1 s for size 512.
    assert tried[-1] == (4096 if seconds_of_512 < 1 else 256)
