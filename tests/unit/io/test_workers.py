"""Worker processes: every job done once, errors reported as what they are, no process left over."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest

from geneformer_mcore.errors import DataError, LostWorkerError
from geneformer_mcore.io.workers import Workers
from geneformer_mcore.tokenizer import build
from geneformer_mcore.tokenizer.genes import InputOptions
from tests.support.small_cells import random_counts, write_h5ad


class TooLarge:
    """A result that does not fit into memory on its way."""

    def __reduce__(self) -> Any:
        raise MemoryError("a copy")


@dataclass
class Doing:
    """Doubles a number; some have another fate. Job -1: the jobs that this process has done."""

    fates: dict[int, Any]
    shared: Any = None
    done: list[int] = field(default_factory=list)

    def __call__(self, job: int, advance: Callable[[int], None]) -> Any:
        fate = self.fates.get(job)
        if isinstance(fate, Exception):
            raise fate
        if fate == "large":
            return TooLarge()
        if fate == "exit":
            os._exit(7)
        if fate == "slow":
            time.sleep(0.1)
        if job == -1:
            return self.done
        if self.shared is not None:
            with self.shared.get_lock():
                self.shared.value += job
        self.done.append(job)
        advance(job)
        advance(1)
        return 2 * job, os.getpid()


@pytest.fixture(scope="module")
def shared() -> Any:
    """What all processes of `three` add up."""
    return get_context("spawn").Value("q", 0)


@pytest.fixture(scope="module")
def three(shared) -> Iterator[Workers]:
    """Three processes, which live from test to test as they do from one work to the next."""
    with Workers(3, shared) as workers:
        yield workers


@pytest.mark.parametrize(("most", "expected"), [(None, 3), (2, 2), (0, 1)])
def test_every_job_once(three, shared, most, expected) -> None:
    advanced: Counter[int] = Counter()

    def advance(job: int, cells: int) -> None:
        advanced[job] += cells

    processes_of_runs, before = [], shared.value
    for first in (0, 100):  # Processes live from one work to the next.
        jobs = range(first, first + 20)
        work = Doing({first + 3: DataError(f"{first + 3} is wrong")})
        found = list(three.run(work, jobs, advance, most=most, last=-1))
        outcomes, handed_over = dict(found[:-expected]), found[-expected:]
        assert sorted(outcomes) == list(jobs)
        assert str(outcomes.pop(first + 3)) == f"{first + 3} is wrong"
        assert all(result == 2 * job for job, (result, _) in outcomes.items())
        assert [job for job, _ in handed_over] == [-1] * expected
        assert sorted(job for _, done in handed_over for job in done) == sorted(outcomes)
        processes_of_runs.append({process for _, process in outcomes.values()})
    assert advanced == {
        job: job + 1 for job in (*range(20), *range(100, 120)) if job not in (3, 103)
    }
    processes, others = processes_of_runs
    assert processes == others
    assert len(processes) == expected
    assert (os.getpid() in processes) == (expected == 1)
    assert shared.value - before == (0 if expected == 1 else sum(advanced))


@pytest.mark.parametrize("most", [1, 3])
def test_jobs_that_are_not_wanted_any_more_are_left_out(three, most) -> None:
    outcomes = three.run(Doing({}), range(9), is_wanted=lambda job: job % 3 != 0, most=most)
    assert sorted(job for job, _ in outcomes) == [1, 2, 4, 5, 7, 8]


def test_a_chain_is_done_by_one_process_in_order(three) -> None:
    def chain(job: int) -> str | None:
        return None if job % 4 == 0 else f"chain {job % 4}"

    outcomes = dict(three.run(Doing({1: "slow", 4: "slow"}), range(40), chain=chain))
    assert sorted(outcomes) == list(range(40))
    for number in (1, 2, 3):
        jobs = [job for job in outcomes if job % 4 == number]
        assert jobs == sorted(jobs)
        assert len({outcomes[job][1] for job in jobs}) == 1


IN_5 = r"in the middle of 5\. Again\."
FULL = OSError(errno.ENOSPC, "No space left on device", "file")
DEFECT = ZeroDivisionError("a defect of ours")


@pytest.mark.parametrize(
    ("fate", "kind", "message"),
    [
        ("exit", LostWorkerError, rf"ended with exit code 7, {IN_5}"),
        (MemoryError(), LostWorkerError, rf"not enough memory \(Python.*, {IN_5}"),
        ("large", LostWorkerError, rf"not enough memory \(a copy\), {IN_5}"),
        (DEFECT, RuntimeError, "(?s)internal error in a worker process.*ZeroDivisionError: a def"),
        (FULL, OSError, "No space left on device: 'file'"),
    ],
)
def test_what_ends_all_work(fate, kind, message) -> None:
    with pytest.raises(kind, match=message), Workers(2, again="Again.") as workers:
        list(workers.run(Doing({5: fate}), range(10)))


def test_no_worker_is_no_number() -> None:
    with pytest.raises(DataError, match="`workers=` must be 1 or more, not 0"):
        Workers(0)


# Workers in the middle of their work, and how they end

COUNTING = """
import time
from data_prep.build_store import main
from geneformer_mcore.tokenizer import build as gathering
from geneformer_mcore.exit_codes import run

def for_ever(*_):
    print("at work", flush=True)
    time.sleep(600)

gathering.ROWS_PER_UNIT = 5
gathering.Counting.__call__ = for_ever
if __name__ == "__main__":
    print("begins", flush=True)
    run(main)
"""


@pytest.fixture
def file(tmp_path) -> Path:
    """20 cells."""
    return write_h5ad(tmp_path / "a.h5ad", random_counts(np.random.default_rng(0), 20, 10))


@pytest.fixture
def counting(tmp_path, file, repository) -> Iterator[subprocess.Popen[str]]:
    """build_store.py without a vocabulary: its two workers count, and never come to an end."""
    (tmp_path / "count.py").write_text(COUNTING)
    process = subprocess.Popen(
        [sys.executable, "count.py", "--out", "s", "--workers", "2", str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error):  # just gone
            # Python's own tracker of resources is no worker.
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def wait_until_at_work(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The two workers, once they are in the middle of it."""
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
    workers = workers_of(process)
    assert len(workers) == 2
    return workers


def end_of(process: subprocess.Popen[str], workers: list[psutil.Process]) -> tuple[int, str]:
    """(exit code, stderr) of a command that ends in order, its workers with it."""
    error = process.communicate(timeout=60)[1]
    assert "Traceback" not in error
    assert not psutil.wait_procs(workers, timeout=60)[1]
    return process.returncode, error


def test_workers_end_with_a_killed_parent(counting) -> None:
    workers = wait_until_at_work(counting)
    counting.kill()
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_an_interrupt_reaches_no_worker_and_ends_all_by_the_parent(counting) -> None:
    done = threading.Event()

    def interrupt() -> None:
        while not done.wait(0.002):
            for worker in workers_of(counting):
                with suppress(psutil.Error):
                    worker.send_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        workers = wait_until_at_work(counting)
    finally:
        done.set()
        thread.join()
    assert all(worker.is_running() for worker in workers)
    os.killpg(counting.pid, signal.SIGINT)
    code, error = end_of(counting, workers)
    assert (code, error[-12:]) == (130, "interrupted\n")


def test_a_killed_worker_is_reported_with_the_remedy(counting) -> None:
    workers = wait_until_at_work(counting)
    workers[1].kill()
    code, error = end_of(counting, workers)
    message = (
        r"(?m)^error: a worker process was ended by signal 9 \(SIGKILL\), as the system does when "
        r"memory runs out, in the middle of counting cells \d+ to \d+ of .*a\.h5ad\. "
        r"Remedy: start .* --memory-gb\.\n\Z"
    )
    assert code == 1
    assert re.search(message, error), error


def test_a_lack_of_memory_is_reported_with_the_remedy(file, monkeypatch) -> None:
    monkeypatch.setattr(build.Tally, "add_block", Mock(side_effect=MemoryError))
    message = r"not enough memory \(.*\), in the middle of counting cells 0 to 19 .*`memory_gb=`"
    with pytest.raises(LostWorkerError, match=message):
        build.gather([file], InputOptions())
