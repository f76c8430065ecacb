"""What perturbations do, as files: a table, an AnnData of cells x perturbations, moved genes.

Answer  ->  .csv | .tsv, most certain first  ->  .h5ad, X and layers  ->  .csv | .tsv of moved genes
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from geneformer_mcore.cells import annotated
from geneformer_mcore.cells.output import whole_file
from geneformer_mcore.downstream.embedding_files import FACTS
from geneformer_mcore.downstream.perturb import Answer

TABLES, ANNDATA, PICTURES = (".csv", ".tsv"), (".h5ad",), (".png",)


def write_table(path: Path, answer: Answer) -> None:
    """Writes the rows, those with the smallest p first, of equals those with the larger shift."""
    rows = answer.table
    largest_first = rows.sort_values("shift", ascending=False, kind="stable")
    _write(path, largest_first.sort_values("p", kind="stable").reset_index())


def write_moved_genes(path: Path, answer: Answer) -> None:
    """Writes the most moved genes of every perturbation."""
    assert answer.moved_genes is not None
    _write(path, answer.moved_genes)


def write_cells(path: Path, answer: Answer) -> None:
    """Writes cells x perturbations."""
    with whole_file(path) as partial:
        as_anndata(answer).write_h5ad(partial)


def as_anndata(answer: Answer) -> Any:
    """AnnData: X the shift of each cell's vector, layers the other shifts, var the table."""
    others = {name: values for name, values in answer.layers.items() if name != "shift"}
    return annotated.of_matrix(
        answer.layers["shift"], answer.obs, answer.table, others, {FACTS: answer.facts}
    )


def _write(path: Path, rows: pd.DataFrame) -> None:
    with whole_file(path) as partial:
        rows.to_csv(partial, sep="\t" if path.suffix == ".tsv" else ",", index=False)
