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
from geneformer_mcore.store.ingest.staging import StagedFolder
from geneformer_mcore.store.keys import cell_keys, order_keys
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.split.table import SPLITS, RandomSplit
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.small_cells import gene_id, plain_tokens, random_counts, vocabulary_of, write_h5ad

NUM_GENES = 60
SPLIT = RandomSplit(0.2, 0.1)


@pytest.fixture(scope="module")
def counts() -> sparse.csr_matrix:
    return random_counts(np.random.default_rng(5), 300, NUM_GENES)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return vocabulary_of(NUM_GENES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, counts: sparse.csr_matrix) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [
        write_h5ad(
            folder / "a.h5ad",
            counts[:180],
            obs={"cell_type": [f"type {i % 3}" for i in range(180)], "age": range(180)},
        ),
        write_h5ad(
            folder / "b.h5ad",
            counts[180:],
            obs={"cell_type": ["other"] * 120, "quality": np.linspace(0, 1, 120)},
        ),
    ]


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, files: list[Path], vocabulary: Vocabulary
) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    build_store(files, path, vocabulary, seq_length=10, split_rule=SPLIT)
    return path


def frames(path: Path) -> tuple[pa.Table, pa.Table]:
    """Tokens and obs, by plain tiledbsoma."""
    with tiledbsoma.open(str(path)) as collection:
        return collection["tokens"].read().concat(), collection["obs"].read().concat()


def test_plain_tiledbsoma_reads_what_was_encoded(
    store: Path, counts: sparse.csr_matrix, vocabulary: Vocabulary
) -> None:
    tokens, obs = frames(store)
    assert tokens.schema.field("tokens").type == pa.large_binary()
    assert tokens["soma_joinid"].to_pylist() == list(range(300))
    assert obs["soma_joinid"].to_pylist() == list(range(300))
    columns = np.array([vocabulary.token_ids[gene_id(i)] for i in range(NUM_GENES)])
    seen = set()
    for row in obs.to_pylist():
        start = 0 if row["dataset_id"] == "a" else 180
        cell = start + int(row["cell_id"][1:])
        seen.add(cell)
        plain = counts[cell].toarray().ravel().astype(np.float64)
        expected = plain_tokens(plain, columns, vocabulary, 10)
        raw = tokens["tokens"][row["soma_joinid"]].as_py()
        assert np.frombuffer(raw, "<u2").tolist() == expected.tolist()
        assert row["cell_key"] == cell_keys(row["dataset_id"], [row["cell_id"]])[0]
        assert (row["n_counts"], row["n_genes"]) == (plain.sum(), (plain > 0).sum())
        assert row["n_tokens"] == len(expected)
        if start == 0:
            assert (row["cell_type"], row["age"]) == (f"type {cell % 3}", cell)
            assert row["quality"] is None
        else:
            assert (row["cell_type"], row["age"]) == ("other", None)
            assert row["quality"] == pytest.approx((cell - 180) / 119)
    assert seen == set(range(300))


def test_splits_are_contiguous_and_shuffled(store: Path) -> None:
    manifest = Manifest.load(store)
    _, obs = frames(store)
    splits = obs["split"].to_pylist()
    for split, (start, stop) in manifest.rows.items():
        assert splits[start:stop] == [split] * (stop - start)
        order = order_keys(obs["cell_key"].to_numpy()[start:stop])
        assert np.all(np.diff(order.astype(object)) > 0)
    assert [stop - start for start, stop in manifest.rows.values()] == [208, 64, 28]
    # Files are mixed: the first hundred rows hold cells of both about as they come.
    in_a = np.mean([name == "a" for name in obs["dataset_id"].to_pylist()[:100]])
    assert 0.4 < in_a < 0.8


def test_manifest_and_report(store: Path, vocabulary: Vocabulary) -> None:
    manifest = Manifest.load(store)
    tokens, obs = frames(store)
    assert manifest.cells == 300
    assert manifest.tokens == sum(obs["n_tokens"].to_pylist())
    assert manifest.vocabulary_hash == vocabulary.checksum
    assert manifest.split == {
        "policy": "random",
        "validation_fraction": 0.2,
        "test_fraction": 0.1,
    }
    first = manifest.sources[0]
    assert (first["name"], first["cells_in"], first["cells_stored"]) == ("a.h5ad", 180, 180)
    assert (first["counts_location"], first["gene_ids_location"]) == ("X", "index")
    assert (first["genes_known"], first["counts_covered"]) == (NUM_GENES, 1.0)
    lengths = [
        n
        for n, d in zip(obs["n_tokens"].to_pylist(), obs["dataset_id"].to_pylist(), strict=True)
        if d == "a"
    ]
    assert first["tokens_mean"] == pytest.approx(np.mean(lengths))
    assert first["tokens_median"] == np.median(lengths)
    assert first["tokens_p5"] == np.quantile(lengths, 0.05, method="inverted_cdf")
    assert first["lengths"] == {
        "bin_tokens": 1,
        "cells": np.bincount(lengths, minlength=11).tolist(),
    }
    assert manifest.refused == []
    assert manifest.labels == {"age": "int64", "cell_type": "large_string", "quality": "double"}
    assert len(tokens) == 300


def test_each_frame_is_one_fragment_and_nothing_else_is_left(store: Path) -> None:
    for name in ("tokens", "obs"):
        assert len(list((store / name / "__fragments").iterdir())) == 1
    assert {path.name for path in store.iterdir() if not path.name.startswith("__")} == {
        "tokens",
        "obs",
        "vocabulary.json",
        "manifest.json",
    }
    assert [path.name for path in store.parent.iterdir()] == ["store"]


def test_every_column_has_a_checksum(store: Path) -> None:
    with tiledbsoma.open(str(store)) as collection:
        for name in ("tokens", "obs"):
            config = collection[name].schema_config_options()
            assert config.capacity == 1024
            text = config.attrs + config.dims + config.offsets_filters + config.validity_filters
            fields = len(collection[name].schema.names)
            # Once per attribute and dimension, and for offsets and validity.
            assert text.count("CHECKSUM_SHA256") == fields + 2


@pytest.mark.parametrize("workers", [1, 2])
def test_content_depends_on_the_cells_alone(
    tmp_path: Path,
    store: Path,
    vocabulary: Vocabulary,
    files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    # Files the other way round, units of 13 rows, buckets of 40 cells, 11 rows written at once.
    monkeypatch.setattr(plan, "LEAST_ROWS_PER_UNIT", 13)
    monkeypatch.setattr(plan, "MOST_ROWS_PER_UNIT", 13)
    monkeypatch.setattr(buckets, "CELLS_PER_BUCKET", 40)
    monkeypatch.setattr(merge, "ROWS_PER_WRITE", 11)
    monkeypatch.setattr(merge, "_FILES_KEPT_OPEN", 2)
    monkeypatch.setattr(tokenise, "ROWS_PER_BLOCK", 7)
    monkeypatch.setattr(build, "_CELLS_PER_WORKER", 1)
    other = tmp_path / "other"
    build_store(files[::-1], other, vocabulary, seq_length=10, split_rule=SPLIT, workers=workers)
    ours, theirs = Manifest.load(other), Manifest.load(store)
    assert replace(ours, files={}) == replace(theirs, files={})
    for one, two in zip(frames(other), frames(store), strict=True):
        assert one.equals(two)


def test_content_hash_sees_labels_and_tokens(
    tmp_path: Path, counts: sparse.csr_matrix, vocabulary: Vocabulary
) -> None:
    hashes = set()
    changed = counts[:20].copy()
    changed.data[0] += 50
    for number, (matrix, label) in enumerate(
        [(counts[:20], "x"), (counts[:20], "y"), (changed, "x")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = write_h5ad(folder / "a.h5ad", matrix, obs={"cell_type": [label] * 20})
        hashes.add(build_store([file], folder / "store", vocabulary).content_hash)
    assert len(hashes) == 3


def test_cells_without_counts_or_known_genes_are_skipped_and_counted(tmp_path: Path) -> None:
    dense = np.zeros((6, 4), dtype=np.float32)
    dense[0, 0] = dense[1, 3] = dense[4, 1] = dense[5, 3] = 2
    file = write_h5ad(tmp_path / "a.h5ad", sparse.csr_matrix(dense))
    manifest = build_store([file], tmp_path / "store", vocabulary_of(3))
    assert manifest.cells == 2
    assert manifest.skipped == {"no counts": 2, "no gene of the vocabulary": 2}
    assert manifest.sources[0]["skipped"] == manifest.skipped
    assert manifest.sources[0]["counts_covered"] == 0.5
    assert check_store(tmp_path / "store") == []


def test_no_cell_left_is_refused(tmp_path: Path) -> None:
    dense = np.array([[0, 0, 3]], dtype=np.float32)
    file = write_h5ad(tmp_path / "a.h5ad", sparse.csr_matrix(dense))
    with pytest.raises(DataError, match="no cell is left"):
        build_store([file], tmp_path / "store", vocabulary_of(2))
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_dataset_id_column_names_the_dataset(tmp_path: Path, counts: sparse.csr_matrix) -> None:
    names = ["d1"] * 10 + ["d2"] * 9 + [None]
    file = write_h5ad(tmp_path / "a.h5ad", counts[:20], obs={"dataset_id": names})
    manifest = build_store([file], tmp_path / "store", vocabulary_of(NUM_GENES))
    _, obs = frames(tmp_path / "store")
    assert sorted(obs["dataset_id"].to_pylist()) == ["a", *["d1"] * 10, *["d2"] * 9]
    assert manifest.sources[0]["datasets"] == 3


def test_columns_with_reserved_names_are_left_out_and_reported(
    tmp_path: Path, counts: sparse.csr_matrix
) -> None:
    reserved = {name: range(20) for name in ("__x", "soma_x", "n_genes")}
    file = write_h5ad(tmp_path / "a.h5ad", counts[:20], obs={**reserved, "_x": range(20)})
    manifest = build_store([file], tmp_path / "store", vocabulary_of(NUM_GENES))
    assert manifest.sources[0]["obs_columns_left_out"] == list(reserved)
    assert list(manifest.labels) == ["_x"]
    assert check_store(tmp_path / "store") == []


def test_duplicate_cells_are_refused(tmp_path: Path, counts: sparse.csr_matrix) -> None:
    within = write_h5ad(tmp_path / "a.h5ad", counts[:3], cell_ids=["x", "y", "z"])
    same = {"dataset_id": ["d"] * 3}
    (tmp_path / "n").mkdir()
    first = write_h5ad(tmp_path / "n" / "b.h5ad", counts[:3], obs=same, cell_ids=["x", "y", "z"])
    second = write_h5ad(tmp_path / "n" / "c.h5ad", counts[:3], obs=same, cell_ids=["u", "v", "y"])
    with pytest.raises(DataError, match="two cells are called 'y' in dataset 'd'"):
        build_store([within, first, second], tmp_path / "store", vocabulary_of(NUM_GENES))
    # The work that is done is of use without one of them.
    assert os.listdir(tmp_path / ".store.staging") != []
    told: list[str] = []
    manifest = build_store(
        [within, second], tmp_path / "store", vocabulary_of(NUM_GENES), say=told.append
    )
    assert (manifest.cells, told) == (6, ["continues: 2 of 2 units of work are there"])
    shutil.rmtree(tmp_path / "store")
    doubled = write_h5ad(tmp_path / "d.h5ad", counts[:3], cell_ids=["x", "y", "x_"])
    with h5py.File(doubled, "r+") as file:
        index = file["obs"].attrs["_index"]
        file["obs"][index][2] = "x"
    with pytest.raises(DataError, match=r"d\.h5ad: two cells are called 'x' in dataset 'd'"):
        build_store([doubled], tmp_path / "store", vocabulary_of(NUM_GENES))
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob(".*"))


def test_existing_path_is_kept_unless_it_is_a_store_to_replace(
    tmp_path: Path, files: list[Path]
) -> None:
    target = tmp_path / "store"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    for overwrite, message in ((False, "exists already"), (True, "is no store")):
        with pytest.raises(DataError, match=message):
            build_store(files, target, vocabulary_of(NUM_GENES), overwrite=overwrite)
    (target / "thesis.txt").unlink()
    first = build_store(files[:1], target, vocabulary_of(NUM_GENES), overwrite=True)
    with pytest.raises(DataError, match="--overwrite"):
        build_store(files, target, vocabulary_of(NUM_GENES))
    assert Manifest.load(target) == first
    second = build_store(files, target, vocabulary_of(NUM_GENES), overwrite=True)
    assert Manifest.load(target) == second
    assert second.cells > first.cells
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "store") as first:
        (first.units / "file").write_text("x")
        with pytest.raises(DataError, match="another process is writing it"):
            StagedFolder(tmp_path / "store").__enter__()
        assert (first.units / "file").exists()


def test_progress_is_told(tmp_path: Path, files: list[Path]) -> None:
    told: list[tuple[str, int, int]] = []
    build_store(
        files,
        tmp_path / "store",
        vocabulary_of(NUM_GENES),
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    seen: dict[str, list[tuple[int, int]]] = {}
    for what, done, total in told:
        seen.setdefault(what, []).append((done, total))
    assert list(seen) == ["looking at inputs", "tokenising", "writing rows"]
    assert seen["looking at inputs"] == [(1, 2), (2, 2)]
    assert sorted(set(seen["tokenising"])) == [(0, 300), (180, 300), (300, 300)]
    assert seen["writing rows"][-1] == (300, 300)
    assert tuple(Manifest.load(tmp_path / "store").rows) == SPLITS
