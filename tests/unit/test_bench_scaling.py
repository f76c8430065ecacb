"""benchmarks/scaling.py: the arithmetic of a step on paper."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import readme_tables, scaling
from benchmarks.scaling_model import deals, feeding, lengths, pages, study
from benchmarks.scaling_model.hardware import GPUS, MODELS, SEQ_LENGTH, Network
from benchmarks.scaling_model.speed import speed
from benchmarks.scaling_model.step import Assumptions, Job, all_reduce_s, step


def test_terms_by_hand() -> None:
    """1 GB of gradients, 2 nodes: 2 * 7/8 / 230 + 2 * 1/2 * (1/8) / 20 + 20 * 8 us, in seconds."""
    assert all_reduce_s(1e9, 2, Network()) == pytest.approx(0.0076087 + 0.00625 + 0.00016, rel=1e-4)
    job = Job(250_000_000, 2, 10.0, 2, 0.001, 1.5, 0.0, 1e12)
    found = step(job, Assumptions(optimizer_s=0.002))
    assert (found.compute_s, found.waiting_s) == pytest.approx((0.015, 0.005))
    # Of the last of two micro batches 0.9 * 0.66 * 7.5 ms hide it.
    assert found.exposed_s == pytest.approx(0.0140187 - 0.004455, rel=1e-4)
    assert found.optimizer_s == pytest.approx(0.002 + 30 * 250e6 / 16 / 1e12)
    assert found.gpu_s == found.compute_s + found.exposed_s + found.optimizer_s
    assert found.step_s == pytest.approx(found.gpu_s / 0.96)
    assert found.cells_per_s == pytest.approx(160 / found.step_s)
    hidden = step(replace(job, cell_s=1.0), Assumptions())
    assert hidden.exposed_s == pytest.approx(0.06 * hidden.all_reduce_s)
    slow = step(replace(job, loader_s=0.5), Assumptions())
    assert (slow.bound, slow.step_s) == ("loader", pytest.approx(0.5 / 0.96))


def test_what_a_rank_executes_by_hand() -> None:
    """Both ranks have rows of 128 positions. Of the second's, 98 hold nothing: one more piece for
    attention."""
    found = deals.packed(np.array([100, 30]), 2, SEQ_LENGTH, deals.Costs(1000, 10, 1))
    first = 128_000 + 10 * (100**2 + 28**2) + 0.15 * 99
    second = 128_000 + 10 * (30**2 + 98**2) + 0.15 * 29
    assert found.flops == pytest.approx([first, second])
    assert found.useful == pytest.approx([200_000 + 0.15 * 99, 39_000 + 0.15 * 29])


def test_simulated_ranks_are_the_real_packing() -> None:
    steps = list(deals.batches(lengths.made_up(), 2048, 3, seed=1))
    packed, dealt = deals.simulate(steps, 128, 16 * SEQ_LENGTH, MODELS["106m"])
    assert packed.tokens.max() <= pages.BAR
    assert packed.micro_batches == dealt.micro_batches == 1
    for values, power in ((dealt.tokens, 1), (dealt.squares, 2)):
        work = [(cells.astype(float) ** power).reshape(16, 128).sum(0) for cells in steps]
        assert values == pytest.approx([load.max() / load.mean() for load in work])
    assert 1 < packed.factor < 1.02 < 1.1 < dealt.factor


def test_measured_speeds_go_before_estimates(tmp_path: Path) -> None:
    usual = {"model": "106m", "precision": "bf16", "attention_dropout": 0.1, "seq_length": 2048}
    measured = ((16, 90.0, 2048.0), (64, 99.0, 2048.0), (16, 150.0, 1300.0))
    names = ("micro_batch", "cells_per_s", "tokens_per_cell")
    rows = [usual | dict(zip(names, each, strict=True)) for each in measured]
    content = {"machine": "x, 1 x NVIDIA A100-SXM4-80GB", "rows": rows}
    (tmp_path / "tflops_a100.json").write_text(json.dumps(content))
    found = speed("A100", MODELS["106m"], tmp_path)
    assert (found.cells_per_s, found.source) == (90.0, "measured: tflops_a100.json")
    for gpu, model in (("A100", "10m"), ("H200", "106m")):
        assert speed(gpu, MODELS[model], tmp_path).source.startswith("estimate, not measured")


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "DEMO_STORE", tmp_path / "none")
    for name, value in {"CELLS": 4096, "REPEATS": 1}.items():
        monkeypatch.setattr(feeding, name, value)
    words = ["--steps", "1", "--json", tmp_path / "scaling.json", "--svg", tmp_path / "a.svg"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *map(str, words)])
    assert scaling.main() == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert len(found["rows"]) == len(GPUS) * len(MODELS) * 2 * len(study.NODES)
    for row in [*found["rows"], *(row for case in found["sensitivity"] for row in case["rows"])]:
        terms = row["compute_s"] + row["exposed_s"] + row["optimizer_s"]
        assert row["step_s"] == pytest.approx(max(terms, row["loader_s"]) / 0.96)
        assert row["cells_per_s"] == pytest.approx(2048 / row["step_s"])
    for name in pages.TABLES:
        page = readme_tables.filled(f"<!-- table: {name} -->\n<!-- end table -->\n", tmp_path)
        assert found["commit"] in page
    assert (tmp_path / "a.svg").read_bytes().count(b"<path") > 10
