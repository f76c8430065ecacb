"""The checks of benchmarks/gpu_session.py can tell right from wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.side_by_side import session_dropout, session_model
from geneformer_mcore.config.sections import ParallelConfig
from geneformer_mcore.model.cores import blockwise, sdpa
from geneformer_mcore.parallel import groups
from tests.distributed import toy
from tests.distributed.ranks import run_ranks

LENGTH = 64


def begin() -> None:
    groups.build_groups(ParallelConfig())
    groups.seed_dropout(1, groups.topology())


def differences(precision: str, packed: bool, fault: float) -> list[dict[str, float]]:
    """Of plain attention, and of torch's with scores off by `fault` times."""
    begin()
    right = sdpa.SdpaAttention._attend

    def wrong(self: Any, query: torch.Tensor, *others: Any) -> torch.Tensor:
        return right(self, query * (1 + fault), *others)

    sdpa.SdpaAttention._attend = wrong  # type: ignore[method-assign]
    configs = [session_model.config_of(name, precision, LENGTH) for name in ("plain", "sdpa")]
    return [session_model.differences(config, packed, toy.CPU) for config in configs]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("precision", "fault"), [("fp32", 1e-3), ("bf16", 0.3)])
def test_a_wrong_attention_is_seen(precision: str, packed: bool, fault: float) -> None:
    ((plain, found),) = run_ranks(differences, 1, precision, packed, 0.0)
    assert session_model.alike(found, plain), (found, plain)
    ((plain, found),) = run_ranks(differences, 1, precision, packed, fault)
    assert not session_model.alike(found, plain), (found, plain)
    assert not session_model.alike(found | {"loss": float("nan")}, plain)


def dropout(packed: bool, fault: str) -> dict[str, float]:
    begin()
    right_drop, right_back = blockwise.drop, blockwise.softmax_backward
    if fault == "share":
        blockwise.drop = lambda values, key, below: right_drop(values, key, below // 2)
    if fault == "backward":
        blockwise.softmax_backward = lambda p, g, sums, key, below: right_back(
            p, g, sums, key + 1, below
        )
    if fault == "same":
        blockwise._key = lambda seed, number: 5
    config = session_model.config_of("blockwise", "fp32", LENGTH, dropout=0.1)
    return session_dropout.statistics(
        session_model.stage_of(config, toy.CPU), packed, LENGTH, toy.CPU
    )


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_is_as_asked(packed: bool) -> None:
    (found,) = run_ranks(dropout, 1, packed, "")
    assert session_dropout.sound(found), found


@pytest.mark.parametrize("fault", ["share", "backward", "same"])
def test_wrong_dropout_is_seen(fault: str) -> None:
    (found,) = run_ranks(dropout, 1, True, fault)
    assert not session_dropout.sound(found), found
