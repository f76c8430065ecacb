"""benchmarks/gpu_session.py as on a borrowed GPU, but at toy size: all parts, all files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_session
from benchmarks.side_by_side import session_summary
from benchmarks.side_by_side.session_parts import ENDED, FAILED, LATE, NOT_BEGUN, Part, run_all
from geneformer_mcore.errors import ConfigError

CELLS = Path("cells")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_session_at_toy_size(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    command = [sys.executable, str(repository / "benchmarks" / "gpu_session.py"), "--toy"]
    ended = subprocess.run(
        [*command, "--seconds", "800", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    parts = read(out / "session.json")["parts"]
    assert {part["state"] for part in parts} == {ENDED}
    assert [part["name"] for part in parts] == [
        *("machine", "check_te", "check_sdpa", "tflops_10m", "train_step_10m")
    ]
    assert all((out / f"{part['name']}.log").is_file() for part in parts)
    checks = read(out / "check_sdpa.json")["checks"]
    assert len(checks) == 4
    for entry in checks:
        assert entry["sound"]
        assert (
            0 < entry["differences"]["gradients"] < (3e-2 if entry["precision"] == "bf16" else 1e-5)
        )
        assert any(
            "attention" in kernel["name"] or "bmm" in kernel["name"] for kernel in entry["kernels"]
        )
    assert "transformer_engine" in read(out / "check_te.json")["checks"][0]["reason"]
    machine = read(out / "machine.json")
    if not machine["cuda"]:
        for cells in ("padded", "packed"):
            for precision in ("fp32", "bf16", "fp16"):
                assert machine["auto"][f"{precision} {cells}"] == "blockwise"
            assert "fp8 needs an NVIDIA GPU" in machine["auto"][f"fp8 {cells}"]
    table = read(out / machine["tflops_file"])
    assert [row["packing"] for row in table["rows"]] == ["padded", "packed"]
    assert len(table["skipped"]) == 2
    steps = {row["name"]: row for row in read(out / "train_step_10m.json")["rows"]}
    assert steps["ours_packed"]["cells_per_s"] > 0
    assert "NVIDIA GPU" in steps["te_layers"]["not_measured"]
    turns = (out / "parts" / "train_step_10m" / "turns.jsonl").read_text().splitlines()
    assert json.loads(turns[0])["name"] == "ours_packed"
    assert "sdpa bf16 packed: sound" in ended.stdout
    assert "106m, packed: - (bar >= 300 cells/s): not measured" in ended.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def python(name: str, code: str, budget_s: float = 60) -> Part:
    return Part(name, [sys.executable, "-c", code], budget_s)


def test_a_part_that_crashes_or_hangs_costs_no_other(tmp_path: Path) -> None:
    sleep = "[sys.executable, '-c', 'import time; time.sleep(99)']"
    child = f"import subprocess, sys; subprocess.run({sleep})"
    began = time.monotonic()
    parts = [
        python("dies", "import os; print('word', flush=True); os.kill(os.getpid(), 11)"),
        python("hangs", child, 2),
        python("ends", "print('done')"),
    ]
    outcomes = run_all(parts, tmp_path, 60)
    assert time.monotonic() - began < 30
    assert [each.state for each in outcomes] == [FAILED, LATE, ENDED]
    assert [each.code for each in outcomes] == [-11, -9, 0]
    assert (tmp_path / "dies.log").read_text() == "word\n"
    kept = read(tmp_path / "session.json")["parts"]
    assert [part["state"] for part in kept] == [FAILED, LATE, ENDED]


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    (outcome,) = run_all([python("late", "raise SystemExit(1)")], tmp_path, 5)
    assert (outcome.state, outcome.code) == (NOT_BEGUN, None)


def test_parts_on_a_gpu_are_sensible_commands(repository: Path, tmp_path: Path) -> None:
    parts = gpu_session.all_parts(tmp_path, CELLS)
    assert len({part.name for part in parts}) == len(parts)
    assert gpu_session.SECONDS < 480
    scripts = {Path(part.command[1]).relative_to(repository).as_posix() for part in parts}
    assert scripts == {f"benchmarks/{name}.py" for name in ("gpu_session", "tflops", "train_step")}
    for part in {part.command[1]: part for part in parts}.values():
        # As argparse sees it: nothing is run.
        done = subprocess.run([*part.command, "--help"], capture_output=True, check=False)
        assert done.returncode == 0, part.name


def test_a_part_that_there_is_not_is_refused(tmp_path: Path) -> None:
    parts = gpu_session.all_parts(tmp_path, CELLS)
    assert [part.name for part in gpu_session._chosen(parts, ["machine"])] == ["machine"]
    assert gpu_session._chosen(parts, None) == parts
    with pytest.raises(ConfigError, match=r"--only .*\(machine, .* and names tflops_10\."):
        gpu_session._chosen(parts, ["machine", "tflops_10"])


def test_the_summary_has_the_bars_of_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    row = {"model": "106m", "packing": "padded", "cells_per_s": 200.0}
    rows = [
        row | {"tflops_padded_equivalent": 350.0},
        row | {"tflops_padded_equivalent": 310.0, "cells_per_s": 150.0},
    ]
    (tmp_path / "parts" / "tflops_106m.json").write_text(json.dumps({"rows": rows, "skipped": []}))
    (tmp_path / "machine.json").write_text(json.dumps({"tflops_file": "tflops_h200.json"}))
    (tmp_path / "session.json").write_text(json.dumps({"parts": []}))
    steps = {"ours_packed": 90.0, "ours_padded": 60.0, "hf_dynamic": 30.0, "hf_padded": 10.0}
    rates = [{"name": name, "cells_per_s": rate} for name, rate in steps.items()]
    rates.append({"name": "te_layers", "not_measured": "not installed"})
    (tmp_path / "train_step_106m.json").write_text(json.dumps({"rows": rates}))
    chosen = "[DEBUG | DotProductAttention]: Selected backend = FusedAttention (sub-backend 1)\n"
    (tmp_path / "check_te.log").write_text(chosen * 3)
    session_summary.write(tmp_path)
    found = read(tmp_path / "summary.json")
    values = {goal["what"]: (goal["value"], goal["met"]) for goal in found["goals"]}
    assert values["106m, padded"] == (200, True)
    assert values["10m, padded"] == (None, None)
    assert values["train_step_106m: ours / Hugging Face at its best"] == (3, True)
    assert values["train_step_106m: ours / TE layers in the recipe's style"] == (None, None)
    assert found["goals"][0]["value"] == 350
    assert found["te_chose"] == ["Selected backend = FusedAttention (sub-backend 1)"]
    assert read(tmp_path / "tflops_h200.json")["rows"] == rows
