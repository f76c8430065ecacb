"""What is not fp32: half precision with a scaled loss, and compiled elementwise parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from geneformer_mcore.checkpoint import state
from geneformer_mcore.config.sections import Precision
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model import megatron_config
from geneformer_mcore.model.attention import select
from tests.distributed import toy
from tests.distributed.curves import SMOOTH
from tests.distributed.parity import PACKED
from tests.distributed.ranks import in_turn, run_ranks

FP16, BF16 = "train.precision=fp16", "train.precision=bf16"
POST = "model.norm=post"


def test_half_precision_learns_as_single_precision_does() -> None:
    def run(*kind: str) -> tuple:
        return toy.losses, (10, *SMOOTH, *kind)

    rows = [(FP16, PACKED), (FP16,), (BF16,), (BF16, POST)]
    (found,) = run_ranks(in_turn, 1, run(), run(POST), *(run(*row) for row in rows))
    for row, half in zip(rows, found[2:], strict=True):
        full = found[POST in row]
        assert half != full
        assert half == pytest.approx(full, rel=5e-3 if BF16 in row else 2e-3), row


def overflows(scale: float, folder: str) -> tuple[list[str], list[float], list[float]]:
    """Why updates were left out, from a scale that is too large; the losses of two more steps,
    and of the same from a checkpoint."""
    run = toy.make(FP16)
    (inner,) = run.trainable.optimizer.chained_optimizers
    inner.grad_scaler._scale.fill_(scale)
    before = [weights.clone() for weights in run.trainable.stages[0].parameters()]
    first = run.step()
    assert all(map(torch.equal, before, run.trainable.stages[0].parameters()))
    reasons = [first.left_out, *(result.left_out for result in run.steps(6))]
    run.write(folder)
    position, went_on = run.position, run.losses(2)
    state.load(run.trainable, Path(folder), 0)
    run.position = position
    return reasons, went_on, run.losses(2)


def test_an_overflow_leaves_the_update_out_and_halves_the_scale(tmp_path: Path) -> None:
    ((reasons, went_on, again),) = run_ranks(overflows, 1, 2.0**14, str(tmp_path / "step"))
    assert reasons[0] == "not finite"
    assert reasons[-1] == ""
    assert went_on == again, "the scale is part of the checkpoint"


@pytest.mark.filterwarnings("ignore:full scope is deprecated")  # Megatron-Core's own default
def test_eight_bits_need_transformer_engine() -> None:
    config, _ = toy.load(None, [])
    for asked in ("auto", "sdpa"):
        model = toy.load(None, [f"model.attention={asked}"])[0].model
        with pytest.raises(ConfigError, match=r"fp8 needs an NVIDIA GPU and model\.attention=te"):
            select.choose(model, toy.CPU, Precision.fp8)
    core = megatron_config.transformer_config(config.model, config.parallel, Precision.fp8, toy.CPU)
    assert megatron_config.precision_of(core) is Precision.fp8
    assert (core.fp8, core.params_dtype) == ("hybrid", torch.bfloat16)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_is_the_same_model() -> None:
    calls = [
        (toy.losses, (2, "optim.lr=1e-3", f"train.precision={precision}", PACKED, compiled))
        for precision in ("fp32", "bf16")
        for compiled in ("model.compile=false", "model.compile=true")
    ]
    ((*fp32, eager, compiled),) = run_ranks(in_turn, 1, *calls, timeout_s=280)
    assert fp32[1] == pytest.approx(fp32[0], rel=1e-5)
    assert compiled == pytest.approx(eager, rel=1e-3)
