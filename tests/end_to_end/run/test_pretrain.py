"""launch/pretrain.py as a user meets it: it trains, stops, goes on, and answers mistakes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.end_to_end.forked import Run, before
from tests.support import commands

STEPS = 14
MORE = (
    f"train.steps={STEPS}",
    "train.validate_every_steps=7",
    # A checkpoint at step 3 or 9 holds half a logging window.
    "metrics.log_every_steps=2",
    "checkpoint.save_every_steps=3",
)


def typed(run: Run, *more: str) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter of its own."""
    command = [sys.executable, str(commands.ROOT / "launch" / "pretrain.py"), *run.words(*more)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def signalled(_rank: int, step: int, number: signal.Signals) -> None:
    """Trouble: the signal comes when so many steps have been made by this start."""
    do = partial(os.kill, os.getpid(), number)
    before("geneformer_mcore.training.trainer:_step", step + 1, do)


KEPT = ("step", "loss", "grad_norm", "lr", "cells_seen", "tokens_seen", "val_loss")


def trace(run: Run) -> list[dict]:
    return [{key: record[key] for key in KEPT if key in record} for record in run.records()]


def test_the_run_folder_holds_what_it_should(undisturbed: Run) -> None:
    names = {path.name for path in undisturbed.folder.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "log.txt"}
    assert names >= {"outcome.json", "baselines.json"}
    assert undisturbed.outcome() == {
        "outcome": "finished",
        "exit_code": 0,
        "step": STEPS,
        "reason": f"all {STEPS} steps done",
        "restart": 0,
    }
    checkpoints = sorted(path.name for path in (undisturbed.folder / "checkpoints").iterdir())
    # The best of those that validated is the last one.
    assert checkpoints == ["latest", "step_0000000012", "step_0000000014"]


def test_the_metrics_are_complete_and_the_loss_falls(undisturbed: Run) -> None:
    training = undisturbed.records("loss")
    assert [line["step"] for line in training] == list(range(2, STEPS + 1, 2))
    assert [line["step"] for line in undisturbed.records("val_loss")] == [7, 14]
    assert set(training[0]) >= {"loss", "grad_norm", "lr", "cells_seen", "tokens_seen", "mfu"}
    assert set(training[0]) >= {"cells_per_s", "tokens_per_s", "data_wait_fraction"}
    assert set(training[0]) >= {"tflops_padded_equivalent", "tflops_executed"}
    assert training[-1]["cells_seen"] == STEPS * 16
    assert training[-1]["loss"] < training[0]["loss"]


def test_a_run_interrupted_and_killed_goes_on_as_if_nothing_had_happened(
    run: Run, undisturbed: Run
) -> None:
    # The step that a signal falls into is made, and saved.
    run.check(trouble=(signalled, 1, signal.SIGTERM), code=75)
    run.check(trouble=(signalled, 2, signal.SIGINT), code=75)
    ended = run.outcome()
    assert (ended["outcome"], ended["exit_code"], ended["step"]) == ("interrupted", 75, 5)
    assert "SIGINT" in ended["reason"]
    # Of steps 10 and 11 nothing is left but a line of metrics.jsonl: 9 is the newest checkpoint.
    run.check(trouble=(signalled, 6, signal.SIGKILL), code=-signal.SIGKILL)
    assert run.outcome()["exit_code"] == 1
    assert run.records()[-1]["step"] == 10
    assert "(step 9, " in run.check()
    assert run.outcome()["restart"] == 3
    assert trace(run) == trace(undisturbed)


def test_a_finished_run_is_left_as_it_is(undisturbed: Run) -> None:
    earlier = trace(undisturbed)
    assert "the run is finished" in undisturbed.check()
    assert trace(undisturbed) == earlier


def test_two_ranks_go_on_from_one_ranks_checkpoint(run: Run, tmp_path: Path) -> None:
    """Elastic: another layout continues with the same cells and losses."""
    still = ("model.hidden_dropout=0", "model.attention_dropout=0", "train.validate_every_steps=0")
    whole = run.at(tmp_path / "whole")
    whole.check(*still)
    run.check(*still, trouble=(signalled, 4, signal.SIGUSR1), code=75)
    assert "its layout was" in run.check(*still, "parallel.tensor=2", ranks=2)
    expected, found = whole.records(), run.records()
    assert [line["tokens_seen"] for line in found] == [line["tokens_seen"] for line in expected]
    losses = [line["loss"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-4)


def test_a_second_start_on_the_same_folder_is_refused(run: Run) -> None:
    endless = ("train.steps=100000", "train.validate_every_steps=0")
    first = run.start(*endless)
    first.wait_for(run.folder / "metrics.jsonl")
    assert "another start" in run.check(*endless, code=2)
    assert run.outcome()["outcome"] == "running"
    first.signal(signal.SIGHUP, 0)
    assert first.wait() == [75]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.stepss=3", "Did you mean `train.steps`?"),
        ("model.num_attention_heads=3", "model.hidden_size (32) must be a multiple"),
        ("data.store=nowhere", "nowhere"),
        ("data.seq_length=4096", "data.seq_length (4096)"),
        ("data.mask_probability=1e-6", "would predict no gene"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(run: Run, argument: str, message: str) -> None:
    assert message in run.check(argument, code=2)


def test_a_mistake_as_a_user_sees_it(run: Run) -> None:
    """The message goes to stderr, and nothing to stdout."""
    ended = typed(run, "train.stepss=3")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert "Did you mean `train.steps`?" in ended.stderr


def test_changed_settings_are_refused_with_both_values(undisturbed: Run) -> None:
    run = undisturbed
    assert "train.seed: 1234 -> 7" in run.check("train.seed=7", "train.steps=20", code=2)
    assert run.outcome()["exit_code"] == 2
    assert "train.seed" in run.outcome()["reason"]
    run.check("train.stepss=3", code=2)
    assert "train.stepss" in run.outcome()["reason"], "no outcome of an earlier start is left"


def test_damaged_checkpoints_do_not_start_the_run_again(run: Run, undisturbed: Run) -> None:
    shutil.copytree(undisturbed.folder, run.folder)
    for record in run.folder.glob("checkpoints/*/record.json"):
        record.write_text(record.read_text() + " ")
    earlier = trace(run)
    assert "none is as it was written" in run.check(code=2)
    assert trace(run) == earlier, "nothing is lost"


def test_without_a_demo_store_make_demo_is_named(tmp_path: Path) -> None:
    ended = commands.run("launch/pretrain.py", cwd=tmp_path)
    assert ended.returncode == 2
    assert "make demo" in ended.stderr


def test_a_dry_run_shows_the_plan_and_touches_nothing(run: Run) -> None:
    ended = typed(run, "--dry-run")
    assert ended.returncode == 0
    assert "num_layers: 2" in ended.stdout
    assert "# tokens_per_micro_batch: 800" in ended.stdout
    assert not run.folder.exists()
