"""launch/finetune.py as a user meets it: it learns labels, stops, goes on, tells, and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end import forked
from tests.end_to_end.test_pretrain import outcome

LEARN = ("train.steps=40", "optim.lr=3e-3", "train.validate_every_steps=20")


@pytest.fixture(scope="module")
def base(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small pretraining run."""
    run = tmp_path_factory.mktemp("base") / "run"
    settings = [f"data.store={store}", "train.steps=6", "train.validate_every_steps=0"]
    started = forked.start(run, settings)
    assert started.wait() == [0], started.printed
    return run


def start(run: Path, base: Path, store: Path, *more: str, ranks: int = 1, **other: object):  # type: ignore[no-untyped-def]
    line = ["--checkpoint", str(base), "--store", str(store), "--label", "cell_type", *LEARN, *more]
    return forked.start(run, line, ranks, command="finetune", **other)


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (1, ()),
        (2, ()),
        (2, ("parallel.tensor=2", "parallel.sequence=true", "finetune.lora_rank=2")),
        (1, ("finetune.frozen_layers=1",)),
    ],
)
def test_it_learns_a_label(
    base: Path, store: Path, tmp_path: Path, ranks: int, more: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    started = start(run, base, store, *more, ranks=ranks)
    assert started.wait() == [0] * ranks, started.printed
    print(started.printed)
    assert outcome(run)["outcome"] == "finished"
    found = json.loads((run / "test" / "report.json").read_text())
    assert found["accuracy"] > 0.9 > found["majority_class"]["accuracy"]
