"""The attention is checked before it is used, and the check can tell right from wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model import attention, attention_check
from tests.distributed import toy
from tests.distributed.ranks import run_ranks


def checked(packed: bool, *overrides: str) -> tuple[float, bool]:
    run = toy.make("model.attention_dropout=0.1", *overrides)
    before = torch.get_rng_state()
    worst = attention_check.check(run.trainable.stages[0], toy.CPU, packed)
    core = run.trainable.stages[0].encoder.layers[0].self_attention.core_attention
    return worst, torch.equal(before, torch.get_rng_state()) and core.training


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["plain", "sdpa", "blockwise"])
@pytest.mark.parametrize(
    ("world_size", "overrides", "most"),
    [
        (1, (), 1e-5),
        (1, ("train.precision=bf16",), 3e-2),
        (2, ("parallel.tensor=2", "parallel.sequence=true"), 1e-5),
    ],
)
def test_ours_pass(
    attention: str, packed: bool, world_size: int, overrides: tuple[str, ...], most: float
) -> None:
    for worst, unchanged in run_ranks(
        checked, world_size, packed, f"model.attention={attention}", *overrides
    ):
        assert 0 < worst < most
        assert unchanged


def spoilt(how: str, packed: bool) -> str:
    run = toy.make("model.attention=sdpa")
    core = run.trainable.stages[0].encoder.layers[0].self_attention.core_attention
    right = core.forward

    def one_cell(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **rest: Any) -> Any:
        if packed:
            ends = torch.tensor([0, len(q)], dtype=torch.int32)
            rest["packed_seq_params"] = attention.packed_pieces(ends, len(q))
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
        attention_check.check(run.trainable.stages[0], toy.CPU, packed)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", ["scale", "mask", "gradient", "nan"])
def test_what_is_wrong_is_refused(how: str, packed: bool) -> None:
    (told,) = run_ranks(spoilt, 1, how, packed)
    assert "differs from the plain computation" in told
    assert "model.attention=flash, sdpa or plain" in told


@pytest.mark.parametrize("packed", [False, True])
def test_what_does_not_run_is_told_as_one_message(packed: bool) -> None:
    (told,) = run_ranks(spoilt, 1, "error", packed)
    assert told.startswith("the attention that was chosen does not run here: no sublibrary. ")
    assert "model.attention=flash, sdpa or plain" in told
