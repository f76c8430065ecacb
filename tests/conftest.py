"""What every test stands on: quiet threads, properties that repeat, data that may be missing."""

from __future__ import annotations

import os
from pathlib import Path

# Before numpy and torch are imported by any test, and inherited by the process that the ranks of a
# distributed test are forked from: with an OpenMP pool of several threads there, they would hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Genes of tests are made up; a test that wants a table of symbols names it.
os.environ["GENEFORMER_GENCODE"] = "off"

import hypothesis
import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# The machine's speed must not decide whether a property holds, and a failure must come again.
hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ours")


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Shows where two runs part that should have ended in the same state."""
    if op != "==" or {type(left).__name__, type(right).__name__} != {"FinalState"}:
        return None
    # Only now: it imports torch, which most tests do not need.
    from tests.support.final_state import FinalState, explain

    assert isinstance(left, FinalState)
    assert isinstance(right, FinalState)
    return ["two runs did not end in the same state", *explain(left, right)]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the project."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets next to the project; the test is skipped where it is missing.

    Another place: the environment variable GENEFORMER_SHARED_DATA.
    """
    folder = Path(os.environ.get("GENEFORMER_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data sets at {folder}")
    return folder


@pytest.fixture(scope="session")
def slack_s(request: pytest.FixtureRequest) -> float:
    """How much later than its time limit a job may end: 10 s on the quiet machine of a soak, and
    as long as it takes on one that is busy with other things."""
    return 10 if request.config.getoption("-m") == "soak" else 60


@pytest.fixture
def rng() -> np.random.Generator:
    """A random generator that is the same in every run."""
    return np.random.default_rng(20_240_530)
