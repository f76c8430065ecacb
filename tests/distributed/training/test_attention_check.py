"""The attention is chosen by what the machine has, and checked before it is used; Transformer
Engine's fused kernels or an error: Megatron-Core must not allow what is slow."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from geneformer_mcore.config.sections import Attention, ModelConfig, Precision
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model import fused
from geneformer_mcore.model.attention import select, selftest
from tests.distributed import toy
from tests.distributed.parity import SEQUENCE
from tests.distributed.ranks import in_turn, run_ranks

ONE_LAYER = "model.num_layers=1"  # only the first is looked at
UNFUSED = "NVTE_UNFUSED_ATTN"
GPU = torch.device("cuda", 0)
BF16, FP16, FP32 = Precision.bf16, Precision.fp16, Precision.fp32


def checked(packed: bool, *overrides: str) -> tuple[float, bool]:
    """(the largest error found, whether random state and mode are as before)."""
    (stage,) = toy.make(ONE_LAYER, "model.attention_dropout=0.1", *overrides).trainable.stages
    before = torch.get_rng_state()
    worst = selftest.check(stage, toy.CPU, packed)
    core = stage.encoder.layers[0].self_attention.core_attention
    return worst, torch.equal(before, torch.get_rng_state()) and core.training


@pytest.mark.parametrize(
    ("world_size", "overrides", "most"),
    [(1, (), 1e-5), (1, ("train.precision=bf16",), 3e-2), (2, SEQUENCE, 1e-5)],
)
def test_ours_pass(world_size: int, overrides: tuple[str, ...], most: float) -> None:
    calls = [
        (checked, (packed, f"model.attention={kind}", *overrides))
        for kind, packed in product(("plain", "sdpa", "blockwise"), (False, True))
    ]
    for found in run_ranks(in_turn, world_size, *calls):
        for (_, what), (worst, unchanged) in zip(calls, found, strict=True):
            assert 0 < worst < most, what
            assert unchanged, what


def spoilt(how: str, packed: bool) -> str:
    (stage,) = toy.make(ONE_LAYER, "model.attention=sdpa").trainable.stages
    core = stage.encoder.layers[0].self_attention.core_attention
    right = core.forward

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **rest: Any) -> Any:
        if how == "error":
            raise RuntimeError("no sublibrary.\nmore")
        if how == "mask":  # all cells are one
            mask = None
            if packed:
                ends = torch.tensor([0, len(q)], dtype=torch.int32)
                rest["packed_seq_params"] = select.packed_pieces(ends, len(q))
        query = {"scale": q * 1.01, "gradient": q.detach() + 0 * q}.get(how, q)
        return right(query, k, v, mask, **rest) * (float("nan") if how == "nan" else 1)

    core.forward = wrong
    with pytest.raises(ConfigError) as refusal:
        selftest.check(stage, toy.CPU, packed)
    return str(refusal.value)


def test_what_is_wrong_or_does_not_run_is_refused() -> None:
    cases = list(product(("scale", "mask", "gradient", "nan", "error"), (False, True)))
    (found,) = run_ranks(in_turn, 1, *((spoilt, case) for case in cases))
    for (how, packed), said in zip(cases, found, strict=True):
        assert "model.attention=flash, sdpa or plain" in said, (how, packed)
        if how == "error":
            start = "the attention that was chosen does not run here: no sublibrary. "
            assert said.startswith(start), packed
        else:
            assert "differs from the plain computation" in said, (how, packed)


def after_building(said: str | None) -> str | None:
    """What the environment holds once a model was built, of what it held before."""
    os.environ.pop(UNFUSED, None)
    if said is not None:
        os.environ[UNFUSED] = said
    toy.make(ONE_LAYER)
    return os.environ.get(UNFUSED)


def test_megatron_leaves_the_environment_as_it_is() -> None:
    said = [None, "0", "1"]
    assert run_ranks(in_turn, 1, *((after_building, (each,)) for each in said)) == [said]


@pytest.mark.parametrize(("said", "found"), [(None, "0"), ("1", "1")])
def test_te_fallback(monkeypatch: pytest.MonkeyPatch, said: str | None, found: str) -> None:
    name = "megatron.core.extensions.transformer_engine"
    stand_in = types.SimpleNamespace(TEDotProductAttention=object)
    monkeypatch.setitem(sys.modules, name, stand_in)  # type: ignore[arg-type]
    monkeypatch.setenv(UNFUSED, said or "")
    if said is None:
        monkeypatch.delenv(UNFUSED)
    select.core_attention(Attention.te)
    assert os.environ[UNFUSED] == found


Gpu = Callable[[tuple[int, int], bool], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU of this capability that only answers what it can, with Transformer Engine or not."""

    def stand_in(capability: tuple[int, int], te: bool) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(select.backends, "is_available", lambda name: te)
        monkeypatch.setattr(select.backends, "require", lambda name: None)

    return stand_in


@pytest.mark.parametrize(
    ("capability", "precision", "te", "padded", "packed"),
    [
        ((9, 0), BF16, True, "te", "te"),
        ((9, 0), Precision.fp8, True, "te", "te"),
        ((9, 0), BF16, False, "flash", "flash"),
        ((9, 0), FP32, True, "sdpa", "sdpa"),
        ((8, 0), BF16, True, "te", "flash"),
        ((8, 0), BF16, False, "flash", "flash"),
        ((10, 0), BF16, True, "te", "te"),
        ((12, 0), BF16, True, "te", "flash"),
        ((7, 0), FP16, True, "sdpa", "sdpa"),
        ((7, 5), FP16, False, "sdpa", "sdpa"),
    ],
)
def test_auto_takes_what_the_gpu_has(
    gpu: Gpu, capability: Any, precision: Precision, te: bool, padded: str, packed: str
) -> None:
    gpu(capability, te)
    for is_packed, expected in ((False, padded), (True, packed)):
        assert select.choose(ModelConfig(), GPU, precision, is_packed).value == expected


DETERMINISTIC = r"512 GiB.*deterministic.*attention=flash"


@pytest.mark.parametrize(
    ("capability", "hidden", "asked", "precision", "message", "chosen"),
    [
        ((7, 5), 256, "flash", FP16, "Ampere.*heads of 64", "sdpa"),
        ((9, 0), 4 * 36, "flash", FP16, "Ampere.*heads of 36", "sdpa"),
        ((9, 0), 4 * 264, "flash", FP16, "Ampere.*heads of 264", "sdpa"),
        ((9, 0), 256, "te", BF16, DETERMINISTIC, "flash"),
        ((9, 0), 256, "te", FP32, "attention=te needs an NVIDIA GPU and 16", "sdpa"),
        ((9, 0), 256, "flash", FP32, "attention=flash needs an NVIDIA GPU and 16", "sdpa"),
    ],
)
def test_what_does_not_run_is_refused_and_auto_takes_what_fits(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capability: Any, hidden: int, asked: str,
    precision: Precision, message: str, chosen: str,
) -> None:  # fmt: skip
    gpu(capability, asked == "te")
    if message == DETERMINISTIC:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    model = ModelConfig(hidden_size=hidden)
    assert select.choose(model, GPU, precision, True).value == chosen
    model.attention = Attention(asked)
    with pytest.raises(ConfigError, match=message):
        select.choose(model, GPU, precision, True)


@pytest.mark.parametrize("asked", [Attention.te, Attention.flash])
def test_fused_kernels_run_in_16_bits(gpu: Gpu, asked: Attention) -> None:
    gpu((9, 0), True)
    assert select.choose(ModelConfig(attention=asked), GPU, BF16) is asked


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
    monkeypatch: pytest.MonkeyPatch, compiler: Any, triton: bool, device: Any, asked: Any,
    expected: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(fused.shutil, "which", lambda _name: compiler)
    monkeypatch.setattr(fused, "is_available", lambda _name: triton)
    assert fused.is_compiled(asked, device) is expected
