"""A small store of made-up cells, built by the commands a user types."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from tests.end_to_end import forked
from tests.support import commands
from tests.support.final_state import FinalState, final_state

NUM_CELLS, NUM_GENES = 240, 300


@pytest.fixture(scope="session")
def h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counts of two made-up cell types over Ensembl-like genes."""
    rng = np.random.default_rng(3)
    rates = rng.gamma(0.6, 2.0, size=(2, NUM_GENES))
    kinds = rng.integers(0, 2, NUM_CELLS)
    counts = rng.poisson(rates[kinds]).astype(np.float32)
    cells = anndata.AnnData(
        scipy.sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {"cell_type": np.array(["a", "b"])[kinds]}, index=[f"c{i}" for i in range(NUM_CELLS)]
        ),
        var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(NUM_GENES)]),
    )
    path = tmp_path_factory.mktemp("cells") / "made_up.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def store(h5ad: Path) -> Path:
    """The token store of those cells, with a vocabulary and medians of their own."""
    path = h5ad.with_name("store")
    commands.check("data_prep/build_store.py", "--out", path, "--validation-fraction", 0.2, h5ad)
    return path


@pytest.fixture(scope="module")
def undisturbed(
    request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinalState:
    """The final state of one rank with the settings MORE of the module, if nothing goes wrong."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    forked.check(run, [f"data.store={store}", *request.module.MORE])
    return final_state(run)
