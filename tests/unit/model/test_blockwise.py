"""Attention with dropout on a CPU: exact for the probabilities it keeps, which are a fair draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from geneformer_mcore.model.attention import blockwise
from geneformer_mcore.model.attention.backends import bounds_of

HEADS, WIDTH = 3, 8


def drawn(n: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key, value and a gradient, [n, heads, width]."""
    draw = torch.Generator().manual_seed(n)
    return [torch.randn(n, HEADS, WIDTH, generator=draw).to(dtype) for _ in range(4)]


def attended(n: int, probability: float, seed: int = 5) -> list[torch.Tensor]:
    """Context and gradients of query, key and value."""
    *inputs, gradient = drawn(n)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    scale = 1 / math.sqrt(WIDTH)
    context = blockwise._DroppedAttention.apply(*inputs, probability, seed, scale)
    return [context.detach(), *torch.autograd.grad(context, inputs, gradient)]


def plainly(n: int, probability: float, seed: int = 5) -> list[torch.Tensor]:
    """The same by autograd, in fp64, with the mask that the hash defines."""
    *inputs, gradient = (tensor.double() for tensor in drawn(n))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    query, key, value = (tensor.transpose(0, 1) for tensor in inputs)
    probabilities = (query @ key.transpose(1, 2) / math.sqrt(WIDTH)).softmax(-1)
    kept = mask(n, probability, seed)
    below = round(probability * 2**32)
    context = ((probabilities * kept / (1 - below / 2**32)) @ value).transpose(0, 1)
    return [context.detach(), *torch.autograd.grad(context, inputs, gradient)]


def kept_plainly(values: torch.Tensor, key: int, below: int) -> torch.Tensor:
    """bool, of the same shape: the values that blockwise.drop leaves."""
    places = np.arange(values.numel(), dtype=np.uint32)
    return torch.from_numpy(mixed(places + np.uint32(key)) >= below).view(values.shape)


def mixed(x: np.ndarray) -> np.ndarray:
    """The hash lowbias32, uint32 in and out."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0xD35A2D97)
    return x ^ (x >> np.uint32(15))


def mask(n: int, probability: float, seed: int) -> torch.Tensor:
    """bool [heads, n, n], block by block."""
    kept = torch.ones(HEADS, n, n, dtype=torch.bool)
    step = max(16, blockwise._SCORES_PER_BLOCK // (HEADS * n))
    for number, block in enumerate(kept.split(step, dim=1)):
        block &= kept_plainly(block, blockwise._key(seed, number), round(probability * 2**32))
    return kept


@pytest.mark.parametrize("n", [1, 2, 37, 70])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_output_and_gradients(n: int, probability: float, monkeypatch) -> None:
    monkeypatch.setattr(blockwise, "_SCORES_PER_BLOCK", HEADS * n * 20)  # several blocks
    for found, wanted in zip(attended(n, probability), plainly(n, probability), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-6)


def test_the_draw_is_fair() -> None:
    kept = mask(400, 0.1, seed=11).double()
    sigma = math.sqrt(0.9 * 0.1)
    assert abs(kept.mean() - 0.9) < 4 * sigma / math.sqrt(kept.numel())
    for axis in range(3):
        means = kept.transpose(0, axis).flatten(1).mean(1)
        deviations = (means - 0.9) * math.sqrt(kept.numel() / len(means)) / sigma
        assert deviations.abs().max() < 5
        assert 0.7 < deviations.square().mean() < 1.4 or len(means) < 10
    neighbours = (kept[..., 1:] - 0.9) * (kept[..., :-1] - 0.9)
    assert abs(neighbours.mean()) < 5 * sigma**2 / math.sqrt(neighbours.numel())


def test_seeds_and_blocks_draw_apart() -> None:
    one, other = mask(100, 0.5, seed=1), mask(100, 0.5, seed=2)
    assert 0.47 < (one == other).double().mean() < 0.53
    keys = {blockwise._key(seed, number) for seed in range(50) for number in range(50)}
    assert len(keys) > 2490, "32 bits collide seldom"


@pytest.mark.parametrize("size", [1, 7, 4096, 70_001])
def test_compiled_and_plain_drop_the_same(size: int) -> None:
    values = torch.ones(size)
    key, below = 2**32 - 5, round(0.1 * 2**32)  # counts on over the end
    blockwise.drop(values, key, below)
    assert torch.equal(values.bool(), kept_plainly(values, key, below))


def test_bounds_of_padded_cells() -> None:
    lengths = torch.tensor([5, 1, 8])
    padding = (torch.arange(8) >= lengths[:, None])[:, None, None, :]
    bounds = bounds_of(padding, 8, 3, torch.device("cpu"))
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 5, 8, 9, 16, 24, 24]
    assert bounds_of(None, 8, 2, torch.device("cpu")).tolist() == [0, 8, 8, 16, 16]
