"""The tables of README.md: figures out of results, and --check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme_tables
from geneformer_mcore.errors import DataError

WHERE = {"machine": "AMD, 1 x NVIDIA H100", "versions": {"python": "3.11.7"}, "commit": "abc"}
SHUFFLE = {"blocks": 0.98, "each_once": True, "epochs_differ": False}
GOAL = {"what": "a / b", "value": 16.0, "bar": 15, "unit": "x", "at_most": False, "met": True}
TFLOPS = {
    **{"model": "10m", "precision": "bf16", "packing": "packed", "tokens_per_cell": 1300.4},
    **{"attention": "flash", "attention_dropout": 0.1, "compiled": True, "micro_batch": 32},
    **{"fill": 0.985, "step_s": 0.03, "cells_per_s": 1234.0, "tokens_per_s": 1.6e6},
    **{"tflops_padded_equivalent": 242.0, "tflops_executed": 101.0, "mfu": 0.2},
    **{"data_wait_fraction": 0.001, "peak_mib": 9876.0},
}


def around(middle: float) -> dict[str, float]:
    return {"value": middle, "low": middle - 0.05, "high": middle + 0.05}


def method(name: str, f1: float, gain: float) -> dict[str, Any]:
    known = {"features": name, "classifier": "forest", "macro_f1_over_baseline": around(gain)}
    return known | {"macro_f1": around(f1), "accuracy": around(f1 + 0.1)}


SCHEME = {"name": "5-fold", "cells": 2600, "labels": ["a", "b"]}
METHODS = [method("PCA", 0.8, 0.0), method("pretrained", 0.7, -0.1)]
TRAINED = {
    **{"num_layers": 2, "hidden_size": 128, "seq_length": 256, "steps": 200},
    **{"cells_per_step": 32, "wall_s": 620.0, "val_loss": 7.251},
}
RESULTS: dict[str, dict[str, Any]] = {
    "tokenize": {
        "cells": 90,
        "rows": [
            {"name": "ours", "cells_per_s": 60_000.0, "cells_that_differ": 0},
            {"name": "theirs", "cells_per_s": 8_000.0, "cells_that_differ": 7},
        ],
    },
    "loader": {
        "rows": [
            {"label": "ours", "table": "tokens", "peer": "", "not_measured": None}
            | {"cells_per_s": 123_456.0, "first_batch_s": 0.25, "peak_mib": 700.4}
            | {"shuffle": SHUFFLE},
            {"label": "scdl", "table": "counts", "peer": "scdl 0.1", "not_measured": "not there"},
        ],
        "goals": [GOAL, GOAL | {"what": "c", "met": False, "at_most": True, "unit": "s"}],
    },
    "perturb": {
        "rows": [
            {"name": "ours", "variants_per_s": 3.0, "variants_per_cpu_s": 4.5}
            | {"flops_per_variant": 100},
            {"name": "theirs", "variants_per_s": 0.5, "variants_per_cpu_s": 0.9}
            | {"flops_per_variant": 450},
        ],
        "reading": ["missed by the clock"],
    },
    "tflops_h100": {"rows": [TFLOPS]},
    "cell_types": {
        "nvidia": {"data": "others", "rows": []},
        "sets": [
            {"input": "blood.h5ad", "schemes": [SCHEME | {"rows": METHODS}]}
            | {"trained_on": ["lung.h5ad"], "not_trained_on": {}, "pretraining": TRAINED},
        ],
    },
}
EXPECTED = {
    "tokenize": "| theirs | 8,000 | 7.50 x | 7 of 90 |",
    "loader_tokens": "| ours | - | 123,456 | 0.25 | 700 | 0.98 | yes | **no** |",
    "loader_counts": "| scdl | scdl 0.1 | not measured: not there |  |  |  |  |  |",
    "loader_goals": "| c | 16 | < 15 s | **no** |",
    "perturb": "| theirs | 0.5 | 0.9 | 6.00 x | 5.00 x | 4.50 x |",
    "tflops": "| AMD, 1 x NVIDIA H100 | 10m | bf16 | packed, 1,300 tokens | flash, dropout 0.1 "
    "| yes | 32 | 98.5% | 0.03 | 1,234 | 1,600,000 | 242 | 101 | 20.0% | 0.1% | 9,876 |",
    "cell_types": "| blood, 2,600 cells | 5-fold, 2 labels | PCA | forest "
    "| **0.800 (0.750 to 0.850)** | 0.900 (0.850 to 0.950) | - |",
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


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    for name in readme_tables.TABLES:
        table = readme_tables.filled(page_of(name), tmp_path)
        assert "not measured" in table, name
        assert "old" not in table
    with pytest.raises(DataError, match="no table is called other"):
        readme_tables.filled(page_of("other"), tmp_path)
