"""obs and var by slices: every form that AnnData has written, the same dtypes for any slice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from geneformer_mcore.errors import DataError
from geneformer_mcore.io import frames as obs_module
from geneformer_mcore.io.frames import StoredFrame
from geneformer_mcore.io.memory import MemoryFrame

NUM_ROWS = 11


def every_kind() -> pd.DataFrame:
    rows = range(NUM_ROWS)
    missing = [i % 3 == 0 for i in rows]
    return pd.DataFrame(
        {
            "whole": np.arange(NUM_ROWS, dtype=np.int32),
            "number": np.arange(NUM_ROWS) / 4,
            "truth": [i % 2 == 0 for i in rows],
            "text": [f"t{i}" for i in rows],
            "label": pd.Categorical([None if no else f"l{i % 2}" for i, no in enumerate(missing)]),
            "level": pd.Categorical([i % 4 for i in rows]),
            "some_whole": pd.array([None if no else 2 for no in missing], dtype="Int64"),
            "some_truth": pd.array([None if no else True for no in missing], dtype="boolean"),
            "some_text": pd.array([None if no else "x" for no in missing], dtype="string"),
        },
        index=[f"cell {i}" for i in rows],
    )


@pytest.fixture(scope="module", params=["hdf5", "zarr2", "zarr3", "memory"])
def stored(request, tmp_path_factory) -> Iterator[tuple[StoredFrame | MemoryFrame, pd.DataFrame]]:
    """Every kind of column, in every kind of storage; what AnnData reads of it."""
    path = tmp_path_factory.mktemp("obs") / "a"
    adata = anndata.AnnData(np.ones((NUM_ROWS, 2)), obs=every_kind())
    if request.param == "memory":
        yield MemoryFrame(adata.obs), adata.obs
        return
    is_zarr, version = request.param[:4] == "zarr", int(request.param[-1])
    with (
        warnings.catch_warnings(),
        anndata.settings.override(allow_write_nullable_strings=True),
        anndata.settings.override(zarr_write_format=version if is_zarr else 2),
    ):
        warnings.simplefilter("ignore")  # Of zarr, about its own format 3.
        (adata.write_zarr if is_zarr else adata.write_h5ad)(path)
        expected = (anndata.read_zarr if is_zarr else anndata.read_h5ad)(path).obs
    file = zarr.open_group(path, mode="r") if is_zarr else h5py.File(path)
    yield StoredFrame(file["obs"], "obs"), expected
    if not is_zarr:
        file.close()


@given(start=st.integers(0, NUM_ROWS), length=st.integers(0, NUM_ROWS))
def test_slices_are_what_anndata_reads(stored, start, length) -> None:
    frame, expected = stored
    stop = min(NUM_ROWS, start + length)
    found = frame.read(start, stop)
    assert found.dtypes.to_dict() == frame.read(0, NUM_ROWS).dtypes.to_dict()
    assert frame.row_names(start, stop) == list(expected.index[start:stop])
    assert frame.columns == list(frame.readable) == list(every_kind())
    assert frame.readable["whole"](start, stop).tolist() == list(range(start, stop))
    pd.testing.assert_frame_equal(found, expected.iloc[start:stop], check_index_type=False)


@pytest.mark.parametrize("stored", ["hdf5", "zarr2"], indirect=True)
def test_many_categories_are_plain_values(stored, monkeypatch) -> None:
    monkeypatch.setattr(obs_module, "MAX_CATEGORIES", 3)
    frame = StoredFrame(stored[0]._item, "obs")
    found, part = frame.read(0, NUM_ROWS), frame.read(1, 3)
    assert found["level"].tolist() == [i % 4 for i in range(NUM_ROWS)]
    assert found["level"].dtype == part["level"].dtype == pd.Int64Dtype()
    assert found["label"].dtype == "category"


def test_a_table_of_before_0_7(file) -> None:
    kinds = [("index", "S9"), ("n_counts", "<f4"), ("louvain", "i1"), ("batch", "S2")]
    rows = np.array([(b"AAAC-1", 2.5, 1, b"b0"), (b"AAAG-1", 4.0, 0, b"b1")], dtype=kinds)
    file["obs"] = rows
    file["uns/louvain_categories"] = np.array([b"B cell", b"T cell"])
    frame = StoredFrame(file["obs"], "obs", file["uns"])
    found = frame.read(0, 2)
    assert found.index.tolist() == ["AAAC-1", "AAAG-1"]
    expected = {"n_counts": [2.5, 4.0], "louvain": ["T cell", "B cell"], "batch": ["b0", "b1"]}
    assert found.to_dict("list") == expected
    assert frame.columns == list(expected)


@pytest.mark.parametrize("kind", ["hdf5", "zarr"])
def test_categories_of_0_7(tmp_path, file, kind) -> None:
    """A reference in HDF5, a path below obs in zarr."""
    is_zarr = kind == "zarr"
    root = zarr.open_group(tmp_path / "a", mode="w", zarr_format=2) if is_zarr else file
    group = root.create_group("obs")
    group.attrs.update({"_index": "names", "column-order": ["donor"]})
    names = {"names": ["a", "b", "c"], "__categories/donor": ["d0", "d1"]}
    for name, values in ({"donor": np.array([1, -1, 0], np.int8)} | names).items():
        group[name] = np.array(values, None if name == "donor" else "S2")
    place = "__categories/donor"
    group["donor"].attrs["categories"] = place if is_zarr else group[place].ref
    frame = StoredFrame(group, "obs")
    assert frame.columns == ["donor"]
    donors = frame.read(0, 3)["donor"].astype(object)
    assert donors.where(donors.notna(), "").tolist() == ["d1", "", "d0"]
    assert frame.row_names(0, 3) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (["a", "", "c"], "string"),
        (np.array([5, 0, 7], np.uint8), "UInt8"),
        ([True, False, True], "boolean"),
        ([0.5, 0.0, 1.5], "float64"),
    ],
)
def test_values_with_a_mask(file, values, dtype) -> None:
    file["obs/_index"] = ["x", "y", "z"]
    file["obs/some/values"], file["obs/some/mask"] = values, [False, True, False]
    found = StoredFrame(file["obs"], "obs").read(0, 3)["some"]
    assert found.dtype == dtype
    assert found.isna().tolist() == [False, True, False]
    assert found.dropna().tolist() == [values[0], values[2]]


@pytest.fixture
def file() -> Iterator[h5py.File]:
    with h5py.File("a.h5", "w", driver="core", backing_store=False) as opened:
        yield opened


@pytest.mark.parametrize("names", [np.arange(7, 9), np.array([b"7", b"8"])])
def test_columns_of_other_kinds_are_listed_and_not_read(file, names) -> None:
    """And row names of any kind are text."""
    file["obs/_index"] = names
    file["obs/matrix"] = np.ones((2, 2))
    file["obs/one"] = 3
    file["obs/list/offsets"] = [0, 1, 2]
    file["obs/complex"] = np.ones(2, complex)
    file["obs/good"] = [1, 2]
    file["obs"].create_dataset("varying", (2,), h5py.vlen_dtype(np.int32))
    frame = StoredFrame(file["obs"], "obs")
    assert frame.columns == ["complex", "good", "list", "matrix", "one", "varying"]
    assert list(frame.read(0, 2)) == ["good"]
    assert (frame.row_names(0, 2), frame.row_names(1, 2)) == (["7", "8"], ["8"])


def test_damaged_values_are_one_message(file) -> None:
    file["obs/_index"] = ["a", "b"]
    column = file.create_dataset("obs/n", data=[1, 2], compression="gzip", chunks=(2,))
    column.id.write_direct_chunk((0,), b"no gzip at all")
    with pytest.raises(DataError, match=r"obs: column n, rows 0 to 1, cannot be read.*Remedy"):
        StoredFrame(file["obs"], "obs").read(0, 2)
