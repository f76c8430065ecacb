"""The measured peak: never above what was really done, quick, and without side effects."""

from __future__ import annotations

import time

import pytest
import torch

from geneformer_mcore.metrics import peak_flops

CPU = torch.device("cpu")


def test_it_is_quick_and_of_this_world() -> None:
    start = time.perf_counter()
    peak = peak_flops.measured_peak(CPU, torch.float32, budget_s=0.3)
    # The budget bounds what is started, and one product may take longer than was expected.
    assert time.perf_counter() - start < 3
    # From a slow shared core to a big server.
    assert 1e8 < peak < 1e14


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


def test_what_the_run_draws_is_unchanged() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    peak_flops.measured_peak(CPU, torch.float32, budget_s=0.01)
    assert torch.equal(torch.get_rng_state(), before)
