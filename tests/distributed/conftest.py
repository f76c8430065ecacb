"""Small trained runs that tests of a session share: they read them, and change copies only."""

from __future__ import annotations

import pytest

from tests.distributed.inference import trained
from tests.distributed.inference.trained import Trained


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """A small trained run of every kind in trained.KINDS."""
    return trained.make_all(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def model(models: dict[str, Trained]) -> Trained:
    return models["plain"]
