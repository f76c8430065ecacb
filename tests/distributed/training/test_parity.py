"""Every layout computes what plain PyTorch computes: logits, gradients, norm, and loss curves."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from geneformer_mcore.types import Batch
from tests.distributed import curves, parity
from tests.distributed.parity import LAYOUTS, Parity

SMALL = ("train.global_batch_size=8",)
"""Four micro batches, of which each of two data-parallel ranks takes two."""
POST, GELU = "model.norm=post", "model.activation=gelu"
truth = cache(parity.truth)

ONE_STEP: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    **{name: (name, (), ()) for name in LAYOUTS},
    "recompute": ("tp1 pp1 dp1", (), ("parallel.recompute=full",)),
    "recompute attention": ("tp1 pp1 dp1", (), ("parallel.recompute=selective",)),
    "packed plain": ("packed", (), ("model.attention=plain",)),
    "packed blockwise": ("packed", (), ("model.attention=blockwise",)),
    "packed small rows": ("packed", (), ("data.tokens_per_micro_batch=104",)),
    "plain attention": ("tp1 pp1 dp1", (), ("model.attention=plain",)),
    "sdpa": ("tp1 pp1 dp1", (), ("model.attention=sdpa",)),
    "gelu": ("tp1 pp1 dp1", (GELU,), ()),
    "gelu, then relu": ("tp1 pp1 dp1", (GELU, "model.head_activation=relu"), ()),
    "post gelu": ("tp1 pp1 dp1", (POST, GELU), ()),
    "post": ("tp1 pp1 dp1", (POST,), ()),
    "post recompute": ("tp1 pp1 dp1", (POST,), ("parallel.recompute=selective",)),
    "post tp2": ("tp2 pp1 dp1", (POST,), ()),
    "post tp2 recompute": ("tp2 sequence", (POST,), ("parallel.recompute=full",)),
    "post interleaved": ("pp2 interleaved", (POST,), ()),
    "post dp2": ("dp2 overlap packed", (POST,), ()),
    "post tp2 pp2": ("tp2 pp2 sequence packed", (POST,), ()),
}
"""Name -> (layout, settings of the model, further settings)."""


@pytest.mark.parametrize("model", [(), (POST,)], ids=["pre", "post"])
def test_the_truth_is_worth_comparing_with(model: tuple[str, ...]) -> None:
    found = truth(settings=(*SMALL, *model))
    assert set(found.gradients) == set(found.weights)
    assert all(gradient.any() for gradient in found.gradients.values())
    assert found.norm > 1, "enlarged weights should have gradients that mistakes show in"
    if model == (POST,):
        norms = {key for key in found.weights if "norm" in key and key.endswith("weight")}
        layers = {f"encoder.layers.{n}.post_{part}_layernorm.weight" for n in range(4)
                  for part in ("attention", "mlp")}  # fmt: skip
        assert norms == layers | {"embedding.layer_norm.weight", "lm_head.layer_norm.weight"}


@pytest.mark.parametrize(("layout", "model", "more"), ONE_STEP.values(), ids=ONE_STEP)
def test_one_step(layout: str, model: tuple[str, ...], more: tuple[str, ...]) -> None:
    settings = (*SMALL, *model)
    assert_equal(parity.parity(layout, truth(settings=settings), settings=(*settings, *more)))


def assert_equal(found: Parity) -> None:
    """To 1e-5: logits absolutely, each gradient and their norm relatively."""
    assert found.logits <= 1e-5
    for key, error in found.gradients.items():
        assert error <= 1e-5, key
    assert found.norm <= 1e-5
    assert found.loss <= 1e-6


def nothing_on_rank_1(batches: list[Batch], data_rank: int) -> list[Batch]:
    return [emptied(batch) for batch in batches] if data_rank == 1 else batches


def nothing_in_the_first_batch(batches: list[Batch], _data_rank: int) -> list[Batch]:
    return [emptied(batches[0]), *batches[1:]]


def nothing_anywhere(batches: list[Batch], _data_rank: int) -> list[Batch]:
    return [emptied(batch) for batch in batches]


def emptied(batch: Batch) -> Batch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return replace(batch, selected_M=nothing, labels_M=nothing)


CHANGES = {
    "tp1 pp1 dp1": (nothing_anywhere,),
    "tp1 pp1 dp2": (nothing_on_rank_1, nothing_in_the_first_batch, nothing_anywhere),
    "dp2 overlap": (nothing_on_rank_1,),
    "tp1 pp2 dp2": (nothing_on_rank_1,),
    "tp1 pp2 dp1": (nothing_in_the_first_batch, nothing_anywhere),
    "pp2 dp2 overlap": (nothing_anywhere,),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_rank_batch_or_step_in_which_nothing_is_predicted(name: str) -> None:
    size = 2 if "dp2" in name else 1
    cases = [(truth(change, size, SMALL), change) for change in CHANGES[name]]
    for (expected, change), found in zip(cases, parity.parities(name, cases, SMALL), strict=True):
        if change is nothing_anywhere:
            assert math.isnan(expected.loss)
            assert expected.norm == found.norm == 0
            assert not any(found.gradients.values())
            assert found.loss == 0, "NaN here and there, and nothing else is NaN"
        else:
            assert expected.norm > 1
            assert_equal(found)


STEPS = 20
LARGE_BATCHES = ("train.micro_batch_size=8",)
CURVES = ("tp2 sequence", "tp1 pp2 dp1", "tp1 pp1 dp2")
"""Layouts whose loss curves are compared in every run of the tests; `make soak` takes all of them,
for 100 steps."""


@pytest.fixture(scope="module")
def plain() -> list[float]:
    losses = curves.plain(STEPS)
    assert losses[-1] < losses[0] - 0.1, "the toy run must learn for this to mean anything"
    return losses


@pytest.mark.parametrize("name", CURVES)
def test_losses_of_20_steps(name: str, plain: list[float]) -> None:
    assert curves.largest_difference(curves.from_seed(name, STEPS, LARGE_BATCHES), plain) <= 1e-4
