"""launch/pretrain.py from a store, its flat copy, through DALI, and from raw counts."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.end_to_end.test_pretrain import command, last_step, outcome, start, trace

STEPS = 28
"""After the seventh come 21 steps, seven checkpoints and three validations: a signal that is sent
then cannot come too late."""


def stop_after(step: int, number: signal.Signals, run: Path, *arguments: str) -> int:
    """Starts, sends the signal once `step` is in metrics.jsonl, and returns the exit code."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while last_step(run) < step:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(timeout=60)


@pytest.fixture(scope="module")
def undisturbed(repository: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sources") / "store"
    ended = start(*command(repository, store, run, f"train.steps={STEPS}"))
    assert ended.returncode == 0, ended.stderr
    return run


@pytest.fixture(scope="module")
def from_counts(store: Path) -> tuple[str, ...]:
    vocabulary = store / "vocabulary.json"
    return ("data.source=counts", f"data.vocabulary={vocabulary}", f"train.steps={STEPS}")


def test_a_run_may_go_on_from_a_flat_copy_or_through_dali(
    repository: Path, store: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    begin = command(repository, store, run, f"train.steps={STEPS}")
    assert stop_after(3, signal.SIGTERM, run, *begin) == 75
    assert stop_after(7, signal.SIGTERM, run, *begin, f"data.cache_dir={cache}") == 75
    assert len(list(cache.glob("*/tokens.bin"))) == 1
    ended = start(*begin, "data.loader=dali")
    assert ended.returncode == 0, ended.stderr
    assert trace(run) == trace(undisturbed)


def test_a_run_from_counts_goes_on_where_it_stopped(
    repository: Path, h5ad: Path, from_counts: tuple[str, ...], tmp_path: Path
) -> None:
    runs = tmp_path / "whole", tmp_path / "stopped"
    whole, stopped = (command(repository, h5ad, run, *from_counts) for run in runs)
    ended = start(*whole)
    assert ended.returncode == 0, ended.stderr
    assert stop_after(5, signal.SIGTERM, runs[1], *stopped) == 75
    assert start(*stopped).returncode == 0
    assert trace(runs[1]) == trace(runs[0])
    assert trace(runs[0])[-1]["val_loss"] < 6


def test_a_run_does_not_go_on_from_other_cells(
    repository: Path,
    h5ad: Path,
    store: Path,
    undisturbed: Path,
    from_counts: tuple[str, ...],
) -> None:
    before = trace(undisturbed)
    ended = start(*command(repository, h5ad, undisturbed, *from_counts))
    assert ended.returncode == 2
    assert "data.source: tokens -> counts" in ended.stderr
    assert "content hash of data.store" in ended.stderr
    assert trace(undisturbed) == before
    assert outcome(undisturbed)["exit_code"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.source=counts",), "data.source=counts needs data.vocabulary"),
        (("data.vocabulary=v.json",), "data.vocabulary (v.json) is for data.source=counts"),
        (("data.source=counts", "data.vocabulary=none.json"), "none.json"),
        (("data.source=counts", "data.vocabulary=v", "data.cache_dir=c"), "data.cache_dir (c)"),
        (("data.cache_dir=/proc/nowhere",), "/proc/nowhere"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(
    repository: Path, h5ad: Path, store: Path, tmp_path: Path, settings: tuple, message: str
) -> None:
    where = h5ad if "data.source=counts" in settings else store
    ended = start(*command(repository, where, tmp_path / "run", *settings))
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
