"""What gives counts: a file or a SOMA Experiment, behind one interface.

    path | URI  ->  which kind is it?  ->  Counts: names, rows a..b as checked blocks

Nothing is read as a whole: rows, names and labels come by slices.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import pandas as pd

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.io.h5ad import CountsFile


class Counts(Protocol):
    """Cells x genes of counts, open for reading; a context manager.

    name:         the path or URI as it was given
    stem:         the dataset id of cells without one
    fingerprint:  plain JSON that changes when the content does (as far as can be told cheaply)
    location:     where the counts were found: "layers/counts", "raw.X", "X" or "layers/NAME"
    passed_over:  places before it in the order whose values are plainly no counts
    obs_columns:  the names of all columns of obs, also of those that read_obs leaves out
    is_sequential:  rows are cheap in ascending order only, and the first read is much work (a large
                  matrix that lies by columns): one process should read them all
    num_cells, num_columns:  shape of the count matrix
    """

    name: str
    stem: str
    location: str
    passed_over: tuple[str, ...]
    num_cells: int
    num_columns: int

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    @property
    def obs_columns(self) -> list[str]: ...

    @property
    def is_sequential(self) -> bool: ...

    def read_obs(self, start: int, stop: int) -> pd.DataFrame:
        """Rows start..stop-1 of obs, indexed by cell id; a column's dtype is that of any slice."""

    def read_cell_ids(self, start: int, stop: int) -> list[str]:
        """The cell ids of rows start..stop-1."""

    def read_dataset_ids(self, start: int, stop: int) -> list[str]:
        """The dataset of each: obs' `dataset_id`, else (no such column, missing) the stem."""

    def gene_columns(self) -> dict[str, Sequence[object]]:
        """Columns of var that may hold gene ids or symbols, "index" among them (see genes)."""

    def gene_names(self) -> list[str]:
        """One name (symbol) per column."""

    def blocks(
        self, num_rows: int = ..., start: int = 0, stop: int | None = None
    ) -> Iterator[CountBlock]:
        """Rows start..stop-1 in blocks of at most `num_rows`, fewer where rows are long."""

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, every value checked (DataError with row, gene, value, remedy)."""

    def close(self) -> None:
        """Closes the source; what was read stays good."""

    def __enter__(self) -> Counts: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_counts(
    source: str | Path, layer: str | None = None, allow_normalised: bool = False
) -> Counts:
    """The counts of an h5ad file, or of a SOMA Experiment: a folder, or a URI (s3://...).

    layer, allow_normalised: see h5ad.CountsFile and soma.ExperimentCounts.
    Raises DataError if it cannot be used.
    """
    if "://" not in str(source) and not _is_folder(Path(source)):
        return CountsFile(source, layer, allow_normalised)
    # Only now: tiledbsoma takes a second to import.
    from geneformer_mcore.io.soma import ExperimentCounts

    return ExperimentCounts(source, layer, allow_normalised)


def _is_folder(path: Path) -> bool:
    """Whether it is one, as Experiments are. DataError for zarr, and where it cannot be told."""
    try:
        mode = _mode(path)
        is_zipped = stat.S_ISREG(mode) and path.name.endswith((".zarr.zip", ".zarr"))
        if is_zipped or any(_mode(path / name) for name in (".zgroup", "zarr.json")):
            raise DataError(
                f"{path}: AnnData as zarr, and h5ad is read. Remedy: write it as h5ad: "
                "anndata.read_zarr(...).write_h5ad(...)."
            )
        return stat.S_ISDIR(mode)
    except OSError as error:
        raise DataError(
            f"{path}: an input must be readable, and it cannot be looked at: {error.strerror}. "
            "Remedy: check the path, and your right to enter every folder of it."
        ) from error


def _mode(path: Path) -> int:
    """What kind of thing is there; 0 for nothing. Path's own questions answer no to some errors
    and raise others, to each version of Python its own."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
