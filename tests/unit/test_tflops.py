"""benchmarks/tflops.py: its rows and cells, what it refuses, and what its numbers are made of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import tflops
from benchmarks.side_by_side import tflops_run
from benchmarks.side_by_side.sizes import CONFIGS
from benchmarks.side_by_side.tflops_cells import FULL, like_real, made_up, of_flat_copy
from benchmarks.side_by_side.tflops_grid import MEAN_TOKENS, Asked, Setting, grid, usual
from benchmarks.side_by_side.tflops_rows import row, table
from benchmarks.side_by_side.tflops_run import Conditions, measure_all, possible
from benchmarks.side_by_side.tflops_steps import Measured, Step
from geneformer_mcore.contracts import CLS, KnownLengths, RandomAccess
from geneformer_mcore.errors import ConfigError, GeneformerError
from geneformer_mcore.model.flops import ModelShape, Work, executed_flops, padded_equivalent_flops
from geneformer_mcore.train.step import Totals
from tests.distributed import toy
from tests.step_job import job_in

CPU = torch.device("cpu")
SCRIPT = Path("benchmarks", "tflops.py")
PADDED = Setting("10m", "fp32", "padded", FULL, "sdpa", 0.0, 2)
PACKED = Setting("10m", "fp32", "packed", MEAN_TOKENS, "sdpa", 0.0, 16)
CONDITIONS = Conditions(seq_length=2048, num_micro_batches=1, steps=3, warmup=1)


def start(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Rows


def test_every_combination_is_a_row() -> None:
    asked = Asked(["106m", "10m"], ["bf16"], ["padded", "packed"], [], ["te", "flash"], [None], [])
    rows = grid(asked, on_gpu=True)
    assert len(rows) == 8
    assert rows[0] == Setting("106m", "bf16", "padded", FULL, "te", None, 16)
    assert rows[-1] == Setting("10m", "bf16", "packed", MEAN_TOKENS, "flash", None, 32)
    said = Asked(["10m"], ["fp32"], ["padded"], [FULL, 900], ["auto"], [0.0, 0.1], [1, 4])
    assert len(set(grid(said, on_gpu=False))) == 8


def test_what_is_usual_suits_the_machine() -> None:
    assert usual(on_gpu=True)["models"] == ["106m", "10m"]
    assert usual(on_gpu=False) == {
        "models": ["10m"],
        "precisions": ["fp32"],
        "dropouts": [None, 0.0],
    }


def test_a_packed_step_has_cells_for_its_micro_batches() -> None:
    padded, packed = CONDITIONS.config(PADDED), CONDITIONS.config(PACKED)
    assert (padded.train.global_batch_size, padded.data.packing) == (2, False)
    assert packed.data.packing
    cells = packed.train.global_batch_size
    assert 0.9 * 16 * 2048 < cells * MEAN_TOKENS < 16 * 2048
    four = Conditions(2048, 4, 3, 1).config(PACKED)
    assert four.train.global_batch_size // 4 == cells


def test_what_cannot_be_is_left_out_with_its_reason() -> None:
    te, flash = (Setting("10m", "bf16", "padded", FULL, name, None, 2) for name in ("te", "flash"))
    long = Setting("10m", "fp32", "padded", FULL, "sdpa", 1.5, 2)
    configs, reasons = possible([PADDED, te, flash, long], CONDITIONS, CPU)
    assert list(configs) == [PADDED]
    assert "transformer_engine" in reasons[te]
    assert "needs an NVIDIA GPU and 16 bits" in reasons[flash]
    assert "model.attention_dropout must be within" in reasons[long]
    with pytest.raises(ConfigError, match=r"(?s)needs an NVIDIA GPU .*attention_dropout"):
        possible([flash, long], CONDITIONS, CPU)


def test_a_row_without_memory_or_with_a_defect_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(config: Any, *_: Any) -> Measured:
        micro_batch = config.train.micro_batch_size
        if micro_batch == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if micro_batch == 4:
            raise RuntimeError("no kernel\nfor this")
        return Measured([a_step(1.0, 100)], 5.0)

    monkeypatch.setattr(tflops_run, "measure", measure)
    settings = [Setting(*("10m", "fp32", "padded", FULL, "sdpa", 0.0), n) for n in (3, 4, 2)]
    out = tmp_path / "out.json"
    results = measure_all(settings, Conditions(2048, 1, 1, 0, out=out), CPU)
    assert [found["reason"] for found in results.skipped] == [
        "out of memory",
        "RuntimeError: no kernel",
    ]
    assert results.failed
    content = json.loads(out.read_text())
    assert [found["micro_batch"] for found in content["rows"]] == [2]
    assert [found["micro_batch"] for found in content["skipped"]] == [3, 4]
    text = table(results.rows, results.skipped)
    assert "micro batch 3: out of memory" in text
    late = measure_all(settings[2:], Conditions(2048, 1, 1, 0, seconds=-1), CPU)
    assert late.skipped[0]["reason"] == "not begun within -1 s"
    assert not late.failed


def a_step(seconds: float, predicted: int, device_s: float | None = None) -> Step:
    totals = Totals(9.0 * predicted, predicted, 0.0, 2, 4000, 8_000_000)
    return Step(seconds, 0.5, device_s, 5000, totals)


def test_rates_are_of_the_mean_work_and_the_median_time() -> None:
    steps = [a_step(2.0, 100, 1.0), a_step(50.0, 200, 40.0), a_step(1.0, 600, 0.5)]
    config = CONDITIONS.config(PADDED)
    cells = made_up(FULL, 2048, 25_429)
    found = row(PADDED, config, cells, "sdpa", False, Measured(steps, 123.0), peak=1e12)
    assert found["step_s"] == 2
    assert found["device_s"] == 1
    assert found["data_wait_fraction"] == 0.25
    assert (found["cells_per_s"], found["tokens_per_s"]) == (1, 2000)
    assert found["tokens_per_cell"] == 2000
    assert found["fill"] == 0.8
    assert found["peak_mib"] == 123
    shape = ModelShape(6, 256, 512, 25_429)
    flops = executed_flops(shape, Work(4000, 8_000_000, 300))
    assert found["tflops_executed"] * 1e12 == pytest.approx(flops / 2)
    assert found["mfu"] == pytest.approx(flops / 2 / 1e12)
    padded = padded_equivalent_flops(shape, 2048)
    assert found["tflops_padded_equivalent"] * 1e12 == pytest.approx(padded)


def test_steps_of_unlike_work_are_compared_per_token() -> None:
    def step(tokens: int, seconds: float) -> Step:
        return Step(seconds, 0.0, None, tokens, Totals(1.0, 10, 0.0, 2, tokens, tokens**2))

    steps = [step(1000, 1.0), step(3000, 3.0), step(2000, 9.0)]
    config = CONDITIONS.config(PADDED)
    cells = made_up(FULL, 2048, 25_429)
    found = row(PADDED, config, cells, "sdpa", True, Measured(steps, 0.0), peak=1e12)
    assert found["tokens_per_s"] == 1000
    assert found["step_s"] == 2
    assert found["device_s"] is None


# Cells


@pytest.mark.parametrize("mean", [200, 1300, 1900])
def test_made_up_lengths_have_the_mean_they_are_asked_for(mean: int) -> None:
    lengths_N = like_real(mean, 2048)
    assert lengths_N.mean() == pytest.approx(mean, rel=2e-3)
    assert lengths_N.min() >= 2
    assert (lengths_N.max() == 2048) == (mean >= 1300)
    assert len(np.unique(lengths_N)) > 100


def test_made_up_cells_are_different_genes_behind_a_cls() -> None:
    cells = made_up(900, 2048, 25_429)
    source = cells.source
    assert isinstance(source, RandomAccess)
    assert not isinstance(source, KnownLengths)
    assert cells.mean_tokens == pytest.approx(900, abs=2)
    some = source.read(5, 8)
    ragged = source.views(np.array([7, 5])).ragged()
    assert len(some) == 3
    seventh = some.tokens_T[some.offsets[2] :]
    assert np.array_equal(ragged.tokens_T[: len(seventh)], seventh)
    assert seventh[0] == CLS
    assert len(np.unique(seventh)) == len(seventh)
    assert (made_up(FULL, 64, 100).source.views(np.arange(9)).lengths_N == 64).all()


def test_cells_of_a_flat_copy_are_cut_off(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    whole, cut = (of_flat_copy(Path(job.cells), length) for length in (2048, 10))
    assert whole.mean_tokens == pytest.approx(toy.ToyCells().offsets[-1] / 120)
    assert cut.mean_tokens < 10
    assert str(tmp_path) not in whole.label


# The command


def test_what_cannot_be_measured_is_refused(repository: Path) -> None:
    wrong = ("--steps", "0", "--warmup", "-1", "--micro-batch", "4", "0", "--lengths", "1", "99")
    ended = start(repository, *wrong, "--seq-length", "64", "--cells", "x")
    assert ended.returncode == 2
    for message in (
        "error: --steps must be at least 1, and is 0.",
        "--warmup must be at least 0, and is -1.",
        "--lengths must be at least 2, and is 1.",
        "--lengths (99) must not exceed --seq-length (64)",
        "--micro-batch must be at least 1, and is 0.",
        "--cells brings cells with lengths of their own",
    ):
        assert message in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seq-length", "1"), "data.seq_length must be within 2..65536, and is 1."),
        (("--attention-dropout", "1.5"), "model.attention_dropout must be within 0..0.99"),
        (("--attention", "te", "--precision", "bf16"), "transformer_engine"),
        (("--cells", "no_such_folder"), "no_such_folder holds no flat copy of tokens"),
    ],
)
def test_settings_and_cells_are_checked_first(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["tflops.py", *arguments])
    with pytest.raises(GeneformerError, match=re.escape(message)):
        tflops.main()


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
    (tmp_path / "benchmarks" / "side_by_side").symlink_to(repository / "benchmarks/side_by_side")
    (tmp_path / "benchmarks" / "tokenize.py").write_text("raise SystemExit('hidden')\n")
    (tmp_path / "geneformer_mcore").symlink_to(repository / "geneformer_mcore")
    ended = start(tmp_path, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_it_measures_as_typed(repository: Path, tmp_path: Path) -> None:
    small = ("--seq-length", "32", "--lengths", "full", "20", "--steps", "2", "--warmup", "0")
    options = ("--attention", "auto", "te", "--attention-dropout", "0", "--micro-batch", "4")
    ended = start(repository, *small, *options, "--json", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "TFLOPS padded-eq." in ended.stdout
    (out,) = tmp_path.glob("tflops_*_cores.json")
    kept = json.loads(out.read_text())
    rows = kept["rows"]
    assert [(found["packing"], found["cells"]) for found in rows] == [
        ("padded", "made up, full length"),
        ("padded", "made up, mean 20"),
        ("packed", "made up, full length"),
        ("packed", "made up, mean 20"),
    ]
    assert rows[0]["tokens_per_cell"] == 32
    assert rows[0]["fill"] == 1
    assert rows[3]["cells_per_step"] == 6
    assert rows[3]["fill"] > rows[1]["fill"]
    assert all(found["attention"] == "sdpa" for found in rows)
    assert len(kept["skipped"]) == 4
    assert {"machine", "versions", "commit", "tflops_peaks"} <= set(kept)


def test_cells_may_come_from_a_flat_copy(repository: Path, tmp_path: Path) -> None:
    job, out = job_in(tmp_path), tmp_path / "out.json"
    small = ("--seq-length", "96", "--steps", "1", "--warmup", "0", "--packing", "packed")
    options = ("--attention-dropout", "0", "--cells", job.cells, "--json", str(out))
    ended = start(repository, *small, *options)
    assert ended.returncode == 0, ended.stderr
    (found,) = json.loads(out.read_text())["rows"]
    assert found["cells"].startswith("flat copy c0c0")
    assert found["tokens_per_cell"] < 96


def test_the_models_are_the_cards() -> None:
    assert all(path.is_file() for path in CONFIGS.values())
