"""Marks of this project."""

from __future__ import annotations

from typing import Any

import pytest


def soak(*values: Any) -> Any:
    """Values of a parametrised test that repeat a kind of fault which another case covers: `make
    soak` runs them, `make test` does not."""
    return pytest.param(*values, marks=pytest.mark.soak)
