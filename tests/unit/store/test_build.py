"""Building a store: what is in it, that it depends on the cells alone, and what is refused."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.check import check_store
from geneformer_mcore.store.ingest import buckets, build, merge, plan, tokenise
from geneformer_mcore.store.ingest.build import build_store
from geneformer_mcore.store.keys import cell_keys, order_keys
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.split.table import SPLITS, RandomSplit
from tests.support.small_cells import (
    gene_ids,
    plain_tokens,
    random_counts,
    vocabulary_of,
    write_h5ad,
)

NUM_GENES = 60
SPLIT = RandomSplit(0.2, 0.1)
VOCABULARY = vocabulary_of(NUM_GENES)
COUNTS = random_counts(np.random.default_rng(5), 300, NUM_GENES)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    in_a = {"cell_type": [f"type {i % 3}" for i in range(180)], "age": range(180)}
    in_b = {"cell_type": ["other"] * 120, "quality": np.linspace(0, 1, 120)}
    parts = (("a.h5ad", COUNTS[:180], in_a), ("b.h5ad", COUNTS[180:], in_b))
    return [write_h5ad(folder / name, counts, obs=obs) for name, counts, obs in parts]


@pytest.fixture(scope="module")
def store(tmp_path_factory, files) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    build_store(files, path, VOCABULARY, seq_length=10, split_rule=SPLIT)
    return path


def frames(path: Path) -> tuple[pa.Table, pa.Table]:
    """Tokens and obs, by plain tiledbsoma."""
    with tiledbsoma.open(str(path)) as collection:
        return collection["tokens"].read().concat(), collection["obs"].read().concat()


def test_plain_tiledbsoma_reads_what_was_encoded(store) -> None:
    tokens, obs = frames(store)
    assert tokens.schema.field("tokens").type == pa.large_binary()
    for frame in (tokens, obs):
        assert frame["soma_joinid"].to_pylist() == list(range(300))
    columns = np.array([VOCABULARY.token_ids[gene] for gene in gene_ids(NUM_GENES)])
    seen = set()
    for row in obs.to_pylist():
        is_a = row["dataset_id"] == "a"
        cell = int(row["cell_id"][1:]) + (0 if is_a else 180)
        seen.add(cell)
        plain = COUNTS[cell].toarray().ravel().astype(np.float64)
        expected = plain_tokens(plain, columns, VOCABULARY, 10)
        raw = tokens["tokens"][row["soma_joinid"]].as_py()
        assert np.frombuffer(raw, "<u2").tolist() == expected.tolist()
        assert row["cell_key"] == cell_keys(row["dataset_id"], [row["cell_id"]])[0]
        counted = (row["n_counts"], row["n_genes"], row["n_tokens"])
        assert counted == (plain.sum(), (plain > 0).sum(), len(expected))
        labels = (f"type {cell % 3}", cell, None) if is_a else ("other", None, (cell - 180) / 119)
        assert (row["cell_type"], row["age"], row["quality"]) == pytest.approx(labels)
    assert seen == set(range(300))


def test_splits_are_contiguous_and_shuffled(store) -> None:
    rows, (_, obs) = Manifest.load(store).rows, frames(store)
    assert [stop - start for start, stop in rows.values()] == [208, 64, 28]
    for split, (start, stop) in rows.items():
        assert set(obs["split"].to_pylist()[start:stop]) == {split}
        order = order_keys(obs["cell_key"].to_numpy()[start:stop])
        assert np.all(np.diff(order.astype(object)) > 0)
    # Files are mixed: the first hundred rows hold cells of both about as they come.
    assert 40 < obs["dataset_id"].to_pylist()[:100].count("a") < 80


def test_manifest_and_report(store) -> None:
    manifest = Manifest.load(store)
    _, obs = frames(store)
    lengths_N = obs["n_tokens"].to_numpy()
    assert (manifest.cells, manifest.tokens, manifest.refused) == (300, lengths_N.sum(), [])
    assert manifest.vocabulary_hash == VOCABULARY.checksum
    assert manifest.split == {"policy": "random", "validation_fraction": 0.2, "test_fraction": 0.1}
    assert manifest.labels == {"age": "int64", "cell_type": "large_string", "quality": "double"}
    lengths_N = lengths_N[obs["dataset_id"].to_numpy() == "a"]
    expected = {
        "name": "a.h5ad",
        "cells_in": 180,
        "cells_stored": 180,
        "counts_location": "X",
        "gene_ids_location": "index",
        "genes_known": NUM_GENES,
        "counts_covered": 1.0,
        "tokens_mean": pytest.approx(np.mean(lengths_N)),
        "tokens_median": np.median(lengths_N),
        "tokens_p5": np.quantile(lengths_N, 0.05, method="inverted_cdf"),
        "lengths": {"bin_tokens": 1, "cells": np.bincount(lengths_N, minlength=11).tolist()},
    }
    assert manifest.sources[0] | expected == manifest.sources[0]


def test_frames_are_one_fragment_with_checksums_and_nothing_else_is_left(store) -> None:
    with tiledbsoma.open(str(store)) as collection:
        for name in ("tokens", "obs"):
            assert len(list((store / name / "__fragments").iterdir())) == 1
            config = collection[name].schema_config_options()
            assert config.capacity == 1024
            text = config.attrs + config.dims + config.offsets_filters + config.validity_filters
            # Once per attribute and dimension, and for offsets and validity.
            assert text.count("CHECKSUM_SHA256") == len(collection[name].schema.names) + 2
    names = {path.name for path in store.iterdir() if not path.name.startswith("__")}
    assert names == {"tokens", "obs", "vocabulary.json", "manifest.json"}
    assert os.listdir(store.parent) == ["store"]


SMALL_STEPS = (
    (plan, "LEAST_ROWS_PER_UNIT", 13),
    (plan, "MOST_ROWS_PER_UNIT", 13),
    (buckets, "CELLS_PER_BUCKET", 40),
    (merge, "ROWS_PER_WRITE", 11),
    (merge, "_FILES_KEPT_OPEN", 2),
    (tokenise, "ROWS_PER_BLOCK", 7),
    (build, "_CELLS_PER_WORKER", 1),
)


@pytest.mark.parametrize("workers", [1, 2])
def test_content_depends_on_the_cells_alone(tmp_path, store, files, monkeypatch, workers) -> None:
    for changed in SMALL_STEPS:
        monkeypatch.setattr(*changed)
    other = tmp_path / "other"
    build_store(files[::-1], other, VOCABULARY, seq_length=10, split_rule=SPLIT, workers=workers)
    ours, theirs = Manifest.load(other), Manifest.load(store)
    assert replace(ours, files={}) == replace(theirs, files={})
    for one, two in zip(frames(other), frames(store), strict=True):
        assert one.equals(two)


def built(folder: Path, counts: object, num_genes: int = NUM_GENES, **parts: object) -> Manifest:
    """The manifest of folder/store, built of the file folder/a.h5ad."""
    folder.mkdir(exist_ok=True)
    file = write_h5ad(folder / "a.h5ad", counts, **parts)
    return build_store([file], folder / "store", vocabulary_of(num_genes))


def test_content_hash_sees_labels_and_tokens(tmp_path) -> None:
    changed = COUNTS[:20].copy()
    changed.data[0] += 50
    cases = [(COUNTS[:20], "x"), (COUNTS[:20], "y"), (changed, "x")]
    hashes = {
        built(tmp_path / str(number), matrix, obs={"cell_type": [label] * 20}).content_hash
        for number, (matrix, label) in enumerate(cases)
    }
    assert len(hashes) == 3


def test_cells_without_counts_or_known_genes_are_skipped(tmp_path) -> None:
    with pytest.raises(DataError, match="no cell is left"):
        built(tmp_path, sparse.csr_matrix([[0, 0, np.float32(3)]]), num_genes=2)
    assert os.listdir(tmp_path) == ["a.h5ad"]
    dense = np.zeros((6, 4), dtype=np.float32)
    dense[0, 0] = dense[1, 3] = dense[4, 1] = dense[5, 3] = 2
    manifest = built(tmp_path, sparse.csr_matrix(dense), num_genes=3)
    assert manifest.cells == 2
    assert manifest.skipped == {"no counts": 2, "no gene of the vocabulary": 2}
    source = manifest.sources[0]
    assert (source["skipped"], source["counts_covered"]) == (manifest.skipped, 0.5)
    assert check_store(tmp_path / "store") == []


def test_dataset_id_column_names_the_dataset_and_reserved_columns_are_left_out(tmp_path) -> None:
    reserved = {name: range(20) for name in ("__x", "soma_x", "n_genes")}
    names = ["d1"] * 10 + ["d2"] * 9 + [None]
    obs = {**reserved, "dataset_id": names, "_x": range(20)}
    manifest = built(tmp_path, COUNTS[:20], obs=obs)
    _, stored = frames(tmp_path / "store")
    assert sorted(stored["dataset_id"].to_pylist()) == ["a", *["d1"] * 10, *["d2"] * 9]
    assert manifest.sources[0]["datasets"] == 3
    assert manifest.sources[0]["obs_columns_left_out"] == [*reserved, "dataset_id"]
    assert list(manifest.labels) == ["_x"]
    assert check_store(tmp_path / "store") == []


def test_duplicate_cells_are_refused(tmp_path) -> None:
    (tmp_path / "n").mkdir()
    same = {"dataset_id": ["d"] * 3}
    cases = (("a.h5ad", None, "xyz"), ("n/b.h5ad", same, "xyz"), ("n/c.h5ad", same, "uvy"))
    within, first, second = (
        write_h5ad(tmp_path / name, COUNTS[:3], obs=obs, cell_ids=list(cells))
        for name, obs, cells in cases
    )
    store = tmp_path / "store"
    with pytest.raises(DataError, match="two cells are called 'y' in dataset 'd'"):
        build_store([within, first, second], store, VOCABULARY)
    # The work that is done is of use without one of them.
    assert os.listdir(tmp_path / ".store.staging") != []
    lines: list[str] = []
    manifest = build_store([within, second], store, VOCABULARY, log=lines.append)
    assert (manifest.cells, lines) == (6, ["continues: 2 of 2 units of work are there"])
    shutil.rmtree(store)
    doubled = write_h5ad(tmp_path / "d.h5ad", COUNTS[:3], cell_ids=["x", "y", "x_"])
    with h5py.File(doubled, "r+") as file:
        file["obs"][file["obs"].attrs["_index"]][2] = "x"
    with pytest.raises(DataError, match=r"d\.h5ad: two cells are called 'x' in dataset 'd'"):
        build_store([doubled], store, VOCABULARY)
    assert not store.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_store_is_kept_unless_it_is_to_be_replaced(tmp_path, files) -> None:
    target, seen = tmp_path / "store", []
    first = build_store(files[:1], target, VOCABULARY)
    with pytest.raises(DataError, match="`overwrite=True`"):
        build_store(files, target, VOCABULARY)
    assert Manifest.load(target) == first
    second = build_store(
        files, target, VOCABULARY, overwrite=True, progress=lambda *done: seen.append(done)
    )
    assert Manifest.load(target) == second
    assert (second.cells, tuple(second.rows)) == (300, SPLITS)
    assert os.listdir(tmp_path) == ["store"]
    assert seen[:2] == [("looking at inputs", done, 2) for done in (1, 2)]
    steps = {done for what, done, total in seen[2:] if (what, total) == ("tokenising", 300)}
    assert steps == {0, 180, 300}
    assert {what for what, *_ in seen[2:]} == {"tokenising", "writing rows"}
    assert seen[-1] == ("writing rows", 300, 300)
