"""README's tables of tokenisers and loaders, out of what the benchmarks keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme_tables

WHERE = {"machine": "a machine", "versions": {"python": "3.11.7"}, "commit": "abc"}
TOKENISERS = {
    "cells": 90,
    "rows": [
        {"name": "ours", "cells_per_s": 60_000.0, "cells_that_differ": 0},
        {"name": "theirs", "cells_per_s": 8_000.0, "cells_that_differ": 7},
    ],
}
MEASURED = {
    "label": "ours, SOMA token store",
    "table": "tokens",
    "peer": "",
    "not_measured": None,
    "cells_per_s": 123_456.0,
    "first_batch_s": 0.25,
    "peak_mib": 700.4,
    "shuffle": {"blocks": 0.98, "each_once": True, "epochs_differ": False},
}
LOADERS = {
    "rows": [
        MEASURED,
        {
            "label": "scdl",
            "table": "counts",
            "peer": "bionemo-scdl 0.1.3",
            "not_measured": "it is not there",
        },
    ],
    "goals": [
        {"what": "a / b", "value": 16.0, "bar": 15, "unit": "x", "at_most": False, "met": True},
        {"what": "c", "value": 3.0, "bar": 2, "unit": "s", "at_most": True, "met": False},
        {"what": "d / e", "value": None, "bar": 5, "unit": "x", "at_most": False, "met": None},
    ],
}
PARITY = {
    "rows": [
        {
            "layout": "tp2 pp2 dp1",
            "ranks": 4,
            "logits": 1.94e-6,
            "gradient": 5.8e-7,
            "worst_parameter": "a",
            "norm": 0.0,
            "losses_from_seed": 2e-5,
            "losses_from_checkpoint": None,
        }
    ]
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "tokenize.json").write_text(json.dumps(TOKENISERS | WHERE))
    (tmp_path / "loader.json").write_text(json.dumps(LOADERS | WHERE))
    (tmp_path / "parity.json").write_text(json.dumps(PARITY | WHERE))
    return tmp_path


def filled(name: str, results: Path) -> list[str]:
    text = f"<!-- table: {name} -->\nold\n<!-- end table -->\n"
    return readme_tables.filled(text, results).splitlines()


def test_tokenisers(results: Path) -> None:
    lines = filled("tokenize", results)
    assert "| ours | 60,000 | 1.00 x | 0 of 90 |" in lines
    assert "| theirs | 8,000 | 7.50 x | 7 of 90 |" in lines


def test_loaders_stand_in_the_table_of_their_kind(results: Path) -> None:
    tokens, counts = filled("loader_tokens", results), filled("loader_counts", results)
    line = "| ours, SOMA token store | - | 123,456 | 0.25 | 700 | 0.98 | yes | **no** |"
    assert line in tokens
    assert line not in counts
    assert "| scdl | bionemo-scdl 0.1.3 | not measured: it is not there |  |  |  |  |  |" in counts


def test_goals_show_their_bar_and_whether_it_is_met(results: Path) -> None:
    lines = filled("loader_goals", results)
    assert "| a / b | 16 | >= 15 x | yes |" in lines
    assert "| c | 3 | < 2 s | **no** |" in lines
    assert "| d / e | not measured | >= 5 x | not measured |" in lines


def test_parity(results: Path) -> None:
    lines = filled("parity", results)
    assert "| tp2 pp2 dp1 | 4 | 1.9e-06 | 5.8e-07 | 0.0e+00 | 2.0e-05 | not measured |" in lines


def test_perturbations(tmp_path: Path) -> None:
    rows = [
        {"name": name, "variants_per_s": rate, "variants_per_cpu_s": of_cpu, "flops_per_variant": n}
        for name, rate, of_cpu, n in (("ours", 3.0, 4.5, 100), ("theirs", 0.5, 0.9, 450))
    ]
    content = {"rows": rows, "reading": ["missed by the clock"]} | WHERE
    (tmp_path / "perturb.json").write_text(json.dumps(content))
    lines = filled("perturb", tmp_path)
    assert "| ours | 3 | 4.5 | 1.00 x | 1.00 x | 1.00 x |" in lines
    assert "| theirs | 0.5 | 0.9 | 6.00 x | 5.00 x | 4.50 x |" in lines
    assert "- missed by the clock" in lines


@pytest.mark.parametrize(
    "name",
    ["tflops", "tokenize", "loader_counts", "loader_tokens", "loader_goals", "parity", "perturb"],
)
def test_without_results_they_say_so(tmp_path: Path, name: str) -> None:
    table = "\n".join(filled(name, tmp_path))
    assert "not measured" in table
    assert "old" not in table


SETTING = {
    "model": "10m",
    "precision": "bf16",
    "packing": "packed",
    "tokens_per_cell": 1300.4,
    "attention": "flash",
    "attention_dropout": 0.1,
    "compiled": True,
    "micro_batch": 32,
    "fill": 0.985,
    "step_s": 0.03,
    "cells_per_s": 1234.0,
    "tokens_per_s": 1.6e6,
    "tflops_padded_equivalent": 242.0,
    "tflops_executed": 101.0,
    "mfu": 0.2,
    "data_wait_fraction": 0.001,
    "peak_mib": 9876.0,
}


def test_tflops_of_every_machine(tmp_path: Path) -> None:
    before = {name: value for name, value in SETTING.items() if name not in ("fill", "peak_mib")}
    cpu = {"rows": [before]} | WHERE | {"machine": "AMD, 2 cores, no GPU"}
    (tmp_path / "tflops_amd.json").write_text(json.dumps(cpu))
    lines = filled("tflops", tmp_path)
    assert any("no GPU | 10m | bf16 | packed, 1,300" in line for line in lines)
    assert any(line.startswith("| one GPU | not measured |") for line in lines)
    gpu = {"rows": [SETTING]} | WHERE | {"machine": "AMD, 16 cores, 1 x NVIDIA H100"}
    (tmp_path / "tflops_h100.json").write_text(json.dumps(gpu))
    lines = filled("tflops", tmp_path)
    assert (
        "| AMD, 16 cores, 1 x NVIDIA H100 | 10m | bf16 | packed, 1,300 tokens "
        "| flash, dropout 0.1 | yes | 32 | 98.5% | 0.03 | 1,234 | 1,600,000 | 242 | 101 | 20.0% "
        "| 0.1% | 9,876 |"
    ) in lines
    assert not any("one GPU" in line for line in lines)
