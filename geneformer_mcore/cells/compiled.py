"""Compiling number loops with numba, with an on-disk cache where one can be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled on its first call; it holds no lock of the interpreter meanwhile.

    Floating point stays strict (no reassociation, no fused multiply-add): token order is exact.
    Division by zero gives infinity or NaN, not an exception, whose test would forbid SIMD.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        # numba finds no folder it may write a cache to: a read-only installation without a home.
        return njit(**options)(function)
