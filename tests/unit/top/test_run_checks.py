"""Checks of runs: the second `make demo`, and two runs that should be equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import check_demo
from tests.support import final_state
from tests.support.final_state import FinalState, explain

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


def run_of(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": n + 1, "loss": loss}) for n, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    for step in (2, 4):
        (folder / "checkpoints" / f"step_{step:010d}").mkdir(parents=True)
    return folder


def test_the_first_step_and_tensor_that_differ_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = FinalState(run_of(tmp_path / "a", [3.0, 2.0, 1.0, 0.5]), {"a.distcp": "1", "b": "2"})
    right = FinalState(run_of(tmp_path / "b", [3.0, 2.0, 1.5, 0.6]), {"a.distcp": "0", "b": "2"})
    weights = {2: torch.zeros(4), 4: torch.tensor([0.0, 1, 0, 2])}

    def read_whole(folder: Path) -> dict[str, torch.Tensor]:
        step = int(folder.name[-1])
        changed = weights[step] if folder.is_relative_to(left.run) else torch.zeros(4)
        return {"same": torch.ones(2), "w": changed}

    monkeypatch.setattr(final_state, "read_whole", read_whole)
    monkeypatch.setattr(final_state, "_damage", lambda folder: "")
    monkeypatch.setattr(final_state.checkpoints, "steps", lambda root: [2, 4])
    assert left != right
    assert FinalState(left.run, left.files) == FinalState(right.run, left.files)
    assert explain(left, right) == [
        "files of the last checkpoint that differ: a.distcp",
        "metrics.jsonl: first difference at step 3: loss 1.0 and 1.5",
        "step 4: 1 tensors differ, first:",
        "  w: 2 of 4 differ, by 2",
    ]
