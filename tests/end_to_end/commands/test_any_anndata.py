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
from tests.support.small_cells import adata_of, gene_id, plain_tokens, random_counts
from tests.support.small_experiment import write_experiment

NUM_CELLS, NUM_GENES, LENGTH = 17, 31, 20
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
EXPECTED = [plain_tokens(row, TOKENS, VOCABULARY, LENGTH).tolist() for row in COUNTS.astype(float)]

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
    found = draw(st.sampled_from(["X", "raw", "layer", "X and another layer", "X behind raw"]))
    return {
        "X": {"X": counts},
        "raw": {"X": draw(st.sampled_from([logged, scaled])), "raw": counts},
        "layer": {"X": logged, "raw": logged, "counts": counts},
        "X and another layer": {"X": counts, "scaled": scaled},
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
    with warnings.catch_warnings(), anndata.settings.override(allow_write_nullable_strings=True):
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
    encoder = RankEncoder(vocabulary, LENGTH)
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


def put(group: h5py.Group, name: str, values: object, **more: object) -> None:
    """In place of what is there."""
    group.pop(name, None)
    group.create_dataset(name, data=values, **more)


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
    for part in ("data", "indices", "indptr"):
        file[f"raw.X/{part}"] = raw[part][:]
    file["raw.X"].attrs.update({"h5sparse_format": b"csr", "h5sparse_shape": COUNTS.shape})


def unchunked_by_columns(file: h5py.File) -> None:
    put(file, "X", np.asfortranarray(COUNTS.astype("<u2")))


def chunked_by_columns(file: h5py.File) -> None:
    put(file, "X", COUNTS, chunks=(NUM_CELLS, 1), compression="gzip")


def wide_indices(file: h5py.File) -> None:
    for part in ("indices", "indptr"):
        put(file["X"], part, file["X"][part][:].astype(np.int64))


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
        put(file["X"], part, np.array(values, file["X"][part].dtype))


def whole_number_names(file: h5py.File) -> None:
    put(file["obs"], file["obs"].attrs["_index"], np.arange(NUM_CELLS))


SPARSE = {"X": sparse.csr_matrix(COUNTS)}
EDITS = [before_0_7, unchunked_by_columns, chunked_by_columns, wide_indices]


@pytest.mark.parametrize("edit", [*EDITS, shuffled_and_with_zeros, whole_number_names])
def test_whatever_wrote_it(tmp_path: Path, edit: Callable[[h5py.File], None]) -> None:
    path = write(tmp_path / "a.h5ad", SPARSE, (IDS, {}), PLAIN)
    with h5py.File(path, "r+") as file:
        edit(file)
    assert tokens_of(path) == EXPECTED


def test_columns_that_are_no_gene_and_genes_in_two_columns(tmp_path: Path) -> None:
    part = np.minimum(COUNTS, 1)
    none = np.zeros((NUM_CELLS, 3))
    counts = np.concatenate([none, COUNTS - part, part], axis=1)
    index = ["", "nan", "antibody 1", *IDS, *VERSIONED]
    path = write(tmp_path / "a.h5ad", {"X": sparse.csr_matrix(counts)}, (index, {}), PLAIN)
    assert tokens_of(path) == EXPECTED


def build(
    patch: pytest.MonkeyPatch, folder: Path, vocabulary: Vocabulary, *inputs: Path
) -> Manifest:
    """The manifest of folder/store, built without any option but --vocabulary."""
    vocabulary.save(folder / "v.json")
    words = ("--out", folder / "store", "--vocabulary", folder / "v.json", "--seq-length", LENGTH)
    words += ("--workers", 1, *inputs)
    patch.setattr(sys, "argv", ["build_store.py", *map(str, words)])
    assert build_store() == 0
    return Manifest.load(folder / "store")


def test_all_of_them_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    obs = pd.DataFrame({"n": range(NUM_CELLS)}, index=PLAIN.index)
    logged = np.log1p(COUNTS)
    made = [
        ("csr.h5ad", "X", SPARSE, (IDS, {})),
        ("csc.h5ad", "X", {"X": sparse.csc_matrix(COUNTS.astype(np.int32))}, (VERSIONED, {})),
        (
            "dense.h5ad",
            "layers/counts",
            {"X": logged, "counts": COUNTS},
            (NUMBERS, {"gene_ids": IDS}),
        ),
        ("symbols.h5ad", "raw.X", {"X": logged, "raw": COUNTS}, (NAMES, {})),
        ("v2.zarr", "X", SPARSE, (IDS, {})),
        ("v3.zarr", "layers/counts", {"X": logged, "counts": SPARSE["X"].tocsc()}, (IDS, {})),
    ]
    paths = [
        write(tmp_path / n, parts, var, obs, f"zarr{n[1]}" if n.endswith("zarr") else None)
        for n, _, parts, var in made
    ]
    write_experiment(tmp_path / "soma", {"census": adata_of(SPARSE["X"], IDS)})
    manifest = build(monkeypatch, tmp_path, VOCABULARY, *paths, tmp_path / "soma")
    assert (manifest.cells, manifest.refused) == (7 * NUM_CELLS, [])
    places = {source["name"]: source["counts_location"] for source in manifest.sources}
    assert [places[name] for name, *_ in made] == [place for _, place, *_ in made]
    with TokenStore.open(tmp_path / "store") as store:
        read = store.read(0, manifest.cells)
        bounds = zip(read.offsets[:-1], read.offsets[1:], strict=True)
        found = [read.tokens_T[a:b].tolist() for a, b in bounds]
    assert sorted(found) == sorted(EXPECTED * 7)


def test_empty_first_and_last_cells_leave_no_trace_of_the_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a CSR matrix, its CSC twin and its dense one in tall chunks, by one command each."""
    monkeypatch.setattr(count_matrix, "BAND_BYTES", 100)
    counts = COUNTS.copy()
    counts[[0, 1, -2, -1]] = 0
    hashes = set()
    for name, form in (("csr", FORMS[0]), ("csc", FORMS[1]), ("tall", FORMS[0])):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name / "a.h5ad", {"X": form(counts)}, (IDS, {}), PLAIN)
        if name == "tall":
            with h5py.File(path, "r+") as file:
                put(file, "X", counts, chunks=(NUM_CELLS, 1))
        manifest = build(monkeypatch, tmp_path / name, VOCABULARY, path)
        assert manifest.cells == NUM_CELLS - 4
        hashes.add(manifest.content_hash)
    assert len(hashes) == 1


REAL = {
    "heart_san_1k": 1000,
    "lca_lung_1k": 1000,
    "marrow_cd34_palantir": 4142,
    "pbmc3k_labelled": 2638,
    "pbmc3k_raw": 2700,
}


def test_the_real_files_in_one_command(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    medians = json.loads((shared_data / "dicts" / "gc30m_gene_medians.json").read_text())
    symbols = json.loads((shared_data / "dicts" / "symbol_to_ensembl.json").read_text())
    names: dict[str, str] = {}
    for symbol, gene in symbols.items():
        names.setdefault(gene, symbol)
    paths = [shared_data / f"{name}.h5ad" for name in REAL]
    before = [path.stat().st_mtime_ns for path in paths]
    # The same cells twice would be refused: two of the files name no data set.
    manifest = build(monkeypatch, tmp_path, Vocabulary.from_medians(medians, names), *paths)
    assert [source["cells_stored"] for source in manifest.sources] == list(REAL.values())
    assert all(source["counts_covered"] > 0.7 for source in manifest.sources)
    assert [path.stat().st_mtime_ns for path in paths] == before
