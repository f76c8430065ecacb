"""The benchmark of perturbations counts what it says."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import perturb
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model.flops import ModelShape

SHAPE = ModelShape(2, 8, 16, 50)


def test_rates_are_of_all_turns() -> None:
    side = perturb.Side("ours", [2.0, 4.0], [1.0, 2.0], [10, 20], [100, 200])
    found = side.as_json(SHAPE, 200)
    assert found["variants_per_s"] == 5
    assert found["variants_per_cpu_s"] == 10
    name, variants, *rates = perturb.table([side]).splitlines()[-1].split()
    assert (name, variants, rates) == ("ours", "30", ["5.00", "10.00"])


def test_operations_are_of_the_lengths_that_are_computed() -> None:
    # Per layer 8 n h^2 + 4 n h f + 4 n^2 h, by hand.
    linear, square = 2 * (8 * 64 + 4 * 8 * 16), 2 * 4 * 8
    ours = perturb.Side(perturb.OURS, variants=[2, 1], tokens=[10, 20])
    expected = linear * (2 * 10 + 11 + 20 + 21) + square * (2 * 100 + 121 + 400 + 441)
    assert ours.flops(SHAPE, 200) == expected / 3
    states = linear * 200 + square * 200**2
    assert perturb.Side(perturb.STATES).flops(SHAPE, 200) == states
    assert perturb.Side(perturb.WHOLE).flops(SHAPE, 200) == states + 2 * 8 * (8 + 50) * 200


def test_goals_are_told_by_both_clocks() -> None:
    ours = perturb.Side(perturb.OURS, [1.0], [1.0], [12], [100])
    other = perturb.Side(perturb.STATES, [1.0], [1.0], [2], [100])
    other.cpu_s[0] = 0.5
    about = {"mean_tokens": 826.4, "mean_tokens_measured": 731.1}
    found = perturb.in_json([ours, other], about, SHAPE, 200)
    assert [(goal["value"], goal["met"]) for goal in found["goals"]] == [(6, True), (3, False)]
    wall, cpu, operations, lengths = found["reading"]
    assert wall.endswith("wall clock: 6 x (bar >= 5 x): met")
    assert cpu.endswith("CPU seconds: 3 x (bar >= 5 x): MISSED")
    flops = perturb.Side(perturb.STATES).flops(SHAPE, 200) / ours.flops(SHAPE, 200)
    assert operations.endswith(f"model/flops.py: {flops:.2f} x")
    assert "shorter than those of the job (731 against 826 tokens per variant)" in lengths


def test_what_cannot_be_measured_is_named_at_once(tmp_path: Path) -> None:
    wrong = argparse.Namespace(turns=0, sample=2, padded=3, json=None)
    with pytest.raises(ConfigError, match=r"--turns must be at least 1[^\0]*--padded must not"):
        perturb.check(wrong)
    perturb.check(argparse.Namespace(turns=1, sample=3, padded=3, json=tmp_path / "x.json"))
