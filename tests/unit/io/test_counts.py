"""Counts of h5ad, zarr and memory: found, and streamed in blocks (refusals: test_bad_input.py)."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.counts import open_counts
from geneformer_mcore.io.h5ad import CountsFile
from tests.support.small_cells import adata_of, random_counts, write_h5ad


@pytest.fixture
def counts(rng) -> sparse.csr_matrix:
    return random_counts(rng, num_cells=23, num_genes=40)


def dense_of(file: Any, num_rows: int) -> np.ndarray:
    rows = []
    for block in file.blocks(num_rows):
        assert block.start == sum(map(len, rows))
        shape = (len(block), file.num_columns)
        rows.append(sparse.csr_matrix((block.data, block.indices, block.indptr), shape).toarray())
    return np.concatenate(rows)


FILES = ("h5ad", "zarr2", "zarr3", "zarr3.zip")
STORAGES = (*FILES, "memory")
CHUNK = {"zarr2": "0", "zarr3": "c/0"}


def stored(path: Path, storage: str) -> Any:
    """The h5ad file `path`, or the same in another storage."""
    if storage == "h5ad":
        return path
    if storage == "memory":
        return anndata.read_h5ad(path)
    target = path.with_suffix(".zarr")
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=int(storage[4])):
        warnings.simplefilter("ignore")  # Of zarr, about its own format 3.
        anndata.read_h5ad(path).write_zarr(target)
    if storage.endswith("zip"):
        return Path(shutil.make_archive(str(target), "zip", target))
    return target


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, lambda m: m.toarray()])
@pytest.mark.parametrize(
    ("storage", "kind"),
    [("h5ad", kind) for kind in (np.float64, np.int32, np.int64, np.uint16)]
    + [(storage, np.float32) for storage in STORAGES],
)
@pytest.mark.parametrize("num_rows", [1, 7, 100])
def test_blocks_are_the_matrix(tmp_path, counts, form, kind, storage, num_rows) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", form(counts.astype(kind)))
    before = path.read_bytes()
    path.chmod(0o444)
    source = stored(path, storage)
    with open_counts(source) as file:
        assert file.stem == ("adata" if storage == "memory" else "a")
        assert file.path == (path if storage == "h5ad" else None)
        assert (file.num_cells, file.num_columns) == counts.shape
        assert file.read_cell_ids(0, 2) == ["c0", "c1"]
        np.testing.assert_array_equal(dense_of(file, num_rows), counts.toarray())
        block = file.read_rows(5, 9)
        assert (block.start, block.data.tolist()) == (5, counts[5:9].data.tolist())
        assert [len(b) for b in file.blocks(4, start=3, stop=13)] == [4, 4, 2]
    assert path.read_bytes() == before, "an input is not modified"


@pytest.mark.parametrize("storage", STORAGES)
def test_order_of_places(tmp_path, counts, storage) -> None:
    data = anndata.AnnData(counts, layers={"counts": counts * 3, "other": counts * 4})
    data.raw = adata_of(counts * 2, [f"r{i}" for i in range(40)])
    data.write_h5ad(tmp_path / "all.h5ad")
    del data.layers["counts"]
    data.write_h5ad(tmp_path / "raw.h5ad")
    for name, layer, *expected in (
        ("all", None, "layers/counts", 3, "0"),
        ("raw", None, "raw.X", 2, "r0"),
        ("all", "other", "layers/other", 4, "0"),
        ("all", "X", "X", 1, "0"),
    ):
        with open_counts(stored(tmp_path / f"{name}.h5ad", storage), layer) as file:
            ratio = file.read_rows(0, 23).data.sum() / counts.sum()
            assert [file.location, ratio, file.gene_columns()["index"][0]] == expected


@pytest.mark.parametrize("storage", ["h5ad", "memory"])
def test_normalised_values_are_passed_over_damaged_counts_not(tmp_path, counts, storage) -> None:
    data = anndata.AnnData(counts)
    data.raw = anndata.AnnData(sparse.csr_matrix(np.log1p(counts.toarray() * 0.37)))
    data.write_h5ad(tmp_path / "a.h5ad")
    with open_counts(stored(tmp_path / "a.h5ad", storage)) as file:
        assert (file.location, file.passed_over) == ("X", ("raw.X",))
    layer = counts.copy()
    layer.data[3] = -1
    path = write_h5ad(tmp_path / "b.h5ad", counts, layers={"counts": layer})
    message = "layers/counts must hold counts"
    with open_counts(stored(path, storage)) as file, pytest.raises(DataError, match=message):
        file.read_rows(0, 23)


@pytest.mark.parametrize("name", ["a.zarr/.zgroup", "a.zarr/zarr.json", "a.zarr.zip"])
def test_zarr_that_is_none(tmp_path, name) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{")
    with pytest.raises(DataError, match=r"a.zarr.*cannot be opened as a zarr store.*read_zarr"):
        open_counts(file if name.endswith("zip") else file.parent)
    with pytest.raises(DataError, match="no such file"):
        open_counts(tmp_path / "missing.zarr.zip")


@pytest.mark.parametrize("part", ["X/data", "X/indices", "obs/_index"])
@pytest.mark.parametrize("storage", ["zarr2", "zarr3", "zarr3.zip"])
def test_damaged_chunks_of_zarr(tmp_path, counts, storage, part) -> None:
    path = stored(write_h5ad(tmp_path / "a.h5ad", counts), storage)
    if path.suffix == ".zip":
        raw = bytearray(path.read_bytes())
        start = raw.index(f"{part}/c/0".encode()) + len(part) + 4
        raw[start : start + 40] = bytes(40)
        path.write_bytes(raw)
    else:
        (path / part / CHUNK[storage]).write_bytes(b"damaged beyond repair")
    message = r"a\.zarr.*cannot be read.*Remedy"
    with pytest.raises(DataError, match=message), open_counts(path) as file:  # noqa: PT012
        file.read_rows(0, 23)
        file.read_obs(0, 23)


@pytest.mark.parametrize("storage", CHUNK)
@pytest.mark.parametrize("frame", ["obs", "var"])
def test_missing_chunks_of_names_of_zarr(tmp_path, counts, storage, frame) -> None:
    """They would be read as blank names, and genes of these be lost."""
    path = stored(write_h5ad(tmp_path / "a.h5ad", counts), storage)
    (path / frame / "_index" / CHUNK[storage]).unlink()
    with pytest.raises(DataError, match="1 of the 1 chunks of column _index are missing"):
        open_counts(path)


@pytest.mark.parametrize("storage", FILES)
@pytest.mark.parametrize("name", ["kang_ifnb", "pbmc3k_labelled"])
def test_real_files_are_what_anndata_reads(shared_data, tmp_path, name, storage) -> None:
    source = shared_data / f"{name}.h5ad"
    expected = anndata.read_h5ad(source)
    with open_counts(stored(shutil.copy(source, tmp_path / "a.h5ad"), storage)) as file:
        obs, blocks = file.read_obs(0, file.num_cells), list(file.blocks(1000))
        assert file.gene_columns()["index"] == expected.var_names.tolist()
    pd.testing.assert_frame_equal(obs, expected.obs, check_names=False)
    for part in ("data", "indices"):
        found = np.concatenate([getattr(block, part) for block in blocks])
        np.testing.assert_array_equal(found, getattr(expected.X, part))
    lengths = np.concatenate([np.diff(block.indptr) for block in blocks])
    np.testing.assert_array_equal(lengths, np.diff(expected.X.indptr))


def test_compression_that_is_not_there(tmp_path, counts) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", counts)
    with h5py.File(path, "r+") as file:
        data = file["X/data"][:]
        del file["X/data"]
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((len(data),))
        settings.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((len(data),))
        made = h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, space, dcpl=settings)
        made.write_direct_chunk((0,), b"squeezed")
    with pytest.raises(DataError, match=r"X is compressed by HDF5 filter 32015 .*gzip"):
        CountsFile(path)


def test_datasets_of_cells(tmp_path, counts) -> None:
    obs = {"dataset_id": pd.Categorical(["d1", None, ""] + ["d2"] * 20)}
    path = write_h5ad(tmp_path / "mine.h5ad", counts, obs=obs)
    for source, stem in ((path, "mine"), (stored(path, "memory"), "adata")):
        with open_counts(source) as file:
            assert file.read_dataset_ids(0, 4) == ["d1", stem, stem, "d2"]
    with CountsFile(write_h5ad(path, counts)) as file:
        assert file.read_dataset_ids(21, 23) == ["mine", "mine"]
        assert (file.stem, file.name) == ("mine", str(path))


@pytest.mark.parametrize("storage", FILES)
def test_fingerprint_is_another_after_a_change(tmp_path, counts, storage) -> None:
    found = []
    for factor in (1, 1, 2):
        path = write_h5ad(tmp_path / "a.h5ad", counts * factor)
        with CountsFile(stored(path, storage)) as file:
            found.append(file.fingerprint)
    assert found[0] != found[1] != found[2]
    assert set(found[0]) == {"size", "mtime_ns"}


def test_raw_of_before_0_7(tmp_path, counts) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", np.log1p(counts.toarray() * 0.3))
    names = [(b"r%d" % i, i) for i in range(40)]
    with h5py.File(path, "r+") as file:
        raw = file.create_group("raw.X")
        raw.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": (23, 40)})
        for part in ("data", "indices", "indptr"):
            raw[part] = getattr(counts, part)
        file["raw.var"] = np.array(names, [("index", "S4"), ("n", int)])
    with CountsFile(path) as opened:
        assert opened.location == "raw.X"
        assert opened.gene_columns()["index"][39] == "r39"
        np.testing.assert_array_equal(dense_of(opened, 7), counts.toarray())


def test_missing_layer(tmp_path, counts) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", counts, layers={"spliced": counts})
    for source in (path, stored(path, "memory")):
        with pytest.raises(DataError, match=r"layers/nascent; layers of the file: spliced"):
            open_counts(source, "nascent")
