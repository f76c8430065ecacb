"""Counts of SOMA Experiments: the same as those of the AnnData they were written from."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

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
from tests.support.small_cells import gene_id, random_counts
from tests.support.small_experiment import ORGANISM, write_experiment

GENES = [gene_id(number) for number in range(30)]


def cells(rng: np.random.Generator, num_cells: int, name: str) -> anndata.AnnData:
    return anndata.AnnData(
        random_counts(rng, num_cells, len(GENES)),
        obs=pd.DataFrame(
            {"cell_type": [f"type {i % 3}" for i in range(num_cells)]},
            index=[f"{name}{i}" for i in range(num_cells)],
        ),
        var=pd.DataFrame({"feature_name": [f"S{i}" for i in range(30)]}, index=GENES),
    )


@pytest.fixture(scope="module")
def parts() -> dict[str, anndata.AnnData]:
    rng = np.random.default_rng(5)
    return {"d1": cells(rng, 13, "a"), "d2": cells(rng, 9, "b"), "d3": cells(rng, 11, "c")}


@pytest.fixture(scope="module")
def counts(parts: dict[str, anndata.AnnData]) -> np.ndarray:
    return np.concatenate([part.X.toarray() for part in parts.values()])


@pytest.fixture(scope="module")
def census(parts: dict[str, anndata.AnnData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("census") / "census"
    write_experiment(path, parts)
    return path


def dense_of(opened: ExperimentCounts, start: int, stop: int) -> np.ndarray:
    block = opened.read_rows(start, stop)
    assert (block.start, len(block)) == (start, stop - start)
    rows = sparse.csr_matrix(
        (block.data, block.indices, block.indptr), (stop - start, opened.num_columns)
    )
    assert rows.has_sorted_indices
    return rows.toarray()


@pytest.mark.parametrize("inside", ["", ORGANISM])
def test_a_census_and_its_experiment(census: Path, counts: np.ndarray, inside: str) -> None:
    with open_counts(census / inside) as opened:
        assert isinstance(opened, ExperimentCounts)
        assert (opened.num_cells, opened.num_columns) == counts.shape
        assert (opened.location, opened.passed_over) == ("X/raw", ())
        np.testing.assert_array_equal(dense_of(opened, 0, 33), counts)
        np.testing.assert_array_equal(dense_of(opened, 11, 15), counts[11:15])
        assert opened.read_cell_ids(12, 14) == ["a12", "b0"]
        assert opened.read_dataset_ids(12, 14) == ["d1", "d2"]
        assert opened.gene_columns()["feature_id"] == GENES
        assert opened.gene_names()[:2] == ["S0", "S1"]


def test_obs_of_any_slice_has_the_same_dtypes(census: Path) -> None:
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


def test_a_filter_chooses_cells(census: Path, counts: np.ndarray) -> None:
    with ExperimentCounts(census, value_filter='dataset_id == "d2"') as opened:
        np.testing.assert_array_equal(dense_of(opened, 0, 9), counts[13:22])
        assert set(opened.read_dataset_ids(0, 9)) == {"d2"}
    with ExperimentCounts(census, value_filter='cell_type == "type 1"') as opened:
        chosen = [i for i, n in enumerate([*range(13), *range(9), *range(11)]) if n % 3 == 1]
        np.testing.assert_array_equal(dense_of(opened, 2, len(chosen)), counts[chosen[2:]])
        assert opened.read_cell_ids(0, 2) == ["a1", "a4"]


def test_joinids_choose_cells(census: Path, counts: np.ndarray) -> None:
    chosen = np.array([0, 1, 2, 9, 30, 32])
    with ExperimentCounts(census, joinids=chosen) as opened:
        np.testing.assert_array_equal(dense_of(opened, 0, 6), counts[chosen])
        np.testing.assert_array_equal(dense_of(opened, 2, 5), counts[chosen[2:5]])
    both = {"joinids": chosen, "value_filter": 'dataset_id == "d3"'}
    with ExperimentCounts(census, **both) as opened:
        np.testing.assert_array_equal(dense_of(opened, 0, 2), counts[[30, 32]])
    with pytest.raises(DataError, match="holds 1 of the 2 cells requested"):
        ExperimentCounts(census, joinids=np.array([32, 33]))


def test_gaps_between_joinids(tmp_path: Path, parts: dict[str, anndata.AnnData]) -> None:
    joinids = np.array([2, 3, 4, 10, 11, 20, 21, 22, 40])
    write_experiment(tmp_path / "e", {"d2": parts["d2"]}, joinids=joinids)
    with ExperimentCounts(tmp_path / "e") as opened:
        assert opened.num_cells == 9
        np.testing.assert_array_equal(dense_of(opened, 0, 9), parts["d2"].X.toarray())
        np.testing.assert_array_equal(dense_of(opened, 2, 6), parts["d2"].X.toarray()[2:6])
        assert opened.read_cell_ids(8, 9) == ["b8"]


def test_places_and_joinids() -> None:
    ids = np.array([2, 3, 4, 10, 11, 40])
    found = JoinIds(ids)
    assert len(found) == 6
    for start in range(7):
        for stop in range(start, 7):
            assert found.read(start, stop).tolist() == ids[start:stop].tolist()
    assert len(JoinIds(ids[:0])) == 0
    for wrong in ([3, 2], [2, 2], [-1, 4]):
        with pytest.raises(ValueError, match="ascend"):
            JoinIds(np.array(wrong))


def test_blocks_are_all_rows(
    census: Path, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soma, "_FIRST_ROWS", 4)
    monkeypatch.setattr(soma, "BLOCK_ENTRIES", 60)
    with ExperimentCounts(census) as opened:
        blocks = list(opened.blocks(20, 1, 30))
    assert [block.start for block in blocks] == [1, *(b.start + len(b) for b in blocks[:-1])]
    assert sum(map(len, blocks)) == 29
    assert max(len(block.data) for block in blocks) <= 120
    total = sum(block.data.sum() for block in blocks)
    assert total == counts[1:30].sum()


def test_answers_out_of_order_are_put_in_order(
    census: Path, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, query = soma.SomaMatrix._sparse, soma.SomaFrame._query

    def reversed_entries(matrix: soma.SomaMatrix, ids: np.ndarray) -> list[object]:
        return [tuple(a[::-1].copy() for a in part) for part in entries(matrix, ids)]

    def reversed_rows(*requested: object) -> pa.Table:
        table = query(*requested)
        return table.take(np.arange(len(table))[::-1])

    monkeypatch.setattr(soma.SomaMatrix, "_sparse", reversed_entries)
    monkeypatch.setattr(soma.SomaFrame, "_query", reversed_rows)
    with ExperimentCounts(census) as opened:
        np.testing.assert_array_equal(dense_of(opened, 3, 20), counts[3:20])
        assert opened.read_cell_ids(11, 15) == ["a11", "a12", "b0", "b1"]


def test_missing_labels_and_names(tmp_path: Path, parts: dict[str, anndata.AnnData]) -> None:
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
def test_what_tiledbsoma_makes_of_an_anndata(
    tmp_path: Path, parts: dict[str, anndata.AnnData], dense: bool
) -> None:
    data = parts["d1"].copy()
    data.X = data.X.toarray() if dense else data.X
    data.obs["score"] = pd.array([None if i % 4 else i for i in range(13)], dtype="Int64")
    path = tmp_path / "soma"
    write_anndata(path, data)
    with open_counts(path) as opened:
        assert opened.location == "X/data"
        np.testing.assert_array_equal(dense_of(opened, 0, 13), parts["d1"].X.toarray())
        np.testing.assert_array_equal(dense_of(opened, 5, 7), parts["d1"].X.toarray()[5:7])
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
def test_values_of_any_number_and_an_x_far_wider_than_var(
    tmp_path: Path, parts: dict[str, anndata.AnnData], options: dict[str, Any]
) -> None:
    """Wide as tiledbsoma.io made it: a list of so many names would fill the memory."""
    write_experiment(tmp_path / "e", {"d1": parts["d1"]}, **options)
    with ExperimentCounts(tmp_path / "e") as opened:
        assert opened.num_columns == len(GENES)
        assert opened.gene_columns()["feature_id"] == GENES
        np.testing.assert_array_equal(dense_of(opened, 0, 13), parts["d1"].X.toarray())


@pytest.mark.parametrize("column", [30, 2**31 - 1, 2**31 + 3, 2**32 + 3])
def test_a_column_beyond_var_is_refused(
    tmp_path: Path, parts: dict[str, anndata.AnnData], column: int
) -> None:
    """Also one that would be a gene's if its number were cut to 32 bits."""
    write_experiment(tmp_path / "e", {"d1": parts["d1"]}, width=2**40)
    entry = {"soma_dim_0": [4], "soma_dim_1": [column], "soma_data": [1.0]}
    kinds = {"soma_dim_0": pa.int64(), "soma_dim_1": pa.int64(), "soma_data": pa.float32()}
    with tiledbsoma.open(str(tmp_path / "e" / ORGANISM / "ms/RNA/X/raw"), "w") as matrix:
        matrix.write(pa.table(entry, schema=pa.schema(kinds)))
    with (
        ExperimentCounts(tmp_path / "e") as opened,
        pytest.raises(DataError, match=r"X/raw is damaged: row 4 names column \d+ of 30\."),
    ):
        opened.read_rows(0, 13)


def test_a_var_without_genes(tmp_path: Path, parts: dict[str, anndata.AnnData]) -> None:
    write_experiment(tmp_path / "e", {"d1": parts["d1"]})
    var = tmp_path / "e" / ORGANISM / "ms/RNA/var"
    for rows in [*(var / "__fragments").iterdir(), *(var / "__commits").iterdir()]:
        shutil.rmtree(rows) if rows.is_dir() else rows.unlink()
    with pytest.raises(DataError, match="var names no genes: there is nothing to encode"):
        ExperimentCounts(tmp_path / "e")


def test_layers(tmp_path: Path, census: Path, parts: dict[str, anndata.AnnData]) -> None:
    write_experiment(tmp_path / "e", {"d2": parts["d2"]}, layer="umi")
    for layer in (None, "umi", "X/umi"):
        with ExperimentCounts(tmp_path / "e", layer) as opened:
            assert opened.location == "X/umi"
    with pytest.raises(DataError, match=r"no layer X/umi; it has: X/raw.*`counts_layer=`"):
        ExperimentCounts(census, "umi")


def test_what_is_no_experiment(tmp_path: Path, census: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", f"file://{tmp_path}/missing"):
        with pytest.raises(DataError, match="cannot be opened as a SOMA Experiment"):
            open_counts(path)
    for part, kind in (("ms", "SOMACollection"), ("obs", "SOMADataFrame")):
        with pytest.raises(DataError, match=f"a {kind}, and a SOMAExperiment with obs is needed"):
            open_counts(census / ORGANISM / part)
    with pytest.raises(DataError, match=r"cannot be read by the filter 'nope == 3'"):
        ExperimentCounts(census, value_filter="nope == 3")
    with pytest.raises(DataError, match="no cells for which the filter holds"):
        ExperimentCounts(census, value_filter='dataset_id == "none"')


def test_fingerprint_tells_what_was_written_and_chosen(
    tmp_path: Path, parts: dict[str, anndata.AnnData]
) -> None:
    found = []
    for name in ("d1", "d1", "d2"):
        write_experiment(tmp_path / f"e{len(found)}", {name: parts[name]})
        with ExperimentCounts(tmp_path / f"e{len(found)}") as opened:
            found.append(opened.fingerprint)
    with ExperimentCounts(tmp_path / "e0", joinids=np.arange(9)) as opened:
        chosen = opened.fingerprint
    assert found[0]["cells"] == 13
    assert found[0]["written_ms"] < found[1]["written_ms"] < found[2]["written_ms"]
    assert chosen["chosen"] == found[2]["chosen"] != found[0]["chosen"]


def test_the_census_is_read_unsigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geneformer_mcore.io.soma._contexts", {})
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    public = soma_context("s3://bucket/census").tiledb_config
    assert (public["vfs.s3.region"], public["vfs.s3.no_sign_request"]) == ("us-west-2", "true")
    local = soma_context("folder").tiledb_config
    assert local.get("vfs.s3.no_sign_request", "false") != "true"
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert soma_context("s3://bucket/census") is soma_context("folder")
