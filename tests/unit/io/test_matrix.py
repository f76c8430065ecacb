"""Matrices of every format by rows: what they hold, in bounded memory, also converted on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.io import count_matrix
from geneformer_mcore.io.count_matrix import StoredMatrix, is_matrix, open_matrix
from tests.support.small_cells import random_counts

SHAPE = (41, 23)
SLICES = ((0, 41), (5, 9), (7, 8), (40, 41), (3, 3), (0, 20))
FORMS = ("csr", "csc", "csc on disk", "dense", "5x4", "41x1", "41x23")


@pytest.fixture
def counts(rng) -> np.ndarray:
    """Rows without an entry are among them: the first two, the last two and one between."""
    found = random_counts(rng, *SHAPE).toarray()
    found[[0, 1, 7, 39, 40]] = 0
    return found


@pytest.fixture
def file() -> Iterator[h5py.File]:
    with h5py.File("memory", "w", driver="core", backing_store=False) as opened:
        yield opened


@pytest.fixture(params=["hdf5", "zarr2", "zarr3"])
def storage(request, tmp_path) -> Any:
    """An empty group of each kind of file."""
    if request.param == "hdf5":
        return request.getfixturevalue("file")
    return zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=int(request.param[-1]))


def put(group: Any, name: str, values: np.ndarray, chunks: tuple[int, ...] | None = None) -> Any:
    if isinstance(group, h5py.Group):
        return group.create_dataset(name, data=values, chunks=chunks)
    return group.create_array(name, data=values, chunks=chunks or "auto")


def store(group: Any, counts: np.ndarray, form: str) -> Any:
    """`form`: csr, csc, dense, or dense in chunks "ROWSxCOLUMNS"."""
    if form[:3] in ("csr", "csc"):
        matrix = sparse.csr_matrix(counts.astype(np.float64)).asformat(form[:3])
        item = group.create_group("X")
        item.attrs.update({"encoding-type": f"{form[:3]}_matrix", "shape": list(SHAPE)})
        put(item, "data", matrix.data.astype(counts.dtype))
        put(item, "indices", matrix.indices)
        put(item, "indptr", matrix.indptr)
        return item
    chunks = None if form == "dense" else tuple(map(int, form.split("x")))
    return put(group, "X", counts, chunks)


def rows_of(matrix: StoredMatrix, start: int, stop: int) -> np.ndarray:
    block = matrix.read_rows(start, stop)
    assert (block.start, len(block)) == (start, stop - start)
    assert (block.data.dtype, block.indices.dtype) == (np.float64, np.int32)
    shape = (stop - start, matrix.shape[1])
    rows = sparse.csr_matrix((block.data, block.indices, block.indptr), shape)
    assert rows.has_sorted_indices
    return rows.toarray()


def make_small(patch: pytest.MonkeyPatch, form: str = "on disk") -> None:
    """Bands, ranges and batches of a few rows; conversions on disk where the form says so."""
    patch.setattr(count_matrix, "BAND_BYTES", 300)
    patch.setattr(count_matrix, "RANGE_ENTRIES", 40)
    patch.setattr(count_matrix, "BATCH_ENTRIES", 33)
    if "on disk" in form:
        patch.setattr(count_matrix, "IN_MEMORY_BYTES", 100)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("storage", "kind"),
    [("hdf5", kind) for kind in ("<f4", ">f4", "<f8", "<i4", "<u2", "<i8", "?")]
    + [("zarr2", "<f4"), ("zarr3", "<f4")],
    indirect=["storage"],
)
def test_rows_are_the_matrix(storage, counts, form, kind, monkeypatch) -> None:
    make_small(monkeypatch, form)
    typed = counts.astype(kind)
    matrix = open_matrix(store(storage, typed, form), "X")
    assert matrix.shape == SHAPE
    assert not (matrix.is_sequential and form in ("csr", "csc", "5x4"))
    for start, stop in SLICES:
        np.testing.assert_array_equal(rows_of(matrix, start, stop), typed[start:stop])
    some = matrix.some()
    assert set(some.ravel().tolist()) <= set(typed.ravel().tolist())
    assert some.any()
    matrix.close()


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_in_memory_nothing_is_written(file, counts, form, monkeypatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    tall = open_matrix(store(file, counts, "41x1"), "X", in_memory=True)
    np.testing.assert_array_equal(rows_of(tall, 3, 20), counts[3:20])
    stored = sparse.csr_matrix(counts).asformat(form)
    for array in (stored, sparse.csr_array(stored).asformat(form), sparse.coo_matrix(stored)):
        matrix = open_matrix(array, "X", in_memory=True)
        assert not matrix.is_sequential
        np.testing.assert_array_equal(rows_of(matrix, 3, 20), counts[3:20])


@given(
    ranges=st.integers(1, 400),
    batch=st.integers(1, 400),
    seed=st.integers(0, 9),
    leading=st.integers(0, 3),
    trailing=st.sampled_from([0, 1, 2, 38, 41]),
    form=st.sampled_from(["csc", "41x1"]),
)
def test_converted_whatever_the_sizes_of_ranges_and_batches(
    ranges, batch, seed, leading, trailing, form
) -> None:
    """And however many of the first and of the last rows are empty."""
    counts = random_counts(np.random.default_rng(seed), *SHAPE).toarray()
    counts[:leading] = 0
    counts[SHAPE[0] - trailing :] = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        h5py.File("memory", "w", driver="core", backing_store=False) as file,
    ):
        make_small(patch)
        patch.setattr(count_matrix, "RANGE_ENTRIES", ranges)
        patch.setattr(count_matrix, "BATCH_ENTRIES", batch)
        matrix = open_matrix(store(file, counts, form), "X")
        for start, stop in ((0, 41), (11, 30), (0, 1), (leading, leading + 1), (40, 41)):
            np.testing.assert_array_equal(rows_of(matrix, start, stop), counts[start:stop])
        matrix.close()


@pytest.mark.parametrize("form", ["csc", "41x1"])
def test_a_conversion_s_file_has_no_name(file, counts, form, tmp_path, monkeypatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    matrix = open_matrix(store(file, counts, form), "X")
    assert matrix.is_sequential
    np.testing.assert_array_equal(rows_of(matrix, 0, 41), counts)
    assert not list(tmp_path.iterdir())
    matrix.close()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_no_room_to_convert(file, counts, when, monkeypatch) -> None:
    make_small(monkeypatch)
    usage = shutil.disk_usage(tempfile.gettempdir())
    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10))
    full = os.open("/dev/full", os.O_RDWR)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: os.fdopen(full, "wb", 0))
    matrix = open_matrix(store(file, counts, "csc"), "a.h5ad: X")
    why = r"0\.0 GB are free" if when == "before" else "No space left"
    with pytest.raises(DataError, match=rf"a\.h5ad: X is stored by columns.*{why}.*TMPDIR"):
        matrix.read_rows(0, 3)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_fit_the_budget(file, counts, form, monkeypatch) -> None:
    make_small(monkeypatch, form)
    monkeypatch.setattr(count_matrix, "BLOCK_ENTRIES", 60)
    matrix = open_matrix(store(file, counts, form), "X")
    start, sizes = 0, []
    while start < 41:
        stop = matrix.fitting(start, min(start + 30, 41))
        assert start < stop <= start + 30
        sizes.append(len(matrix.read_rows(start, stop).data))
        start = stop
    assert max(sizes) <= 60
    assert sum(sizes) == np.count_nonzero(counts)
    monkeypatch.setattr(count_matrix, "BLOCK_ENTRIES", 1)
    assert matrix.fitting(2, 30) == 3, "a row longer than the budget is a block of its own"
    matrix.close()


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.uint32])
@pytest.mark.parametrize("form", ["csr", "csc", "csc on disk"])
def test_an_index_beyond_int32_does_not_become_another(
    file, counts, form, kind, monkeypatch
) -> None:
    make_small(monkeypatch, form)
    group = store(file, counts, form)
    indices = group["indices"][:].astype(kind)
    indices[4] = 2**32 + 3 if kind != np.uint32 else 2**31 + 3
    del group["indices"]
    group["indices"] = indices
    matrix = open_matrix(group, "X")
    if form == "csr":
        assert matrix.read_rows(0, 41).indices[4] == -1
    else:
        with pytest.raises(DataError, match="row number beyond its 41 cells"):
            matrix.read_rows(0, 41)


def test_encodings(file, counts) -> None:
    group = store(file, counts, "csr")
    del group.attrs["encoding-type"]
    group.attrs.update({"h5sparse_format": b"csr", "h5sparse_shape": group.attrs["shape"]})
    del group.attrs["shape"]
    np.testing.assert_array_equal(rows_of(open_matrix(group, "X"), 0, 41), counts)
    assert is_matrix(group)
    assert not is_matrix(group["data"])


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize(("place", "value"), [(3, 10**6), (-1, 5)])
def test_an_index_that_does_not_fit(storage, counts, form, place, value) -> None:
    group = store(storage, counts, form)
    values = group["indptr"][:]
    values[place] = value
    group["indptr"][:] = values
    with pytest.raises(DataError, match=r"X is damaged: an index \(indptr\)"):
        open_matrix(group, "X")


@pytest.mark.parametrize("part", ["data", "indices"])
def test_chunks_of_zarr_that_are_missing(tmp_path, counts, part) -> None:
    """Of a copy in part: zarr would give zeros for them."""
    group = store(zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2), counts, "csr")
    values = group[part][:]
    del group[part]
    put(group, part, values, (50,))
    open_matrix(group, "X")
    (tmp_path / "a.zarr/X" / part / "1").unlink()
    with pytest.raises(DataError, match=rf"1 of the \d chunks of its {part} are missing"):
        open_matrix(group, "X")
