"""Counts of SOMA Experiments: the same as those of the AnnData they were written from."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from itertools import combinations_with_replacement
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma
import tiledbsoma.io
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.io import soma
from geneformer_mcore.io.counts import open_counts
from geneformer_mcore.io.soma import ExperimentCounts, JoinIds, soma_context
from tests.support.small_cells import adata_of, gene_ids, random_counts
from tests.support.small_experiment import ORGANISM, write_experiment

GENES = gene_ids(30)
NAMES = [f"{name}{i}" for name, number in (("a", 13), ("b", 9), ("c", 11)) for i in range(number)]


def cells(rng: np.random.Generator, num_cells: int, name: str) -> anndata.AnnData:
    return adata_of(
        random_counts(rng, num_cells, len(GENES)),
        cell_ids=[f"{name}{i}" for i in range(num_cells)],
        obs={"cell_type": [f"type {i % 3}" for i in range(num_cells)]},
        var={"feature_name": [f"S{i}" for i in range(30)]},
    )


@pytest.fixture(scope="module")
def parts() -> dict[str, anndata.AnnData]:
    rng = np.random.default_rng(5)
    return {"d1": cells(rng, 13, "a"), "d2": cells(rng, 9, "b"), "d3": cells(rng, 11, "c")}


@pytest.fixture(scope="module")
def counts(parts) -> np.ndarray:
    return np.concatenate([part.X.toarray() for part in parts.values()])


@pytest.fixture(scope="module")
def census(parts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("census") / "census"
    write_experiment(path, parts)
    return path


@pytest.fixture
def one(parts, tmp_path) -> Callable[..., Path]:
    """Writes the Experiment of d1 alone, in some other form."""

    def write(**options: object) -> Path:
        write_experiment(tmp_path / "e", {"d1": parts["d1"]}, **options)
        return tmp_path / "e"

    return write


def check_rows(opened: ExperimentCounts, start: int, expected: np.ndarray) -> None:
    """Rows from `start` on are these."""
    block = opened.read_rows(start, start + len(expected))
    assert (block.start, len(block)) == (start, len(expected))
    rows = sparse.csr_matrix((block.data, block.indices, block.indptr), expected.shape)
    assert rows.has_sorted_indices
    assert opened.num_columns == len(GENES)
    np.testing.assert_array_equal(rows.toarray(), expected)


@pytest.mark.parametrize("inside", ["", ORGANISM])
def test_a_census_and_its_experiment(census, counts, inside) -> None:
    with open_counts(census / inside) as opened:
        assert isinstance(opened, ExperimentCounts)
        assert (opened.num_cells, opened.num_columns) == counts.shape
        assert (opened.location, opened.passed_over) == ("X/raw", ())
        check_rows(opened, 0, counts)
        check_rows(opened, 11, counts[11:15])
        assert opened.read_cell_ids(12, 14) == ["a12", "b0"]
        assert opened.read_dataset_ids(12, 14) == ["d1", "d2"]
        assert opened.gene_columns()["feature_id"] == GENES
        assert opened.gene_names()[:2] == ["S0", "S1"]


def test_obs_of_any_slice_has_the_same_dtypes(census) -> None:
    with ExperimentCounts(census) as opened:
        everything = opened.read_obs(0, 33)
        part = opened.read_obs(11, 15)
        assert part.dtypes.to_dict() == everything.dtypes.to_dict()
        assert opened.read_obs(3, 3).dtypes.to_dict() == everything.dtypes.to_dict()
        assert list(everything) == opened.obs_columns
    pd.testing.assert_frame_equal(part, everything.iloc[11:15])
    assert part.index.tolist() == ["a11", "a12", "b0", "b1"]
    assert part["cell_type"].tolist() == ["type 2", "type 0", "type 0", "type 1"]
    assert everything["cell_type"].dtype == "category"


def test_a_filter_and_joinids_choose_cells(census, counts) -> None:
    kinds = [i for i, n in enumerate([*range(13), *range(9), *range(11)]) if n % 3 == 1]
    joinids = np.array([0, 1, 2, 9, 30, 32])
    for chosen, options in (
        (range(13, 22), {"value_filter": 'dataset_id == "d2"'}),
        (kinds, {"value_filter": 'cell_type == "type 1"'}),
        (joinids, {"joinids": joinids}),
        ([30, 32], {"joinids": joinids, "value_filter": 'dataset_id == "d3"'}),
    ):
        expected, names = counts[list(chosen)], [NAMES[place] for place in chosen]
        with ExperimentCounts(census, **options) as opened:
            assert opened.num_cells == len(chosen)
            check_rows(opened, 0, expected)
            check_rows(opened, 1, expected[1:4])
            assert opened.read_cell_ids(0, len(chosen)) == names
    with pytest.raises(DataError, match="holds 1 of the 2 cells requested"):
        ExperimentCounts(census, joinids=np.array([32, 33]))


def test_gaps_between_joinids(one, counts) -> None:
    with ExperimentCounts(
        one(joinids=np.array([2, 3, 4, *range(9, 14), *range(39, 44)]))
    ) as opened:
        assert opened.num_cells == 13
        check_rows(opened, 0, counts[:13])
        check_rows(opened, 2, counts[2:9])
        assert opened.read_cell_ids(12, 13) == ["a12"]


def test_places_and_joinids() -> None:
    ids = np.array([2, 3, 4, 10, 11, 40])
    found = JoinIds(ids)
    assert len(found) == 6
    for start, stop in combinations_with_replacement(range(7), 2):
        assert found.read(start, stop).tolist() == ids[start:stop].tolist()
    assert len(JoinIds(ids[:0])) == 0
    for wrong in ([3, 2], [2, 2], [-1, 4]):
        with pytest.raises(ValueError, match="ascend"):
            JoinIds(np.array(wrong))


def test_blocks_are_all_rows(census, counts, monkeypatch) -> None:
    monkeypatch.setattr(soma, "_FIRST_ROWS", 4)
    monkeypatch.setattr(soma, "BLOCK_ENTRIES", 60)
    with ExperimentCounts(census) as opened:
        blocks = list(opened.blocks(20, 1, 30))
    starts = [1, *(block.start + len(block) for block in blocks)]
    assert starts == [*(block.start for block in blocks), 30]
    assert max(len(block.data) for block in blocks) <= 120
    assert sum(block.data.sum() for block in blocks) == counts[1:30].sum()


def test_answers_out_of_order_are_put_in_order(census, counts, monkeypatch) -> None:
    entries, query = soma.SomaMatrix._sparse, soma.SomaFrame._query

    def reversed_entries(matrix: soma.SomaMatrix, ids: np.ndarray) -> list[object]:
        return [tuple(a[::-1].copy() for a in part) for part in entries(matrix, ids)]

    def reversed_rows(*requested: object) -> pa.Table:
        table = query(*requested)
        return table.take(np.arange(len(table))[::-1])

    monkeypatch.setattr(soma.SomaMatrix, "_sparse", reversed_entries)
    monkeypatch.setattr(soma.SomaFrame, "_query", reversed_rows)
    with ExperimentCounts(census) as opened:
        check_rows(opened, 3, counts[3:20])
        assert opened.read_cell_ids(11, 15) == ["a11", "a12", "b0", "b1"]


def test_missing_labels_and_names(tmp_path, parts) -> None:
    data = parts["d1"].copy()
    data.obs["dataset_id"] = pd.Categorical([None, "x", "y"] + ["x"] * 10)
    data.obs["observation_joinid"] = ["", *(f"j{i}" for i in range(12))]
    write_anndata(tmp_path / "soma", data)
    with open_counts(tmp_path / "soma") as opened:
        assert opened.read_dataset_ids(0, 4) == ["soma", "x", "y", "x"]
        assert opened.read_cell_ids(0, 3) == ["0", "j0", "j1"]
        label = opened.read_obs(0, 4)["dataset_id"]
    assert label.isna().tolist() == [True, False, False, False]
    assert label.dropna().tolist() == ["x", "y", "x"]


def write_anndata(path: Path, data: anndata.AnnData) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tiledbsoma 2.3.0's own, of anndata's old names.
        tiledbsoma.io.from_anndata(str(path), data, "RNA")


@pytest.mark.parametrize("dense", [False, True])
def test_what_tiledbsoma_makes_of_an_anndata(tmp_path, parts, counts, dense) -> None:
    data = parts["d1"].copy()
    data.X = data.X.toarray() if dense else data.X
    data.obs["score"] = pd.array([None if i % 4 else i for i in range(13)], dtype="Int64")
    write_anndata(tmp_path / "soma", data)
    with open_counts(tmp_path / "soma") as opened:
        assert opened.location == "X/data"
        check_rows(opened, 0, counts[:13])
        check_rows(opened, 5, counts[5:7])
        assert opened.read_cell_ids(3, 5) == ["a3", "a4"]
        assert opened.read_dataset_ids(3, 5) == ["soma", "soma"]
        assert opened.gene_columns()["index"] == GENES
        scores = opened.read_obs(0, 5)["score"]
        assert scores.dtype == opened.read_obs(4, 5)["score"].dtype
        assert scores.dropna().tolist() == [0, 4]


@pytest.mark.parametrize(
    "options",
    [{"value_type": kind} for kind in (np.int32, np.uint16, np.float64)]
    + [{"width": 2_147_483_646}],
)
def test_values_of_any_number_and_an_x_far_wider_than_var(one, counts, options) -> None:
    """Wide as tiledbsoma.io made it: a list of so many names would fill the memory."""
    with ExperimentCounts(one(**options)) as opened:
        assert opened.gene_columns()["feature_id"] == GENES
        check_rows(opened, 0, counts[:13])


@pytest.mark.parametrize("column", [30, 2**31 - 1, 2**31 + 3, 2**32 + 3])
def test_a_column_beyond_var_is_refused(one, column) -> None:
    """Also one that would be a gene's if its number were cut to 32 bits."""
    path = one(width=2**40)
    entry = {"soma_dim_0": [4], "soma_dim_1": [column], "soma_data": np.array([1], np.float32)}
    with tiledbsoma.open(str(path / ORGANISM / "ms/RNA/X/raw"), "w") as matrix:
        matrix.write(pa.table(entry))
    message = r"X/raw is damaged: row 4 names column \d+ of 30\."
    with ExperimentCounts(path) as opened, pytest.raises(DataError, match=message):
        opened.read_rows(0, 13)


def test_a_var_without_genes(one) -> None:
    path = one()
    var = path / ORGANISM / "ms/RNA/var"
    for rows in [*(var / "__fragments").iterdir(), *(var / "__commits").iterdir()]:
        shutil.rmtree(rows) if rows.is_dir() else rows.unlink()
    with pytest.raises(DataError, match="var names no genes: there is nothing to encode"):
        ExperimentCounts(path)


def test_layers(one, census) -> None:
    path = one(layer="umi")
    for layer in (None, "umi", "X/umi"):
        with ExperimentCounts(path, layer) as opened:
            assert opened.location == "X/umi"
    with pytest.raises(DataError, match=r"no layer X/umi; it has: X/raw.*`counts_layer=`"):
        ExperimentCounts(census, "umi")


def test_what_is_no_experiment(tmp_path, census) -> None:
    needed = "and a SOMAExperiment with obs is needed"
    for path, filtered, message in (
        (tmp_path, "", "cannot be opened as a SOMA Experiment"),
        (f"file://{tmp_path}/missing", "", "cannot be opened as a SOMA Experiment"),
        (census / ORGANISM / "ms", "", f"a SOMACollection, {needed}"),
        (census / ORGANISM / "obs", "", f"a SOMADataFrame, {needed}"),
        (census, "nope == 3", "cannot be read by the filter 'nope == 3'"),
        (census, 'dataset_id == "none"', "no cells for which the filter holds"),
    ):
        with pytest.raises(DataError, match=message):
            ExperimentCounts(path, value_filter=filtered) if filtered else open_counts(path)


def test_fingerprint_tells_what_was_written_and_chosen(tmp_path, parts) -> None:
    found = []
    for name in ("d1", "d1", "d2"):
        write_experiment(tmp_path / f"e{len(found)}", {name: parts[name]})
        with ExperimentCounts(tmp_path / f"e{len(found)}") as opened:
            found.append(opened.fingerprint)
    moved = (tmp_path / "e1").rename(tmp_path / "a#b%20c?d e")  # No such sign hides the time.
    with ExperimentCounts(moved) as opened:
        assert opened.fingerprint == found[1]
    with ExperimentCounts(tmp_path / "e0", joinids=np.arange(9)) as opened:
        chosen = opened.fingerprint
    assert found[0]["cells"] == 13
    assert found[0]["written_ms"] < found[1]["written_ms"] < found[2]["written_ms"]
    assert chosen["chosen"] == found[2]["chosen"] != found[0]["chosen"]


def test_the_census_is_read_unsigned(monkeypatch) -> None:
    monkeypatch.setattr("geneformer_mcore.io.soma._contexts", {})
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    public = soma_context("s3://bucket/census").tiledb_config
    assert (public["vfs.s3.region"], public["vfs.s3.no_sign_request"]) == ("us-west-2", "true")
    local = soma_context("folder").tiledb_config
    assert local.get("vfs.s3.no_sign_request", "false") != "true"
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert soma_context("s3://bucket/census") is soma_context("folder")
