"""The attention is checked before it is used, and the check can tell right from wrong."""

from __future__ import annotations

import pytest
import torch

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model import attention_check
from tests.distributed import toy
from tests.distributed.ranks import run_ranks


def checked(*overrides: str) -> tuple[float, bool]:
    run = toy.make("model.attention_dropout=0.1", *overrides)
    before = torch.get_rng_state()
    worst = attention_check.check(run.trainable.stages[0], toy.CPU)
    core = run.trainable.stages[0].encoder.layers[0].self_attention.core_attention
    return worst, torch.equal(before, torch.get_rng_state()) and core.training


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@pytest.mark.parametrize(
    ("world_size", "overrides", "most"),
    [
        (1, (), 1e-5),
        (1, ("train.precision=bf16",), 3e-2),
        (2, ("parallel.tensor=2", "parallel.sequence=true"), 1e-5),
    ],
)
def test_ours_pass(
    attention: str, world_size: int, overrides: tuple[str, ...], most: float
) -> None:
    for worst, unchanged in run_ranks(
        checked, world_size, f"model.attention={attention}", *overrides
    ):
        assert 0 < worst < most
        assert unchanged


def spoilt(how: str) -> str:
    run = toy.make("model.attention=sdpa")
    core = run.trainable.stages[0].encoder.layers[0].self_attention.core_attention
    right = core.forward
    spoil = {
        "scale": lambda q, k, v, **rest: right(q * 1.01, k, v, **rest),
        "mask": lambda q, k, v, attention_mask, **rest: right(q, k, v, None, **rest),
        "gradient": lambda q, k, v, **rest: right(q.detach() + 0 * q, k, v, **rest),
        "nan": lambda q, k, v, **rest: right(q, k, v, **rest) * float("nan"),
    }
    core.forward = spoil[how]
    try:
        attention_check.check(run.trainable.stages[0], toy.CPU)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["scale", "mask", "gradient", "nan"])
def test_what_is_wrong_is_refused(how: str) -> None:
    (told,) = run_ranks(spoilt, 1, how)
    assert "differs from the plain computation" in told
    assert "model.attention=plain" in told
