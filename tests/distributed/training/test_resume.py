"""A run continued in its own layout is bitwise the run that was never stopped, dropout on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import toy
from tests.distributed.parity import PACKED, PP2, SEQUENCE, TP2
from tests.distributed.ranks import run_ranks

DROPOUT = (
    *("model.num_layers=2", "train.micro_batch_size=8"),
    *("model.hidden_dropout=0.1", "model.attention_dropout=0.1"),
)
STEPS = 2
"""Before and after the checkpoint."""


def train_and_save(folder: str, *overrides: str) -> tuple[list[float], dict[str, str]]:
    run = toy.make(*DROPOUT, *overrides)
    run.steps(STEPS)
    run.write(folder)
    return run.losses(STEPS), run.digest()


def resume(folder: str, *overrides: str) -> tuple[list[float], dict[str, str]]:
    run = toy.loaded(folder, STEPS, *DROPOUT, *overrides, same_layout=True)
    return run.losses(STEPS), run.digest()


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (2, ()),
        (2, (TP2,)),
        (2, (PP2, "train.precision=bf16")),
        (2, (*SEQUENCE, PACKED, "model.attention=blockwise")),
    ],
)
def test_bitwise(world_size: int, overrides: tuple[str, ...], tmp_path: Path) -> None:
    folder = str(tmp_path / "step")
    undisturbed = run_ranks(train_and_save, world_size, folder, *overrides)
    assert run_ranks(resume, world_size, folder, *overrides) == undisturbed
