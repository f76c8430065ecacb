"""Counts of a file, a SOMA Experiment or an AnnData in memory, behind one interface.

h5ad | zarr folder | .zarr.zip  ->  h5ad.CountsFile         )
SOMA folder | URI (s3://...)    ->  soma.ExperimentCounts   )  Counts: names, labels, rows a..b
AnnData in memory               ->  memory.MemoryCounts     )
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.h5ad import OF_10X, Counts, CountsFile

ZARR_FILES = (".zgroup", "zarr.json")
"""One of them is in every zarr store, of version 2 and 3."""


def open_counts(
    source: Any,
    layer: str | None = None,
    allow_normalised: bool = False,
    allow_external: bool = False,
) -> Counts:
    """The counts of `source`, the path of an h5ad file or of AnnData as zarr (a folder, .zarr.zip),
    a SOMA Experiment (a folder or a URI, s3://...), or an AnnData in memory.

    layer, allow_normalised: see h5ad.Counts and soma.ExperimentCounts.
    allow_external: parts of a file or folder may lie elsewhere (see elements).
    Raises DataError if it cannot be used.
    """
    if not isinstance(source, str | Path):
        # Only now: a caller with an AnnData has imported what it takes.
        from geneformer_mcore.io.memory import MemoryCounts

        return MemoryCounts(source, layer, allow_normalised)
    if "://" not in str(source) and not _may_be_soma(Path(source)):
        return CountsFile(source, layer, allow_normalised, allow_external)
    if any(Path(source).glob("*matrix.mtx*")):
        raise DataError(f"{source}: a folder of matrices of 10x. Remedy: {OF_10X}.")
    # Only now: tiledbsoma takes a second to import.
    from geneformer_mcore.io.soma import ExperimentCounts

    return ExperimentCounts(source, layer, allow_normalised, allow_external=allow_external)


def _may_be_soma(path: Path) -> bool:
    """Whether it is a folder, and no zarr store. DataError where that cannot be found out."""
    try:
        return stat.S_ISDIR(_mode(path)) and not any(_mode(path / name) for name in ZARR_FILES)
    except OSError as error:
        raise DataError(
            f"{path}: an input must be readable, and it cannot be looked at: {error.strerror}. "
            "Remedy: check the path, and your right to enter every folder of it."
        ) from error


def _mode(path: Path) -> int:
    """st_mode; 0 where there is nothing. `Path.is_dir` hides some errors and raises others,
    differently in each version of Python."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
