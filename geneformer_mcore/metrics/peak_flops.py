"""Peak FLOP/s of this device, the denominator of MFU: measured by matrix products, so it holds for
any CPU or GPU, and for the run's clock and threads."""

from __future__ import annotations

import time

import torch

SIZES = (256, 512, 1024, 2048, 4096, 8192)
"""Edges of the square matrices, tried in order while time is left."""


def measured_peak(device: torch.device, dtype: torch.dtype, budget_s: float = 0.8) -> float:
    """FLOP/s of the fastest of some square matrix products, in about `budget_s` seconds.

    Sizes grow while the next one, eight times the work, is expected to fit into the budget. All
    ranks of a machine should call it at the same time, to share its cores as in training.
    """
    deadline = time.perf_counter() + budget_s
    best, expected_s = 0.0, 0.0
    for size in SIZES:
        # A warm-up and at least one timed product.
        if time.perf_counter() + 2 * expected_s > deadline:
            break
        fastest_s = _fastest_product_s(size, device, dtype, deadline)
        best = max(best, 2 * size**3 / fastest_s)
        expected_s = 8 * fastest_s
    return best


def _fastest_product_s(
    size: int, device: torch.device, dtype: torch.dtype, deadline: float, most: int = 5
) -> float:
    """Seconds of the fastest of up to `most` products of two `size` x `size` matrices."""
    left = _matrix(size, device, dtype)
    right, out = left.T.contiguous(), torch.empty_like(left)
    _product_s(left, right, out)  # libraries choose and load their kernels in the first call
    fastest_s = _product_s(left, right, out)
    for _ in range(most - 1):
        if time.perf_counter() + fastest_s > deadline:
            break
        fastest_s = min(fastest_s, _product_s(left, right, out))
    return fastest_s


def _matrix(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # Random, as constants take less power; a repeated tile, as drawing takes longer than the
    # product; a generator of its own, as the run's must not change.
    tile = torch.randn(SIZES[0], SIZES[0], generator=torch.Generator().manual_seed(0))
    repeats = size // SIZES[0]
    return tile.to(device, dtype).repeat(repeats, repeats)


def _product_s(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    _wait_for(left.device)
    start = time.perf_counter()
    torch.mm(left, right, out=out)
    _wait_for(left.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
