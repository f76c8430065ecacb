"""Counts of an AnnData in memory, read in place: nothing is written to a disk.

X, raw, layers (arrays, sparse, dask; of views and backed files)  ->  _stored  ->  StoredMatrix
"""

from __future__ import annotations

from functools import cached_property, partial
from hashlib import sha256
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.blocks import READ_FAILURES
from geneformer_mcore.io.frames import Column, Frame
from geneformer_mcore.io.h5ad import AnnDataCounts
from geneformer_mcore.io.retry import raise_if_io_error


class MemoryFrame(Frame):
    """obs or var of an AnnData."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self.columns, self.num_rows = list(map(str, frame.columns)), len(frame)

    @property
    def readable(self) -> dict[str, Column]:
        return {name: partial(self._column, place) for place, name in enumerate(self.columns)}

    def row_names(self, start: int, stop: int) -> list[str]:
        return [str(name) for name in self._frame.index[start:stop]]

    def _column(self, place: int, start: int, stop: int) -> Any:
        return self._frame.iloc[start:stop, place].array


class MemoryCounts(AnnDataCounts):
    """The counts of an AnnData, which is only read, and must not change meanwhile."""

    name, stem = "the AnnData", "adata"

    def __init__(
        self, adata: Any, layer: str | None = None, allow_normalised: bool = False
    ) -> None:
        """Raises DataError if it is no AnnData, or holds no counts."""
        require(adata)
        super().__init__(allow_normalised)
        self._adata = adata
        try:
            self._open(layer, in_memory=True)
        except DataError:
            raise
        except READ_FAILURES as error:
            # Of the file of a backed one, too.
            raise_if_io_error(self.name, error)
            raise DataError(f"{self.name} cannot be read: {error}.") from error

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """A hash of names and counts."""
        digest = sha256(repr(self._obs.row_names(0, self.num_cells)).encode())
        digest.update(repr(self.gene_columns()["index"]).encode())
        for block in self.blocks():
            for part in (block.indptr, block.indices, block.data):
                digest.update(np.ascontiguousarray(part).tobytes())
        return {"sha256": digest.hexdigest()}

    def _get(self, path: str) -> Any:
        adata = self._adata
        if path == "raw/X":
            return None if adata.raw is None else _stored(adata.raw.X)
        return _stored(adata.X if path == "X" else adata.layers.get(path.removeprefix("layers/")))

    def _frame(self, path: str) -> MemoryFrame:
        of = self._adata.raw if path == "raw/var" else self._adata
        return MemoryFrame(of.obs if path == "obs" else of.var)

    def _layers(self) -> list[str]:
        # Since anndata 0.13, None is the name of X.
        return [name for name in self._adata.layers if name is not None]


class _Lazy:
    """A dask array, computed a slice of rows at a time."""

    def __init__(self, array: Any) -> None:
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = self._array[rows].compute()
        return found.toarray() if sparse.issparse(found) else np.asarray(found)


def require(adata: Any) -> None:
    """Raises DataError if it is no AnnData."""
    import anndata  # takes a second

    if not isinstance(adata, anndata.AnnData):
        raise DataError(f"an AnnData is needed, and this is {type(adata).__name__}.")


def _stored(matrix: Any) -> Any:
    """The matrix in a form that open_matrix takes; a backed one is read from its file, by rows."""
    if hasattr(matrix, "compute"):
        return _Lazy(matrix)
    if isinstance(matrix, np.ndarray):
        return np.asarray(matrix)
    return getattr(matrix, "group", matrix)
