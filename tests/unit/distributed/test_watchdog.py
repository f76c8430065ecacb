"""Lost ranks: the watch of one rank, the answers of all, and the verdict."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from torch.distributed import FileStore

from geneformer_mcore.distributed import watchdog
from geneformer_mcore.distributed.watchdog import Answer, HealthCheck, LostRankError, Watchdog


class Silenced:
    """A store that stops answering: silently, as where the network loses all, or with an error, as
    where the connection is closed."""

    def __init__(self) -> None:
        self.closed, self.silent, self.over = (threading.Event() for _ in range(3))

    def check(self, _keys: list[str]) -> bool:
        if self.silent.is_set():
            self.over.wait(60)
        if self.closed.is_set():
            raise RuntimeError("Connection closed by peer")
        return False

    def set(self, *_: Any) -> None:
        self.check([])


@pytest.fixture
def silenced(monkeypatch) -> Iterator[Silenced]:
    monkeypatch.setattr(watchdog, "PrefixStore", lambda _prefix, store: store)
    for name in ("_LOOK_S", "_STORE_S", "_JUDGED_S"):
        monkeypatch.setattr(watchdog, name, 0.1)
    made = Silenced()
    yield made
    made.over.set()


def loss_of(limit_s: float, begin: Callable[[Watchdog], object]) -> LostRankError:
    """The loss that a watchdog with this limit reports, after `begin`."""
    losses: list[LostRankError] = []
    ended = threading.Event()
    with Watchdog(limit_s, lambda loss: (losses.append(loss), ended.set())) as lookout:
        begin(lookout)
        assert ended.wait(20)
    return losses[0]


@pytest.mark.parametrize("how", ["silent", "closed"])
def test_lost_contact_to_the_store(silenced, how: str) -> None:
    """Whether the rank stands still or meets an error."""

    def stands_still(lookout: Watchdog) -> None:
        lookout.join(silenced, 5, 8)
        lookout.doing("a step", step=3)
        getattr(silenced, how).set()

    loss = loss_of(0.3, stands_still)
    assert str(loss).startswith("rank 5 of 8 is cut off from rank 0: the store on that node")
    assert "rank 5 at step 3, a step for " in str(loss)
    assert (loss.code, loss.tell, loss.step) == (1, True, 3)

    getattr(silenced, how).clear()

    def meets_an_error() -> None:
        with Watchdog(60, pytest.fail) as lookout:
            lookout.join(silenced, 5, 8)
            getattr(silenced, how).set()
            raise RuntimeError("[gloo] Connection reset by peer")

    with pytest.raises(LostRankError, match=r"rank 5 of 8 is cut off .* Connection reset by peer"):
        meets_an_error()


def test_a_process_of_its_own_is_cut_off_from_none() -> None:
    assert str(loss_of(0.1, lambda _: None)).startswith("no rank got on for 0.1 s")


WAITING = Answer("forward, backward and update", 60.0, 12)
STUCK = Answer("waiting for the next cells", 61.0, 12)


def test_silent_ranks_are_named_with_the_state_of_the_others() -> None:
    """Many are not all listed; if all answer, the one that does something else shows."""
    verdict = watchdog.judge({0: WAITING, 1: WAITING, 3: WAITING}, 4, 60)
    assert verdict.code == 1
    assert verdict.message.startswith("rank 2 of 4 is lost: it gives no answer")
    assert "rank 0, 1, 3 at step 12, forward, backward and update for 60 s" in verdict.message
    many = watchdog.judge({0: WAITING}, 128, 60).message
    assert many.startswith("rank 1, 2, 3, 4, 5, 6, 7, 8 ... of 128 is lost")
    message = watchdog.judge({0: WAITING, 1: STUCK}, 2, 60).message
    assert "no rank got on for 60 s" in message
    assert "rank 1 at step 12, waiting for the next cells for 61 s" in message


def test_a_rank_with_an_error_of_its_own_comes_before_silent_ones() -> None:
    failed = Answer("waiting for the next cells", 0.1, 12, "ValueError: x", 1, at_fault=True)
    assert watchdog.judge({0: WAITING, 1: failed}, 3, 60).message == (
        "the job failed: rank 1 failed at step 12 while waiting for the next cells: ValueError: x"
    )
    wrong = Answer("saving a checkpoint", 1.0, 12, "no room", 2, at_fault=True)
    assert watchdog.judge({0: WAITING, 1: wrong}, 2, 60) == watchdog.Verdict(2, "no room")


@pytest.fixture
def store(tmp_path) -> FileStore:
    return FileStore(str(tmp_path / "store"), 3)


def test_answers_are_collected_from_those_who_give_them(store, monkeypatch) -> None:
    monkeypatch.setattr(watchdog, "ANSWER_S", 0.3)
    ranks = [HealthCheck(store, rank, 3) for rank in range(3)]
    assert not ranks[1].is_called()
    ranks[0].call()
    assert ranks[1].is_called()
    ranks[1].answer(WAITING)
    ranks[2].answer(STUCK)
    answers = ranks[2].collect()
    assert answers == {1: WAITING, 2: STUCK}
    assert [rank.speaks(answers) for rank in ranks] == [False, True, False]


def test_a_lost_neighbour_is_ended_and_nobody_else(store, monkeypatch) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    lost, answering = sleepers = [subprocess.Popen(sleep) for _ in range(2)]
    with monkeypatch.context() as patched:
        processes = [psutil.Process(sleeper.pid) for sleeper in sleepers]
        for rank, process in enumerate(processes):
            patched.setattr(psutil, "Process", lambda found=process: found)
            HealthCheck(store, rank, 3)
    HealthCheck(store, 2, 3).kill_lost_neighbours({1: WAITING, 2: WAITING})
    assert lost.wait(timeout=10) == -9
    time.sleep(0.1)
    assert answering.poll() is None
    answering.kill()
    answering.wait()
