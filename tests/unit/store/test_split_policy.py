"""Held-out data sets: the table of data sets, the choice, and split.json, which assigns cells."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.ingest.build import build_store
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.split import dataset_table
from geneformer_mcore.store.split.dataset_table import COVERED, Dataset, DatasetTable
from geneformer_mcore.store.split.dataset_table import read_dataset_table as read_table
from geneformer_mcore.store.split.policy import POLICIES, choose_roles, make_split
from geneformer_mcore.store.split.table import SplitTable
from geneformer_mcore.tokenizer.genes import InputOptions
from tests.support.small_cells import adata_of, random_counts, vocabulary_of, write_h5ad
from tests.support.small_experiment import write_experiment

Labels = Iterable[str]
"""In a text they are single letters."""


def dataset(name: str, cells: int, assays: Labels = "a", tissues: Labels = "t") -> Dataset:
    labels = map(frozenset, (assays, tissues))
    return Dataset(name, cells, dict(zip(COVERED, labels, strict=True)))


def table_of(*datasets: Dataset, **cells: int) -> DatasetTable:
    """Of these data sets, and of others with so many cells."""
    every = [*datasets, *(dataset(name, number) for name, number in cells.items())]
    return DatasetTable(tuple(sorted(every, key=lambda one: one.dataset_id)))


# The choice

ASSAYS, TISSUES = (st.text(letters, max_size=2) for letters in ("abc", "tuvw"))
DATASETS = st.builds(dataset, st.uuids().map(str), st.integers(1, 10**5), ASSAYS, TISSUES)
TABLES = st.lists(DATASETS, min_size=1, max_size=12, unique_by=lambda one: one.dataset_id).map(
    lambda datasets: table_of(*datasets)
)


def labels_of(datasets: Iterable[Dataset], column: str) -> set[str]:
    return set().union(*(one.labels[column] for one in datasets))


@settings(max_examples=100)
@given(TABLES, st.sampled_from(POLICIES), st.floats(0.001, 0.9), st.integers(0, 9), st.data())
def test_share_and_coverage_hold(table, policy: str, fraction: float, seed: int, data) -> None:
    ids = [one.dataset_id for one in table.datasets]
    named = data.draw(st.lists(st.sampled_from(ids), max_size=2, unique=True))
    try:
        roles = choose_roles(table, policy, fraction, seed, named)
    except DataError:
        return
    assert set(roles) == set(ids)
    kept = [one for one in table.datasets if roles[one.dataset_id] == "train"]
    for column in COVERED:
        assert labels_of(kept, column) == labels_of(table.datasets, column)
    tests = {name for name, role in roles.items() if role == "test"}
    assert set(named) <= tests
    # Of those not named: at most the share, and some of them for validation.
    free = [one for one in table.datasets if one.dataset_id not in named]
    gone = [one for one in free if one not in kept]
    left = fraction * sum(one.cells for one in free) - sum(one.cells for one in gone)
    assert left >= 0
    assert "held-out" in roles.values()
    if named or policy == "smallest-first":
        assert tests == set(named)
    else:
        assert len(tests) == 1 < len(gone)
    # Nothing more could be held out.
    for one in kept:
        others = [other for other in kept if other is not one]
        is_covered = all(one.labels[column] <= labels_of(others, column) for column in COVERED)
        assert one.cells > left or not is_covered


def test_smallest_first() -> None:
    table = table_of(d90=90, d5=5, d1=1, d3=3, d2=2, d899=899)
    # 1 % of 1,000 is reached with 1 + 2 + 3 + 5 = 11.
    for fraction, expected in ((0.011, ["d1", "d2", "d3", "d5"]), (0.009, ["d1", "d2", "d3"])):
        roles = choose_roles(table, "smallest-first", fraction)
        assert sorted(name for name in roles if roles[name] == "held-out") == expected
    # The only one with an assay stays, and the next in size goes.
    rare = table_of(dataset("rare", 1, assays="z"), *table.datasets)
    roles = choose_roles(rare, "smallest-first", 0.011)
    assert (roles["rare"], roles["d5"]) == ("train", "held-out")


def test_card_draws_by_seed_and_keeps_one_whole_for_test() -> None:
    table = table_of(**{f"d{number:03}": 100 for number in range(300)})
    roles = [choose_roles(table, "card", 0.01, seed) for seed in range(3)]
    for found in roles:
        assert sorted(found.values())[:4] == ["held-out", "held-out", "test", "train"]
    assert roles[0] == choose_roles(table, "card", 0.01, 0)
    assert roles[0] != roles[1] != roles[2]
    # Golden: another choice for the same seed would be another split under an old name.
    out = {name: role for name, role in roles[0].items() if role != "train"}
    assert out == {"d052": "test", "d141": "held-out", "d258": "held-out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "best"}, "no policy 'best'; there are card, smallest-first"),
        ({"held_out_fraction": 0.0}, "between 0 and 1, not 0"),
        ({"held_out_fraction": float("nan")}, "between 0 and 1, not nan"),
        ({"test_datasets": ["x", "a"]}, "1 of 2 data sets named for test are not there: x; there"),
        ({"test_datasets": ["only"]}, r"only cannot be kept for test: 1 .*\(assay 'z'\)"),
        ({"held_out_fraction": 0.001}, r"0.001 of 1,001 cells is 1, and .* is b with 100"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    table = table_of(dataset("only", 1, assays="z"), a=900, b=100)
    with pytest.raises(DataError, match=message):
        choose_roles(**{"table": table, "policy": "card", "held_out_fraction": 0.1} | arguments)


def test_choices_that_are_impossible_or_just_possible() -> None:
    # What is named is out of training before others are looked at.
    table = table_of(dataset("gut", 500, "ab"), dataset("b", 10, "b"), c=990)
    with pytest.raises(DataError, match=r"no data set can be held out: each of the 2"):
        choose_roles(table, "smallest-first", 0.5, test_datasets=["gut"])
    # The fraction that a message names is enough.
    table = table_of(a=9_000, b=1_234)
    with pytest.raises(DataError, match=r"Remedy: `held_out_fraction=0\.1206`"):
        choose_roles(table, "card", 0.01)
    assert choose_roles(table, "card", 0.1206, allow_incomplete=True)["b"] == "held-out"


def test_split_of_a_table() -> None:
    table = table_of(dataset("a", 900, "xy", ""), dataset("b", 100, "x", ""))
    split = make_split(table, "card", 0.1, 3, (), 0.25, "train", allow_incomplete=True)
    assert split.labels == {"assay": 2, "tissue_general": 0}
    assert split.count_cells() == {"train": 900, "held-out": 100, "test": 0}
    assert (split.seed, split.validation_share, split.unlisted) == (3, 0.25, "train")


def test_the_card_requires_a_data_set_for_test_alone_and_every_covered_column() -> None:
    two = table_of(big=900, small=100)
    with pytest.raises(DataError, match=r"of 2 data sets only 1 .*\(small, 100 of 100 .*`test_da"):
        choose_roles(two, "card", 0.1)
    roles = {"big": "train", "small": "held-out"}
    assert choose_roles(two, "card", 0.1, allow_incomplete=True) == roles
    assert choose_roles(two, "smallest-first", 0.1) == roles
    named = table_of(named=10, big=900, small=100)
    assert choose_roles(named, "card", 0.1, test_datasets=["named"]) == roles | {"named": "test"}
    table = replace(table_of(a=800, b=50, c=50), missing={"tissue_general": "b.h5ad"})
    message = r"of the 900 cells .* 1 of these 2 columns .*: b\.h5ad has no tissue_general\. Remedy"
    with pytest.raises(DataError, match=message):
        make_split(table, "card", 0.2)
    assert make_split(table, "card", 0.2, allow_incomplete=True).count_datasets()["test"] == 1
    assert make_split(table, "smallest-first", 0.2).count_datasets()["held-out"] == 2


# The table: of the same cells, the same, wherever it comes from

LABELS = pd.DataFrame(
    {
        "dataset_id": ["007"] * 5 + ["x"] * 3,
        "assay": ["10x", "10x", "smart", "10x", "10x"] + ["10x"] * 3,
        "tissue_general": ["gut", "lung", "gut", "gut", "gut", "eye", "eye", "NA"],
    }
)
EXPECTED = table_of(
    dataset("007", 5, ("10x", "smart"), ("gut", "lung")), dataset("x", 3, ["10x"], ["eye"])
)


@pytest.fixture
def h5ad(tmp_path, rng) -> Path:
    labels = LABELS.to_dict("list")
    return write_h5ad(tmp_path / "cells.h5ad", random_counts(rng, 8, 6, 0.9), obs=labels)


def test_tables_of_cells_and_of_datasets(tmp_path) -> None:
    LABELS.assign(other=1).to_csv(tmp_path / "cells.csv")
    LABELS.to_csv(tmp_path / "cells.tsv", sep="\t", index=False)
    LABELS.astype("category").to_parquet(tmp_path / "cells.parquet")
    counted = LABELS.groupby([*LABELS]).size().reset_index(name="n_cells").sample(frac=1.0)
    counted.to_csv(tmp_path / "counted.csv", index=False)
    counted.to_parquet(tmp_path / "counted.parquet")
    for name in ("cells.csv", "cells.tsv", "cells.parquet", "counted.csv", "counted.parquet"):
        assert read_table([tmp_path / name]) == EXPECTED, name


def test_counts_stores_and_experiments(h5ad, tmp_path, rng, monkeypatch) -> None:
    monkeypatch.setattr(dataset_table, "_ROWS", 3)
    build_store([h5ad], tmp_path / "store", vocabulary_of(6))
    cells = {
        name: adata_of(random_counts(rng, len(rows), 4), obs=rows.to_dict("list"))
        for name, rows in LABELS.groupby("dataset_id")
    }
    address = write_experiment(tmp_path / "census", cells)
    for place in (h5ad, tmp_path / "store", address):
        assert read_table([place]) == EXPECTED


def test_several_sources_add_up(h5ad, tmp_path, rng) -> None:
    LABELS.iloc[:3].to_csv(tmp_path / "more.csv")
    plain = write_h5ad(tmp_path / "plain.h5ad", random_counts(rng, 4, 3))
    table = read_table([h5ad, tmp_path / "more.csv", plain, str(h5ad)])
    # A file without the columns is reported, and the others' labels count.
    assert table.missing == {"assay": str(plain), "tissue_general": str(plain)}
    first, last = EXPECTED.datasets
    expected = (replace(first, cells=8), dataset("plain", 4, "", ""), last)
    assert (table.datasets, table.cells) == (expected, 15)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", None, r"t\.csv: there is no such file"),
        ("t.csv", "assay\n10x\n", "needs the column dataset_id"),
        ("t.csv", "dataset_id,n_cells\na,3\nb,-1\n", "n_cells must be whole numbers >= 0, not '-1"),
        ("t.csv", "dataset_id,n_cells\na,many\n", "whole numbers >= 0, not 'many'"),
        ("t.csv", "dataset_id,n_cells\na,1.5\n", r"not '1\.5'"),
        ("t.csv", "dataset_id,n_cells\n,7\n", "7 cells name no data set"),
        ("t.csv", "dataset_id,n_cells\na,0\n", "no cells in"),
        ("t.csv", "", "cannot be read as a table"),
        ("t.parquet", "PAR1 no", "cannot be read as a table"),
        ("t.h5ad", "text", "not a whole HDF5"),
    ],
)
def test_tables_that_are_none(tmp_path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_table([tmp_path / name], InputOptions())


# split.json

ROLES = {"a": "train", "b": "held-out", "c": "test"}
TABLE = SplitTable("card", 7, 0.01, ROLES, {"a": 900, "b": 50, "c": 50}, {"assay": 3})


def cells_of(dataset: str, number: int) -> tuple[np.ndarray, list[str]]:
    names = [f"c{place}" for place in range(number)]
    return cell_keys(dataset, names), [dataset] * number


def test_roles_become_splits() -> None:
    for name, expected in (("a", {0}), ("c", {2}), ("b", {1, 2})):
        codes_N = TABLE.assign(*cells_of(name, 4_000))
        assert (codes_N.dtype, set(codes_N.tolist())) == (np.int8, expected)
    for share, least, most in ((0.5, 0.47, 0.53), (0.9, 0.88, 0.92)):
        codes_N = replace(TABLE, validation_share=share).assign(*cells_of("b", 4_000))
        assert least < (codes_N == 1).mean() < most
    assert TABLE.validation_share == 0.5
    with pytest.raises(DataError, match=r"names 3 data sets, and 1 of the input .*: x\."):
        TABLE.assign(*cells_of("x", 2))
    lenient = replace(TABLE, unlisted="train")
    assert lenient.assign(*cells_of("x", 2)).tolist() == [0, 0]
    lenient.check(["x"])
    assert TABLE.assign(np.empty(0, np.uint64), []).tolist() == []


def test_a_cell_s_split_depends_on_the_cell_alone(rng) -> None:
    keys, names = zip(*(cells_of(name, 50) for name in "abc"), strict=True)
    keys_N, names_N = np.concatenate(keys), np.concatenate(names)
    codes_N, order = TABLE.assign(keys_N, names_N.tolist()), rng.permutation(150)
    again: SplitTable = pickle.loads(pickle.dumps(TABLE))
    shuffled_N = again.assign(keys_N[order], names_N[order].tolist())
    np.testing.assert_array_equal(shuffled_N, codes_N[order])
    # Golden: a store built again must have the same split.
    assert "".join(map(str, codes_N[50:80])) == "121211112111221211212222111111"


def test_saved_and_loaded_or_damage_is_seen(tmp_path, monkeypatch) -> None:
    path = tmp_path / "split.json"
    with pytest.raises(DataError, match=r"no such file. Remedy: data_prep/make_split.py"):
        SplitTable.load(path)
    TABLE.save(path)
    loaded, text = SplitTable.load(path), path.read_text()
    assert (loaded, loaded.checksum) == (TABLE, TABLE.checksum)
    assert json.loads(text)["counted"]["cells"] == {"train": 900, "held-out": 50, "test": 50}
    described = TABLE.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["checksum"] == TABLE.checksum
    assert replace(TABLE, roles={**ROLES, "a": "test"}).describe() != described
    changes = (('"train"', '"test"'), ("900", "901"), ("}", ""), ("0.01", "0.02"))
    for damaged in (*(text.replace(old, new, 1) for old, new in changes), '{"format": "x"}'):
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"not a whole split\.json, or changed"):
            SplitTable.load(path)
    monkeypatch.setattr("geneformer_mcore.store.split.table.VERSION", 2)
    TABLE.save(path)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"version 2 of split.json, this program reads 1"):
        SplitTable.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": ROLES | {"a": "trian"}}, "role is one of train, held-out, test"),
        ({"roles": {"a": "train"}}, "of the same data sets"),
        ({"validation_share": 1.5}, "in 0 to 1, not 1.5"),
        ({"validation_share": float("nan")}, "in 0 to 1, not nan"),
        ({"unlisted": "drop"}, "refuse or train, not 'drop'"),
    ],
)
def test_impossible_tables(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(TABLE, **changes)
