"""What is printed where two runs that should be equal are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support import final_state
from tests.support.final_state import FinalState, explain


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
