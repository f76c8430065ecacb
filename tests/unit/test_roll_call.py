"""Whom a job was lost by: the answers of ranks, and what is made of them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import FileStore

from geneformer_mcore.distributed import watchdog
from geneformer_mcore.distributed.watchdog import Answer, HealthCheck, judge


def waiting(for_s: float = 60.0, step: int = 12) -> Answer:
    return Answer("forward, backward and update", for_s, step)


def test_a_silent_rank_is_named_with_what_the_others_do() -> None:
    verdict = judge({0: waiting(), 1: waiting(), 3: waiting()}, 4, 60)
    assert verdict.code == 1
    assert verdict.message.startswith("rank 2 of 4 is lost: it gives no answer")
    assert "rank 0, 1, 3 at step 12, forward, backward and update for 60 s" in verdict.message


def test_a_rank_with_an_error_of_its_own_comes_before_silent_ones() -> None:
    failed = Answer("waiting for the next cells", 0.1, 12, "ValueError: x", 1, at_fault=True)
    verdict = judge({0: waiting(), 1: failed}, 3, 60)
    assert verdict.message == (
        "the job failed: rank 1 failed at step 12 while waiting for the next cells: ValueError: x"
    )


def test_a_mistake_of_the_users_is_told_as_one() -> None:
    wrong = Answer("saving a checkpoint", 1.0, 12, "no room", 2, at_fault=True)
    assert judge({0: waiting(), 1: wrong}, 2, 60) == watchdog.Verdict(2, "no room")


def test_if_all_answer_the_one_that_does_something_else_shows() -> None:
    stuck = Answer("waiting for the next cells", 61.0, 12)
    message = judge({0: waiting(), 1: stuck}, 2, 60).message
    assert "no rank got on for 60 s" in message
    assert "rank 1 at step 12, waiting for the next cells for 61 s" in message


def test_many_lost_ranks_are_not_all_listed() -> None:
    message = judge({0: waiting()}, 128, 60).message
    assert message.startswith("rank 1, 2, 3, 4, 5, 6, 7, 8 ... of 128 is lost")


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "store"), 3)


def test_answers_are_collected_from_those_who_give_them(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "ANSWER_S", 0.3)
    ranks = [HealthCheck(store, rank, 3) for rank in range(3)]
    assert not ranks[1].is_called()
    ranks[0].call()
    assert ranks[1].is_called()
    ranks[1].answer(waiting())
    ranks[2].answer(waiting(step=13))
    answers = ranks[2].collect()
    assert answers == {1: waiting(), 2: waiting(step=13)}
    assert [rank.speaks(answers) for rank in ranks] == [False, True, False]


def test_a_lost_neighbour_is_ended_and_nobody_else(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleepers = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)
    ]
    process_of = psutil.Process
    for rank, sleeper in enumerate(sleepers):
        monkeypatch.setattr(psutil, "Process", lambda process=sleeper.pid: process_of(process))
        HealthCheck(store, rank, 3)
    monkeypatch.setattr(psutil, "Process", process_of)
    mine = HealthCheck(store, 2, 3)
    mine.kill_lost_neighbours({1: waiting(), 2: waiting()})
    assert sleepers[0].wait(timeout=10) == -9
    time.sleep(0.1)
    assert sleepers[1].poll() is None
    sleepers[1].kill()
    sleepers[1].wait()
