"""A small store of made-up cells, built by the commands a user types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from tests.end_to_end.forked import Run
from tests.support import commands
from tests.support.small_cells import write_h5ad

NUM_CELLS, NUM_GENES = 240, 300


@pytest.fixture(scope="session")
def h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counts of two made-up cell types over Ensembl-like genes."""
    rng = np.random.default_rng(3)
    rates = rng.gamma(0.6, 2.0, size=(2, NUM_GENES))
    kinds = rng.integers(0, 2, NUM_CELLS)
    counts = rng.poisson(rates[kinds]).astype(np.float32)
    path = tmp_path_factory.mktemp("cells") / "made_up.h5ad"
    obs: dict[str, object] = {"cell_type": np.array(["a", "b"])[kinds]}
    return write_h5ad(path, scipy.sparse.csr_matrix(counts), obs=obs)


@pytest.fixture(scope="session")
def store(h5ad: Path) -> Path:
    """The token store of those cells, with a vocabulary and medians of their own."""
    path = h5ad.with_name("store")
    commands.check("data_prep/build_store.py", "--out", path, "--validation-fraction", 0.2, h5ad)
    return path


@pytest.fixture(scope="module")
def settings(request: pytest.FixtureRequest, store: Path) -> tuple[str, ...]:
    """The store, and what the module adds to it in MORE."""
    return (f"data.store={store}", *getattr(request.module, "MORE", ()))


@pytest.fixture
def run(settings: tuple[str, ...], tmp_path: Path) -> Run:
    """A run that has not begun, in a folder of its own."""
    return Run(tmp_path / "run", settings)


@pytest.fixture(scope="module")
def undisturbed(settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One rank that has come to its end, if nothing goes wrong."""
    run = Run(tmp_path_factory.mktemp("runs") / "undisturbed", settings)
    run.check()
    return run
