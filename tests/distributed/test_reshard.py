"""A checkpoint of any layout continues under any other: weights, moments and steps all fit.

The first loss after loading proves only the weights; the next ones prove fp32 copies, moments and
step. Two-layer stages make Megatron's gradient buckets end at places that need padding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from geneformer_mcore.checkpoint import state
from tests.distributed import toy
from tests.distributed.ranks import run_ranks

SAVED_AT, CONTINUED = 3, 5
LAYOUTS = {
    "serial": (1,),
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2": (2,),
    "pp2-interleaved": (2, "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "tp2-pp2": (4, "parallel.tensor=2", "parallel.pipeline=2"),
}
TWO_LAYERS = ("model.num_layers=2",)
FOUR_LAYERS = ("model.num_layers=4",)


def save(folder: str, *overrides: str) -> list[float]:
    run = toy.make(*overrides)
    run.steps(SAVED_AT)
    if run.topology.rank == 0:
        Path(folder).mkdir()
    torch.distributed.barrier()
    state.save(run.trainable, Path(folder), run.topology.rank)
    return [result.totals.loss for result in run.steps(CONTINUED)]


def load(folder: str, *overrides: str) -> list[float]:
    run = toy.make(*overrides)
    state.load(run.trainable, Path(folder), None)
    run.position = SAVED_AT * run.config.train.global_batch_size
    return [result.totals.loss for result in run.steps(CONTINUED)]


@pytest.mark.parametrize(
    ("saver", "loader", "size"),
    [
        ("pp2", "pp2", TWO_LAYERS),
        ("pp2", "serial", TWO_LAYERS),
        ("serial", "pp2", TWO_LAYERS),
        ("tp2", "pp2", TWO_LAYERS),
        ("tp2-pp2", "dp2", TWO_LAYERS),
        ("dp2", "tp2", TWO_LAYERS),
        ("pp2-interleaved", "pp2-interleaved", FOUR_LAYERS),
        ("pp2-interleaved", "serial", FOUR_LAYERS),
        ("dp2", "pp2-interleaved", FOUR_LAYERS),
    ],
)
def test_losses_go_on(saver: str, loader: str, size: tuple[str, ...], tmp_path: Path) -> None:
    folder = str(tmp_path / "step")
    ranks, *overrides = LAYOUTS[saver]
    (undisturbed, *_) = run_ranks(save, ranks, folder, *size, *overrides)
    ranks, *overrides = LAYOUTS[loader]
    for losses in run_ranks(load, ranks, folder, *size, *overrides):
        assert losses == pytest.approx(undisturbed, rel=1e-5)


def test_bf16_keeps_its_fp32_weights(tmp_path: Path) -> None:
    folder, bf16 = str(tmp_path / "step"), ("train.precision=bf16", *TWO_LAYERS)
    (undisturbed, *_) = run_ranks(save, 2, folder, *bf16, "parallel.pipeline=2")
    (losses, *_) = run_ranks(load, 2, folder, *bf16, "parallel.pipeline=2")
    assert losses == undisturbed
