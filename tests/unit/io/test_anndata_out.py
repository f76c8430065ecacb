"""AnnData files given out: a copy with more in it, of old files and new, and a new one."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.io import anndata_out
from geneformer_mcore.io import frames as obs_module
from geneformer_mcore.io.anndata_out import Beside
from geneformer_mcore.io.h5ad import CountsFile
from tests.support.small_cells import adata_of

BESIDE = Beside(
    {"X_new": np.arange(8, dtype=np.float16).reshape(4, 2)},
    {"flag": np.array([True, False, True, True])},
    {"facts": {"layer": "last", "step": 3, "model": {"width": 2}}},
)


@pytest.fixture
def adata() -> anndata.AnnData:
    counts = sparse.csr_matrix(np.arange(12, dtype=np.float32).reshape(4, 3))
    var = {"symbol": ["x", "y", "z"], "n": [1, 2, 3]}
    layers = {"counts": counts.copy()}
    return adata_of(counts, obs={"kind": list("abab")}, var=var, layers=layers)


def check(path: Path) -> anndata.AnnData:
    found = anndata.read_h5ad(path)
    assert found.obsm["X_new"].dtype == np.float16
    np.testing.assert_array_equal(found.obsm["X_new"], BESIDE.obsm["X_new"])
    assert found.obs["flag"].tolist() == [True, False, True, True]
    assert found.uns["facts"]["model"]["width"] == 2
    return found


def test_copy(adata, tmp_path) -> None:
    source, target = tmp_path / "a.h5ad", tmp_path / "deep" / "b.h5ad"
    adata.write_h5ad(source)
    before = source.read_bytes()
    anndata_out.write_copy(source, target, BESIDE)
    assert source.read_bytes() == before
    found = check(target)
    assert found.obs.columns.tolist() == ["kind", "flag"]
    np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())
    # What has these names already is replaced.
    anndata_out.write_copy(target, tmp_path / "c.h5ad", BESIDE)
    assert check(tmp_path / "c.h5ad").obs.columns.tolist() == ["kind", "flag"]
    assert sorted(path.name for path in target.parent.iterdir()) == ["b.h5ad"]


@pytest.mark.filterwarnings("ignore")  # anndata, of the file's age
def test_copy_of_a_file_from_before_there_were_groups(tmp_path) -> None:
    source, target = tmp_path / "old.h5ad", tmp_path / "new.h5ad"
    with h5py.File(source, "w") as file:
        file["X"] = np.ones((4, 3), np.float32)
        for name, size in (("obs", 4), ("var", 3)):
            names = [(f"{name}{i}".encode(),) for i in range(size)]
            file[name] = np.array(names, dtype=[("index", "S8")])
    anndata_out.write_copy(source, target, BESIDE)
    assert check(target).obs_names.tolist() == ["obs0", "obs1", "obs2", "obs3"]


def test_new(adata, tmp_path) -> None:
    anndata_out.write_new(adata.obs, tmp_path / "b.h5ad", BESIDE)
    assert check(tmp_path / "b.h5ad").obs["kind"].tolist() == list("abab")


def columns_of_many_kinds() -> pd.DataFrame:
    """What obs of h5ad files and Experiments are read as, some of which AnnData does not write."""
    texts = ["a", None, "c", "a"]
    of_text = pd.CategoricalDtype(pd.Index(pd.array(["x", "y"], dtype="string")))
    return pd.DataFrame(
        {
            "names": pd.array(list("abcd"), dtype="string"),
            "some": pd.array(texts, dtype="string"),
            "nothing": pd.array([None] * 4, dtype="string"),
            "objects": np.array(texts, dtype=object),
            "no_objects": np.array([None] * 4, dtype=object),
            "categories": pd.Categorical.from_codes([0, 1, -1, 0], dtype=of_text),
            "floats": pd.array([1.5, None, 2, 3], dtype="Float64"),
            "whole": pd.array([1, None, 2, 3], dtype="Int64"),
            "truth": pd.array([True, None, False, True], dtype="boolean"),
            "when": pd.to_datetime(["2020-01-02", None, "2020-01-03", "2020-01-02"]),
            "day": np.array([date(2020, 1, 2)] * 4, dtype=object),
            "plain": [1, 2, 3, 4],
        },
        index=[f"c{i}" for i in range(4)],
    )


def test_obs_of_any_kind_can_be_written(tmp_path) -> None:
    obs = columns_of_many_kinds()
    before = obs.copy()
    anndata_out.write_new(obs, tmp_path / "new.h5ad", BESIDE)
    var = pd.DataFrame(index=["g1", "g2"])
    anndata_out.of_matrix(np.ones((4, 2)), obs, var, {}, {}).write_h5ad(tmp_path / "matrix.h5ad")
    pd.testing.assert_frame_equal(obs, before)
    for name in ("new", "matrix"):
        found = anndata.read_h5ad(tmp_path / f"{name}.h5ad").obs
        assert list(found.columns)[:12] == list(obs.columns)
        for column in obs.columns:
            expected = before[column].astype(object)
            if column in ("when", "day"):
                expected = expected.map(lambda time: str(time), na_action="ignore")
            values = found[column].astype(object)
            assert values.isna().tolist() == expected.isna().tolist(), column
            assert values.dropna().tolist() == expected.dropna().tolist(), column


def test_obs_of_more_text_than_is_kept_as_categories(tmp_path) -> None:
    number = obs_module.MAX_CATEGORIES + 1
    names = [f"clone{place}" for place in range(number)]
    matrix = sparse.csr_matrix(np.ones((number, 1), np.float32))
    cells = adata_of(matrix, obs={"clone": pd.Categorical(names)})
    path = tmp_path / "a.h5ad"
    cells.write_h5ad(path)
    with CountsFile(path) as counts:
        obs = counts.read_obs(0, number)
    assert isinstance(obs["clone"].dtype, pd.StringDtype)
    anndata_out.of_matrix(np.ones((3, 1)), obs[:3], cells.var, {}, {}).write_h5ad(path)
    assert anndata.read_h5ad(path).obs["clone"].tolist() == names[:3]


def test_obsm_that_cannot_be_used_is_told(adata, tmp_path) -> None:
    path = tmp_path / "a.h5ad"
    values = np.array([[1, 2], [np.nan, np.nan], [3, 4], [5, 6]], np.float64)
    adata.obsm["good"] = values
    adata.obsm["infinite"] = np.where(values == 3, np.inf, values)
    adata.obsm["huge"] = np.where(values == 3, 1e300, values)
    adata.write_h5ad(path)
    np.testing.assert_array_equal(anndata_out.read_obsm(path, "good"), values.astype(np.float32))
    other = Path(shutil.copy(path, tmp_path / "other.h5ad"))
    with h5py.File(other, "r+") as file:
        del file["obsm"]
        file["obsm"] = np.ones(3)
    (tmp_path / "text.h5ad").write_text("no h5ad")
    for wrong, name, message in (
        (path, "infinite", "1 cells have infinite ones"),
        (path, "huge", "1 cells have infinite ones"),
        (path, "other", "no array 'other' of numbers; it holds good, huge, infinite"),
        (other, "good", "it holds nothing"),
        *((tmp_path / each, "good", "from an h5ad file only") for each in ("text.h5ad", "", "no")),
    ):
        with pytest.raises(DataError, match=message):
            anndata_out.read_obsm(wrong, name)
