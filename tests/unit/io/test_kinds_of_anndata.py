"""Every kind of AnnData takes annotations, gives a copy, or is refused before any work; names that
become keys. CONTRIBUTING.md says how to run this file with another anndata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.io import anndata_out
from geneformer_mcore.io.anndata_out import Beside
from geneformer_mcore.io.counts import open_counts
from geneformer_mcore.io.h5ad import CountsFile
from tests.support.small_cells import adata_of, random_counts

NUM_CELLS, HALF = 12, 6
KINDS: dict[str, Callable[[Path], anndata.AnnData]] = {
    "in memory": anndata.read_h5ad,
    "view": lambda path: anndata.read_h5ad(path)[HALF:],
    "backed": lambda path: anndata.read_h5ad(path, backed="r"),
    "backed view": lambda path: anndata.read_h5ad(path, backed="r")[HALF:],
    "view of a view": lambda path: anndata.read_h5ad(path)[1:][HALF - 1 :],
}


@pytest.fixture
def path(rng: np.random.Generator, tmp_path: Path) -> Path:
    """Counts in raw.X beside logarithms, and ids of genes that begin late in their column."""
    counts = random_counts(rng, NUM_CELLS, 150)
    ids = [None] * 120 + [f"ENSG{place:011d}" for place in range(30)]
    adata = adata_of(counts, obs={"kind": list("ab" * HALF)}, var={"gene_ids": ids})
    adata.raw = adata.copy()
    adata.X = np.log1p(counts.toarray())
    adata.layers["other"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    return tmp_path / "a.h5ad"


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_and_takes_annotations(kind: str, copy: bool, path: Path) -> None:
    given = KINDS[kind](path)
    cells = slice(HALF, None) if "view" in kind else slice(None)
    if kind == "backed view" and not copy:
        with pytest.raises(DataError, match=r"a view of a backed one.*`copy=True`"):
            anndata_out.check_annotations(given, "X_new", copy)
        return
    anndata_out.check_annotations(given, "X_new", copy)
    with open_counts(given) as counts, open_counts(path) as of_file:
        assert (counts.location, counts.passed_over) == ("raw.X", ())
        expected = of_file.read_rows(*cells.indices(NUM_CELLS)[:2])
        np.testing.assert_array_equal(counts.read_rows(0, given.n_obs).data, expected.data)
        assert counts.gene_columns().keys() == {"gene_ids", "index"}
        with pytest.raises(DataError, match=r"no matrix in layers/nope; layers of the file: other"):
            open_counts(given, "nope")
    target = anndata_out.copy_of(given) if copy else given
    values = np.arange(2.0 * given.n_obs).reshape(-1, 2)
    Beside({"X_new": values}, {"flag": values[:, 0] > 3}, {"facts": {"n": 1}}).put(target)
    assert target.obs_names.tolist() == [f"c{place}" for place in range(NUM_CELLS)[cells]]
    np.testing.assert_array_equal(target.obsm["X_new"], values)
    assert target.obs["flag"].tolist() == (values[:, 0] > 3).tolist()
    assert target.uns["facts"] == {"n": 1}
    assert ("X_new" in given.obsm) == (not copy)
    assert np.asarray(given.X[:]).shape == np.asarray(target.X[:]).shape


@pytest.mark.parametrize("key", ["a/b", "", ".", "..", "_index", "a\0b", "\ud800", None, 3])
def test_a_key_that_no_file_can_hold_is_refused_before_any_work(key: Any, path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`key_added=` must be a name that an h5ad"):
        anndata_out.check_annotations(KINDS["in memory"](path), key, False)


def test_any_name_of_a_column_becomes_a_key(tmp_path: Path) -> None:
    names = ["lab/a", "lab_a", "lab", "_index", "", ".", "..", "x\0y", "\ud800", "/", "naïve ñ"]
    obs = pd.DataFrame([range(len(names))] * 4, columns=names, index=list("abcd"))
    key = anndata_out.as_key("predicted_lab/a")
    beside = Beside({key: np.ones((4, 2))}, {key: np.arange(4)}, {key: {}})
    anndata_out.write_new(obs, tmp_path / "a.h5ad", beside)
    found = anndata.read_h5ad(tmp_path / "a.h5ad")
    kept = {"lab_a": 1, "lab": 2, "naïve ñ": 10, "lab_a_": 0}
    assert {name: found.obs[name].iloc[0] for name in kept} == kept
    assert sorted(found.obs.iloc[0][:-1].tolist()) == list(range(len(names)))
    assert list(found.obsm) == [*found.uns] == [found.obs.columns[-1]] == ["predicted_lab_a"]


TEXTS = ["día", "B", "", "naïve"]
STRINGS: dict[str, Any] = {
    "of any length": h5py.string_dtype(),
    "of any length, as ASCII": h5py.string_dtype("ascii"),
    "fixed": h5py.string_dtype("utf-8", 12),
    "fixed, as ASCII": h5py.string_dtype("ascii", 12),
}


@pytest.mark.parametrize("kind", STRINGS)
def test_text_of_every_kind_that_hdf5_has(kind: str, tmp_path: Path) -> None:
    """R writes UTF-8 into fields that it marks as ASCII, and names as bytes."""
    counts = np.ones((4, 2), np.float32)
    adata_of(counts, obs={"kind": pd.Categorical(TEXTS)}, cell_ids=list("abcd")).write_h5ad(
        tmp_path / "a.h5ad"
    )
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        obs, data = file["obs"], [text.encode() for text in TEXTS]
        for group, name in ((obs["kind"], "categories"), (obs, "_index"), (file["var"], "_index")):
            del group[name]
            size = 2 if group.name == "/var" else 4
            group.create_dataset(name, data=data[:size], dtype=STRINGS[kind])
        obs["kind/codes"][:] = range(4)
        obs.attrs["encoding-type"] = np.bytes_(b"dataframe")
        obs.attrs["column-order"] = np.array([b"kind"])
    with CountsFile(tmp_path / "a.h5ad") as counts:
        assert counts.read_cell_ids(0, 4) == TEXTS
        assert counts.read_obs(0, 4)["kind"].tolist() == TEXTS
        assert counts.gene_columns()["index"] == TEXTS[:2]
        obs = counts.read_obs(0, 4)
    beside = Beside({"X_new": np.ones((4, 2))}, {"flag": np.ones(4, bool)}, {})
    anndata_out.check_copy(tmp_path / "a.h5ad")
    anndata_out.write_copy(tmp_path / "a.h5ad", tmp_path / "b.h5ad", beside)
    with CountsFile(tmp_path / "b.h5ad") as counts:
        assert counts.obs_columns == ["kind", "flag"]
        assert counts.read_obs(0, 4)["kind"].tolist() == TEXTS
    anndata_out.write_new(obs, tmp_path / "c.h5ad", beside)
    assert anndata.read_h5ad(tmp_path / "c.h5ad").obs["kind"].tolist() == TEXTS


def test_an_old_file_that_cannot_be_written_again_is_refused_before_any_work(
    tmp_path: Path,
) -> None:
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        file["X"] = np.ones((4, 3), np.float32)
        for name, size in (("obs", 4), ("var", 3)):
            rows = [(f"{name}{place}".encode(), b"\xff\xfe") for place in range(size)]
            file[name] = np.array(rows, dtype=[("index", "S8"), ("batch", "S8")])
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"of this age is written anew by anndata.*Remedy:"):
        anndata_out.check_copy(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["old.h5ad"]


@pytest.mark.parametrize(("layer", "factor"), [("raw.X", 1), ("counts", 3), (None, 3)])
def test_raw_can_be_named(layer: str | None, factor: int, rng, tmp_path: Path) -> None:
    counts = random_counts(rng, 5, 9)
    adata = adata_of(counts, layers={"counts": counts * 3})
    adata.raw = adata.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    for source in (adata, tmp_path / "a.h5ad"):
        with open_counts(source, layer) as opened:
            np.testing.assert_array_equal(opened.read_rows(0, 5).data, counts.data * factor)


def test_a_mudata_is_called_one(path: Path, tmp_path: Path) -> None:
    with h5py.File(path) as file, h5py.File(tmp_path / "a.h5mu", "w") as several:
        for name in ("obs", "var"):
            file.copy(name, several)
        file.copy(file, several.create_group("mod"), "rna")
    with pytest.raises(DataError, match=r"a MuData of rna, .*\['rna'\]\.write_h5ad"):
        open_counts(tmp_path / "a.h5mu")
