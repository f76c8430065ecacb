"""A rank that dies, stops or fails ends the job in time, and is named."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from geneformer_mcore.errors import DataError
from tests.end_to_end.forked import Run
from tests.end_to_end.run.test_pretrain import MORE as STEPS_OF_A_RUN
from tests.support import commands
from tests.support.marks import soak

TIMEOUT_S = 8
TROUBLE_AT = 5
MORE = (*STEPS_OF_A_RUN, f"parallel.timeout_s={TIMEOUT_S}", "train.steps=1000")

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


@dataclass
class Job:
    """A run of two ranks, and when its trouble came."""

    run: Run
    note: Path
    printed: str = ""

    def ended(self, what: str, of_rank: int, *more: str) -> list[int | None]:
        """The exit codes of both ranks."""
        trouble = (troubled, of_rank, what, str(self.note))
        job = self.run.start(*more, ranks=2, trouble=trouble)
        codes = job.wait()
        self.printed = job.printed
        return codes

    def ended_by_torchrun(self, what: str, of_rank: int) -> int:
        """The exit code of torchrun, as a user starts it."""
        script = self.note.with_name("trouble.py")
        script.write_text(SCRIPT.format(of_rank=of_rank, what=what, note=str(self.note)))
        words = "--standalone --max-restarts=0 --nproc_per_node=2 --shutdown-timeout=120"
        ended = commands.torchrun(*words.split(), script, *self.run.words())
        self.printed = ended.stderr
        return ended.returncode

    def assert_in_time(self, limit_s: float) -> None:
        """From the trouble until the outcome was there."""
        outcome_at = (self.run.folder / "outcome.json").stat().st_mtime
        assert outcome_at - float(self.note.read_text()) < limit_s

    def assert_named(self, what: str, of_rank: int) -> None:
        """The outcome names the rank that was lost, and so does what was printed."""
        found = self.run.outcome()
        assert (found["outcome"], found["exit_code"]) == ("failed", 1)
        assert found["step"] == TROUBLE_AT - 1
        reason = found["reason"]
        assert f"error: {reason[:60]}" in self.printed
        if what == "asleep":
            assert f"no rank got on for {TIMEOUT_S} s" in reason
        else:
            assert f"rank {of_rank} of 2 is lost" in reason
            assert f"rank {1 - of_rank} " in reason
        assert "while forward, backward and update" in reason or "update for" in reason


@pytest.fixture
def job(run: Run, tmp_path: Path) -> Job:
    return Job(run, tmp_path / "when")


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
    what: str, of_rank: int, job: Job, slack_s: float
) -> None:
    codes = job.ended(what, of_rank)
    lost = 1 if what == "asleep" else -signal.SIGKILL
    assert (codes[of_rank], codes[1 - of_rank]) == (lost, 1)
    job.assert_named(what, of_rank)
    job.assert_in_time(TIMEOUT_S + slack_s)


@pytest.mark.parametrize(("what", "of_rank"), [soak("killed", 0), ("stopped", 1)])
def test_under_torchrun_too(what: str, of_rank: int, job: Job, slack_s: float) -> None:
    """Which asks the others to end when one rank has ended, and heeds none that is stopped."""
    assert job.ended_by_torchrun(what, of_rank) == 1
    job.assert_named(what, of_rank)
    job.assert_in_time(TIMEOUT_S + slack_s)


@pytest.mark.parametrize("of_rank", [1, soak(0)])
def test_an_error_on_one_rank_reaches_all(of_rank: int, job: Job, slack_s: float) -> None:
    assert job.ended("failed", of_rank) == [1, 1]
    # Rank 0 writes the outcome: of its own error it need not name where it was.
    where = f"the job failed: rank {of_rank} failed at step 4 while forward, backward and update: "
    assert job.run.outcome()["reason"] == f"{where if of_rank else ''}ValueError: a bad cell"
    job.assert_in_time(slack_s)


def test_a_users_mistake_on_one_rank_is_exit_code_2(job: Job) -> None:
    assert job.ended("refused", 1) == [2, 2]
    found = job.run.outcome()
    assert (found["exit_code"], found["reason"]) == (2, "a bad store")


def test_a_nan_on_one_rank_is_left_out_everywhere_counted_and_named(job: Job) -> None:
    more = ("train.non_finite=skip", "train.steps=8", "checkpoint.save_every_steps=0")
    assert job.ended("nan", 1, *more) == [0, 0], job.printed
    assert job.run.records("loss")[-1]["skipped_updates"] == 1
    folder = job.run.folder
    (line,) = (folder / "skipped.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert (skipped["step"], skipped["position"]) == (TROUBLE_AT, (TROUBLE_AT - 1) * 16)
    assert len(set(skipped["cells"])) == 16
    assert skipped["reason"] == "the gradient norm is not finite"
    assert "skipped.jsonl" in (folder / "log.txt").read_text()


def test_a_nan_ends_the_run_where_the_policy_is_stop(job: Job) -> None:
    assert job.ended("nan", 1) == [1, 1]
    found = job.run.outcome()
    assert "step 5: the gradient norm is not finite" in found["reason"]
    assert found["exit_code"] == 1
