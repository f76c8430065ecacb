"""Transformer Engine's fused kernels or an error: Megatron-Core must not allow what is slow."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch

from geneformer_mcore.config.sections import Attention, ModelConfig, Precision
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model import fused
from geneformer_mcore.model.attention import select
from tests.distributed import toy
from tests.distributed.ranks import in_turn, run_ranks

UNFUSED = "NVTE_UNFUSED_ATTN"


def after_building(said: str | None) -> str | None:
    """What the environment says once a model was built, of what it said before."""
    os.environ.pop(UNFUSED, None)
    if said is not None:
        os.environ[UNFUSED] = said
    toy.make("model.num_layers=1")
    return os.environ.get(UNFUSED)


def test_megatron_leaves_the_environment_as_it_is() -> None:
    said = [None, "0", "1"]
    assert run_ranks(in_turn, 1, *((after_building, (each,)) for each in said)) == [said]


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
    select.core_attention(Attention.te)
    assert os.environ[UNFUSED] == found


GPU = torch.device("cuda", 0)


def stand_in_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], te: bool) -> None:
    """A GPU that only answers what it can."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(select.backends, "is_available", lambda name: te)
    monkeypatch.setattr(select.backends, "require", lambda name: None)


@pytest.mark.parametrize(
    ("capability", "precision", "te", "padded", "packed"),
    [
        ((9, 0), Precision.bf16, True, "te", "te"),
        ((9, 0), Precision.fp8, True, "te", "te"),
        ((9, 0), Precision.bf16, False, "flash", "flash"),
        ((9, 0), Precision.fp32, True, "sdpa", "sdpa"),
        ((8, 0), Precision.bf16, True, "te", "flash"),
        ((8, 0), Precision.bf16, False, "flash", "flash"),
        ((10, 0), Precision.bf16, True, "te", "te"),
        ((12, 0), Precision.bf16, True, "te", "flash"),
        ((7, 0), Precision.fp16, True, "sdpa", "sdpa"),
        ((7, 5), Precision.fp16, False, "sdpa", "sdpa"),
    ],
)
def test_auto_takes_what_the_gpu_has(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    precision: Precision,
    te: bool,
    padded: str,
    packed: str,
) -> None:
    stand_in_gpu(monkeypatch, capability, te)
    chosen = [select.choose(ModelConfig(), GPU, precision, each) for each in (False, True)]
    assert [each.value for each in chosen] == [padded, packed]


def test_deterministic_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpu(monkeypatch, (9, 0), te=True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert select.choose(ModelConfig(), GPU, Precision.bf16, True) is Attention.flash
    asked = ModelConfig(attention=Attention.te)
    with pytest.raises(ConfigError, match=r"512 GiB.*deterministic.*attention=flash"):
        select.choose(asked, GPU, Precision.bf16, True)


@pytest.mark.parametrize(
    ("compiler", "triton", "device", "asked", "expected"),
    [
        ("/usr/bin/cc", True, GPU, None, True),
        (None, True, GPU, None, False),
        ("/usr/bin/cc", False, GPU, None, False),
        ("/usr/bin/cc", True, toy.CPU, None, False),
        (None, False, toy.CPU, True, True),
        ("/usr/bin/cc", True, GPU, False, False),
    ],
)
def test_what_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
    compiler: str | None,
    triton: bool,
    device: torch.device,
    asked: bool | None,
    expected: bool,
) -> None:
    monkeypatch.setattr(fused.shutil, "which", lambda _name: compiler)
    monkeypatch.setattr(fused, "is_available", lambda _name: triton)
    assert fused.is_compiled(asked, device) is expected


@pytest.mark.parametrize(
    ("capability", "hidden"), [((7, 5), 256), ((9, 0), 4 * 36), ((9, 0), 4 * 264)]
)
def test_flash_where_it_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hidden: int
) -> None:
    stand_in_gpu(monkeypatch, capability, te=False)
    model = ModelConfig(hidden_size=hidden)
    assert select.choose(model, GPU, Precision.fp16, True) is Attention.sdpa
    model.attention = Attention.flash
    with pytest.raises(ConfigError, match=f"Ampere.*heads of {hidden // 4}"):
        select.choose(model, GPU, Precision.fp16, True)


@pytest.mark.parametrize("asked", [Attention.te, Attention.flash])
def test_fused_kernels_are_for_16_bits(monkeypatch: pytest.MonkeyPatch, asked: Attention) -> None:
    stand_in_gpu(monkeypatch, (9, 0), te=True)
    model, gpu = ModelConfig(attention=asked), GPU
    assert select.choose(model, gpu, Precision.bf16) is asked
    with pytest.raises(ConfigError, match=f"attention={asked.value} needs an NVIDIA GPU and 16"):
        select.choose(model, gpu, Precision.fp32)
