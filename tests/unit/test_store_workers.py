"""Worker processes: every job done once, in spite of errors told as what they are."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import psutil
import pytest

from geneformer_mcore.errors import DataError, LostWorkerError
from geneformer_mcore.io.workers import Workers


@dataclass(frozen=True)
class Doing:
    """Doubles a number; some have another fate."""

    fates: dict[int, str]

    def __call__(self, job: int, tell: Callable[[int], None]) -> tuple[int, int]:
        fate = self.fates.get(job)
        if fate == "data":
            raise DataError(f"{job} is wrong")
        if fate == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")
        if fate == "defect":
            raise ZeroDivisionError("a defect of ours")
        if fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "exit":
            os._exit(7)
        if fate == "slow":
            time.sleep(0.1)
        tell(job)
        tell(1)
        return 2 * job, os.getpid()


@pytest.fixture(scope="module")
def three() -> Iterator[Workers]:
    """Three processes, which live from test to test as they do from one work to the next."""
    with Workers(3) as workers:
        yield workers


@pytest.mark.parametrize("most", [None, 2, 0])
def test_every_job_once(three: Workers, most: int | None) -> None:
    expected = 3 if most is None else max(1, most)
    assert_every_job_once(three, most, expected)


def test_every_job_once_in_this_process() -> None:
    with Workers(1) as workers:
        assert_every_job_once(workers, None, 1)


def assert_every_job_once(workers: Workers, most: int | None, expected: int) -> None:
    told: dict[int, int] = {}

    def tell(job: int, cells: int) -> None:
        told[job] = told.get(job, 0) + cells

    processes_of_runs = []
    for first in (0, 100):  # Processes live from one work to the next.
        jobs = range(first, first + 20)
        outcomes = dict(workers.run(Doing({first + 3: "data"}), jobs, tell, most=most))
        assert sorted(outcomes) == list(jobs)
        assert str(outcomes.pop(first + 3)) == f"{first + 3} is wrong"
        assert all(result == 2 * job for job, (result, _) in outcomes.items())
        processes_of_runs.append({process for _, process in outcomes.values()})
    assert told == {job: job + 1 for job in (*range(20), *range(100, 120)) if job not in (3, 103)}
    processes, others = processes_of_runs
    assert processes == others
    assert len(processes) == expected
    assert (os.getpid() in processes) == (expected == 1)


@pytest.mark.parametrize("most", [1, 3])
def test_jobs_that_are_not_wanted_any_more_are_left_out(three: Workers, most: int) -> None:
    outcomes = three.run(Doing({}), range(9), is_wanted=lambda job: job % 3 != 0, most=most)
    assert sorted(job for job, _ in outcomes) == [1, 2, 4, 5, 7, 8]


def test_a_chain_is_done_by_one_process_in_order(three: Workers) -> None:
    def chain(job: int) -> str | None:
        return None if job % 4 == 0 else f"chain {job % 4}"

    order: list[int] = []
    outcomes: dict[int, tuple[int, int]] = {}
    for job, outcome in three.run(Doing({1: "slow", 4: "slow"}), range(40), chain=chain):
        outcomes[job] = outcome
        order.append(job)
    assert sorted(outcomes) == list(range(40))
    for number in (1, 2, 3):
        jobs = [job for job in order if job % 4 == number]
        assert jobs == sorted(jobs)
        assert len({outcomes[job][1] for job in jobs}) == 1


@pytest.mark.parametrize(
    ("fate", "kind", "message"),
    [
        ("killed", LostWorkerError, r"ended by signal 9 \(SIGKILL\), as .*, in the middle of 5\."),
        ("exit", LostWorkerError, r"ended with exit code 7, in the middle of 5\."),
        ("defect", RuntimeError, "(?s)a defect in a worker process.*ZeroDivisionError: a defect"),
        ("full", OSError, "No space left on device: 'file'"),
    ],
)
def test_what_ends_all_work(fate: str, kind: type[Exception], message: str) -> None:
    def run() -> None:
        with Workers(2) as workers:
            for _ in workers.run(Doing({5: fate}), range(10)):
                pass

    with pytest.raises(kind, match=message):
        run()


def test_an_interrupt_from_the_keyboard_reaches_no_worker_not_even_as_it_starts() -> None:
    done = threading.Event()

    def interrupt() -> None:
        while not done.wait(0.002):
            for child in psutil.Process().children():
                with suppress(psutil.Error):  # just gone
                    # Python's own tracker of resources is no worker.
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.send_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with Workers(2) as workers:
            outcomes = dict(workers.run(Doing({}), range(4)))
    finally:
        done.set()
        thread.join()
    assert {job: result for job, (result, _) in outcomes.items()} == {0: 0, 1: 2, 2: 4, 3: 6}
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_no_worker_is_no_number() -> None:
    with pytest.raises(DataError, match="at least 1 worker, not 0"):
        Workers(0)
