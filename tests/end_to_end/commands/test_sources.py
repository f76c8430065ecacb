"""launch/pretrain.py from a store, its flat copy, through DALI, and from raw counts."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.end_to_end.forked import Run
from tests.end_to_end.run.test_pretrain import MORE as STEPS_OF_A_RUN
from tests.end_to_end.run.test_pretrain import signalled, trace

MORE = (*STEPS_OF_A_RUN, "train.steps=10")


@pytest.fixture
def counts(run: Run, h5ad: Path, store: Path) -> Run:
    """A run from raw counts."""
    more = ("data.source=counts", f"data.vocabulary={store / 'vocabulary.json'}")
    return Run(run.folder, (f"data.store={h5ad}", *MORE, *more))


def test_a_run_may_go_on_from_a_flat_copy_or_through_dali(
    run: Run, undisturbed: Run, tmp_path: Path
) -> None:
    cache, stop = tmp_path / "cache", (signalled, 2, signal.SIGTERM)
    run.check(trouble=stop, code=75)
    run.check(f"data.cache_dir={cache}", trouble=stop, code=75)
    assert len(list(cache.glob("*/tokens.bin"))) == 1
    run.check("data.loader=dali")
    assert trace(run) == trace(undisturbed)


def test_a_run_from_counts_goes_on_where_it_stopped(counts: Run, tmp_path: Path) -> None:
    whole = counts.at(tmp_path / "whole")
    whole.check()
    counts.check(trouble=(signalled, 5, signal.SIGTERM), code=75)
    counts.check()
    assert trace(counts) == trace(whole)
    assert trace(whole)[-1]["val_loss"] < 6


def test_a_run_does_not_go_on_from_other_cells(counts: Run, undisturbed: Run) -> None:
    earlier = trace(undisturbed)
    printed = counts.at(undisturbed.folder).check(code=2)
    assert "data.source: tokens -> counts" in printed
    assert "content hash of data.store" in printed
    assert trace(undisturbed) == earlier
    assert undisturbed.outcome()["exit_code"] == 2


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
    run: Run, h5ad: Path, more: tuple[str, ...], message: str
) -> None:
    cells = [f"data.store={h5ad}"] if "data.source=counts" in more else []
    assert message in run.check(*cells, *more, code=2)
