"""benchmarks/train_step.py: what it refuses, whom it skips, and what its numbers are made of."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.peers.all_steps import HF_DYNAMIC, NAMES, contestants
from benchmarks.peers.step_contestant import Job
from benchmarks.side_by_side import step_cells, step_rows
from benchmarks.side_by_side.step_cells import StepCells
from benchmarks.side_by_side.step_rounds import all_turns, fastest, tune
from geneformer_mcore.backends import is_available
from geneformer_mcore.contracts import PAD
from geneformer_mcore.errors import ConfigError, DataError, GeneformerError
from geneformer_mcore.model.flops import ModelShape, Work, executed_flops
from tests.distributed import toy
from tests.small_cells import random_counts, write_h5ad
from tests.step_job import job_in

SCRIPT = Path("benchmarks", "train_step.py")
SHAPE = ModelShape(4, 32, 64, toy.VOCABULARY)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A small model and 120 cells."""
    return job_in(tmp_path_factory.mktemp("flat"))


@pytest.mark.parametrize("name", NAMES)
def test_who_cannot_be_measured_says_why(job: Job, name: str) -> None:
    why = contestants()[name].why_not(job, on_gpu=False)
    expected = {
        "te_layers": "Transformer Engine needs an NVIDIA GPU",
        "ours_packed": why if why == "" else "there is no setting data.packing yet",
    }
    if name.startswith("hf") and not is_available("transformers"):
        expected[name] = "transformers is not installed"
    assert why == expected.get(name, "")
    on_gpu = contestants()["te_layers"].why_not(job, on_gpu=True)
    assert on_gpu == "Transformer Engine's fused attention is for bf16"


def test_every_contestant_is_told_apart() -> None:
    labels = [kind.label for kind in contestants().values()]
    assert len(set(labels)) == len(labels) == len(NAMES)


# The table


def a_turn(seconds: float, micro: int = 1) -> dict[str, Any]:
    return {
        "seconds": [seconds / 2, seconds / 2],
        "losses": [6.5, 6.4, 6.3],
        "cells": 8,
        "peak_mib": 100.0 * micro,
        "about": "plain",
        "needed": vars(Work(400, 30_000, 60)),
        "computed": vars(Work(500, 40_000, 500)),
    }


def three_rows() -> list[dict[str, Any]]:
    kinds = contestants()
    turns = {
        "ours_padded": [a_turn(each) for each in (1.0, 2.0, 4.0)],
        HF_DYNAMIC: [a_turn(each) for each in (4.0, 4.0, 4.0)],
    }
    rows = [
        step_rows.row(name, kinds[name], found, 2, {1: 3.0, 2: 4.0, 4: "killed"}, "", SHAPE)
        for name, found in turns.items()
    ]
    rows.append(step_rows.row("megatron", kinds["megatron"], [], 1, {}, "it failed", SHAPE))
    step_rows.add_ratios(rows)
    return rows


def test_rows_are_medians_and_ratios_are_of_rounds() -> None:
    ours, theirs, failed = three_rows()
    assert ours["cells_per_s"] == 4
    assert ours["tokens_per_s"] == 200
    assert ours["micro_batch"] == 2
    assert ours["fill"] == 0.8
    executed = executed_flops(SHAPE, Work(400, 30_000, 60)) / 2 / 1e12
    assert ours["tflops_executed"] == pytest.approx(executed)
    computed = executed_flops(SHAPE, Work(500, 40_000, 500)) / 2 / 1e12
    assert ours["tflops_computed"] == pytest.approx(computed)
    assert ours["hf_dynamic_ratio"] == [2, 1, 4]
    assert ours["hf_padded_ratio"] is None
    assert theirs["hf_dynamic_ratio"] == [1, 1, 1]
    assert failed["not_measured"] == "it failed"
    assert json.loads(json.dumps(ours))["tuning"] == {"1": 3, "2": 4, "4": "killed"}


def test_the_table_shows_who_was_skipped_and_how_the_others_were_set() -> None:
    text = step_rows.table(three_rows())
    assert "skipped: Megatron-Core BERT, padded to full length: it failed" in text
    assert "2.00 (1.00..4.00)" in text
    assert "ours, padded: plain" in text
    assert "6.5000" in text


# Cells


def test_padding_is_as_each_is_named(job: Job) -> None:
    cells = StepCells.open(job.cells, job.config(), toy.VOCABULARY)
    dynamic = cells.micro_batches(0, 6, 1)
    assert [len(batch.tokens_BS) for batch in dynamic] == [6, 6, 4]
    for batch in dynamic:
        assert (batch.tokens_BS != PAD).sum(1).max() == batch.tokens_BS.shape[1]
    grouped = [batch.tokens_BS.shape[1] for batch in cells.micro_batches(0, 4, 1, by_length=True)]
    assert grouped == sorted(grouped)
    assert sum(grouped) < sum(
        batch.tokens_BS.shape[1] for batch in cells.micro_batches(0, 4, pad_multiple=1)
    )
    full = cells.micro_batches(0, 4, pad_multiple=0)
    assert {batch.tokens_BS.shape[1] for batch in full} == {toy.SEQ_LENGTH}


def test_what_cells_need_is_their_own_lengths(job: Job) -> None:
    cells = StepCells.open(job.cells, job.config(), toy.VOCABULARY)
    lengths = [
        int((row != PAD).sum()) for batch in cells.micro_batches(1, 4, 0) for row in batch.tokens_BS
    ]
    assert cells.needed(1, 7) == Work(sum(lengths), sum(n * n for n in lengths), 7)


def test_a_flat_copy_is_found_as_such_or_within(job: Job, tmp_path: Path) -> None:
    folder = Path(job.cells)
    assert step_cells.find([folder]) == folder
    assert step_cells.find([folder.parent]) == folder
    assert step_cells.find([tmp_path]) is None
    assert step_cells.find([folder, folder]) is None


def test_cells_that_do_not_suit_are_refused(job: Job, tmp_path: Path) -> None:
    folder = Path(job.cells)
    step_cells.check(folder, toy.VOCABULARY, 120)
    with pytest.raises(DataError, match="holds 120 cells, and a global batch takes 121"):
        step_cells.check(folder, toy.VOCABULARY, 121)
    with pytest.raises(DataError, match=r"holds token .* and the model knows those below 500"):
        step_cells.check(folder, 500, 16)
    with pytest.raises(DataError, match=r"no_such\.h5ad is not there"):
        step_cells.make([tmp_path / "no_such.h5ad"], None, tmp_path)


def test_micro_batches_must_fit_the_global_batch() -> None:
    said = {"precision": None, "attention_dropout": None, "steps": None}
    arguments = argparse.Namespace(global_batch=12, micro_batches=[8, 4, 1, 4], **said)
    train_step.fill_in(arguments, train_step._ON_CPU)
    assert arguments.micro_batches == [1, 4]
    assert (arguments.precision, arguments.attention_dropout, arguments.steps) == ("fp32", 0, 1)
    arguments.micro_batches = [8]
    with pytest.raises(ConfigError, match=r"\(12\) must be a multiple of one of .* \[8\]"):
        train_step.fill_in(arguments, train_step._ON_CPU)


# The command


def start(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_what_cannot_be_measured_is_refused(repository: Path, tmp_path: Path) -> None:
    wrong = ("--rounds", "0", "--steps", "0", "--warmup", "-1", "--micro-batches", "2", "0")
    ended = start(repository, "--cells", str(tmp_path), *wrong, "--only", "nobody")
    assert ended.returncode == 2
    for message in (
        "error: --rounds must be at least 1, and is 0.",
        "--steps must be at least 1, and is 0.",
        "--warmup must be at least 0, and is -1.",
        "--micro-batches must be at least 1, and is 0.",
        "--only: no nobody; there are ours_packed",
    ):
        assert message in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attention-dropout", "1.5"), "model.attention_dropout must be within 0..0.99"),
        (("--global-batch", "6", "--micro-batches", "4"), "--global-batch (6) must be a multiple"),
        (("--json", "FOLDER"), "it is a folder"),
        ((), "is not there: give a flat copy, or files of counts."),
    ],
)
def test_settings_and_cells_are_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    words = [str(tmp_path) if word == "FOLDER" else word for word in arguments]
    work = ("--work", str(tmp_path / "work"))
    typed = ["train_step.py", "--cells", str(tmp_path / "none.h5ad"), *work, *words]
    monkeypatch.setattr(sys, "argv", typed)
    with pytest.raises(GeneformerError, match=re.escape(message)):
        train_step.main()


def test_each_keeps_its_fastest_micro_batch_and_takes_its_turns() -> None:
    calls = []

    def turn(name: str, size: int) -> tuple[dict[str, Any], str]:
        calls.append((name, size))
        if name == "megatron" or size == 4:
            return {}, "no memory"
        return a_turn({"ours_padded": 2.0, HF_DYNAMIC: 4.0}[name] / size), ""

    labels = {name: name for name in ("ours_padded", HF_DYNAMIC, "megatron", "te_layers")}
    failures = {"te_layers": "no GPU"}
    tuning = tune(turn, labels, [1, 2, 4], failures)
    assert tuning["ours_padded"] == {1: 4, 2: 8, 4: "no memory"}
    assert (tuning["megatron"], tuning["te_layers"]) == ({1: "no memory"}, {})
    assert failures == {"megatron": "no memory", "te_layers": "no GPU"}
    sizes = {name: fastest(tried, [1, 2, 4]) for name, tried in tuning.items()}
    assert list(sizes.values()) == [2, 2, 1, 1]
    calls.clear()
    turns = all_turns(turn, labels, sizes, 2, failures)
    assert calls == [("ours_padded", 2), (HF_DYNAMIC, 2)] * 2
    assert [len(each) for each in turns.values()] == [2, 2, 0, 0]
    assert tune(turn, labels, [4], failures)["ours_padded"] == {}, "nothing to choose from"


@pytest.mark.slow
def test_it_measures_as_typed(repository: Path, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ended = start(
        repository,
        *("--cells", job.cells, "--work", str(tmp_path / "work"), "--json", str(out)),
        *("--seq-length", "32", "--global-batch", "4", "--micro-batches", "4", "--rounds", "1"),
        *("--only", "ours_padded", "megatron", "te_layers"),
    )
    assert ended.returncode == 0, ended.stderr
    assert "skipped: TE layers" in ended.stdout
    content = json.loads(out.read_text())
    rows = {found["name"]: found for found in content["rows"]}
    assert rows["te_layers"]["not_measured"] == "Transformer Engine needs an NVIDIA GPU"
    for name in ("ours_padded", "megatron"):
        found = rows[name]
        assert found["not_measured"] == ""
        assert found["cells_per_s"] == found["rounds"][0] > 0
        assert found["micro_batch"] == 4
        assert found["peak_mib"] > 100, "ten million weights, gradients and moments"
        assert 0 < found["fill"] <= 1
        assert found["first_loss"] == pytest.approx(math.log(train_step.VOCABULARY), abs=0.3)
    assert {"machine", "versions", "commit", "settings"} <= set(content)


@pytest.mark.slow
def test_a_flat_copy_is_made_of_counts(repository: Path, tmp_path: Path) -> None:
    counts = random_counts(np.random.default_rng(0), 40, 300)
    file, work = write_h5ad(tmp_path / "a.h5ad", counts), tmp_path / "work"
    words = ("--cells", str(file), "--work", str(work), "--make", "--global-batch", "8")
    ended = start(repository, *words)
    assert ended.returncode == 0, ended.stderr
    folder = Path(ended.stdout.strip().splitlines()[-1].partition(": ")[2])
    assert step_cells.find([folder]) == folder
    step_cells.check(folder, train_step.VOCABULARY, 40)
    assert step_cells.make([file], None, work) == folder
    with pytest.raises(ConfigError, match="holds other cells than those asked for"):
        step_cells.make([file], Path("other.json"), work)
