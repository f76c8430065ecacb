"""The check of the second `make demo` finds what it is there to find."""

from __future__ import annotations

from typing import Any

import pytest

from tests import check_demo

GOOD = {
    "outcome": "finished", "logged_step": 200, "restart": 0, "val_loss": 5.0,
    "baselines": {"unigram": 5.5}, "curves": {"train": {"steps": [10, 20, 200]}},
}  # fmt: skip


def test_a_good_run_has_no_problem_and_one_that_installs_has() -> None:
    assert check_demo.unlearned(GOOD) == []
    assert check_demo.installed(".venv/bin/torchrun launch/pretrain.py\nstep 200/200\n") == []
    line = ".venv/bin/python -m pip --disable-pip-version-check install --quiet torch"
    (problem,) = check_demo.installed(f"step 1\n{line}\n")
    assert line in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_loss": 5.25}, "validation loss 5.25 is not 0.3 below the unigram's 5.5"),
        ({"val_loss": None}, "validation loss None"),
        ({"baselines": None}, "the unigram's None"),
        ({"logged_step": 190}, "finished at step 190, not 200"),
        ({"outcome": "interrupted"}, "interrupted at step 200"),
        ({"restart": 1}, "restart 1"),
        ({"curves": {"train": {"steps": [110, 200]}}}, "logged from step 110 on: not from 0"),
    ],
)
def test_a_bad_run_has_one(change: dict[str, Any], message: str) -> None:
    (problem,) = check_demo.unlearned(GOOD | change)
    assert message in problem
