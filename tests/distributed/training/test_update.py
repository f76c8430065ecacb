"""The update itself: which weights decay, what clipping keeps, which learning rate is taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from geneformer_mcore.optim import optimizer as optim
from tests.distributed import toy
from tests.distributed.ranks import in_turn, run_ranks

LR, DECAY, CLIP = 0.25, 0.125, 2.0


def named(run: toy.Toy) -> dict[str, torch.Tensor]:
    return dict(run.trainable.stages[0].named_parameters())


def copied(run: toy.Toy) -> dict[str, torch.Tensor]:
    return {name: weights.detach().clone() for name, weights in named(run).items()}


def update(run: toy.Toy, norm: float, lr: float = LR) -> float:
    """One update with the same made-up gradients each time, scaled to `norm`; the norm as seen."""
    draw = torch.Generator().manual_seed(7)
    gradients = [torch.randn(weights.shape, generator=draw) for weights in named(run).values()]
    total = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    for weights, gradient in zip(named(run).values(), gradients, strict=True):
        weights.main_grad.copy_(gradient * (norm / total))
    seen = optim.gradient_norm(run.trainable.optimizer)
    optim.set_learning_rate(run.trainable.optimizer, lr)
    optim.update(run.trainable, seen)
    return seen


def decayed() -> dict[str, tuple[int, bool, bool]]:
    """{weights: (their dimensions, exactly shrunk by lr x weight decay, unchanged)} after an
    update with gradients of zero. Vectors start at 1, so that a decay would show."""
    run = toy.make(f"optim.weight_decay={DECAY}")
    for weights in named(run).values():
        if weights.dim() == 1:
            weights.data.fill_(1.0)
    run.trainable.optimizer.reload_model_params()
    before = copied(run)
    update(run, norm=0.0)
    found = {}
    for name, weights in named(run).items():
        was, shrunk = before[name], before[name] * (1 - LR * DECAY)
        found[name] = weights.dim(), torch.equal(weights, shrunk), torch.equal(weights, was)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_matrices_decay_by_lr_times_weight_decay_and_vectors_not_at_all(world_size: int) -> None:
    for seen in run_ranks(decayed, world_size):
        assert {dimensions for dimensions, _, _ in seen.values()} == {1, 2}
        assert any(name.endswith(".bias") for name in seen)
        assert any("layernorm" in name and name.endswith(".weight") for name in seen)
        for name, (dimensions, shrunk, unchanged) in seen.items():
            assert (shrunk, unchanged) == (dimensions == 2, dimensions == 1), name


Clipped = tuple[float, float, float, dict[str, np.ndarray]]


def clipped(norm: float, clip: float) -> Clipped:
    """(norm seen, norm of the first moment, of the root of the second, weights) after an update of
    `norm` and a small one. The second update is what tells scales apart: Adam's first hides them.
    """
    run = toy.make(f"optim.clip={clip}", "optim.beta1=0.5", "optim.beta2=0.75")
    seen = update(run, norm)
    (inner,) = run.trainable.optimizer.chained_optimizers
    states = list(inner.optimizer.state.values())
    first = math.sqrt(sum(float(state["exp_avg"].double().square().sum()) for state in states))
    second = math.sqrt(sum(float(state["exp_avg_sq"].double().sum()) for state in states))
    update(run, norm=0.5)
    return seen, first, second, {name: each.numpy() for name, each in copied(run).items()}


HUGE, SMALL = 1e4, 0.75 * CLIP
CASES = ((HUGE, CLIP), (CLIP, CLIP), (SMALL, CLIP), (SMALL, 0.0), (HUGE, 0.0))
"""(norm of the gradient, clip)."""


def equal(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(each, others[name]) for name, each in some.items())


def test_a_gradient_is_scaled_to_clip_where_it_is_larger_by_the_norm_of_all_shards() -> None:
    (alone,) = run_ranks(in_turn, 1, *((clipped, case) for case in CASES))
    lone = dict(zip(CASES, alone, strict=True))
    for (norm, clip), (seen, first, second, _) in lone.items():
        kept = min(norm, clip or norm)
        assert seen == pytest.approx(norm)
        assert first == pytest.approx(0.5 * kept)
        assert second == pytest.approx(0.5 * kept)  # root of (1 - beta2) = 0.25
    weights = {case: found[-1] for case, found in lone.items()}
    torch.testing.assert_close(weights[HUGE, CLIP], weights[CLIP, CLIP])
    assert equal(weights[SMALL, CLIP], weights[SMALL, 0.0])
    assert not equal(weights[HUGE, CLIP], weights[HUGE, 0.0])

    (seen_0, first_0, _, weights_0), (seen_1, first_1, _, weights_1) = run_ranks(
        clipped, 2, HUGE, CLIP
    )
    assert seen_0 == seen_1 == pytest.approx(HUGE)
    assert math.hypot(first_0, first_1) == pytest.approx(lone[HUGE, CLIP][1])
    assert equal(weights_0, weights_1)
    torch.testing.assert_close(weights_0, weights[HUGE, CLIP])


def moved(lr: float) -> tuple[float, float]:
    """(smallest, largest) move of a weight in the first update: Adam's is lr, whatever the
    gradient."""
    run = toy.make("optim.weight_decay=0", "optim.eps=1e-20", "optim.lr=0.01")
    before = copied(run)
    update(run, norm=1.0, lr=lr)
    after = copied(run)
    moves = torch.cat([(after[name] - was).abs().flatten() for name, was in before.items()])
    return float(moves.min()), float(moves.max())


def test_the_learning_rate_that_was_set_is_the_one_used() -> None:
    rates = (0.0, 0.25)
    assert run_ranks(in_turn, 1, *((moved, (lr,)) for lr in rates)) == [
        [pytest.approx((lr, lr), rel=1e-4) for lr in rates]
    ]
