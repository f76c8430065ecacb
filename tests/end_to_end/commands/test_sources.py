"""launch/pretrain.py from a store, its flat copy, through DALI, and from raw counts."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.end_to_end import forked
from tests.end_to_end.run.test_pretrain import outcome, settings, signalled, trace

STEPS = "train.steps=10"


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sources") / "store"
    ended = forked.start(run, settings(store, STEPS))
    assert ended.wait() == [0], ended.printed
    return run


@pytest.fixture(scope="module")
def from_counts(store: Path) -> tuple[str, ...]:
    vocabulary = store / "vocabulary.json"
    return ("data.source=counts", f"data.vocabulary={vocabulary}", STEPS)


def test_a_run_may_go_on_from_a_flat_copy_or_through_dali(
    store: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    stop = (1, signalled, (2, signal.SIGTERM))
    assert forked.start(run, settings(store, STEPS), *stop).wait() == [75]
    copied = settings(store, STEPS, f"data.cache_dir={cache}")
    assert forked.start(run, copied, *stop).wait() == [75]
    assert len(list(cache.glob("*/tokens.bin"))) == 1
    ended = forked.start(run, settings(store, STEPS, "data.loader=dali"))
    assert ended.wait() == [0], ended.printed
    assert trace(run) == trace(undisturbed)


def test_a_run_from_counts_goes_on_where_it_stopped(
    h5ad: Path, from_counts: tuple[str, ...], tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ended = forked.start(whole, settings(h5ad, *from_counts))
    assert ended.wait() == [0], ended.printed
    stop = (1, signalled, (5, signal.SIGTERM))
    assert forked.start(stopped, settings(h5ad, *from_counts), *stop).wait() == [75]
    assert forked.start(stopped, settings(h5ad, *from_counts)).wait() == [0]
    assert trace(stopped) == trace(whole)
    assert trace(whole)[-1]["val_loss"] < 6


def test_a_run_does_not_go_on_from_other_cells(
    h5ad: Path, undisturbed: Path, from_counts: tuple[str, ...]
) -> None:
    before = trace(undisturbed)
    ended = forked.start(undisturbed, settings(h5ad, *from_counts))
    assert ended.wait() == [2]
    assert "data.source: tokens -> counts" in ended.printed
    assert "content hash of data.store" in ended.printed
    assert trace(undisturbed) == before
    assert outcome(undisturbed)["exit_code"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("data.source=counts",), "data.source=counts needs data.vocabulary"),
        (("data.vocabulary=v.json",), "data.vocabulary (v.json) is for data.source=counts"),
        (("data.source=counts", "data.vocabulary=none.json"), "none.json"),
        (("data.source=counts", "data.vocabulary=v", "data.cache_dir=c"), "data.cache_dir (c)"),
        (("data.cache_dir=/proc/nowhere",), "/proc/nowhere"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(
    h5ad: Path, store: Path, tmp_path: Path, more: tuple, message: str
) -> None:
    where = h5ad if "data.source=counts" in more else store
    ended = forked.start(tmp_path / "run", settings(where, *more))
    assert ended.wait() == [2]
    assert message in ended.printed
    assert "Traceback" not in ended.printed
