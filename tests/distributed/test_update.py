"""The update itself: which weights decay, what clipping keeps, which learning rate is taken."""

from __future__ import annotations

import math

import pytest
import torch

from geneformer_mcore.optim import optimizer as optim
from tests.distributed import toy
from tests.distributed.ranks import run_ranks

LR, DECAY, CLIP = 0.25, 0.125, 2.0


def named(run: toy.Toy) -> dict[str, torch.Tensor]:
    (stage,) = run.trainable.stages
    return dict(stage.named_parameters())


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
    return {
        name: (
            weights.dim(),
            torch.equal(weights, before[name] * (1 - LR * DECAY)),
            torch.equal(weights, before[name]),
        )
        for name, weights in named(run).items()
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_matrices_decay_by_lr_times_weight_decay_and_vectors_not_at_all(world_size: int) -> None:
    for seen in run_ranks(decayed, world_size):
        assert {dimensions for dimensions, _, _ in seen.values()} == {1, 2}
        assert any(name.endswith(".bias") for name in seen)
        assert any("layernorm" in name and name.endswith(".weight") for name in seen)
        for name, (dimensions, shrunk, unchanged) in seen.items():
            assert (shrunk, unchanged) == (dimensions == 2, dimensions == 1), name


def clipped(norm: float, clip: float) -> tuple[float, float, float, dict[str, list[float]]]:
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
    return seen, first, second, {name: w.flatten().tolist() for name, w in copied(run).items()}


def assert_close(seen: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    for name, weights in expected.items():
        torch.testing.assert_close(torch.tensor(seen[name]), torch.tensor(weights), msg=name)


def test_a_huge_gradient_is_scaled_to_clip() -> None:
    ((seen, first, second, weights),) = run_ranks(clipped, 1, 1e4, CLIP)
    assert seen == pytest.approx(1e4)
    assert first == pytest.approx(0.5 * CLIP)
    assert second == pytest.approx(0.5 * CLIP)  # root of (1 - beta2) = 0.25
    ((_, _, _, scaled),) = run_ranks(clipped, 1, CLIP, CLIP)
    assert_close(weights, scaled)


def test_ranks_clip_by_the_norm_of_all_shards() -> None:
    ((_, first, _, serial),) = run_ranks(clipped, 1, 1e4, CLIP)
    (seen_0, first_0, _, weights_0), (seen_1, first_1, _, weights_1) = run_ranks(
        clipped, 2, 1e4, CLIP
    )
    assert seen_0 == seen_1 == pytest.approx(1e4)
    assert math.hypot(first_0, first_1) == pytest.approx(first)
    assert weights_0 == weights_1
    assert_close(weights_0, serial)


def test_a_gradient_below_clip_is_left_alone() -> None:
    ((_, first, _, weights),) = run_ranks(clipped, 1, 0.75 * CLIP, CLIP)
    assert first == pytest.approx(0.5 * 0.75 * CLIP)
    ((_, _, _, unclipped),) = run_ranks(clipped, 1, 0.75 * CLIP, 0.0)
    assert weights == unclipped


def test_clip_0_never_clips() -> None:
    ((_, first, second, weights),) = run_ranks(clipped, 1, 1e4, 0.0)
    assert first == pytest.approx(0.5 * 1e4)
    assert second == pytest.approx(0.5 * 1e4)
    ((_, _, _, scaled),) = run_ranks(clipped, 1, 1e4, CLIP)
    assert weights != scaled


def moved(lr: float) -> tuple[float, float]:
    """(smallest, largest) move of a weight in the first update: Adam's is lr, whatever the
    gradient."""
    run = toy.make("optim.weight_decay=0", "optim.eps=1e-20", "optim.lr=0.01")
    before = copied(run)
    update(run, norm=1.0, lr=lr)
    moves = [(weights - before[name]).abs() for name, weights in copied(run).items()]
    return float(min(move.min() for move in moves)), float(max(move.max() for move in moves))


@pytest.mark.parametrize("lr", [0.0, 0.25])
def test_the_learning_rate_that_was_set_is_the_one_used(lr: float) -> None:
    ((least, most),) = run_ranks(moved, 1, lr)
    assert least == pytest.approx(lr, rel=1e-4)
    assert most == pytest.approx(lr, rel=1e-4)
