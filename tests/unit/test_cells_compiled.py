"""Compiled loops work where no cache can be written."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import pytest

from geneformer_mcore import backends as module


def test_without_a_place_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def njit(cache: bool = False, **options: Any) -> Callable[..., Any]:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(module, "njit", njit)
    assert module.compiled(lambda number: number + 1)(2) == 3
    assert asked == [True, False]


def test_numba_raises_that_error_where_it_cannot_cache() -> None:
    # Code that is in no file cannot be cached.
    code = compile("lambda number: number * 2", "<nowhere>", "eval")
    function = FunctionType(code.co_consts[0], {})
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(function)
    assert module.compiled(function)(4) == 8
