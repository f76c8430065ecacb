"""Counts of an h5ad file as validated CSR blocks, without loading the file.

    file.h5ad  ->  where are the counts?  ->  rows a..b as CSR  ->  checked  ->  CountBlock
               ->  obs: cell ids, labels  ->  var: gene ids and names

The file is opened for reading only and never modified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from geneformer_mcore.cells.faults import describe_value, first_fault, looks_normalised
from geneformer_mcore.cells.genes import ID_COLUMNS
from geneformer_mcore.cells.matrix import StoredMatrix, is_matrix
from geneformer_mcore.cells.normalise import CountBlock
from geneformer_mcore.errors import DataError

ROWS_PER_BLOCK = 4096
NAME_COLUMNS = ("feature_name", "gene_symbol", "gene_symbols", "gene_name")
"""Where gene names (symbols) are looked for in `var`, in this order; else its row names."""

_PROBED_ROWS = 256
_PLACES = {"layers/counts": "layers/counts", "raw.X": "raw/X", "X": "X"}


class CountsFile:
    """An h5ad file of counts, open for reading; a context manager.

    path:         the file
    location:     where the counts were found: "layers/counts", "raw.X", "X" or "layers/NAME"
    passed_over:  places before it in the order whose values are plainly no counts
    num_cells, num_columns:  shape of the count matrix
    cell_ids:     the obs names, in row order
    obs:          the columns of obs, as a pandas data frame
    """

    def __init__(
        self, path: str | Path, layer: str | None = None, allow_normalised: bool = False
    ) -> None:
        """Opens `path` and finds its counts: in `layer` if given, else layers["counts"], raw.X, X.

        allow_normalised: values need not be whole numbers. Meant for counts scaled per cell, whose
        ranks are those of the counts; logarithms rank otherwise and must not be given.
        Raises DataError if the file cannot be read or has no counts where they are looked for.
        """
        self.path = Path(path)
        self._whole_numbers = not allow_normalised
        self._file = _open_hdf5(self.path)
        try:
            self._open(layer)
        except DataError:
            self.close()
            raise
        except (OSError, KeyError, ValueError, TypeError) as error:
            self.close()
            raise DataError(
                f"{self.path}: cannot be read as an AnnData file: {error}. Remedy: check that it "
                "is whole, and that anndata.read_h5ad opens it."
            ) from error

    def _open(self, layer: str | None) -> None:
        self.location, self.passed_over, self._matrix = self._find_counts(layer)
        self.num_cells, self.num_columns = self._matrix.shape
        self.obs = self._read_frame("obs")
        self._var = self._read_frame("raw/var" if self.location == "raw.X" else "var")
        self.cell_ids = _row_names(self.obs)
        if self.num_cells == 0 or self.num_columns == 0:
            raise DataError(
                f"{self.path}: {self.num_cells} cells x {self.num_columns} genes: there is nothing "
                "to encode. Remedy: leave the file out."
            )
        beside = (len(self.obs), len(self._var))
        if beside != self._matrix.shape:
            raise DataError(
                f"{self._matrix.name} is {self.num_cells:,} x {self.num_columns:,}, and the file "
                f"names {beside[0]:,} cells and {beside[1]:,} genes. Remedy: write the file again."
            )

    def gene_columns(self) -> dict[str, Sequence[object]]:
        """Those columns of var that may hold gene ids, "index" among them (see genes)."""
        columns = {name: self._var[name].tolist() for name in ID_COLUMNS if name in self._var}
        return columns | {"index": _row_names(self._var)}

    def gene_names(self) -> list[str]:
        """One name (symbol) per column, from var's column of symbols, else its row names."""
        for column in NAME_COLUMNS:
            if column in self._var:
                return [str(name) for name in self._var[column]]
        return _row_names(self._var)

    def blocks(
        self, num_rows: int = ROWS_PER_BLOCK, start: int = 0, stop: int | None = None
    ) -> Iterator[CountBlock]:
        """Rows start..stop-1 in blocks of `num_rows`, every value checked (see read_rows)."""
        stop = self.num_cells if stop is None else stop
        for first in range(start, stop, num_rows):
            yield self.read_rows(first, min(first + num_rows, stop))

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, every value checked.

        Raises DataError with row, gene, value and remedy at a value that is no count.
        """
        try:
            block = self._matrix.read_rows(start, stop)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{self._matrix.name}: rows {start} to {stop - 1} cannot be read: {error}. Remedy: "
                "the file is truncated or damaged; get it again."
            ) from error
        self._check(block)
        return block

    def close(self) -> None:
        """Closes the file; blocks already read stay good."""
        self._file.close()

    def __enter__(self) -> CountsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _find_counts(self, layer: str | None) -> tuple[str, tuple[str, ...], StoredMatrix]:
        """(location, places passed over, matrix)."""
        wanted = _PLACES if layer is None else {_layer_name(layer): _layer_name(layer)}
        places = [name for name, path in wanted.items() if is_matrix(self._file.get(path))]
        if not places:
            raise DataError(
                f"{self.path}: no matrix in {' or '.join(wanted)}; layers of the file: "
                f"{', '.join(self._layers()) or 'none'}. Remedy: name the layer of the raw counts "
                "with --layer."
            )
        for i, name in enumerate(places):
            matrix = StoredMatrix(self._file[wanted[name]], f"{self.path}: {name}")
            if name == places[-1] or not self._whole_numbers or not _is_normalised(matrix):
                return name, tuple(places[:i]), matrix
        raise AssertionError("the last place is always taken")

    def _check(self, block: CountBlock) -> None:
        entry = first_fault(block, self.num_columns, self._whole_numbers)
        if entry is None:
            return
        column, value = int(block.indices[entry]), float(block.data[entry])
        row = block.start + int(np.searchsorted(block.indptr, entry, side="right")) - 1
        if not 0 <= column < self.num_columns:
            raise DataError(
                f"{self._matrix.name} is damaged: row {row} names column {column} of "
                f"{self.num_columns:,}. Remedy: get or write the file again."
            )
        raise DataError(
            f"{self._matrix.name} must hold counts, and row {row} (cell {self.cell_ids[row]}), "
            f"gene {_row_names(self._var)[column]} holds {value:g}: {describe_value(value)}. "
            f"{self._remedy(value)}"
        )

    def _remedy(self, value: float) -> str:
        if not np.isfinite(value):
            return "Remedy: mend the value, or leave the cell out."
        layers = self._layers()
        named = f" (the file has: {', '.join(layers)})" if layers else ""
        return (
            'Remedy: put the raw counts into layers["counts"] or raw, or name their layer with '
            f"--layer{named}. Counts scaled per cell, not logarithms, pass with --allow-normalised."
        )

    def _layers(self) -> list[str]:
        return list(self._file.get("layers", {}))

    def _read_frame(self, name: str) -> pd.DataFrame:
        frame = read_elem(self._file[name])
        if not isinstance(frame, pd.DataFrame):
            raise DataError(
                f"{self.path}: `{name}` has the form of AnnData before 0.7. Remedy: write it anew: "
                "anndata.read_h5ad(old).write_h5ad(new)."
            )
        return frame


def _open_hdf5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except OSError as error:
        size = path.stat().st_size if path.is_file() else 0
        raise DataError(
            f"{path}: not a whole HDF5 (h5ad) file ({size:,} bytes): {error}. Remedy: get it "
            "again; other formats are converted with anndata."
        ) from error


def _layer_name(layer: str) -> str:
    return layer if layer == "X" else f"layers/{layer}"


def _is_normalised(matrix: StoredMatrix) -> bool:
    return looks_normalised(matrix.read_rows(0, min(_PROBED_ROWS, matrix.shape[0])).data)


def _row_names(frame: pd.DataFrame) -> list[str]:
    return [str(name) for name in frame.index]
