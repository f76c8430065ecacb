"""What every test stands on: the order of tests, quiet threads, data that may be missing."""

from __future__ import annotations

import os
from pathlib import Path

# Before numpy and torch are imported by any test: a parent with an OpenMP pool of several threads
# cannot fork the ranks of a distributed test, they hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FIRST = ("tests/rules", "tests/distributed")
"""Folders whose tests run first, in this order. The forking ones must: once a process has used
tiledbsoma, a child forked from it hangs."""

# The machine's speed must not decide whether a property holds, and a failure must come again.
hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ours")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable sort: the folders of FIRST, then the rest as collected."""
    items.sort(key=lambda item: _place(item.path))


def _place(path: Path) -> int:
    name = path.relative_to(REPOSITORY).as_posix()
    return next((i for i, folder in enumerate(FIRST) if name.startswith(folder)), len(FIRST))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the project."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the project; the test is skipped where it is missing.

    Another place: the environment variable GENEFORMER_SHARED_DATA.
    """
    folder = Path(os.environ.get("GENEFORMER_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data sets at {folder}")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """A random generator that is the same in every run."""
    return np.random.default_rng(20_240_530)
