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

from tests.end_to_end import forked
from tests.end_to_end.forked import newest, outcome, records
from tests.support import commands

STEPS = 14
MORE = (
    f"train.steps={STEPS}",
    "train.validate_every_steps=7",
    # A checkpoint at step 3 or 9 holds half a logging window.
    "metrics.log_every_steps=2",
    "checkpoint.save_every_steps=3",
)


def settings(store: Path, *more: str) -> list[str]:
    return [f"data.store={store}", *MORE, *more]


def typed(run: Path, store: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter of its own."""
    words = [f"run.dir={run}", *forked.SETTINGS, *settings(store, *more)]
    command = [sys.executable, str(commands.ROOT / "launch" / "pretrain.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def signalled(_rank: int, step: int, number: signal.Signals) -> None:
    """Trouble: the signal comes when so many steps have been made by this start."""
    forked.before(
        "geneformer_mcore.training.trainer:_step", step + 1, partial(os.kill, os.getpid(), number)
    )


KEPT = ("step", "loss", "grad_norm", "lr", "cells_seen", "tokens_seen", "val_loss")


def trace(run: Path) -> list[dict]:
    return [{key: record[key] for key in KEPT if key in record} for record in records(run)]


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    forked.check(run, settings(store))
    return run


def test_the_run_folder_holds_what_it_should(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "log.txt"}
    assert names >= {"outcome.json", "baselines.json"}
    assert outcome(finished) == {
        "outcome": "finished",
        "exit_code": 0,
        "step": STEPS,
        "reason": f"all {STEPS} steps done",
        "restart": 0,
    }
    checkpoints = sorted(path.name for path in (finished / "checkpoints").iterdir())
    # The best of those that validated is the last one.
    assert checkpoints == ["latest", "step_0000000012", "step_0000000014"]


def test_the_metrics_are_complete_and_the_loss_falls(finished: Path) -> None:
    lines = records(finished)
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in training] == list(range(2, STEPS + 1, 2))
    assert [line["step"] for line in validation] == [7, 14]
    assert set(training[0]) >= {"loss", "grad_norm", "lr", "cells_seen", "tokens_seen", "mfu"}
    assert set(training[0]) >= {"cells_per_s", "tokens_per_s", "data_wait_fraction"}
    assert set(training[0]) >= {"tflops_padded_equivalent", "tflops_executed"}
    assert training[-1]["cells_seen"] == STEPS * 16
    assert training[-1]["loss"] < training[0]["loss"]


def test_a_run_interrupted_and_killed_goes_on_as_if_nothing_had_happened(
    store: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "disturbed"

    def go_on(code: int, *trouble: int) -> str:
        how = (signalled, trouble) if trouble else ()
        return forked.check(run, settings(store), 1, *how, code=code)

    # The step that a signal falls into is made, and saved.
    go_on(75, 1, signal.SIGTERM)
    go_on(75, 2, signal.SIGINT)
    ended = outcome(run)
    assert (ended["outcome"], ended["exit_code"], ended["step"]) == ("interrupted", 75, 5)
    assert "SIGINT" in ended["reason"]
    # Of steps 10 and 11 nothing is left but a line of metrics.jsonl: 9 is the newest checkpoint.
    go_on(-signal.SIGKILL, 6, signal.SIGKILL)
    assert outcome(run)["exit_code"] == 1
    assert records(run)[-1]["step"] == 10
    assert "(step 9, " in go_on(0)
    assert outcome(run)["restart"] == 3
    assert trace(run) == trace(finished)


def test_a_finished_run_says_so(store: Path, finished: Path) -> None:
    before = trace(finished)
    assert "the run is finished" in forked.check(finished, settings(store))
    assert trace(finished) == before


def test_two_ranks_go_on_from_one_ranks_checkpoint(store: Path, tmp_path: Path) -> None:
    """Elastic: another layout continues with the same cells and losses."""
    still = ("model.hidden_dropout=0", "model.attention_dropout=0", "train.validate_every_steps=0")
    whole, run = tmp_path / "whole", tmp_path / "elastic"
    forked.check(whole, settings(store, *still))
    forked.check(run, settings(store, *still), 1, signalled, (4, signal.SIGUSR1), code=75)
    printed = forked.check(run, settings(store, *still, "parallel.tensor=2"), 2)
    assert "its layout was" in printed
    expected, seen = records(whole), records(run)
    assert [line["tokens_seen"] for line in seen] == [line["tokens_seen"] for line in expected]
    losses = [line["loss"] for line in expected]
    assert [line["loss"] for line in seen] == pytest.approx(losses, rel=1e-4)


def test_a_second_start_on_the_same_folder_is_refused(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    again = settings(store, "train.steps=100000", "train.validate_every_steps=0")
    first = forked.start(run, again)
    first.wait_for(run / "metrics.jsonl")
    assert "another start" in forked.check(run, again, code=2)
    assert outcome(run)["outcome"] == "running"
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
def test_mistakes_get_one_message_and_exit_code_2(
    store: Path, tmp_path: Path, argument: str, message: str
) -> None:
    assert message in forked.check(tmp_path / "run", settings(store, argument), code=2)


def test_a_run_that_never_updated_is_no_success(store: Path, tmp_path: Path) -> None:
    """It leaves no checkpoint that calls it finished."""
    more = ("data.mask_probability=1e-6", "train.validate_every_steps=0", "train.steps=4")
    printed = forked.check(tmp_path / "run", settings(store, *more), code=2)
    assert "step 1: nothing is predicted in it" in printed
    assert "all 4 updates were left out" in printed
    assert newest(tmp_path / "run") == 3


def test_a_mistake_as_a_user_sees_it(store: Path, tmp_path: Path) -> None:
    """The message goes to stderr, and nothing to stdout."""
    ended = typed(tmp_path / "run", store, "train.stepss=3")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert "Did you mean `train.steps`?" in ended.stderr


def test_changed_settings_are_refused_with_both_values(store: Path, finished: Path) -> None:
    printed = forked.check(finished, settings(store, "train.seed=7", "train.steps=20"), code=2)
    assert "train.seed: 1234 -> 7" in printed
    assert outcome(finished)["exit_code"] == 2
    assert "train.seed" in outcome(finished)["reason"]
    forked.check(finished, settings(store, "train.stepss=3"), code=2)
    assert "train.stepss" in outcome(finished)["reason"], "no outcome of an earlier start is left"


def test_damaged_checkpoints_do_not_start_the_run_anew(
    store: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for record in run.glob("checkpoints/*/record.json"):
        record.write_text(record.read_text() + " ")
    before = trace(run)
    assert "none is as it was written" in forked.check(run, settings(store), code=2)
    assert trace(run) == before, "nothing is lost"


def test_without_a_demo_store_make_demo_is_named(tmp_path: Path) -> None:
    ended = commands.run("launch/pretrain.py", cwd=tmp_path)
    assert ended.returncode == 2
    assert "make demo" in ended.stderr


def test_a_dry_run_shows_the_plan_and_touches_nothing(store: Path, tmp_path: Path) -> None:
    ended = typed(tmp_path / "run", store, "--dry-run")
    assert ended.returncode == 0
    assert "num_layers: 2" in ended.stdout
    assert "# tokens_per_micro_batch: 800" in ended.stdout
    assert not (tmp_path / "run").exists()
