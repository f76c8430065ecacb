"""Small SOMA Experiments of the Census' schema, written with tiledbsoma as anyone would."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma
from scipy import sparse

ORGANISM = "census_data/homo_sapiens"
"""Where the human Experiment lies inside a Census."""

LABELS = {
    "assay": "10x 3' v3",
    "cell_type": "native cell",
    "development_stage": "adult stage",
    "disease": "normal",
    "donor_id": "donor 1",
    "self_reported_ethnicity": "unknown",
    "sex": "unknown",
    "suspension_type": "cell",
    "tissue": "lung",
    "tissue_general": "lung",
}
"""The label columns of the Census' obs that we use, with the value of a cell that has none."""


def write_experiment(
    path: Path,
    adata_by_dataset: Mapping[str, anndata.AnnData],
    value_type: type = np.float32,
    layer: str = "raw",
    joinids: np.ndarray | None = None,
    width: int | None = None,
) -> str:
    """Writes a Census with one human Experiment to the new folder `path`; returns that one's URI.

    adata_by_dataset:  {dataset_id: cells}, all with the same genes (var names: Ensembl ids; names
                       from var's `feature_name`, if there); obs columns named as in LABELS, and
                       `is_primary_data`, `observation_joinid`, are taken over, others left out
    value_type:        of X's values: float32 as in the Census, or an integer
    joinids:           int64 [cells], ascending; else 0, 1, ...
    width:             columns that X has room for; else one per gene
    """
    cells = list(adata_by_dataset.values())
    counts = sparse.vstack([sparse.csr_matrix(one.X) for one in cells], format="csr")
    joinids = np.arange(counts.shape[0]) if joinids is None else joinids
    obs = pd.concat(
        [_obs(dataset, one) for dataset, one in adata_by_dataset.items()], ignore_index=True
    )
    obs.insert(0, "soma_joinid", joinids.astype(np.int64))
    obs["raw_sum"] = np.asarray(counts.sum(1)).ravel().astype(np.float64)
    obs["nnz"] = np.diff(counts.indptr).astype(np.int64)
    obs["n_measured_vars"] = np.int64(counts.shape[1])
    frames = {"obs": _table(obs, {*LABELS, "dataset_id"}), "ms/RNA/var": _table(_var(cells[0]))}
    shape = (int(joinids[-1]) + 1, width or counts.shape[1])
    kind = pa.from_numpy_dtype(value_type)
    _create(path, frames, layer, kind, shape)
    # Only now: what is written while its parent is open loses its dictionaries (tiledbsoma 2.3.0).
    for name, table in frames.items():
        with tiledbsoma.open(str(path / ORGANISM / name), "w") as frame:
            frame.write(table)
    with tiledbsoma.open(str(path / ORGANISM / "ms/RNA/X" / layer), "w") as matrix:
        matrix.write(_coordinates(counts, joinids, value_type))
    return str(path / ORGANISM)


def _create(
    path: Path,
    frames: Mapping[str, pa.Table],
    layer: str,
    kind: pa.DataType,
    shape: tuple[int, int],
) -> None:
    with tiledbsoma.Collection.create(str(path)) as census:
        data = census.add_new_collection("census_data")
        experiment = data.add_new_collection("homo_sapiens", tiledbsoma.Experiment)
        measurements = experiment.add_new_collection("ms")
        measurement = measurements.add_new_collection("RNA", tiledbsoma.Measurement)
        for parent, name in ((experiment, "obs"), (measurement, "ms/RNA/var")):
            table = frames[name]
            parent.add_new_dataframe(
                name.split("/")[-1],
                schema=table.schema,
                index_column_names=["soma_joinid"],
                domain=[(0, table["soma_joinid"][-1].as_py())],
            ).close()
        layers = measurement.add_new_collection("X")
        layers.add_new_sparse_ndarray(layer, type=kind, shape=shape).close()


def _obs(dataset: str, cells: anndata.AnnData) -> pd.DataFrame:
    found = cells.obs
    columns: dict[str, object] = {"dataset_id": [dataset] * len(found)}
    for name, default in LABELS.items():
        given = found[name].astype(object) if name in found else None
        columns[name] = default if given is None else given.where(given.notna(), None).tolist()
    names = found.get("observation_joinid", pd.Series(cells.obs_names))
    columns["is_primary_data"] = found.get("is_primary_data", pd.Series([True] * len(found))).values
    return pd.DataFrame(columns).assign(observation_joinid=[str(name) for name in names])


def _var(cells: anndata.AnnData) -> pd.DataFrame:
    names = cells.var.get("feature_name", pd.Series(cells.var_names))
    return pd.DataFrame(
        {
            "soma_joinid": np.arange(cells.n_vars),
            "feature_id": [str(gene) for gene in cells.var_names],
            "feature_name": [str(name) for name in names],
        }
    )


def _table(frame: pd.DataFrame, categories: Set[str] = frozenset()) -> pa.Table:
    # As in the Census: labels are dictionaries, ids are text.
    arrays = {}
    for column in frame:
        text = pa.large_string() if frame[column].dtype == object else None
        array = pa.array(frame[column], text)
        arrays[column] = array.dictionary_encode() if column in categories else array
    return pa.table(arrays)


def _coordinates(counts: sparse.csr_matrix, joinids: np.ndarray, value_type: type) -> pa.Table:
    coo = counts.tocoo()
    return pa.table(
        {
            "soma_dim_0": joinids[coo.row].astype(np.int64),
            "soma_dim_1": coo.col.astype(np.int64),
            "soma_data": coo.data.astype(value_type),
        }
    )
