"""Any human AnnData goes in without a flag: one known matrix, written in every way there is."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from data_prep.build_store import main as build_store
from geneformer_mcore.io import count_matrix
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.tokenizer.genes import InputOptions, find_genes, map_genes
from geneformer_mcore.tokenizer.rank_encoder import RankEncoder
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.support.small_cells import gene_id, plain_tokens, random_counts
from tests.support.small_experiment import write_experiment

NUM_CELLS, NUM_GENES = 17, 31
NAMES = [f"SYM{number}" for number in range(NUM_GENES)]
VOCABULARY = Vocabulary.from_medians(
    {gene_id(i): 0.5 + (i * 7919 % 1000) / 250 for i in range(NUM_GENES)},
    {gene_id(i): NAMES[i] for i in range(NUM_GENES)},
)
NAMELESS = Vocabulary.from_medians(
    dict(zip(VOCABULARY.feature_ids, VOCABULARY.medians, strict=True))
)
COUNTS = random_counts(np.random.default_rng(8), NUM_CELLS, NUM_GENES).toarray()
TOKENS = np.arange(NUM_GENES) + 5
EXPECTED = [plain_tokens(row, TOKENS, VOCABULARY, 20).tolist() for row in COUNTS.astype(float)]

IDS = list(VOCABULARY.feature_ids)
VERSIONED = [f"{gene}.{number % 7}" for number, gene in enumerate(IDS)]
NUMBERS = [str(number) for number in range(NUM_GENES)]


def gencode() -> dict[str, str]:
    return dict(zip(NAMES, IDS, strict=True))


@st.composite
def var(draw: st.DrawFn) -> tuple[list[str], dict[str, object]]:
    """(index, columns): ids in the index or a column, or symbols alone."""
    place = draw(
        st.sampled_from(["index", "feature_id", "ensembl_id", "gene_ids", "Ensembl", "symbols"])
    )
    if place == "symbols":
        name = draw(st.sampled_from(["index", "gene_symbols", "feature_name"]))
        return (NAMES, {}) if name == "index" else (NUMBERS, {name: NAMES})
    ids = draw(st.sampled_from([IDS, VERSIONED]))
    extra = draw(st.sampled_from([{}, {"gene_name": NAMES}, {"n_cells": np.arange(NUM_GENES)}]))
    if place == "index":
        return ids, extra
    values = draw(st.sampled_from([list, pd.Categorical, lambda v: pd.array(v, dtype="string")]))
    return draw(st.sampled_from([NAMES, NUMBERS])), {place: values(ids), **extra}


FORMS: list[Callable[[np.ndarray], Any]] = [sparse.csr_matrix, sparse.csc_matrix, np.asarray]
KINDS = [np.float32, np.float64, np.int32, np.int64, np.uint16, np.int8]


@st.composite
def matrices(draw: st.DrawFn) -> dict[str, Any]:
    """{place: matrix}: the counts somewhere, and elsewhere what must not be taken for them."""

    def formed(values: np.ndarray) -> Any:
        return draw(st.sampled_from(FORMS))(values)

    counts = formed(COUNTS.astype(draw(st.sampled_from(KINDS))))
    logged = formed(np.log1p(COUNTS / COUNTS.sum(1, keepdims=True) * 1e4).astype(np.float32))
    scaled = (COUNTS - COUNTS.mean(0)).astype(np.float32)
    found = draw(st.sampled_from(["X", "raw", "layer", "X beside", "X behind raw"]))
    return {
        "X": {"X": counts},
        "raw": {"X": draw(st.sampled_from([logged, scaled])), "raw": counts},
        "layer": {"X": logged, "raw": logged, "counts": counts},
        "X beside": {"X": counts, "scaled": scaled},
        "X behind raw": {"X": counts, "raw": logged},
    }[found]


@st.composite
def obs(draw: st.DrawFn) -> pd.DataFrame:
    """Labels of every kind, names of every kind."""
    rows = range(NUM_CELLS)
    columns = {
        "text": [f"t{i}" for i in rows],
        "label": pd.Categorical([None if i % 4 == 0 else f"l{i % 3}" for i in rows]),
        "some": pd.array([None if i % 5 == 0 else i for i in rows], dtype="Int32"),
        "truth": pd.array([None if i % 5 == 0 else True for i in rows], dtype="boolean"),
        "number": np.arange(NUM_CELLS) / 3,
    }
    names: Any = [f"cell {i}" for i in rows]
    if draw(st.booleans()):
        names = pd.CategoricalIndex(names)
    kept = draw(st.sets(st.sampled_from(sorted(columns))))
    return pd.DataFrame({name: columns[name] for name in sorted(kept)}, index=names)


@contextmanager
def tolerant() -> Iterator[None]:
    """anndata remarks on names that are no text, and turns them into text."""
    with (
        warnings.catch_warnings(),
        anndata.settings.override(allow_write_nullable_strings=True),
    ):
        warnings.simplefilter("ignore")
        yield


def write(
    path: Path, parts: dict[str, Any], var: Any, obs: pd.DataFrame, storage: str | None = None
) -> Path:
    """storage: "zarr2", "zarr3", or h5ad with this compression"""
    index, columns = var
    frame = pd.DataFrame(columns, index=index)
    layers = {name: matrix for name, matrix in parts.items() if name not in ("X", "raw")}
    with tolerant():
        data = anndata.AnnData(parts["X"], obs=obs, var=frame, layers=layers)
        if "raw" in parts:
            data.raw = anndata.AnnData(parts["raw"], obs=obs, var=frame)
        if storage is None or "zarr" not in storage:
            data.write_h5ad(path, compression=storage)
        else:
            with anndata.settings.override(zarr_write_format=int(storage[-1])):
                data.write_zarr(path)
    return path


def tokens_of(source: Path, vocabulary: Vocabulary = NAMELESS) -> list[list[int]]:
    """The tokens of every cell, read without any option."""
    options = InputOptions(default_symbols=gencode)
    encoder = RankEncoder(vocabulary, 20)
    with options.open(source) as counts:
        genes = map_genes(find_genes(counts, options, vocabulary), vocabulary, counts)
        found = []
        for block in counts.blocks(7):
            ranked = encoder.encode(block, genes.token_of_column)
            bounds = zip(ranked.offsets[:-1], ranked.offsets[1:], strict=True)
            found += [ranked.tokens_T[a:b].tolist() for a, b in bounds]
        counts.read_obs(3, 9)
        counts.read_dataset_ids(0, 4)
    return found


@settings(max_examples=60)
@given(
    parts=matrices(),
    var=var(),
    obs=obs(),
    storage=st.sampled_from([None, "gzip", "lzf", "zarr2", "zarr3"]),
    vocabulary=st.sampled_from([VOCABULARY, NAMELESS]),
)
def test_whatever_it_looks_like(
    tmp_path_factory: pytest.TempPathFactory,
    parts: dict[str, Any],
    var: Any,
    obs: pd.DataFrame,
    storage: str | None,
    vocabulary: Vocabulary,
) -> None:
    path = tmp_path_factory.mktemp("any") / "a"
    write(path, parts, var, obs, storage)
    before = hash_of(path)
    assert tokens_of(path, vocabulary) == EXPECTED
    assert hash_of(path) == before


def hash_of(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


PLAIN = pd.DataFrame(index=[f"cell {i}" for i in range(NUM_CELLS)])


def rewrite(path: Path, edit: Callable[[h5py.File], None]) -> Path:
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def before_0_7(file: h5py.File) -> None:
    """Frames as tables, h5sparse's attributes, raw at the top, categories in uns."""
    raw = file["X"]
    del file["X"], file["obs"], file["var"]
    names = [(f"cell {i}".encode(), i % 2) for i in range(NUM_CELLS)]
    file["obs"] = np.array(names, [("index", "S9"), ("louvain", "i1")])
    file["uns/louvain_categories"] = np.array([b"a", b"b"])
    genes = np.array([(gene.encode(),) for gene in IDS], [("index", "S15")])
    file["var"] = file["raw.var"] = genes
    file["X"] = np.log1p(COUNTS / 3)
    file["raw.X/data"] = raw["data"][:]
    file["raw.X/indices"], file["raw.X/indptr"] = raw["indices"][:], raw["indptr"][:]
    file["raw.X"].attrs.update({"h5sparse_format": b"csr", "h5sparse_shape": COUNTS.shape})


def unchunked_by_columns(file: h5py.File) -> None:
    del file["X"]
    file["X"] = np.asfortranarray(COUNTS.astype("<u2"))


def chunked_by_columns(file: h5py.File) -> None:
    del file["X"]
    file.create_dataset("X", data=COUNTS, chunks=(NUM_CELLS, 1), compression="gzip")


def wide_indices(file: h5py.File) -> None:
    for part in ("indices", "indptr"):
        values = file["X"][part][:].astype(np.int64)
        del file["X"][part]
        file["X"][part] = values


def shuffled_and_with_zeros(file: h5py.File) -> None:
    """Columns of a row in any order, zeros stored, and one entry as two halves."""
    matrix = sparse.csr_matrix(np.where(COUNTS == 0, 1e9, COUNTS))
    rng = np.random.default_rng(0)
    data, indices, indptr = [], [], [0]
    for row in range(NUM_CELLS):
        order = rng.permutation(NUM_GENES)
        values = np.where(matrix[row].data == 1e9, 0, matrix[row].data)[order]
        half = int(np.flatnonzero(values >= 1)[0])
        data += [*values[:half], values[half] - 1, *values[half + 1 :], 1]
        indices += [*matrix[row].indices[order], matrix[row].indices[order][half]]
        indptr.append(len(data))
    for part, values in (("data", data), ("indices", indices), ("indptr", indptr)):
        kind = file["X"][part].dtype
        del file["X"][part]
        file["X"][part] = np.array(values, kind)


def whole_number_names(file: h5py.File) -> None:
    del file["obs"][file["obs"].attrs["_index"]]
    file["obs"][file["obs"].attrs["_index"]] = np.arange(NUM_CELLS)


@pytest.mark.parametrize(
    "edit",
    [
        before_0_7,
        unchunked_by_columns,
        chunked_by_columns,
        wide_indices,
        shuffled_and_with_zeros,
        whole_number_names,
    ],
)
def test_whatever_wrote_it(tmp_path: Path, edit: Callable[[h5py.File], None]) -> None:
    path = write(tmp_path / "a.h5ad", {"X": sparse.csr_matrix(COUNTS)}, (IDS, {}), PLAIN)
    assert tokens_of(rewrite(path, edit)) == EXPECTED


def test_columns_that_are_no_gene_and_genes_in_two_columns(tmp_path: Path) -> None:
    part = np.minimum(COUNTS, 1)
    none = np.zeros((NUM_CELLS, 3))
    counts = np.concatenate([none, COUNTS - part, part], axis=1)
    index = ["", "nan", "antibody 1", *IDS, *VERSIONED]
    path = write(tmp_path / "a.h5ad", {"X": sparse.csr_matrix(counts)}, (index, {}), PLAIN)
    assert tokens_of(path) == EXPECTED


def test_an_experiment_of_the_census_schema(tmp_path: Path) -> None:
    data = anndata.AnnData(sparse.csr_matrix(COUNTS), var=pd.DataFrame(index=IDS))
    write_experiment(tmp_path / "e", {"d": data})
    assert tokens_of(tmp_path / "e") == EXPECTED


def run_build(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["build_store.py", *map(str, arguments), "--workers", "1"])
    return build_store()


def test_all_of_them_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VOCABULARY.save(tmp_path / "v.json")
    names = pd.DataFrame({"n": range(NUM_CELLS)}, index=[f"cell {i}" for i in range(NUM_CELLS)])
    made = [
        ("csr.h5ad", {"X": sparse.csr_matrix(COUNTS)}, (IDS, {})),
        ("csc.h5ad", {"X": sparse.csc_matrix(COUNTS.astype(np.int32))}, (VERSIONED, {})),
        ("dense.h5ad", {"X": np.log1p(COUNTS), "counts": COUNTS}, (NUMBERS, {"gene_ids": IDS})),
        ("symbols.h5ad", {"X": np.log1p(COUNTS), "raw": COUNTS}, (NAMES, {})),
        ("v2.zarr", {"X": sparse.csr_matrix(COUNTS)}, (IDS, {})),
        ("v3.zarr", {"X": np.log1p(COUNTS), "counts": sparse.csc_matrix(COUNTS)}, (IDS, {})),
    ]
    paths = [
        write(tmp_path / n, parts, var, names, f"zarr{n[1]}" if n.endswith("zarr") else None)
        for n, parts, var in made
    ]
    data = anndata.AnnData(sparse.csr_matrix(COUNTS), var=pd.DataFrame(index=IDS))
    write_experiment(tmp_path / "soma", {"census": data})
    out = tmp_path / "store"
    arguments = ("--out", out, "--vocabulary", tmp_path / "v.json", "--seq-length", 20)
    assert run_build(monkeypatch, *arguments, *paths, tmp_path / "soma") == 0
    manifest = Manifest.load(out)
    assert (manifest.cells, manifest.refused) == (7 * NUM_CELLS, [])
    places = {source["name"]: source["counts_location"] for source in manifest.sources}
    found = [places[n] for n, _, _ in made]
    assert found == ["X", "X", "layers/counts", "raw.X", "X", "layers/counts"]
    with TokenStore.open(out) as store:
        read = store.read(0, manifest.cells)
        bounds = zip(read.offsets[:-1], read.offsets[1:], strict=True)
        found = [tuple(read.tokens_T[a:b].tolist()) for a, b in bounds]
    assert sorted(found) == sorted(tuple(cell) for cell in EXPECTED * 7)


def test_empty_first_and_last_cells_leave_no_trace_of_the_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a CSR matrix, its CSC twin and its dense one in tall chunks, by one command each."""
    monkeypatch.setattr(count_matrix, "BAND_BYTES", 100)
    VOCABULARY.save(tmp_path / "v.json")
    counts = COUNTS.copy()
    counts[[0, 1, -2, -1]] = 0
    hashes = {}
    for name, form in (("csr", FORMS[0]), ("csc", FORMS[1]), ("tall", FORMS[0])):
        folder = tmp_path / name
        folder.mkdir()
        path = write(folder / "a.h5ad", {"X": form(counts)}, (IDS, {}), PLAIN)
        if name == "tall":
            with h5py.File(path, "r+") as file:
                del file["X"]
                file.create_dataset("X", data=counts, chunks=(NUM_CELLS, 1))
        out = folder / "store"
        assert run_build(monkeypatch, "--out", out, "--vocabulary", tmp_path / "v.json", path) == 0
        manifest = Manifest.load(out)
        assert manifest.cells == NUM_CELLS - 4
        hashes[name] = manifest.content_hash
    assert len(set(hashes.values())) == 1, hashes


REAL = ("heart_san_1k", "lca_lung_1k", "marrow_cd34_palantir", "pbmc3k_labelled", "pbmc3k_raw")


@pytest.fixture(scope="module")
def gc30m(shared_data: Path) -> Vocabulary:
    medians = json.loads((shared_data / "dicts" / "gc30m_gene_medians.json").read_text())
    symbols = json.loads((shared_data / "dicts" / "symbol_to_ensembl.json").read_text())
    names: dict[str, str] = {}
    for symbol, gene in symbols.items():
        names.setdefault(gene, symbol)
    return Vocabulary.from_medians(medians, names)


def test_the_real_files_in_one_command(
    shared_data: Path, gc30m: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc30m.save(tmp_path / "v.json")
    paths = [shared_data / f"{name}.h5ad" for name in REAL]
    before = [path.stat() for path in paths]
    out = tmp_path / "store"
    # The same cells twice would be refused: two of the files name no data set.
    assert run_build(monkeypatch, "--out", out, "--vocabulary", tmp_path / "v.json", *paths) == 0
    manifest = Manifest.load(out)
    assert [source["cells_stored"] for source in manifest.sources] == [1000, 1000, 4142, 2638, 2700]
    assert all(source["counts_covered"] > 0.7 for source in manifest.sources)
    assert [path.stat().st_mtime_ns for path in paths] == [b.st_mtime_ns for b in before]


@pytest.mark.parametrize("name", REAL)
def test_a_real_file_in_other_forms(
    shared_data: Path, gc30m: Vocabulary, tmp_path: Path, name: str
) -> None:
    data = anndata.read_h5ad(shared_data / f"{name}.h5ad")[:150].copy()
    data.write_h5ad(tmp_path / "same.h5ad")
    expected = tokens_of(tmp_path / "same.h5ad", gc30m)
    assert min(map(len, expected)) > 1
    counts = data.X
    logged = counts.copy()
    logged.data = np.log1p(logged.data)
    for number, (values, layers) in enumerate(
        [
            (sparse.csc_matrix(counts), {}),
            (counts.toarray().astype(np.uint32), {}),
            (logged, {"counts": counts.astype(np.int64)}),
        ]
    ):
        other = anndata.AnnData(values, obs=data.obs, var=data.var, layers=layers)
        other.write_h5ad(tmp_path / f"{number}.h5ad", compression="gzip")
        assert tokens_of(tmp_path / f"{number}.h5ad", gc30m) == expected
