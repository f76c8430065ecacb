"""A rank that dies, stops or fails ends the job in time, and is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.test_pretrain import SETTINGS, outcome, records

TIMEOUT_S = 8
TROUBLE_AT = 5

TROUBLE = """
import os, signal, sys, time
import launch.pretrain as pretrain
from geneformer_mcore.train import loop

whole = loop.train_step

def train_step(trainable, batches, *rest):
    train_step.calls += 1
    if train_step.calls == {at} and os.environ["RANK"] == "{rank}":
        {trouble}
    return whole(trainable, batches, *rest)

train_step.calls = 0
loop.train_step = train_step
if __name__ == "__main__":
    sys.exit(pretrain.main())
"""


def run(
    trouble: str, rank: int, repository: Path, store: Path, tmp_path: Path, *more: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    """(how a job of two ranks ended, its seconds since the trouble)."""
    script = tmp_path / "trouble.py"
    note = f"open({str(tmp_path / 'when')!r}, 'w').write(str(time.time())); "
    script.write_text(TROUBLE.format(at=TROUBLE_AT, rank=rank, trouble=note + trouble))
    settings = [f"data.store={store}", f"run.dir={tmp_path / 'run'}", *SETTINGS]
    settings += [f"parallel.timeout_s={TIMEOUT_S}", "train.steps=1000", *more]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
    command += ["--nproc_per_node=2", "--shutdown-timeout=120", str(script), *settings]
    ended = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    # Until rank 0's outcome was there: the launcher's own seconds are left out.
    outcome_at = (tmp_path / "run" / "outcome.json").stat().st_mtime
    return ended, outcome_at - float((tmp_path / "when").read_text())


KILLED, STOPPED = (f"os.kill(os.getpid(), signal.SIG{name})" for name in ("KILL", "STOP"))


@pytest.mark.parametrize(
    ("trouble", "rank"),
    [(KILLED, 0), (STOPPED, 0), (STOPPED, 1), ("time.sleep(1000)", 1)],
    ids=["first killed", "first stopped", "second stopped", "second asleep"],
)
def test_a_lost_rank_ends_the_job_in_time_and_is_named(
    trouble: str, rank: int, repository: Path, store: Path, tmp_path: Path
) -> None:
    ended, seconds = run(trouble, rank, repository, store, tmp_path)
    assert ended.returncode == 1
    found = outcome(tmp_path / "run")
    assert (found["outcome"], found["exit_code"]) == ("failed", 1)
    assert found["step"] == TROUBLE_AT - 1
    told = found["reason"]
    assert f"error: {told[:60]}" in ended.stderr
    if "sleep" in trouble:
        assert f"no rank got on for {TIMEOUT_S} s" in told
    else:
        assert f"rank {rank} of 2 is lost" in told
        assert f"rank {1 - rank} " in told
    assert "while forward, backward and update" in told or "update for" in told
    assert seconds < TIMEOUT_S + 10


def test_an_error_on_one_rank_is_what_all_are_told(
    repository: Path, store: Path, tmp_path: Path
) -> None:
    ended, seconds = run("raise ValueError('a bad cell')", 1, repository, store, tmp_path)
    assert ended.returncode == 1
    reason = outcome(tmp_path / "run")["reason"]
    assert reason == (
        "the job failed: rank 1 failed at step 4 while forward, backward and update: "
        "ValueError: a bad cell"
    )
    assert seconds < 10


def test_a_users_mistake_on_one_rank_is_exit_code_2(
    repository: Path, store: Path, tmp_path: Path
) -> None:
    trouble = "from geneformer_mcore.errors import DataError; raise DataError('a bad store')"
    run(trouble, 1, repository, store, tmp_path)
    found = outcome(tmp_path / "run")
    assert (found["exit_code"], found["reason"]) == (2, "a bad store")


NAN = (
    "stage = trainable.stages[0]; hook = stage.encoder.final_layernorm.bias.register_hook("
    "lambda grad: grad * float('nan')); before = [p.detach().clone() for p in stage.parameters()]; "
    "result = whole(trainable, batches, *rest); hook.remove(); "
    "assert all(a.equal(b) for a, b in zip(before, stage.parameters())); return result"
)


def test_a_nan_on_one_rank_is_left_out_everywhere_counted_and_named(
    repository: Path, store: Path, tmp_path: Path
) -> None:
    more = ("train.non_finite=skip", "train.steps=8", "checkpoint.save_every_steps=0")
    ended, _ = run(NAN, 1, repository, store, tmp_path, *more)
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "run"
    assert [line["skipped_updates"] for line in records(folder) if "loss" in line][-1] == 1
    (line,) = (folder / "skipped.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert (skipped["step"], skipped["position"]) == (TROUBLE_AT, (TROUBLE_AT - 1) * 16)
    assert len(set(skipped["cells"])) == 16
    assert skipped["reason"] == "the gradient norm is not finite"
    assert "skipped.jsonl" in (folder / "log.txt").read_text()


def test_a_nan_ends_the_run_where_the_policy_is_stop(
    repository: Path, store: Path, tmp_path: Path
) -> None:
    ended, _ = run(NAN, 1, repository, store, tmp_path)
    assert ended.returncode == 1
    found = outcome(tmp_path / "run")
    assert "step 5: the gradient norm is not finite" in found["reason"]
    assert found["exit_code"] == 1
