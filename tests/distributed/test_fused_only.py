"""Transformer Engine's fused kernels or an error: Megatron-Core must not allow what is slow."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch

from geneformer_mcore.config.sections import Attention, ModelConfig, Precision
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model import attention
from tests.distributed import toy
from tests.distributed.ranks import run_ranks

UNFUSED = "NVTE_UNFUSED_ATTN"


def after_building(said: str | None) -> str | None:
    """What the environment says once a model was built, of what it said before."""
    os.environ.pop(UNFUSED, None)
    if said is not None:
        os.environ[UNFUSED] = said
    toy.make()
    return os.environ.get(UNFUSED)


@pytest.mark.parametrize("said", [None, "0", "1"])
def test_megatron_leaves_the_environment_as_it_is(said: str | None) -> None:
    assert run_ranks(after_building, 1, said) == [said]


@pytest.mark.parametrize(("said", "found"), [(None, "0"), ("1", "1")])
def test_te_may_not_fall_back_unless_it_is_allowed_to(
    monkeypatch: pytest.MonkeyPatch, said: str | None, found: str
) -> None:
    name = "megatron.core.extensions.transformer_engine"
    stand_in = types.ModuleType(name)
    stand_in.TEDotProductAttention = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setenv(UNFUSED, said or "")
    if said is None:
        monkeypatch.delenv(UNFUSED)
    attention.core_attention(Attention.te)
    assert os.environ[UNFUSED] == found


@pytest.mark.parametrize("asked", [Attention.te, Attention.flash])
def test_fused_kernels_are_for_16_bits(monkeypatch: pytest.MonkeyPatch, asked: Attention) -> None:
    monkeypatch.setattr(attention.backends, "require", lambda name: None)
    model = ModelConfig(attention=asked)
    gpu = torch.device("cuda", 0)
    assert attention.choose(model, gpu, Precision.bf16) is asked
    with pytest.raises(ConfigError, match=f"attention={asked.value} needs an NVIDIA GPU and 16"):
        attention.choose(model, gpu, Precision.fp32)
