"""The attention is checked before it is used, and the check can tell right from wrong."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model.attention import select, selftest
from tests.distributed import toy
from tests.distributed.ranks import in_turn, run_ranks

ONE_LAYER = "model.num_layers=1"  # only the first is looked at


def checked(packed: bool, *overrides: str) -> tuple[float, bool]:
    run = toy.make(ONE_LAYER, "model.attention_dropout=0.1", *overrides)
    before = torch.get_rng_state()
    worst = selftest.check(run.trainable.stages[0], toy.CPU, packed)
    core = run.trainable.stages[0].encoder.layers[0].self_attention.core_attention
    return worst, torch.equal(before, torch.get_rng_state()) and core.training


@pytest.mark.parametrize(
    ("world_size", "overrides", "most"),
    [
        (1, (), 1e-5),
        (1, ("train.precision=bf16",), 3e-2),
        (2, ("parallel.tensor=2", "parallel.sequence=true"), 1e-5),
    ],
)
def test_ours_pass(world_size: int, overrides: tuple[str, ...], most: float) -> None:
    calls = [
        (checked, (packed, f"model.attention={attention}", *overrides))
        for attention, packed in product(("plain", "sdpa", "blockwise"), (False, True))
    ]
    for found in run_ranks(in_turn, world_size, *calls):
        for (_, what), (worst, unchanged) in zip(calls, found, strict=True):
            assert 0 < worst < most, what
            assert unchanged, what


SPOILT = ("scale", "mask", "gradient", "nan", "error")


def spoilt(how: str, packed: bool) -> str:
    run = toy.make(ONE_LAYER, "model.attention=sdpa")
    core = run.trainable.stages[0].encoder.layers[0].self_attention.core_attention
    right = core.forward

    def one_cell(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **rest: Any) -> Any:
        if packed:
            ends = torch.tensor([0, len(q)], dtype=torch.int32)
            rest["packed_seq_params"] = select.packed_pieces(ends, len(q))
        return right(q, k, v, None, **rest)

    spoil = {
        "scale": lambda q, k, v, m, **rest: right(q * 1.01, k, v, m, **rest),
        "mask": one_cell,
        "gradient": lambda q, k, v, m, **rest: right(q.detach() + 0 * q, k, v, m, **rest),
        "nan": lambda q, k, v, m, **rest: right(q, k, v, m, **rest) * float("nan"),
    }
    spoil["error"] = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no sublibrary.\nmore"))
    core.forward = spoil[how]
    try:
        selftest.check(run.trainable.stages[0], toy.CPU, packed)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def refused() -> dict[tuple[str, bool], str]:
    """What the check says of each kind of wrong attention, padded and packed."""
    cases = list(product(SPOILT, (False, True)))
    (found,) = run_ranks(in_turn, 1, *((spoilt, case) for case in cases))
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", SPOILT[:-1])
def test_what_is_wrong_is_refused(
    how: str, packed: bool, refused: dict[tuple[str, bool], str]
) -> None:
    assert "differs from the plain computation" in refused[how, packed]
    assert "model.attention=flash, sdpa or plain" in refused[how, packed]


@pytest.mark.parametrize("packed", [False, True])
def test_what_does_not_run_is_told_as_one_message(
    packed: bool, refused: dict[tuple[str, bool], str]
) -> None:
    said = refused["error", packed]
    assert said.startswith("the attention that was chosen does not run here: no sublibrary. ")
    assert "model.attention=flash, sdpa or plain" in said
