"""The tables of README.md: figures out of results, and --check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme_tables
from benchmarks.harness.pages import TABLES
from benchmarks.harness.session.parts import summarise
from geneformer_mcore.errors import DataError


def rows(*names: str, **columns: tuple[Any, ...]) -> list[dict[str, Any]]:
    """One row per name, with the columns' values."""
    values = [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]
    return [{"name": name} | found for name, found in zip(names, values, strict=True)]


BOTH = ("ours", "theirs")
GOAL = {"what": "c", "value": 3.0, "bar": 2, "unit": "s", "at_most": True, "met": False}
RESULTS: dict[str, dict[str, Any]] = {
    "tokenize": {
        "cells": 90,
        "rows": rows(*BOTH, cells_per_s=(60_000.0, 8_000.0), cells_that_differ=(0, 7)),
    },
    "loader": {"rows": [], "goals": [GOAL]},
    "perturb": {
        "rows": rows(
            *BOTH,
            variants_per_s=(3.0, 0.5),
            variants_per_cpu_s=(4.5, 0.9),
            flops_per_variant=(100, 450),
        ),
        "reading": [],
    },
}
EXPECTED = {
    "tokenize": "| theirs | 8,000 | 7.50 x | 7 of 90 |",
    "loader_goals": "| c | 3 | < 2 s | **no** |",
    "perturb": "| theirs | 0.5 | 0.9 | 6.00 x | 5.00 x | 4.50 x |",
}


def page_of(*names: str) -> str:
    return "\n".join(f"<!-- table: {name} -->\nold\n<!-- end table -->" for name in names)


def test_tables_hold_what_was_measured_and_check_finds_what_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = {"machine": "a machine", "versions": {"python": "3.11.7"}, "commit": "abc"}
    for name, content in RESULTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content | where))
    page = tmp_path / "README.md"
    page.write_text(page_of(*EXPECTED))
    words = ["readme_tables.py", "--readme", str(page), "--results", str(tmp_path)]
    codes = []
    for check in (["--check"], [], ["--check"]):
        monkeypatch.setattr(sys, "argv", [*words, *check])
        codes.append(readme_tables.main())
    assert codes == [1, 0, 0]
    difference = capsys.readouterr().err
    for line in EXPECTED.values():
        assert line in page.read_text().splitlines()
        assert f"+{line}" in difference.splitlines()


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    for name in TABLES:
        assert "not measured" in readme_tables.filled(page_of(name), tmp_path), name
    with pytest.raises(DataError, match="no table is called other"):
        readme_tables.filled(page_of("other"), tmp_path)


def test_the_bars_of_a_gpu_session_are_of_its_best_rows(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    measured = rows("a", "b", cells_per_s=(200.0, 150.0), tflops_padded_equivalent=(310.0, 350.0))
    found = [row | {"model": "106m", "packing": "padded"} for row in measured]
    steps = rows("ours_packed", "ours_padded", "hf_dynamic", "hf_padded", cells_per_s=(9, 6, 3, 1))
    for name, content in {
        "parts/tflops_106m": {"rows": found, "skipped": []},
        "machine": {"tflops_file": "tflops_h200.json"},
        "session": {"parts": []},
        "train_step_106m": {"rows": [*steps, {"name": "te_layers", "not_measured": "no"}]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    chosen = "[DEBUG]: Selected backend = FusedAttention (sub-backend 1)\n"
    (tmp_path / "check_te.log").write_text(chosen * 3)
    summarise(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    goals = [(goal["value"], goal["met"]) for goal in summary["goals"]]
    nothing = (None, None)
    assert goals == [(350, True), (200, True), nothing, nothing, (3, True), nothing]
    assert summary["te_chose"] == ["Selected backend = FusedAttention (sub-backend 1)"]
    assert json.loads((tmp_path / "tflops_h200.json").read_text())["rows"] == found
