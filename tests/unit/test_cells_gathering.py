"""Workers that count a corpus: they end with their parent, and what ends them is told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from geneformer_mcore.errors import LostWorkerError
from geneformer_mcore.tokenizer import build
from geneformer_mcore.tokenizer.corpus import InputOptions
from tests.small_cells import random_counts, write_h5ad

COUNTING = """
import time
from data_prep.build_store import main
from geneformer_mcore.tokenizer import build as gathering
from geneformer_mcore.exit_codes import run

def for_ever():
    print("at work", flush=True)
    time.sleep(600)
    yield

gathering.ROWS_PER_UNIT = 5
gathering._units_as_asked = for_ever
if __name__ == "__main__":
    print("begins", flush=True)
    run(main)
"""


@pytest.fixture
def counting(tmp_path: Path, repository: Path) -> Iterator[subprocess.Popen[str]]:
    """build_store.py without a vocabulary: its two workers count, and never come to an end."""
    counts = random_counts(np.random.default_rng(0), 20, 10)
    file = write_h5ad(tmp_path / "a.h5ad", counts)
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


def test_workers_end_with_a_killed_parent(counting: subprocess.Popen[str]) -> None:
    workers = wait_until_at_work(counting)
    counting.kill()
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_an_interrupt_reaches_no_worker_and_ends_all_by_the_parent(
    counting: subprocess.Popen[str],
) -> None:
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
    told = counting.communicate(timeout=60)[1]
    assert counting.returncode == 130, told
    assert told.endswith("interrupted\n")
    assert "Traceback" not in told
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_a_killed_worker_is_told_with_the_remedy(counting: subprocess.Popen[str]) -> None:
    workers = wait_until_at_work(counting)
    workers[1].kill()
    told = counting.communicate(timeout=60)[1]
    assert counting.returncode == 1, told
    assert re.search(
        r"^error: a worker process was ended by signal 9 \(SIGKILL\), as the system does when "
        r"memory runs out, while the vocabulary was counted\. Remedy: start .* --memory-gb\.\n\Z",
        told,
        re.MULTILINE,
    ), told
    assert "Traceback" not in told
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_a_lack_of_memory_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> Iterator[int]:
        raise MemoryError
        yield

    file = write_h5ad(tmp_path / "a.h5ad", random_counts(np.random.default_rng(0), 20, 10))
    monkeypatch.setattr(build, "_read", read)
    with pytest.raises(LostWorkerError, match=r"not enough memory \(.*\), while .*--memory-gb"):
        build.gather([file], InputOptions())
