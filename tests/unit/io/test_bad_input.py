"""Every kind of bad input gets its outcome: refused with a message, or cells skipped and counted.

Each case is a whole h5ad file (or Experiment), spoilt in one way, and given to build_store.py.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from data_prep.build_store import main as build_store
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.io.counts import open_counts
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.tokenizer import gencode
from tests.support.small_cells import (
    adata_of,
    gene_id,
    gene_ids,
    random_counts,
    vocabulary_of,
    write_h5ad,
)
from tests.support.small_experiment import ORGANISM, write_experiment

NUM_CELLS, NUM_GENES = 12, 20
COUNTS = random_counts(np.random.default_rng(4), NUM_CELLS, NUM_GENES, density=0.4)
DENSE = COUNTS.toarray()
SYMBOLS = [f"SYM{i}" for i in range(NUM_GENES)]
MICE = [f"ENSMUSG{i:011d}" for i in range(NUM_GENES)]
NO_TEXT = np.full(NUM_CELLS, b"c\xff", h5py.string_dtype("utf-8", 5))
TWINS = ["same"] * 2 + [f"c{i}" for i in range(10)]
FEW_KNOWN = [gene_id(0), *gene_ids(range(101, 120))]

Make = Callable[[Path], object]
"""Writes the spoilt input at the path it is given (a.h5ad)."""


@pytest.fixture
def build(tmp_path, monkeypatch, capsys):
    """build_store.py in this process: (exit code, stderr, path of the store)."""
    vocabulary_of(NUM_GENES).save(tmp_path / "vocabulary.json")

    def call(*arguments: object) -> tuple[int, str, Path]:
        store, known = tmp_path / "store", tmp_path / "vocabulary.json"
        words = ["build_store.py", "--out", store, "--workers", 1, "--vocabulary", known]
        monkeypatch.setattr(sys, "argv", list(map(str, [*words, *arguments])))
        with pytest.raises(SystemExit) as ended:
            run(build_store, counts_layer="--layer")
        return int(ended.value.code or 0), capsys.readouterr().err, store

    return call


@pytest.fixture
def refusal(build):
    """The message with which build_store.py ends with 2, no store, and no traceback."""

    def call(*arguments: object) -> str:
        code, error, store = build(*arguments)
        assert (code, store.exists(), "Traceback" in error) == (2, False, False)
        return error

    return call


def hash_of(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def edited(edit: Callable[[h5py.File], object], form: str = "csr") -> Make:
    """A good file with something in it changed."""

    def make(path: Path) -> None:
        write_h5ad(path, COUNTS.asformat(form), obs={"label": pd.Categorical(["a", "b"] * 6)})
        with h5py.File(path, "r+") as file:
            edit(file)

    return make


def replaced(name: str, values: object, form: str = "csr") -> Make:
    """A good file with an array replaced by values, or by a function of what it held."""

    def edit(file: h5py.File) -> None:
        attributes = dict(file[name].attrs)
        new = values(file[name][:]) if callable(values) else values
        del file[name]
        file[name] = new
        file[name].attrs.update(attributes)

    return edited(edit, form)


def spoilt(name: str, place: int, value: int, form: str = "csr", kind: type | None = None) -> Make:
    """A good file with one number of an array changed."""

    def spoil(values: np.ndarray) -> np.ndarray:
        values = values.astype(kind or values.dtype)
        values[place] = value
        return values

    return replaced(name, spoil, form)


def with_value(value: float, form: str = "csr", row: int = 3, column: int = 7) -> Make:
    """A good file with one value that is no count."""
    wrong = DENSE.astype(np.float64)
    wrong[row, column] = value
    return matrix(wrong if form == "dense" else sparse.csr_matrix(wrong).asformat(form))


def squeeze(file: h5py.File) -> None:
    """Damage the compressed bytes of the counts."""
    data = file["X/data"][:]
    del file["X/data"]
    made = file.create_dataset("X/data", data=data, compression="gzip", chunks=(len(data),))
    made.id.write_direct_chunk((0,), b"damaged beyond repair")


def other_encoding(file: h5py.File) -> None:
    file["X"].attrs["encoding-type"] = "coo_matrix"


def genes(names: list[str]) -> Make:
    return lambda path: write_h5ad(path, COUNTS, names)


def matrix(values: object) -> Make:
    return lambda path: write_h5ad(path, values)


def cut(path: Path) -> None:
    raw = write_h5ad(path, COUNTS).read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def experiment(value: float = 1.0) -> Make:
    wrong = DENSE.copy()
    wrong[3, 7] = value
    return lambda path: write_experiment(path, {"d": adata_of(sparse.csr_matrix(wrong))})


def damaged_experiment(path: Path) -> None:
    experiment()(path)
    (fragment,) = (path / ORGANISM / "ms/RNA/X/raw/__fragments").glob("*/a0.tdb")
    os.truncate(fragment, 5)


def part_of_a_census(path: Path) -> None:
    experiment()(path)
    for file in (path / ORGANISM / "obs").rglob("*.tdb"):
        file.unlink()


def empty_zarr(path: Path) -> None:
    path.mkdir()
    (path / ".zgroup").write_text("{}")


def other_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("matrix")


PLACE = [r"row 3", r"\(cell c3\)", rf"gene {gene_id(7)}"]
LOGGED = np.log1p(DENSE / DENSE.sum(1, keepdims=True) * 1e4)

REFUSED: dict[str, tuple[Make, list[str]]] = {
    # The file
    "missing": (lambda path: None, ["there is no such file"]),
    "empty": (lambda path: path.write_bytes(b""), ["not a whole HDF5", r"0 bytes"]),
    "text": (lambda path: path.write_text("gene,c0\nA,1\n"), ["not a whole HDF5", "12 bytes"]),
    "half": (cut, ["not a whole HDF5", "truncated"]),
    "a folder": (lambda path: path.mkdir(), ["cannot be opened as a SOMA Experiment"]),
    "zarr": (empty_zarr, ["a zarr store, and no AnnData file: it holds nothing"]),
    "another format in HDF5": (other_hdf5, ["no AnnData file: it holds matrix"]),
    "no matrix": (edited(lambda file: file.pop("X")), [r"no matrix in .*X", "--layer"]),
    "a matrix of one dimension": (replaced("X", [1.0, 2.0]), ["no matrix in"]),
    "no obs names": (edited(lambda file: file["obs"].pop("_index")), ["obs has no row names"]),
    "var is a number": (replaced("var", 3), ["cannot be read as an AnnData file"]),
    "no cells": (matrix(COUNTS[:0]), ["0 cells x 20 genes", "leave the file out"]),
    "no genes": (matrix(COUNTS[:, :0]), ["12 cells x 0 genes"]),
    "too few cells": (replaced("obs/_index", lambda names: names[:11]), ["label holds 12.*11 row"]),
    "too few genes": (replaced("var/_index", gene_ids(19)), ["X is 12 x 20.*12 cells and 19 ge"]),
    "text for counts": (replaced("X/data", ["x"] * COUNTS.nnz), ["holds values of type"]),
    "complex counts": (matrix(DENSE.astype(complex)), ["complex128.*counts are numbers"]),
    "an unknown encoding": (edited(other_encoding), ["csr_matrix or csc_.*is coo_matrix"]),
    "damaged compression, by columns": (edited(squeeze, "csc"), ["cannot be read", "get it again"]),
    "damaged compression": (edited(squeeze), ["rows 0 to 11 cannot be read", "get it again"]),
    # Values; of other forms of matrix: test_any_value_that_is_no_count_is_named_wherever_it_is
    "negative": (with_value(-2), [*PLACE, "-2: negative", r'layers\["counts"\]']),
    "NaN": (with_value(np.nan), [*PLACE, "nan: NaN", "correct the value"]),
    "infinite": (with_value(np.inf), [*PLACE, "inf: infinite"]),
    "minus infinite": (with_value(-np.inf), [*PLACE, "-inf: infinite"]),
    "fraction": (with_value(1.5), [*PLACE, r"1\.5: not a whole number", "--allow-normalised"]),
    "log-normalised": (matrix(sparse.csr_matrix(LOGGED)), ["not a whole number", r"counts.*raw"]),
    "scaled": (matrix(DENSE - DENSE.mean(0)), [r'put the raw counts into layers\["counts"\]']),
    # The index of the matrix
    "column beyond": (spoilt("X/indices", 4, 20), ["row 0 names column 20 of 20"]),
    "column below": (spoilt("X/indices", 4, -3), ["names column -3 of 20"]),
    "beyond int32": (spoilt("X/indices", 4, 2**32 + 2, kind=np.int64), ["names column -1 of 20"]),
    "row beyond": (spoilt("X/indices", 4, 12, "csc"), ["row number beyond its 12 cells"]),
    "rows that overlap": (spoilt("X/indptr", 3, 0), ["index .indptr. that does not fit 12"]),
    "too few values": (replaced("X/data", lambda data: data[:-1]), [f"index names {COUNTS.nnz}"]),
    # Genes
    "another species": (
        genes(MICE),
        [r"0 of 20 genes .*: 0\.0% of its genes", MICE[0], gene_id(0), "least 10%"],
    ),
    "few known ids": (
        genes(FEW_KNOWN),
        [r"1 of 20 genes .*: 5\.0% of its genes", "--allow-low-overlap"],
    ),
    "no ids": (replaced("var/_index", [""] * NUM_GENES), ["0 of 0 genes", "all blank"]),
    "symbols without a table": (genes(SYMBOLS), ["SYM0", "--symbols FILE or.*GENEFORMER_GENCODE"]),
    "numbers for genes": (genes(list(map(str, range(NUM_GENES)))), ["0 of 20 genes"]),
    # Cells
    "two cells of one name": (replaced("obs/_index", TWINS), ["'same' in dataset 'a'"]),
    "names that are no text": (replaced("obs/_index", NO_TEXT), ["column _index.*cannot be read"]),
    "no such category": (spoilt("obs/label/codes", 5, 9), ["label has code 9 for one of 2 cat"]),
    # SOMA
    "negative, in an Experiment": (experiment(-2), ["X/raw", *PLACE, "-2: negative"]),
    "a damaged Experiment": (damaged_experiment, ["X/raw: .*cannot be read"]),
    "an Experiment in part": (part_of_a_census, ["Remedy"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(refusal, tmp_path, kind) -> None:
    make, parts = REFUSED[kind]
    path = tmp_path / "a.h5ad"
    make(path)
    before = hash_of(path)
    error = refusal(path)
    for part in ["a.h5ad", *parts, "Remedy"]:
        assert re.search(part, error), (part, error)
    assert hash_of(path) == before


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.h5ad.gz", gzip.compress(b"x"), "compressed; decompress it (gunzip)"),
        ("a.h5ad", bz2.compress(b"x"), "compressed; decompress it (bunzip2)"),
        ("matrix.mtx", b"%%MatrixMarket matrix", "read its folder (scanpy: read_10x_mtx)"),
        ("matrix.mtx.gz", gzip.compress(b"x"), "read its folder (scanpy: read_10x_mtx)"),
        ("folder/GSM1_matrix.mtx.gz", b"", "read its folder (scanpy: read_10x_mtx)"),
    ],
)
def test_what_databases_deliver(refusal, tmp_path, name: str, content: bytes, remedy: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    assert remedy in refusal(tmp_path / "folder" if "folder" in name else path)


def test_a_zarr_without_its_root_metadata(refusal, tmp_path) -> None:
    (tmp_path / "a.zarr").mkdir()
    assert "SOMA Experiment, nor as a zarr store: .zgroup" in refusal(tmp_path / "a.zarr")


def test_paths_that_cannot_be_looked_at(refusal, tmp_path, monkeypatch) -> None:
    """Too long a name; and a folder that may not be entered, made up, as root may enter any."""
    error = refusal(tmp_path / ("x" * 300))
    assert "cannot be looked at: File name too long. Remedy: check the path" in error
    folder, stat = tmp_path / "shut", os.stat
    folder.mkdir()

    def refuse(path: object, **options: object) -> os.stat_result:
        if str(path).startswith(f"{folder}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    for path in (folder, folder / "a.h5ad"):
        error = refusal(path)
        assert f"{path}: an input must be readable" in error
        assert "Permission denied. Remedy: check the path, and your right" in error


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_cells_are_skipped_and_columns_counted(build, tmp_path, form) -> None:
    """Cells without counts or known genes; columns without an id, and with another's."""
    counts = np.concatenate([DENSE, np.zeros((NUM_CELLS, 1), np.float32)], axis=1)
    counts[[2, 5, 7]] = 0
    counts[7, NUM_GENES] = 4
    stored = sparse.csr_matrix(counts)
    stored.data[0] = 0  # An explicit zero.
    names = [*gene_ids(NUM_GENES), "unknown"]
    names[3:6] = "", gene_id(0) + ".7", "NA"
    code, error, store = build(write_h5ad(tmp_path / "a.h5ad", stored.asformat(form), names))
    assert (code, error) == (0, "")
    manifest = Manifest.load(store)
    (source,) = manifest.sources
    assert (manifest.cells, source["cells_in"]) == (NUM_CELLS - 3, NUM_CELLS)
    assert sorted(source["skipped"].values()) == [1, 2]
    assert (source["genes_blank"], source["genes_repeated"]) == (2, 1)
    assert source["genes_known"] == NUM_GENES - 3


@pytest.mark.parametrize(
    ("make", "flag"),
    [(matrix(COUNTS * 0.25), "--allow-normalised"), (genes(FEW_KNOWN), "--allow-low-overlap")],
    ids=["scaled counts", "low overlap"],
)
def test_what_a_flag_lets_pass(build, refusal, tmp_path, make, flag) -> None:
    make(tmp_path / "a.h5ad")
    refusal(tmp_path / "a.h5ad")
    assert build(tmp_path / "a.h5ad", flag)[0] == 0


def test_a_named_table_of_genes_that_is_none(refusal, tmp_path, monkeypatch) -> None:
    gencode.default_symbols.cache_clear()
    monkeypatch.setenv(gencode.VARIABLE, str(tmp_path / "none.csv"))
    path = write_h5ad(tmp_path / "a.h5ad", COUNTS, SYMBOLS)
    assert "none.csv: cannot be read" in refusal(path)
    gencode.default_symbols.cache_clear()
    assert "none.json: cannot be read" in refusal(path, "--symbols", tmp_path / "none.json")


NO_COUNT = st.one_of(
    st.floats(max_value=0, exclude_max=True, allow_nan=False, width=32),
    st.sampled_from([np.nan, np.inf]),
    st.floats(0.125, 2.0**20, width=32).filter(lambda value: value != int(value)),
)


@settings(max_examples=40)
@given(
    value=NO_COUNT,
    row=st.integers(0, NUM_CELLS - 1),
    column=st.integers(0, NUM_GENES - 1),
    form=st.sampled_from(["csr", "csc", "dense"]),
    in_memory=st.booleans(),
    normalised=st.booleans(),
)
def test_any_value_that_is_no_count_is_named_wherever_it_is(
    tmp_path_factory, value, row, column, form, in_memory, normalised
) -> None:
    path = tmp_path_factory.mktemp("bad") / "a.h5ad"
    with_value(value, form, row, column)(path)
    source = anndata.read_h5ad(path) if in_memory else path
    # Of these, normalised values may be fractions alone.
    allow = {"allow_normalised": normalised and not 0 < value < np.inf}
    with open_counts(source, **allow) as counts, pytest.raises(DataError) as error:
        list(counts.blocks(5))
    for part in (f"row {row} (cell c{row})", f"gene {gene_id(column)} holds {value:g}", "Remedy"):
        assert part in str(error.value)
    assert not in_memory or "the AnnData: X must" in str(error.value)


@cache
def good_file() -> tuple[bytes, list[int]]:
    """(a whole file, where the bytes of its numbers are)."""
    places: list[int] = []

    def add(_: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "if" or not item.size:
            return
        whole = [(item.id.get_offset(), item.id.get_storage_size())]
        for number in range(item.id.get_num_chunks() if item.chunks else 0):
            chunk = item.id.get_chunk_info(number)
            whole.append((chunk.byte_offset, chunk.size))
        for start, size in whole:
            places.extend(range(start, start + size) if start else ())

    with TemporaryDirectory() as folder:
        obs = {"label": pd.Categorical(["a", "b"] * 6), "n": range(NUM_CELLS)}
        path = write_h5ad(Path(folder, "a.h5ad"), COUNTS, obs=obs)
        with h5py.File(path) as file:
            file.visititems(add)
        return path.read_bytes(), places


@given(data=st.data(), bit=st.integers(0, 7), is_cut=st.booleans())
def test_no_flipped_bit_of_a_number_and_no_cut_is_a_traceback(
    tmp_path_factory, data, bit, is_cut
) -> None:
    """HDF5 has no checksums, so a flip may make another count; but never a defect of ours.

    Bits of its own structure are left alone: on some of them the HDF5 library itself hangs.
    """
    whole, places = good_file()
    raw = bytearray(whole)
    byte = data.draw(st.integers(0, len(raw) - 1) if is_cut else st.sampled_from(places))
    raw[byte] ^= 1 << bit
    path = tmp_path_factory.mktemp("bad") / "a.h5ad"
    path.write_bytes(raw[:byte] if is_cut else raw)
    with suppress(DataError), open_counts(path) as counts:
        list(counts.blocks())
        counts.read_obs(0, counts.num_cells)
        counts.gene_columns()
        assert not is_cut
