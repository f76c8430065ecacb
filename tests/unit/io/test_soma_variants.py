"""Experiments of every form that tiledbsoma.io makes of an AnnData: the same counts and names, and
a fingerprint that changes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
import tiledbsoma.io

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.soma import ExperimentCounts
from tests.support.small_cells import adata_of, gene_ids, random_counts

NUM_CELLS, NUM_GENES = 11, 17
pytestmark = pytest.mark.filterwarnings("ignore")  # tiledbsoma's, of anndata


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    return random_counts(np.random.default_rng(2), NUM_CELLS, NUM_GENES)


def cells(counts: Any, where: str, index: str | None = None, var: str | None = None) -> Any:
    """Counts in "X", "raw" or a layer, and logarithms in the other places."""
    adata = adata_of(counts.copy(), obs={"kind": ["a"] * NUM_CELLS})
    adata.obs.index.name, adata.var.index.name = index, var
    if where == "raw":
        adata.raw = adata.copy()
    elif where != "X":
        adata.layers[where] = adata.X.copy()
    if where != "X":
        adata.X = np.log1p(counts)
    return adata


def write(path: Path, adata: anndata.AnnData, **options: Any) -> str:
    options = {"measurement_name": "RNA"} | options
    return tiledbsoma.io.from_anndata(str(path), adata, **options)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "X": ({"where": "X"}, {}, "X/data"),
    "dense": ({"where": "X"}, {"X_kind": tiledbsoma.DenseNDArray}, "X/data"),
    "raw": ({"where": "raw"}, {}, "ms/raw/X/data"),
    "raw under another name": ({"where": "raw"}, {"raw_X_layer_name": "umi"}, "ms/raw/X/umi"),
    "another measurement": ({"where": "raw"}, {"measurement_name": "GEX"}, "ms/raw/X/data"),
    "a layer": ({"where": "counts"}, {}, "X/counts"),
    "names of X and cells": ({"where": "X"}, {"X_layer_name": "umi"}, "X/umi"),
    "named indices": ({"where": "X", "index": "barcode", "var": "gene"}, {}, "X/data"),
    "named raw": ({"where": "raw", "index": "cell_id", "var": "gene"}, {}, "ms/raw/X/data"),
    "an index called index": ({"where": "X", "index": "index"}, {}, "X/data"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_that_tiledbsoma_makes(variant: str, counts: Any, tmp_path: Path) -> None:
    of_cells, options, location = VARIANTS[variant]
    with ExperimentCounts(write(tmp_path / "e", cells(counts, **of_cells), **options)) as opened:
        assert opened.location == location
        block = opened.read_rows(0, NUM_CELLS)
        np.testing.assert_array_equal(block.data, counts.data)
        np.testing.assert_array_equal(block.indices, counts.indices)
        names = [f"c{place}" for place in range(NUM_CELLS)]
        assert opened.read_cell_ids(0, NUM_CELLS) == names
        assert opened.read_obs(2, 5).index.tolist() == names[2:5]
        assert opened.gene_columns()["index"] == gene_ids(NUM_GENES)
        layer = location
    with ExperimentCounts(tmp_path / "e", layer) as opened:
        assert (opened.location, opened.passed_over) == (location, ())


def test_several_measurements_are_listed_and_can_be_named(counts: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "e", cells(counts, "X"), measurement_name="one")
    with tiledbsoma.open(path, "w") as experiment:
        two = experiment["ms"].add_new_collection("two", tiledbsoma.Measurement)
        two.set("var", experiment.ms["one"]["var"])
        two.set("X", experiment.ms["one"]["X"])
    with pytest.raises(DataError, match=r"it has: ms/one/X/data, ms/two/X/data\. Remedy"):
        ExperimentCounts(path)
    with ExperimentCounts(path, "ms/two/X/data") as opened:
        np.testing.assert_array_equal(opened.read_rows(0, NUM_CELLS).data, counts.data)


def delete_counts(path: str) -> None:
    with tiledbsoma.SparseNDArray.open(f"{path}/ms/RNA/X/data", mode="d") as matrix:
        matrix.delete_cells((slice(0, 3),))


def add_a_column(path: str) -> None:
    with tiledbsoma.DataFrame.open(f"{path}/obs") as obs:
        frame = obs.read().concat().to_pandas().assign(more=1)
    with tiledbsoma.open(path, "w") as experiment:
        tiledbsoma.io.update_obs(experiment, frame)


def record_another_index(path: str) -> None:
    with tiledbsoma.DataFrame.open(f"{path}/obs", "w") as obs:
        obs.metadata["soma_dataframe_original_index_name"] = '"kind"'


def rename_genes(path: str) -> None:
    with tiledbsoma.DataFrame.open(f"{path}/ms/RNA/var") as var:
        frame = var.read().concat().to_pandas()
    with tiledbsoma.DataFrame.open(f"{path}/ms/RNA/var", "w") as var:
        var.write(pa.Table.from_pandas(frame.assign(var_id=frame["var_id"] + "b")))


@pytest.mark.parametrize(
    "change", [delete_counts, add_a_column, record_another_index, rename_genes]
)
def test_the_fingerprint_changes_with_what_it_stands_for(
    change: Callable[[str], None], counts: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "e", cells(counts, "X"))
    prints = []
    for step in (None, None, change):
        if step is not None:
            step(path)
        with ExperimentCounts(path) as opened:
            prints.append(opened.fingerprint)
    assert prints[0] == prints[1] != prints[2]
