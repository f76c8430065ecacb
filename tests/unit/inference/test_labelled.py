"""Labels, donors and counts of a file: found, or reported as missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from geneformer_mcore.celltypes import labelled
from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer.genes import InputOptions
from tests.support.small_cells import random_counts, write_h5ad

OBS = {
    "Cell.Type": pd.Categorical(["T", "B", None, " T"] * 3),
    "Patient_ID": ["p1"] * 6 + ["p2"] * 6,
    "batch": np.arange(12),
}


def read(path: Path, label: str = "", donor: str = "", layer: Any = None) -> labelled.Labelled:
    return labelled.read(str(path), label, donor, InputOptions(layer=layer))


@pytest.fixture
def h5ad(rng: np.random.Generator, tmp_path: Path) -> Path:
    """12 cells with labels."""
    return write_h5ad(tmp_path / "a.h5ad", random_counts(rng, 12, 30), obs=dict(OBS))


def test_columns_are_found_by_usual_names(h5ad: Path) -> None:
    found = read(h5ad)
    assert (found.label, found.donor) == ("Cell.Type", "Patient_ID")
    assert found.labels_N.tolist() == ["T", "B", "", "T"] * 3
    assert found.donors_N is not None
    assert found.donors_N.tolist() == OBS["Patient_ID"]
    assert found.names[3] == "c3"


def test_requested_columns_are_taken(h5ad: Path) -> None:
    found = read(h5ad, "batch", "Cell.Type")
    assert found.labels_N.tolist() == [str(number) for number in range(12)]
    assert found.donor == "Cell.Type"


def test_missing_columns_are_reported_with_those_there_are(h5ad: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'x'; its columns: Cell\.Type, Patient_ID"):
        read(h5ad, label="x")
    with pytest.raises(DataError, match=r"no column 'x'.*name one with `donor=`"):
        read(h5ad, donor="x")
    plain = write_h5ad(tmp_path / "b.h5ad", np.ones((2, 3)), obs={"n": [1, 2]})
    with pytest.raises(
        DataError, match=r"no column called celltype, .*its columns: n.*name one with `label=`"
    ):
        read(plain)


def test_one_donor_is_none_and_refused_where_it_was_requested(tmp_path: Path) -> None:
    obs = {"cell_type": ["a", "b"], "donor": ["d", "d"]}
    path = write_h5ad(tmp_path / "b.h5ad", np.ones((2, 3)), obs=obs)
    assert read(path).donors_N is None
    with pytest.raises(DataError, match=r"at least 2 donors, and names 1 \(d\)"):
        read(path, donor="donor")


def test_counts_are_those_that_the_models_read(tmp_path: Path) -> None:
    counts = np.array([[1, 0, 3], [0, 2, 2]], np.float32)
    obs = {"cell_type": ["a", "b"]}
    path = write_h5ad(tmp_path / "b.h5ad", np.log1p(counts), obs=obs, layers={"counts": counts})
    found = read(path)
    np.testing.assert_array_equal(found.counts_NG.toarray(), counts)
    logs = labelled.log_counts(found.counts_NG, np.ones(2, bool))
    expected = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 10_000)
    np.testing.assert_allclose(logs.toarray(), expected, rtol=1e-6)
    np.testing.assert_array_equal(found.counts_NG.toarray(), counts)
    second = labelled.log_counts(found.counts_NG, np.array([False, True]))
    np.testing.assert_allclose(second.toarray(), expected * [[0], [1]], rtol=1e-6)
    empty = found.without_counts().counts_NG
    assert (empty.nnz, empty.shape) == (0, counts.shape)
    with pytest.raises(DataError, match=r"not a whole number.*`counts_layer=`"):
        read(path, layer="X")
