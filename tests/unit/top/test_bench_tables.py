"""The tables of README.md: figures out of results, and --check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme_tables
from benchmarks.harness.pages import TABLES
from geneformer_mcore.errors import DataError

OURS, THEIRS = {"name": "ours"}, {"name": "theirs"}
GOAL = {"what": "c", "value": 3.0, "bar": 2, "unit": "s", "at_most": True, "met": False}
WHERE = {"machine": "a machine", "versions": {"python": "3.11.7"}, "commit": "abc"}
RATES = ("variants_per_s", "variants_per_cpu_s", "flops_per_variant")
RESULTS: dict[str, dict[str, Any]] = {
    "tokenize": {
        "cells": 90,
        "rows": [
            OURS | {"cells_per_s": 60_000.0, "cells_that_differ": 0},
            THEIRS | {"cells_per_s": 8_000.0, "cells_that_differ": 7},
        ],
    },
    "loader": {"rows": [], "goals": [GOAL]},
    "perturb": {
        "rows": [
            OURS | dict(zip(RATES, (3.0, 4.5, 100), strict=True)),
            THEIRS | dict(zip(RATES, (0.5, 0.9, 450), strict=True)),
        ],
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
    for name, content in RESULTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content | WHERE))
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


@pytest.mark.parametrize("name", TABLES)
def test_what_was_not_measured_says_so(tmp_path: Path, name: str) -> None:
    assert "not measured" in readme_tables.filled(page_of(name), tmp_path)


def test_a_table_of_no_known_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no table is called other"):
        readme_tables.filled(page_of("other"), tmp_path)
