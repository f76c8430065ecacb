"""A rank that dies, stops or fails ends the job in time, and is named."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geneformer_mcore.errors import DataError
from tests.end_to_end import forked
from tests.end_to_end.forked import outcome, records
from tests.end_to_end.run.test_pretrain import MORE
from tests.support import commands
from tests.support.marks import soak

TIMEOUT_S = 8
TROUBLE_AT = 5

SCRIPT = """
import os, sys
import launch.pretrain as pretrain
from tests.end_to_end.run.test_lost_ranks import troubled

if __name__ == "__main__":
    troubled(int(os.environ["RANK"]), {of_rank}, {what!r}, {note!r})
    sys.exit(pretrain.main())
"""


def troubled(rank: int, of_rank: int, what: str, note: str) -> None:
    """Trouble: `what`, of TROUBLES, happens to rank `of_rank` at step TROUBLE_AT, and the file
    `note` is written with the time."""
    from geneformer_mcore.training import trainer

    whole, calls = trainer.train_step, 0

    def train_step(trainable: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != TROUBLE_AT:
            return whole(trainable, *rest)
        Path(note).write_text(str(time.time()))
        return TROUBLES[what](whole, trainable, *rest)

    if rank == of_rank:
        trainer.train_step = train_step


def settings(store: Path, *more: str) -> list[str]:
    limits = (f"parallel.timeout_s={TIMEOUT_S}", "train.steps=1000")
    return [f"data.store={store}", *MORE, *limits, *more]


def run(
    what: str, of_rank: int, store: Path, tmp_path: Path, *more: str
) -> tuple[list[int | None], str, float]:
    """(exit codes of two ranks, what they printed, seconds since the trouble)."""
    note = str(tmp_path / "when")
    job = forked.start(tmp_path / "run", settings(store, *more), 2, troubled, (of_rank, what, note))
    return job.wait(), job.printed, seconds_since(tmp_path)


def seconds_since(tmp_path: Path) -> float:
    """From the trouble until the outcome was there."""
    outcome_at = (tmp_path / "run" / "outcome.json").stat().st_mtime
    return outcome_at - float((tmp_path / "when").read_text())


def run_by_torchrun(what: str, of_rank: int, store: Path, tmp_path: Path) -> tuple[int, str, float]:
    """(its exit code, what it printed, seconds since the trouble), as a user starts it."""
    script, note = tmp_path / "trouble.py", str(tmp_path / "when")
    script.write_text(SCRIPT.format(of_rank=of_rank, what=what, note=note))
    words = ("--standalone", "--max-restarts=0", "--nproc_per_node=2", "--shutdown-timeout=120")
    given = (f"run.dir={tmp_path / 'run'}", *forked.SETTINGS, *settings(store))
    ended = commands.torchrun(*words, script, *given)
    return ended.returncode, ended.stderr, seconds_since(tmp_path)


def failed(*_: Any) -> None:
    raise ValueError("a bad cell")


def refused(*_: Any) -> None:
    raise DataError("a bad store")


def nan(whole: Any, trainable: Any, *rest: Any) -> Any:
    """One of its gradients is not a number; no weight changes."""
    stage = trainable.stages[0]
    bias = stage.encoder.final_layernorm.bias
    hook = bias.register_hook(lambda grad: grad * float("nan"))
    before = [weight.detach().clone() for weight in stage.parameters()]
    result = whole(trainable, *rest)
    hook.remove()
    assert all(a.equal(b) for a, b in zip(before, stage.parameters(), strict=True))
    return result


TROUBLES: dict[str, Callable[..., Any]] = {
    "killed": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda *_: os.kill(os.getpid(), signal.SIGSTOP),
    "asleep": lambda *_: time.sleep(1000),
    "failed": failed,
    "refused": refused,
    "nan": nan,
}


def assert_named(what: str, of_rank: int, run: Path, printed: str) -> None:
    """The outcome names the rank that was lost, and so does what was printed."""
    found = outcome(run)
    assert (found["outcome"], found["exit_code"]) == ("failed", 1)
    assert found["step"] == TROUBLE_AT - 1
    reason = found["reason"]
    assert f"error: {reason[:60]}" in printed
    if what == "asleep":
        assert f"no rank got on for {TIMEOUT_S} s" in reason
    else:
        assert f"rank {of_rank} of 2 is lost" in reason
        assert f"rank {1 - of_rank} " in reason
    assert "while forward, backward and update" in reason or "update for" in reason


@pytest.mark.parametrize(
    ("what", "of_rank"),
    [
        soak("killed", 0),
        ("killed", 1),
        ("stopped", 0),
        soak("stopped", 1),
        ("asleep", 1),
        soak("asleep", 0),
    ],
)
def test_a_lost_rank_ends_the_job_in_time_and_is_named(
    what: str, of_rank: int, store: Path, tmp_path: Path, slack_s: float
) -> None:
    codes, printed, seconds = run(what, of_rank, store, tmp_path)
    lost = 1 if what == "asleep" else -signal.SIGKILL
    assert (codes[of_rank], codes[1 - of_rank]) == (lost, 1)
    assert_named(what, of_rank, tmp_path / "run", printed)
    assert seconds < TIMEOUT_S + slack_s


@pytest.mark.parametrize(("what", "of_rank"), [soak("killed", 0), ("stopped", 1)])
def test_under_torchrun_too(
    what: str, of_rank: int, store: Path, tmp_path: Path, slack_s: float
) -> None:
    """Which asks the others to end when one rank has ended, and heeds none that is stopped."""
    code, printed, seconds = run_by_torchrun(what, of_rank, store, tmp_path)
    assert code == 1
    assert_named(what, of_rank, tmp_path / "run", printed)
    assert seconds < TIMEOUT_S + slack_s


@pytest.mark.parametrize("of_rank", [1, soak(0)])
def test_an_error_on_one_rank_reaches_all(
    of_rank: int, store: Path, tmp_path: Path, slack_s: float
) -> None:
    codes, _, seconds = run("failed", of_rank, store, tmp_path)
    assert codes == [1, 1]
    reason = outcome(tmp_path / "run")["reason"]
    # Rank 0 writes the outcome: of its own error it needs not say where it was.
    where = f"the job failed: rank {of_rank} failed at step 4 while forward, backward and update: "
    assert reason == f"{where if of_rank else ''}ValueError: a bad cell"
    assert seconds < slack_s


def test_a_users_mistake_on_one_rank_is_exit_code_2(store: Path, tmp_path: Path) -> None:
    assert run("refused", 1, store, tmp_path)[0] == [2, 2]
    found = outcome(tmp_path / "run")
    assert (found["exit_code"], found["reason"]) == (2, "a bad store")


def test_a_nan_on_one_rank_is_left_out_everywhere_counted_and_named(
    store: Path, tmp_path: Path
) -> None:
    more = ("train.non_finite=skip", "train.steps=8", "checkpoint.save_every_steps=0")
    codes, printed, _ = run("nan", 1, store, tmp_path, *more)
    assert codes == [0, 0], printed
    folder = tmp_path / "run"
    assert [line["skipped_updates"] for line in records(folder) if "loss" in line][-1] == 1
    (line,) = (folder / "skipped.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert (skipped["step"], skipped["position"]) == (TROUBLE_AT, (TROUBLE_AT - 1) * 16)
    assert len(set(skipped["cells"])) == 16
    assert skipped["reason"] == "the gradient norm is not finite"
    assert "skipped.jsonl" in (folder / "log.txt").read_text()


def test_a_nan_ends_the_run_where_the_policy_is_stop(store: Path, tmp_path: Path) -> None:
    assert run("nan", 1, store, tmp_path)[0] == [2, 2]
    found = outcome(tmp_path / "run")
    assert "step 5: the gradient norm is not finite" in found["reason"]
    assert found["exit_code"] == 2
