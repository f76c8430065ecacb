"""benchmarks/tflops.py: what it refuses before it measures, and what its numbers are made of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tflops
from geneformer_mcore.config import load
from geneformer_mcore.model.flops import ModelShape, Work, executed_flops
from geneformer_mcore.train.step import Totals

CPU = torch.device("cpu")
SCRIPT = Path("benchmarks", "tflops.py")


def start(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "--steps must be at least 1, and is 0."),
        (("--warmup", "-1"), "--warmup must be at least 0, and is -1."),
        (("--length", "1"), "--length must be at least 2, and is 1."),
        (("--length", "99", "--seq-length", "64"), "--length (99) must not exceed --seq-length"),
        (("--micro-batch", "0"), "--micro-batch must be at least 1, and is 0."),
        (("--seq-length", "1"), "data.seq_length must be within 2..65536, and is 1."),
        (("--attention-dropout", "1.5"), "model.attention_dropout must be within 0..0.99"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    repository: Path, arguments: tuple[str, ...], message: str
) -> None:
    ended = start(repository, *arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_all_mistakes_are_named_at_once(repository: Path) -> None:
    ended = start(repository, "--steps", "0", "--length", "0")
    assert "--steps" in ended.stderr
    assert "--length" in ended.stderr


def test_results_that_could_not_be_written_are_not_measured(
    repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "a_file").write_text("")
    ended = start(repository, "--json", str(tmp_path / "a_file" / "out.json"))
    assert ended.returncode == 2
    assert "out.json cannot be written" in ended.stderr
    assert not ended.stdout, "it must be said before anything is measured"


def test_a_script_beside_it_does_not_hide_the_standard_library(
    repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(repository / SCRIPT, tmp_path / SCRIPT)
    (tmp_path / "benchmarks" / "tokenize.py").write_text("raise SystemExit('hidden')\n")
    (tmp_path / "geneformer_mcore").symlink_to(repository / "geneformer_mcore")
    ended = start(tmp_path, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_rates_are_of_the_mean_work_and_the_median_time() -> None:
    config, _ = load(
        tflops.CONFIGS["10m"], ["train.micro_batch_size=2", "train.global_batch_size=2"]
    )
    predicted = (100, 200, 600)
    steps = [
        tflops.Step(step_s, 0.5, Totals(9.0 * m, m, 0.0, 2, 4000, 8_000_000))
        for step_s, m in zip((2.0, 50.0, 1.0), predicted, strict=True)
    ]
    row = tflops.row(config, "10m", steps, CPU, peak=1e12)
    assert row["step_s"] == 2
    assert row["data_wait_fraction"] == 0.25
    assert (row["cells_per_s"], row["tokens_per_s"]) == (1, 2000)
    assert row["tokens_per_cell"] == 2000
    flops = executed_flops(ModelShape(6, 256, 512, 25_429), Work(4000, 8_000_000, 300))
    assert row["tflops_executed"] * 1e12 == pytest.approx(flops / 2)
    assert row["mfu"] == pytest.approx(flops / 2 / 1e12)


def test_it_measures_as_typed(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.json"
    small = ("--seq-length", "32", "--steps", "2", "--warmup", "0", "--json", str(out))
    ended = start(repository, *small)
    assert ended.returncode == 0, ended.stderr
    assert "TFLOPS padded-eq." in ended.stdout
    kept = json.loads(out.read_text())
    assert [row["tokens_per_cell"] for row in kept["rows"]] == [32, 32]
    assert kept["rows"][1]["attention_dropout"] == 0
    assert {"machine", "versions", "commit", "peak"} <= set(kept)
