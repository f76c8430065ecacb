"""Counts of an AnnData in memory: those of its file, whatever it holds, and no disk is touched."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.io import count_matrix
from geneformer_mcore.io.counts import open_counts
from geneformer_mcore.io.memory import MemoryCounts
from tests.support.small_cells import adata_of, random_counts

NUM_CELLS, NUM_GENES = 23, 40
FORMS: dict[str, Callable[[Any], Any]] = {
    "csr": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc": sparse.csc_matrix,
    "dense": lambda matrix: matrix.toarray(),
    "whole numbers": lambda matrix: matrix.toarray().astype(np.uint16),
}


@pytest.fixture(autouse=True)
def no_disk(tmp_path, monkeypatch) -> None:
    """No temporary file can be made, and any conversion counts as a large one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setattr(count_matrix, "IN_MEMORY_BYTES", 0)


def labelled(counts: Any) -> anndata.AnnData:
    labels = pd.Categorical(["d1", None, ""] + ["d2"] * (NUM_CELLS - 3))
    obs = {"dataset_id": labels, "score": np.arange(NUM_CELLS) / 2}
    symbols = [f"S{i}" for i in range(NUM_GENES)]
    return adata_of(counts, obs=obs, var={"symbol": symbols, "n": 1})


@pytest.fixture
def counts(rng) -> sparse.csr_matrix:
    return random_counts(rng, NUM_CELLS, NUM_GENES)


def read(source: Any) -> tuple[list[Any], pd.DataFrame, list[Any]]:
    with open_counts(source) as opened:
        blocks = [
            (block.start, block.data.tolist(), block.indices.tolist(), block.indptr.tolist())
            for block in opened.blocks(7)
        ]
        names = [opened.read_cell_ids(0, opened.num_cells), opened.gene_columns()]
        names += [opened.gene_names(), opened.obs_columns]
        place = [opened.location, opened.passed_over, opened.is_sequential]
        return blocks, opened.read_obs(2, 9), names + place


def assert_the_same(adata: anndata.AnnData, path: Path) -> None:
    adata.copy().write_h5ad(path) if not adata.isbacked else adata.to_memory().write_h5ad(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(count_matrix, "IN_MEMORY_BYTES", 1 << 20)
        expected = read(path)
    blocks, obs, names = read(adata)
    assert (blocks, names) == (expected[0], expected[2])
    pd.testing.assert_frame_equal(obs, expected[1])


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_as_of_the_file(counts, form, view, tmp_path) -> None:
    adata = labelled(FORMS[form](counts))
    assert_the_same(adata[3:, ::2] if view else adata, tmp_path / "a.h5ad")


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_backed(counts, form, view, tmp_path) -> None:
    labelled(FORMS[form](counts)).write_h5ad(tmp_path / "backed.h5ad")
    backed = anndata.read_h5ad(tmp_path / "backed.h5ad", backed="r")
    assert_the_same(backed[3:] if view else backed, tmp_path / "a.h5ad")
    backed.file.close()


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_a_lazy_array_is_computed_by_rows(counts, form) -> None:
    """Such as dask's, which is not installed here."""

    class Lazy:
        def __init__(self, array: Any) -> None:
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __getitem__(self, rows: slice) -> Lazy:
            return Lazy(self.array[rows])

        def compute(self) -> Any:
            return self.array

    adata = labelled(counts)
    expected = read(adata)
    adata._X = Lazy(FORMS[form](counts))
    assert read(adata)[0] == expected[0]


def test_what_changes_changes_the_fingerprint(counts) -> None:
    adata, other = labelled(counts), labelled(counts * 2)
    renamed = adata.copy()
    renamed.obs_names = [f"d{i}" for i in range(NUM_CELLS)]
    prints = [MemoryCounts(each).fingerprint["sha256"] for each in (adata, adata, other, renamed)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_the_anndata_stays_as_it_is(counts) -> None:
    adata = labelled(counts.tocsc())
    before = adata.copy()
    read(adata)
    assert (before.X != adata.X).nnz == 0
    assert adata.X.format == "csc"
    pd.testing.assert_frame_equal(adata.obs, before.obs)


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_an_index_that_is_none(counts, form) -> None:
    """scipy does not look at it, and its own loops would leave the memory of the matrix."""
    matrix = counts.asformat(form)
    adata = labelled(matrix)
    adata.X.indices[4] = 10**6
    with open_counts(adata) as opened, pytest.raises(DataError, match="is damaged"):
        list(opened.blocks())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (pd.DataFrame(), "an AnnData is needed, and this is DataFrame"),
        (anndata.AnnData(obs=pd.DataFrame(index=["a"])), "no matrix in layers/counts or raw.X or"),
        (adata_of(np.ones((0, 3))), "0 cells x 3 genes"),
        (adata_of(np.ones((3, 0))), "3 cells x 0 genes"),
    ],
    ids=["DataFrame", "no matrix", "no cells", "no genes"],
)
def test_what_has_no_counts_is_refused(source, message) -> None:
    with pytest.raises(DataError, match=message):
        open_counts(source)


def test_a_backed_file_that_is_damaged(counts, tmp_path) -> None:
    path = tmp_path / "a.h5ad"
    labelled(counts).write_h5ad(path, compression="gzip")
    with h5py.File(path, "r+") as file:
        file["X/indptr"].id.write_direct_chunk((0,), b"no gzip at all")
    backed = anndata.read_h5ad(path, backed="r")
    with pytest.raises(DataError, match="the AnnData cannot be read"):
        open_counts(backed)
    backed.file.close()
