"""Labelled cells of one file: labels, donors, and counts for PCA.

obs     ->  columns of labels and of donors    ->  text per cell, "" for none
counts  ->  CSR, the matrix that models read   ->  / total * 10,000  ->  log(1 + x)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.frames import label_texts
from geneformer_mcore.tokenizer.genes import InputOptions

LABELS = ("celltype", "celltypes", "celllabel", "celltypeannotation", "cellontologyclass")
DONORS = ("donorid", "donor", "patientid", "patient", "individual", "subject", "subjectid")
"""Default columns of obs, the first that exists; case, `_`, `.` and spaces are ignored."""
COUNTS_PER_CELL = 10_000.0


@dataclass(frozen=True)
class Labelled:
    """Cells of a file, in its order.

    label, donor:  columns of obs; donor "" where there is none
    labels_N:      object, text; "" for none
    donors_N:      the same; None without such a column
    """

    label: str
    donor: str
    names: list[str]
    labels_N: np.ndarray
    donors_N: np.ndarray | None
    counts_NG: sparse.csr_matrix

    def without_counts(self) -> Labelled:
        """The same with an empty matrix of the same shape, to free memory."""
        return replace(self, counts_NG=sparse.csr_matrix(self.counts_NG.shape, dtype=np.float32))


def read(source: str, label: str, donor: str, options: InputOptions) -> Labelled:
    """Read the cells of an h5ad file or Experiment.

    label, donor: columns of obs; "" takes a default, that of donors only if it names at least two
    Raises DataError if there is no such column, or the values are no counts.
    """
    with options.open(source) as counts:
        obs = counts.read_obs(0, counts.num_cells)
        label = find_column(obs, label, LABELS, source, "label")
        labels_N = label_texts(obs[label])
        donor, donors_N = _donors(obs, donor, source)
        blocks = [
            sparse.csr_matrix(
                (block.data.astype(np.float32), block.indices, block.indptr),
                (len(block), counts.num_columns),
            )
            for block in counts.blocks()
        ]
    matrix = sparse.vstack(blocks, format="csr")
    return Labelled(label, donor, [str(name) for name in obs.index], labels_N, donors_N, matrix)


def _donors(obs: pd.DataFrame, donor: str, source: str) -> tuple[str, np.ndarray | None]:
    if not donor and _guess(obs, DONORS) is None:
        return "", None
    column = find_column(obs, donor, DONORS, source, "donor")
    donors_N = label_texts(obs[column])
    found = sorted(set(donors_N) - {""})
    if len(found) >= 2:
        return column, donors_N
    if not donor:
        return "", None
    raise DataError(
        f"{source}: to leave one donor out, obs column {column!r} must name at least 2 donors, and "
        f"names {len(found)} ({', '.join(found) or 'none'}). Remedy: another `donor=`, or none."
    )


def find_column(
    obs: pd.DataFrame, asked: str, usual: Sequence[str], source: str, parameter: str
) -> str:
    """The requested column, else the first with a usual name. Raises DataError if there is none."""
    if asked in obs.columns:
        return asked
    found = None if asked else _guess(obs, usual)
    if found is not None:
        return found
    wanted = f"no column {asked!r}" if asked else f"no column called {', '.join(usual)} or alike"
    raise DataError(
        f"{source}: obs has {wanted}; its columns: {', '.join(map(str, obs.columns)) or 'none'}. "
        f"Remedy: name one with `{parameter}=`."
    )


def _guess(obs: pd.DataFrame, usual: Sequence[str]) -> str | None:
    plain = {re.sub(r"[\W_]", "", str(name)).lower(): str(name) for name in reversed(obs.columns)}
    return next((plain[name] for name in usual if name in plain), None)


def log_counts(counts_NG: sparse.csr_matrix, usable_N: np.ndarray) -> sparse.csr_matrix:
    """float32, log(1 + counts / total of the cell * 10,000), by scanpy. Rows that are not
    `usable_N` (bool) become empty; no other may be."""
    import scanpy

    adata = scanpy.AnnData(counts_NG[usable_N])
    scanpy.pp.normalize_total(adata, target_sum=COUNTS_PER_CELL)
    scanpy.pp.log1p(adata)
    logs = adata.X
    # All rows, without a copy of the values.
    lengths_N = np.zeros(len(usable_N), logs.indptr.dtype)
    lengths_N[usable_N] = np.diff(logs.indptr)
    indptr = np.concatenate([[0], np.cumsum(lengths_N)])
    return sparse.csr_matrix((logs.data, logs.indices, indptr), counts_NG.shape)
