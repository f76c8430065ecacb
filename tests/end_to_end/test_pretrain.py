"""launch/pretrain.py as a user meets it: it trains, stops, goes on, and answers mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests import commands
from tests.end_to_end import forked

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


def command(repository: Path, store: Path, run: Path, *more: str) -> list[str]:
    script = str(repository / "launch" / "pretrain.py")
    return [sys.executable, script, f"run.dir={run}", *forked.SETTINGS, *settings(store, *more)]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=200, check=False)


def signalled(_rank: int, step: int, number: signal.Signals) -> None:
    """Trouble: the signal comes when so many steps have been made by this start."""
    forked.before(
        "geneformer_mcore.training.trainer:_step", step + 1, partial(os.kill, os.getpid(), number)
    )


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def last_step(run: Path) -> int:
    return max((record["step"] for record in records(run)), default=0)


def outcome(run: Path) -> dict:
    return json.loads((run / "outcome.json").read_text())


KEPT = ("step", "loss", "grad_norm", "lr", "cells_seen", "tokens_seen", "val_loss")


def trace(run: Path) -> list[dict]:
    return [{key: record[key] for key in KEPT if key in record} for record in records(run)]


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    ended = forked.start(run, settings(store))
    assert ended.wait() == [0], ended.printed
    return run


def test_the_run_folder_holds_what_it_should(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "log.txt",
        "outcome.json",
        "baselines.json",
    }
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
    assert set(training[0]) >= {
        "loss",
        "grad_norm",
        "lr",
        "cells_seen",
        "tokens_seen",
        "cells_per_s",
        "tokens_per_s",
        "tflops_padded_equivalent",
        "tflops_executed",
        "mfu",
        "data_wait_fraction",
    }
    assert training[-1]["cells_seen"] == STEPS * 16
    assert training[-1]["loss"] < training[0]["loss"]


def test_a_run_interrupted_and_killed_goes_on_as_if_nothing_had_happened(
    store: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "disturbed"

    def go_on(*trouble: int) -> forked.Start:
        how = (signalled, trouble) if trouble else ()
        return forked.start(run, settings(store), 1, *how)

    # The step that a signal falls into is made, and saved.
    assert go_on(1, signal.SIGTERM).wait() == [75]
    assert go_on(2, signal.SIGINT).wait() == [75]
    ended = outcome(run)
    assert (ended["outcome"], ended["exit_code"], ended["step"]) == ("interrupted", 75, 5)
    assert "SIGINT" in ended["reason"]
    # Of steps 10 and 11 nothing is left but a line of metrics.jsonl: 9 is the newest checkpoint.
    assert go_on(6, signal.SIGKILL).wait() == [-signal.SIGKILL]
    assert outcome(run)["exit_code"] == 1
    assert last_step(run) == 10
    last = go_on()
    assert last.wait() == [0], last.printed
    assert "(step 9, " in last.printed
    assert outcome(run)["restart"] == 3
    assert trace(run) == trace(finished)


def test_a_finished_run_says_so(store: Path, finished: Path) -> None:
    before = trace(finished)
    again = forked.start(finished, settings(store))
    assert again.wait() == [0]
    assert "the run is finished" in again.printed
    assert trace(finished) == before


def test_two_ranks_go_on_from_one_ranks_checkpoint(store: Path, tmp_path: Path) -> None:
    """Elastic: another layout continues with the same cells and losses."""
    still = ("model.hidden_dropout=0", "model.attention_dropout=0", "train.validate_every_steps=0")
    whole, run = tmp_path / "whole", tmp_path / "elastic"
    assert forked.start(whole, settings(store, *still)).wait() == [0]
    stopped = forked.start(run, settings(store, *still), 1, signalled, (4, signal.SIGUSR1))
    assert stopped.wait() == [75]
    two = forked.start(run, settings(store, *still, "parallel.tensor=2"), 2)
    assert two.wait() == [0, 0], two.printed
    assert "its layout was" in two.printed
    expected, seen = records(whole), records(run)
    assert [line["tokens_seen"] for line in seen] == [line["tokens_seen"] for line in expected]
    losses = [line["loss"] for line in expected]
    assert [line["loss"] for line in seen] == pytest.approx(losses, rel=1e-4)


def test_a_second_start_on_the_same_folder_is_refused(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    again = settings(store, "train.steps=100000", "train.validate_every_steps=0")
    first = forked.start(run, again)
    deadline = time.monotonic() + 60
    while last_step(run) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = forked.start(run, again)
    assert second.wait() == [2]
    assert "another start" in second.printed
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
    ended = forked.start(tmp_path / "run", settings(store, argument))
    assert ended.wait() == [2]
    assert message in ended.printed
    assert "Traceback" not in ended.printed


def test_a_mistake_as_a_user_sees_it(repository: Path, store: Path, tmp_path: Path) -> None:
    """The message goes to stderr, and nothing to stdout."""
    ended = start(*command(repository, store, tmp_path / "run", "train.stepss=3"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert "Did you mean `train.steps`?" in ended.stderr


def test_changed_settings_are_refused_with_both_values(store: Path, finished: Path) -> None:
    ended = forked.start(finished, settings(store, "train.seed=7", "train.steps=20"))
    assert ended.wait() == [2]
    assert "train.seed: 1234 -> 7" in ended.printed
    assert outcome(finished)["exit_code"] == 2
    assert "train.seed" in outcome(finished)["reason"]
    assert forked.start(finished, settings(store, "train.stepss=3")).wait() == [2]
    assert "train.stepss" in outcome(finished)["reason"], "no outcome of an earlier start is left"


def test_damaged_checkpoints_do_not_start_the_run_anew(
    store: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for record in run.glob("checkpoints/*/record.json"):
        record.write_text(record.read_text() + " ")
    before = trace(run)
    ended = forked.start(run, settings(store))
    assert ended.wait() == [2]
    assert "none is as it was written" in ended.printed
    assert trace(run) == before, "nothing is lost"


def test_without_a_demo_store_make_demo_is_named(tmp_path: Path) -> None:
    ended = commands.run("launch/pretrain.py", cwd=tmp_path)
    assert ended.returncode == 2
    assert "make demo" in ended.stderr


def test_a_dry_run_shows_the_plan_and_touches_nothing(
    repository: Path, store: Path, tmp_path: Path
) -> None:
    ended = start(*command(repository, store, tmp_path / "run", "--dry-run"))
    assert ended.returncode == 0
    assert "num_layers: 2" in ended.stdout
    assert "# tokens_per_micro_batch: 800" in ended.stdout
    assert not (tmp_path / "run").exists()
