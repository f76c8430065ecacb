"""Where a split's table of data sets may come from: the same cells, the same table."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.ingest.build import build_store
from geneformer_mcore.store.split import dataset_table
from geneformer_mcore.store.split.dataset_table import Dataset, DatasetTable, read_dataset_table
from geneformer_mcore.tokenizer.corpus import InputOptions
from tests.small_cells import gene_id, random_counts, vocabulary_of, write_h5ad
from tests.small_experiment import write_experiment

LABELS = pd.DataFrame(
    {
        "dataset_id": ["007"] * 5 + ["x"] * 3,
        "assay": ["10x", "10x", "smart", "10x", "10x"] + ["10x"] * 3,
        "tissue_general": ["gut", "lung", "gut", "gut", "gut", "eye", "eye", "NA"],
    }
)

EXPECTED = DatasetTable(
    (
        Dataset(
            "007",
            5,
            {"assay": frozenset({"10x", "smart"}), "tissue_general": frozenset({"gut", "lung"})},
        ),
        Dataset("x", 3, {"assay": frozenset({"10x"}), "tissue_general": frozenset({"eye"})}),
    )
)


@pytest.fixture
def h5ad(tmp_path: Path, rng: np.random.Generator) -> Path:
    labels = {name: LABELS[name].tolist() for name in LABELS}
    return write_h5ad(tmp_path / "cells.h5ad", random_counts(rng, 8, 6, 0.9), obs=labels)


def test_tables_of_cells_and_of_datasets(tmp_path: Path) -> None:
    LABELS.assign(other=1).to_csv(tmp_path / "cells.csv")
    LABELS.to_csv(tmp_path / "cells.tsv", sep="\t", index=False)
    LABELS.astype("category").to_parquet(tmp_path / "cells.parquet")
    counted = LABELS.groupby([*LABELS]).size().reset_index(name="n_cells").sample(frac=1.0)
    counted.to_csv(tmp_path / "counted.csv", index=False)
    counted.to_parquet(tmp_path / "counted.parquet")
    for name in ("cells.csv", "cells.tsv", "cells.parquet", "counted.csv", "counted.parquet"):
        assert read_dataset_table([tmp_path / name]) == EXPECTED, name


def test_files_of_counts_stores_and_experiments(
    h5ad: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_table, "_ROWS", 3)
    assert read_dataset_table([h5ad]) == EXPECTED
    build_store([h5ad], tmp_path / "store", vocabulary_of(6))
    assert read_dataset_table([tmp_path / "store"]) == EXPECTED
    cells = {
        name: anndata.AnnData(
            random_counts(rng, len(rows), 4),
            obs=rows.drop(columns="dataset_id").set_index(rows.index.astype(str)),
            var=pd.DataFrame(index=[gene_id(place) for place in range(4)]),
        )
        for name, rows in LABELS.groupby("dataset_id")
    }
    address = write_experiment(tmp_path / "census", cells)
    assert read_dataset_table([address]) == EXPECTED


def test_several_sources_add_up(h5ad: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    LABELS.iloc[:3].to_csv(tmp_path / "more.csv")
    plain = write_h5ad(tmp_path / "plain.h5ad", random_counts(rng, 4, 3))
    table = read_dataset_table([h5ad, tmp_path / "more.csv", plain, str(h5ad)])
    assert [(one.dataset_id, one.cells) for one in table.datasets] == [
        ("007", 8),
        ("plain", 4),
        ("x", 3),
    ]
    assert table.cells == 15
    # A file without the columns is told of, and the others' labels count.
    assert table.missing == {"assay": str(plain), "tissue_general": str(plain)}
    assert table.datasets[1].labels == {"assay": frozenset(), "tissue_general": frozenset()}
    assert table.datasets[0].labels["assay"] == {"10x", "smart"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"t\.csv: there is no such file"),
        ("assay\n10x\n", "needs the column dataset_id"),
        ("dataset_id,n_cells\na,3\nb,-1\n", "n_cells must be whole numbers >= 0, not '-1'"),
        ("dataset_id,n_cells\na,many\n", "whole numbers >= 0, not 'many'"),
        ("dataset_id,n_cells\na,1.5\n", r"not '1\.5'"),
        ("dataset_id,n_cells\n,7\n", "7 cells name no data set"),
        ("dataset_id,n_cells\na,0\n", "no cells in"),
        ("", "cannot be read as a table"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "t.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_dataset_table([path])


def test_damaged_parquet_and_counts(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_dataset_table([tmp_path / "t.parquet"])
    (tmp_path / "t.h5ad").write_text("text")
    with pytest.raises(DataError, match="not a whole HDF5"):
        read_dataset_table([tmp_path / "t.h5ad"], InputOptions())
