"""The CELLxGENE Census: releases, the data set of every cell, and cells as AnnData.

    version  ->  find_release: address of the organism's SOMA Experiment
    address + filter  ->  read_cells: data set, assay and tissue of each cell
    address + filter + data set + joinids a..b  ->  fetch_cells: AnnData with raw counts

`cellxgene_census` (extra `census`) finds releases; an Experiment's address needs no look-up.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

from geneformer_mcore.backends import require
from geneformer_mcore.errors import DataError
from geneformer_mcore.io.soma import FAILURES, ExperimentCounts, open_experiment, unreadable

if TYPE_CHECKING:
    from anndata import AnnData

CARD_FILTER = "suspension_type != 'na' and is_primary_data == True and disease == 'normal'"
"""The model card's cells: of normal tissue, each once."""

ORGANISM = "homo_sapiens"
STABLE = "stable"
"""The release that the Census recommends."""

TABLE_COLUMNS = ("dataset_id", "assay", "tissue_general")
"""Columns that a split by data set uses."""

OBS_COLUMNS = (
    *TABLE_COLUMNS,
    "sex",
    "development_stage",
    "self_reported_ethnicity",
    "cell_type",
    "tissue",
    "disease",
    "donor_id",
    "suspension_type",
    "is_primary_data",
)
"""Columns of obs that are kept: the model card's, and labels of cells."""


@dataclass(frozen=True)
class Release:
    """build: the Census' own name of it, a date; address: of the organism's Experiment."""

    build: str
    address: str


def find_release(version: str, organism: str = ORGANISM) -> Release:
    """The release `version` ("stable", "latest" or a date).

    Raises MissingBackendError without the package, DataError for an unknown version or organism;
    an OSError or RuntimeError is the network's.
    """
    require("cellxgene_census")
    import cellxgene_census

    try:
        build = cellxgene_census.get_census_version_description(version)["release_build"]
        # By its date: `stable` may become another release while this runs.
        with cellxgene_census.open_soma(census_version=build) as census:
            return Release(build, census["census_data"][organism].uri)
    except ValueError as error:
        raise DataError(
            f"no Census version {version!r}: {error} Remedy: stable, latest or a release's date."
        ) from error
    except KeyError:
        raise DataError(
            f"the Census {version} has no organism {organism!r}. Remedy: homo_sapiens, "
            "mus_musculus, or another that it has."
        ) from None


def read_cells(address: str, value_filter: str | None) -> Iterator[pa.Table]:
    """soma_joinid and those of TABLE_COLUMNS there are, of the cells for which the filter holds.

    DataError if the Experiment cannot be read so, or SOMA would compare with another number.
    """
    with closing(open_experiment(address)) as experiment:
        obs = experiment["obs"]
        _check_numbers(address, obs.schema, value_filter)
        columns = [name for name in TABLE_COLUMNS if name in obs.schema.names]
        if "dataset_id" not in columns:
            raise DataError(
                f"{address}: obs has no dataset_id: it does not have the Census' schema. Remedy: "
                "build_store.py takes any SOMA Experiment as it is."
            )
        try:
            yield from obs.read(column_names=["soma_joinid", *columns], value_filter=value_filter)
        except FAILURES as error:
            what = f"obs cannot be read by the filter {value_filter!r}"
            raise unreadable(address, what, error) from error


def _check_numbers(address: str, schema: pa.Schema, value_filter: str | None) -> None:
    """Raises DataError for a number that SOMA would cast to the column's kind, into another one."""
    for columns, values in _comparisons(value_filter):
        kinds = {name: schema.field(name).type for name in columns if name in schema.names}
        for name, kind in kinds.items():
            is_bool = pa.types.is_boolean(kind)
            what = "True or False" if is_bool else "whole numbers"
            for value in values if is_bool or pa.types.is_integer(kind) else []:
                is_whole = not isinstance(value, float) or value.is_integer()
                if (value not in (None, False, True)) if is_bool else not is_whole:
                    raise DataError(
                        f"{address}: obs.{name} holds {what}, and the filter {value_filter!r} "
                        f"compares it with {value!r}, which SOMA would take for another. Remedy: "
                        f"compare it with {what}."
                    )


def count_missing(address: str, value_filter: str | None) -> dict[str, int]:
    """{column: cells without a value of it}, of columns that the filter compares with values: no
    comparison holds for such a cell, not even `!=`. DataError if they cannot be read."""
    asked = (names for names, values in _comparisons(value_filter) if None not in values)
    found = {}
    with closing(open_experiment(address)) as experiment:
        obs = experiment["obs"]
        for name in sorted({name for names in asked for name in names}):
            if name not in obs.schema.names or not obs.schema.field(name).nullable:
                continue
            where = f"attr({name!r}) == None"
            try:
                rows = obs.read(column_names=["soma_joinid"], value_filter=where)
                found[name] = sum(len(table) for table in rows)
            except FAILURES as error:
                raise unreadable(address, f"obs.{name} cannot be read", error) from error
    return {name: cells for name, cells in found.items() if cells}


def _comparisons(value_filter: str | None) -> Iterator[tuple[set[str], list[Any]]]:
    """(columns, values) of each comparison in a filter, which is a Python expression; none of one
    that is not: SOMA says what is wrong with it."""
    try:
        tree = ast.parse(value_filter or "None", mode="eval")
    except (SyntaxError, ValueError):
        return
    for comparison in ast.walk(tree):
        if isinstance(comparison, ast.Compare):
            nodes = list(ast.walk(comparison))
            names = {node.id for node in nodes if isinstance(node, ast.Name)}
            values = [node.value for node in nodes if isinstance(node, ast.Constant)]
            if "attr" in names:  # attr("a name")
                names |= {value for value in values if isinstance(value, str)}
            yield names - {"attr", "val"}, values


def fetch_cells(
    address: str,
    value_filter: str | None,
    dataset_id: str,
    first: int,
    last: int,
    report: Callable[[int], None],
) -> AnnData:
    """The cells of one data set with joinids in first..last: X = raw counts (CSR float32).

    obs: those of OBS_COLUMNS there are, index: the Census' cell ids; var: feature_id (index) and
    feature_name. `report` is called with the number of cells just read.
    """
    import anndata  # takes a second

    own = f"dataset_id == '{dataset_id}'"
    where = f"({value_filter}) and {own}" if value_filter else own
    joinids = np.arange(first, last + 1)
    with ExperimentCounts(address, value_filter=where, joinids=joinids) as counts:
        blocks = []
        for block in counts.blocks():
            blocks.append((block.data.astype(np.float32), block.indices, np.diff(block.indptr)))
            report(len(block))
        data, indices, lengths = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        shape = (counts.num_cells, counts.num_columns)
        obs = counts.read_obs(0, counts.num_cells)
        columns = counts.gene_columns()
        genes = [str(gene) for gene in columns.get("feature_id", columns["index"])]
        var = pd.DataFrame(
            {"feature_name": counts.gene_names()}, pd.Index(genes, name="feature_id")
        )
    kept = obs[[name for name in OBS_COLUMNS if name in obs]]
    # Categories are all labels of the Census, of which these cells have few.
    labels = kept.select_dtypes("category")
    used = {name: column.cat.remove_unused_categories() for name, column in labels.items()}
    matrix = sparse.csr_matrix((data, indices, indptr), shape)
    return anndata.AnnData(matrix, obs=kept.assign(**used), var=var)
