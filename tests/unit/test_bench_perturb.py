"""The benchmark of perturbations counts what it says."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import perturb
from geneformer_mcore.errors import ConfigError


def test_rates_are_of_all_turns() -> None:
    side = perturb.Side("ours", [2.0, 4.0], [1.0, 2.0], [10, 20], [100, 200])
    found = side.as_json()
    assert found["variants_per_s"] == 5
    assert found["variants_per_cpu_s"] == 10
    name, variants, *rates = perturb.table([side]).splitlines()[-1].split()
    assert (name, variants, rates) == ("ours", "30", ["5.00", "10.00"])


def test_what_cannot_be_measured_is_named_at_once(tmp_path: Path) -> None:
    wrong = argparse.Namespace(turns=0, sample=2, padded=3, json=None)
    with pytest.raises(ConfigError, match=r"--turns must be at least 1[^\0]*--padded must not"):
        perturb.check(wrong)
    perturb.check(argparse.Namespace(turns=1, sample=3, padded=3, json=tmp_path / "x.json"))
