"""Matrices of every format by rows: what they hold, in bounded memory, also turned on disk."""

from __future__ import annotations

import errno
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.io import h5ad
from geneformer_mcore.io.h5ad import StoredMatrix, is_matrix, open_matrix
from tests.small_cells import random_counts

SHAPE = (41, 23)


@pytest.fixture
def counts(rng: np.random.Generator) -> np.ndarray:
    """Rows without an entry are among them: the first two, the last two and one between."""
    found = random_counts(rng, *SHAPE).toarray()
    found[[0, 1, 7, 39, 40]] = 0
    return found


@pytest.fixture
def file(tmp_path: Path) -> Iterator[h5py.File]:
    with h5py.File(tmp_path / "a.h5", "w") as opened:
        yield opened


def store(file: h5py.File, counts: np.ndarray, form: str) -> h5py.Group | h5py.Dataset:
    """`form`: csr, csc, dense, or dense in chunks "ROWSxCOLUMNS"."""
    if form in ("csr", "csc"):
        matrix = sparse.csr_matrix(counts.astype(np.float64)).asformat(form)
        group = file.create_group("X")
        group.attrs.update({"encoding-type": f"{form}_matrix", "shape": counts.shape})
        group["data"] = matrix.data.astype(counts.dtype)
        group["indices"], group["indptr"] = matrix.indices, matrix.indptr
        return group
    chunks = None if form == "dense" else tuple(map(int, form.split("x")))
    return file.create_dataset("X", data=counts, chunks=chunks)


def rows_of(matrix: StoredMatrix, start: int, stop: int) -> np.ndarray:
    block = matrix.read_rows(start, stop)
    assert (block.start, len(block)) == (start, stop - start)
    assert (block.data.dtype, block.indices.dtype) == (np.float64, np.int32)
    shape = (stop - start, matrix.shape[1])
    rows = sparse.csr_matrix((block.data, block.indices, block.indptr), shape)
    assert rows.has_sorted_indices
    return rows.toarray()


FORMS = ("csr", "csc", "dense", "5x4", "41x1", "41x23")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<i4", "<u2", "<i8", "?"])
def test_rows_are_the_matrix(
    file: h5py.File,
    counts: np.ndarray,
    form: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(h5ad, "BAND_BYTES", 300)
    monkeypatch.setattr(h5ad, "RANGE_ENTRIES", 40)
    monkeypatch.setattr(h5ad, "BATCH_ENTRIES", 33)
    typed = counts.astype(kind)
    matrix = open_matrix(store(file, typed, form), "X")
    assert matrix.shape == SHAPE
    for start, stop in ((0, 41), (5, 9), (7, 8), (40, 41), (3, 3), (0, 20)):
        np.testing.assert_array_equal(rows_of(matrix, start, stop), typed[start:stop])
    matrix.close()


@given(
    ranges=st.integers(1, 400),
    batch=st.integers(1, 400),
    seed=st.integers(0, 9),
    leading=st.integers(0, 3),
    trailing=st.sampled_from([0, 1, 2, 38, 41]),
    form=st.sampled_from(["csc", "41x1"]),
)
def test_turned_whatever_the_sizes_of_ranges_and_batches(
    ranges: int, batch: int, seed: int, leading: int, trailing: int, form: str
) -> None:
    """And however many of the first and of the last rows are empty."""
    counts = random_counts(np.random.default_rng(seed), *SHAPE).toarray()
    counts[:leading] = 0
    counts[SHAPE[0] - trailing :] = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        h5py.File("memory", "w", driver="core", backing_store=False) as file,
    ):
        patch.setattr(h5ad, "RANGE_ENTRIES", ranges)
        patch.setattr(h5ad, "BATCH_ENTRIES", batch)
        patch.setattr(h5ad, "BAND_BYTES", 300)
        matrix = open_matrix(store(file, counts, form), "X")
        for start, stop in ((0, 41), (11, 30), (0, 1), (leading, leading + 1), (40, 41)):
            np.testing.assert_array_equal(rows_of(matrix, start, stop), counts[start:stop])
        matrix.close()


@pytest.mark.parametrize("form", ["csc", "41x1"])
def test_turned_on_disk(
    file: h5py.File,
    counts: np.ndarray,
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(h5ad, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(h5ad, "RANGE_ENTRIES", 40)
    monkeypatch.setattr(h5ad, "BAND_BYTES", 300)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    matrix = open_matrix(store(file, counts, form), "X")
    assert matrix.is_sequential
    before = sorted(tmp_path.iterdir())
    np.testing.assert_array_equal(rows_of(matrix, 0, 41), counts)
    assert sorted(tmp_path.iterdir()) == before, "the file has no name, so that none is left behind"
    matrix.close()


def test_no_room_to_turn_on_disk(
    file: h5py.File, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(h5ad, "IN_MEMORY_BYTES", 100)
    full = shutil.disk_usage(tempfile.gettempdir())._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    matrix = open_matrix(store(file, counts, "csc"), "a.h5ad: X")
    with pytest.raises(DataError, match=r"a\.h5ad: X lies by columns.*0\.0 GB are free.*TMPDIR"):
        matrix.read_rows(0, 3)


def test_a_disk_that_fills_while_it_is_turned(
    file: h5py.File, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, raw: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(h5ad, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    matrix = open_matrix(store(file, counts, "csc"), "a.h5ad: X")
    with pytest.raises(DataError, match=r"a\.h5ad: X lies by columns.*No space left.*TMPDIR"):
        matrix.read_rows(0, 3)


def test_what_is_small_or_lies_by_rows_is_not_sequential(
    file: h5py.File, counts: np.ndarray
) -> None:
    for form in ("csr", "csc", "dense", "5x4"):
        assert not open_matrix(store(file, counts, form), "X").is_sequential
        del file["X"]


@pytest.mark.parametrize("form", FORMS)
def test_blocks_fit_the_budget(
    file: h5py.File, counts: np.ndarray, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (h5ad, h5ad):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 60)
    monkeypatch.setattr(h5ad, "BAND_BYTES", 300)
    matrix = open_matrix(store(file, counts, form), "X")
    start, sizes = 0, []
    while start < 41:
        stop = matrix.fitting(start, min(start + 30, 41))
        assert start < stop <= start + 30
        sizes.append(len(matrix.read_rows(start, stop).data))
        start = stop
    assert max(sizes) <= 60
    assert sum(sizes) == np.count_nonzero(counts)
    matrix.close()


def test_a_row_longer_than_the_budget_is_a_block_of_its_own(
    file: h5py.File, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (h5ad, h5ad):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 1)
    for form in ("csr", "csc", "dense"):
        matrix = open_matrix(store(file, counts, form), "X")
        assert matrix.fitting(2, 30) == 3
        matrix.close()
        del file["X"]


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.uint32])
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_an_index_beyond_int32_does_not_become_another(
    file: h5py.File, counts: np.ndarray, form: str, kind: type
) -> None:
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


@pytest.mark.parametrize("value", ["text", 1j])
def test_values_that_are_no_numbers_are_refused(file: h5py.File, value: object) -> None:
    file["X"] = [[value, value]]
    with pytest.raises(DataError, match=r"X holds values of type .* counts are numbers"):
        open_matrix(file["X"], "X")


def test_encodings(file: h5py.File, counts: np.ndarray) -> None:
    group = store(file, counts, "csr")
    del group.attrs["encoding-type"]
    with pytest.raises(ValueError, match="unknown"):
        open_matrix(group, "X")
    group.attrs.update({"h5sparse_format": b"csr", "h5sparse_shape": group.attrs["shape"]})
    del group.attrs["shape"]
    np.testing.assert_array_equal(rows_of(open_matrix(group, "X"), 0, 41), counts)
    assert is_matrix(group)
    assert not is_matrix(group["data"])


@pytest.mark.parametrize("form", FORMS)
def test_some_values_without_turning(file: h5py.File, counts: np.ndarray, form: str) -> None:
    matrix = open_matrix(store(file, counts, form), "X")
    some = matrix.some()
    assert set(some.ravel().tolist()) <= set(counts.ravel().tolist())
    assert some.any()


def test_the_index_takes_what_the_file_says(file: h5py.File, counts: np.ndarray) -> None:
    group = store(file, counts, "csc")
    group["indptr"][3] = 10**6
    with pytest.raises(DataError, match=r"X is damaged: an index \(indptr\)"):
        open_matrix(group, "X")
    assert h5ad.encoding_of(group) == "csc"
