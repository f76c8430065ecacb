"""A small run of every benchmark, and what each refuses."""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from benchmarks import gpu_session, tokenize, train_step
from benchmarks.harness import made_up, step_cells
from benchmarks.harness.common import version_of
from geneformer_mcore.errors import DataError, GeneformerError
from tests.distributed import toy
from tests.end_to_end.commands.benchmark_processes import ROOT, forked
from tests.support.small_cells import gene_id, random_counts, write_h5ad
from tests.support.step_job import job_in

SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
SIZES = """\
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4}
data: {seq_length: 64}
"""


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def peak(*_: object) -> float:
    """In place of the fastest matrix product, which takes a second to measure."""
    return 1e12


@pytest.fixture
def counts(tmp_path: Path, rng: np.random.Generator) -> Path:
    return write_h5ad(tmp_path / "counts.h5ad", random_counts(rng, 40, 300))


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    """Changes that make models and pools of cells small, and waits short."""
    (tmp_path / "toy.yaml").write_text(SIZES)
    return {
        "benchmarks.harness.common:CONFIGS": {"10m": tmp_path / "toy.yaml"},
        "benchmarks.harness.made_up:POOL_CELLS": 40,
        "benchmarks.harness.made_up:GENES": 300,
        "benchmarks.harness.loader_turn:MIN_S": 0.0,
        "geneformer_mcore.metrics.peak_flops:measured_peak": peak,
    }


EARLY = {
    "from __future__ import annotations",
    "import os",
    "import sys",
    "from pathlib import Path",
}
REMOVAL = "\n    sys.path[0] = "


@pytest.mark.parametrize("name", SCRIPTS)
def test_as_typed_no_script_hides_the_standard_library(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python puts the folder of a script first, and there lies a tokenize.py."""
    script = ROOT / "benchmarks" / f"{name}.py"
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}.py")
    assert str(script.parent) not in sys.path
    # Here Python's own is imported already: what comes before the removal is read.
    text = script.read_text()
    nodes = ast.walk(ast.parse(f"{text[: text.index(REMOVAL)]}{REMOVAL}0"))
    imports = (ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
    assert set(imports) <= EARLY


def test_a_fresh_interpreter_starts_a_benchmark() -> None:
    command = [sys.executable, "benchmarks/tflops.py", "--help"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)


def started(
    name: str, monkeypatch: pytest.MonkeyPatch, *words: object, **change: object
) -> int | None:
    """The exit code of a benchmark's `main` in this process, with some of its names changed."""
    module = importlib.import_module(f"benchmarks.{name}")
    for key, value in change.items():
        monkeypatch.setattr(module, key, value)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    return module.main()


REFUSED = [
    ("loader", "--work . --runs 0 --cells 63", "--cells must be at least 64, and is 63."),
    ("loader", "--work . --only nobody", "no nobody; there are counts_soma_dense"),
    ("tokenize", "--cells 0 --runs 0", "--cells must be at least 1, and is 0."),
    ("perturb", "a --medians b --turns 0", "--turns must be at least 1"),
    ("scaling", "--steps 0", "--steps must be at least 1, and is 0."),
    ("train_step", "--cells . --rounds 0 --warmup -1", "--warmup must be at least 0, and is -1."),
    ("train_step", "--cells none --attention-dropout 1.5", "model.attention_dropout must be"),
    ("train_step", "--cells none --global-batch 6 --micro-batches 4", "must be a multiple"),
    ("train_step", "--cells none", "none holds no flat copy of tokens"),
    ("tflops", "--steps 0 --warmup -1", "--warmup must be at least 0, and is -1."),
    ("tflops", "--attention te --precision bf16", "transformer_engine"),
    ("tflops", "--json file/out.json", "out.json: cannot be written"),
    ("gpu_session", "--out new --toy --only attention tflops", "no tflops; there are attention"),
    ("gpu_session", "--out new --cells none", "none holds no flat copy of tokens"),
    ("cell_types", "--train none --labelled none --out new", "no such file: none"),
]


@pytest.mark.parametrize(("name", "words", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str, message: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_step, "ROOT", tmp_path)
    with pytest.raises(GeneformerError, match=re.escape(message)):
        started(name, monkeypatch, *words.split())


def test_cells_that_do_not_suit_are_refused(tmp_path: Path) -> None:
    folder = Path(job_in(tmp_path / "flat").cells)
    with pytest.raises(DataError, match="holds 120 cells, and a global batch takes 121"):
        step_cells.check(folder, toy.VOCABULARY, 121)
    with pytest.raises(DataError, match=r"holds token .* and the model knows those below 500"):
        step_cells.check(folder, 500, 16)


def test_tokenize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up, "POOL_CELLS", 40)
    monkeypatch.setattr(made_up, "GENES", 300)
    out = tmp_path / "new" / "out.json"
    words = ("--cells", 96, "--runs", 2, "--json", out)
    assert started("tokenize", monkeypatch, *words) == 0
    kept = read(out)
    ours, *others = kept["rows"]
    assert (ours["name"], ours["cells_that_differ"]) == (tokenize.OURS, 0)
    assert [len(row["runs"]) for row in kept["rows"]] == [2] * 5
    assert kept["goals"][0]["value"] == ours["cells_per_s"] / others[0]["cells_per_s"]
    rows = [row | {"cells_that_differ": 1} for row in kept["rows"]]
    code = started("tokenize", monkeypatch, *words, measure=lambda *_: rows)
    assert code == 1, "a list of ours that is not exact"


def test_ingest(tmp_path: Path, counts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "r.json", tmp_path / "work"
    words = ("--cells", 100, "--workers", 1, "--work", work, "--json", out, counts)
    started("ingest", monkeypatch, *words, SETS=(1, 2))
    runs = read(out)["runs"]
    assert [run["cells"] for run in runs] == [100, 200]
    for run in runs:
        assert run["cells_per_s"] == pytest.approx(run["cells"] / run["seconds"], abs=1)
        assert run["peak_pss_gb"] > 0.02
        assert run["cpu_s"] > 0
    assert not work.exists()


def test_loader(tmp_path: Path, small: dict[str, Any]) -> None:
    ours, out = ("ours_store", "ours_flat", "ours_h5ad"), tmp_path / "out.json"
    words = ("--work", tmp_path / "work", "--cells", 256, "--runs", 1, "--json", out)
    words += ("--png", tmp_path / "out.svg")
    peers = ("counts_backed", "counts_scdataset")
    ended = forked("loader", *words, "--only", *ours, *peers, change=small)
    assert ended.code == 0, ended.printed
    kept = {found["name"]: found for found in read(out)["rows"]}
    for name in (*ours, "counts_backed"):
        assert kept[name]["not_measured"] is None, kept[name]
        assert kept[name]["shuffle"]["each_once"] is True
        assert kept[name]["shuffle"]["epochs_differ"] is True
        assert kept[name]["cells_per_s"] > 0
    if version_of("scDataset") == "not installed":
        assert kept["counts_scdataset"]["not_measured"] == "scDataset is not installed"
    assert (tmp_path / "out.svg").read_bytes().count(b"<path") > 10
    again = forked("loader", *words[:2], "--cells", 512, change=small)
    assert again.code == 2
    assert "holds other cells (256 of made up)" in again.printed


def test_perturb(tmp_path: Path, counts: Path, small: dict[str, Any]) -> None:
    (tmp_path / "medians.json").write_text(json.dumps({gene_id(i): 1.0 for i in range(300)}))
    out = tmp_path / "out.json"
    change = small | {"benchmarks.perturb:NUM_CELLS": 6, "benchmarks.perturb:NUM_GENES": 8}
    words = ("--medians", tmp_path / "medians.json", "--turns", 1, "--sample", 3, "--padded", 2)
    ended = forked("perturb", counts, *words, "--json", out, change=change)
    assert ended.code == 0, ended.printed
    kept = read(out)
    assert kept["largest_difference"] < 1e-5
    assert [row["variants"] for row in kept["rows"]] == [[3], [2], [2]]
    assert [row["variants_per_s"] > 0 for row in kept["rows"]] == [True] * 3


@pytest.mark.timeout(900)
def test_a_gpu_session_with_tflops_and_train_step(tmp_path: Path, small: dict[str, Any]) -> None:
    out = tmp_path / "new" / "out"
    words = ("--toy", "--seconds", 800, "--out", out)
    ended = forked("gpu_session", *words, change=small, limit_s=880)
    assert ended.code == 0, ended.printed
    names = ("attention", "tflops_10m", "train_step_10m")
    assert read(out / "session.json")["ends"] == dict.fromkeys(names, "0")
    checks = read(out / "attention.json")["checks"]
    sdpa = [check for check in checks if check["attention"] == "sdpa"]
    assert len(sdpa) == 4
    assert all(0 < each["difference"] < 3e-2 for each in sdpa)
    assert "transformer_engine" in checks[0]["reason"]
    table = read(out / "tflops_10m.json")
    assert [row["packing"] for row in table["rows"]] == ["padded", "packed"]
    for row in table["rows"]:
        assert row["cells_per_s"] == pytest.approx(row["cells_per_step"] / row["step_s"])
    assert table["rows"][0]["tokens_per_cell"] == 64
    assert table["rows"][1]["tokens_per_cell"] == pytest.approx(40, rel=0.5)
    assert len(table["skipped"]) == 2
    assert "TFLOPS, padded-equivalent" in (out / "tflops_10m.log").read_text()
    (ours,) = read(out / "train_step_10m.json")["rows"]
    assert ours["cells_per_s"] == ours["rounds"][0] == 4 / sum(ours["step_s"][0])
    assert ours["first_loss"] == pytest.approx(math.log(train_step.VOCABULARY), abs=0.3)
    assert 0 < ours["fill"] <= 1


def test_parts_of_a_session_cost_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = "import time; time.sleep(99)"
    codes = {
        "dies": "import os; print('word', flush=True); os.kill(os.getpid(), 11)",
        "hangs": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])",
        "ends": "print('done')",
    }
    for name, code in codes.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(gpu_session, "HERE", tmp_path)
    monkeypatch.setattr(gpu_session, "LEAST_S", 1.0)
    parts = {name: (1.5 if name == "hangs" else 60, [f"{name}.py"]) for name in codes}
    ends = {"dies": "-11", "hangs": "out of time", "ends": "0"}
    assert gpu_session.run_parts(parts, tmp_path, 90) == ends
    assert (tmp_path / "dies.log").read_text() == "word\n"
    assert read(tmp_path / "session.json")["ends"] == ends
    assert gpu_session.run_parts(parts, tmp_path, 0.5) == dict.fromkeys(codes, "not begun")


def test_parts_on_a_gpu_are_commands_with_known_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = gpu_session.parts_of(tmp_path, Path("cells"), toy=False)
    assert len(parts) == 5
    assert gpu_session.SECONDS < 480
    for _, words in parts.values():
        monkeypatch.setattr(sys, "argv", words)
        importlib.import_module(f"benchmarks.{Path(words[0]).stem}")._arguments()


def test_real_job_without_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started("real_job", monkeypatch, tmp_path) == 0
    assert "skipped: the real cells are not here" in capsys.readouterr().out
