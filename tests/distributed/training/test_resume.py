"""A run continued in its own layout is bitwise the run that was never stopped, dropout on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import toy
from tests.distributed.inference import tuned
from tests.distributed.inference.tuned import LORA
from tests.distributed.parity import PACKED, PP2, SEQUENCE, TP2
from tests.distributed.ranks import in_turn, run_ranks

DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")
SMALL = ("model.num_layers=2", "train.micro_batch_size=8")
FROZEN = ("finetune.frozen_layers=2",)
UNEVEN = (PACKED, "train.global_batch_size=5", "data.tokens_per_micro_batch=192")
BF16 = "train.precision=bf16"
KINDS: dict[str, Any] = {"toy": toy, "tuned": tuned}
STEPS = 2
"""Before and after the checkpoint."""


def more(kind: str, overrides: tuple[str, ...]) -> tuple[str, ...]:
    return (*DROPOUT, *(("finetune.dropout=0.2",) if kind == "tuned" else SMALL), *overrides)


def train_and_save(kind: str, folder: str, *overrides: str) -> tuple[list[float], dict[str, str]]:
    run = KINDS[kind].make(*more(kind, overrides))
    run.steps(STEPS)
    run.write(folder)
    return run.losses(STEPS), run.digest()


def resume(kind: str, folder: str, *overrides: str) -> tuple[list[float], dict[str, str]]:
    run = toy.loaded(folder, STEPS, *more(kind, overrides), same_layout=True, kind=KINDS[kind])
    return run.losses(STEPS), run.digest()


@pytest.mark.parametrize(
    ("kind", "world_size", "layouts"),
    [
        ("toy", 1, [()]),
        ("toy", 2, [(), (TP2,), (PP2, BF16), (*SEQUENCE, PACKED, "model.attention=blockwise")]),
        ("tuned", 2, [UNEVEN, (*LORA, *SEQUENCE, PACKED), (*FROZEN, TP2, BF16)]),
    ],
)
def test_bitwise(kind: str, world_size: int, layouts: list[tuple], tmp_path: Path) -> None:
    calls = [(kind, str(tmp_path / f"{n}"), *layout) for n, layout in enumerate(layouts)]
    undisturbed = run_ranks(in_turn, world_size, *((train_and_save, call) for call in calls))
    assert run_ranks(in_turn, world_size, *((resume, call) for call in calls)) == undisturbed
