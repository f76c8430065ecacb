"""Counts of an h5ad file as validated CSR blocks, without loading the file.

    file.h5ad  ->  where are the counts?  ->  rows a..b as CSR  ->  checked  ->  CountBlock
               ->  obs: cell ids, labels  ->  var: gene ids and names

The file is opened for reading only and never modified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import pandas as pd

from geneformer_mcore.cells.faults import READ_FAILURES, check_counts, looks_normalised
from geneformer_mcore.cells.genes import NAME_COLUMNS
from geneformer_mcore.cells.matrix import StoredMatrix, is_matrix, open_matrix
from geneformer_mcore.cells.normalise import CountBlock
from geneformer_mcore.cells.obs import StoredFrame
from geneformer_mcore.cells.outside import raise_if_outside
from geneformer_mcore.errors import DataError

ROWS_PER_BLOCK = 4096

_PLACES = {"layers/counts": "layers/counts", "raw.X": "raw/X", "X": "X"}
_BEFORE_0_7 = {"raw/X": "raw.X", "raw/var": "raw.var"}
"""What AnnData called them, when it kept both at the top of the file."""


class CountsFile:
    """An h5ad file of counts, open for reading; see inputs.Counts for what it gives.

    name:         the file, as given; stem: its name without folder and .h5ad
    location:     where the counts were found: "layers/counts", "raw.X", "X" or "layers/NAME"
    passed_over:  places before it in the order whose values are plainly no counts
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
        self.name = str(path)
        self.stem = self.path.name.removesuffix(".h5ad")
        self._whole_numbers = not allow_normalised
        self._file = _open_hdf5(self.path)
        try:
            self._open(layer)
        except DataError:
            self.close()
            raise
        except READ_FAILURES as error:
            self.close()
            raise_if_outside(self.name, error)
            raise DataError(
                f"{self.path}: cannot be read as an AnnData file: {error}. Remedy: check that it "
                "is whole, and that anndata.read_h5ad opens it."
            ) from error

    def _open(self, layer: str | None) -> None:
        self.location, self.passed_over, self._matrix = self._find_counts(layer)
        self.num_cells, self.num_columns = self._matrix.shape
        self._obs = self._frame("obs")
        self._var = self._frame("raw/var" if self.location == "raw.X" else "var")
        if self.num_cells == 0 or self.num_columns == 0:
            raise DataError(
                f"{self.path}: {self.num_cells} cells x {self.num_columns} genes: there is nothing "
                "to encode. Remedy: leave the file out."
            )
        self._title = f"{self.path}: {self.location}"
        beside = (self._obs.num_rows, self._var.num_rows)
        if beside != self._matrix.shape:
            raise DataError(
                f"{self._title} is {self.num_cells:,} x {self.num_columns:,}, and the file "
                f"names {beside[0]:,} cells and {beside[1]:,} genes. Remedy: write the file again."
            )

    @property
    def is_sequential(self) -> bool:
        """Whether one process should read all rows, in order (see matrix.StoredMatrix)."""
        return self._matrix.is_sequential

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Size in bytes and time of the last change in ns."""
        status = self.path.stat()
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}

    @property
    def obs_columns(self) -> list[str]:
        """The columns of obs, also those that cannot be read."""
        return list(self._obs.columns)

    def read_obs(self, start: int, stop: int) -> pd.DataFrame:
        """Rows start..stop-1 of obs, indexed by cell id."""
        return self._obs.read(start, stop)

    def read_cell_ids(self, start: int, stop: int) -> list[str]:
        """The obs names of rows start..stop-1."""
        return self._obs.row_names(start, stop)

    def read_dataset_ids(self, start: int, stop: int) -> list[str]:
        """The dataset of each cell: obs' `dataset_id`, else the file's name."""
        column = self._obs.readable.get("dataset_id")
        if column is None:
            return [self.stem] * (stop - start)
        found = pd.Series(column(start, stop), dtype=object)
        return [
            self.stem if absent or not str(name) else str(name)
            for name, absent in zip(found, found.isna(), strict=True)
        ]

    @cached_property
    def _gene_texts(self) -> dict[str, list[object]]:
        columns = {name: column(0, self.num_columns) for name, column in self._var.readable.items()}
        series = {name: pd.Series(values) for name, values in columns.items()}
        texts = {name: pd.Series(values, dtype=object) for name, values in series.items()}
        names: list[object] = [*self._var.row_names(0, self.num_columns)]
        return {
            name: text.tolist()
            for name, text in texts.items()
            if any(isinstance(value, str) for value in text)
        } | {"index": names}

    def gene_columns(self) -> dict[str, Sequence[object]]:
        """The columns of var that hold text; its row names under "index"."""
        return dict(self._gene_texts)

    def gene_names(self) -> list[str]:
        """One name (symbol) per column, from var's column of symbols, else its row names."""
        found = (name for name in NAME_COLUMNS if name in self._gene_texts)
        return [str(name) for name in self._gene_texts[next(found, "index")]]

    def blocks(
        self, num_rows: int = ROWS_PER_BLOCK, start: int = 0, stop: int | None = None
    ) -> Iterator[CountBlock]:
        """Rows start..stop-1 in blocks of at most `num_rows`, every value checked."""
        stop = self.num_cells if stop is None else stop
        while start < stop:
            with self._telling(start, stop):
                last = self._matrix.fitting(start, min(start + num_rows, stop))
            yield self.read_rows(start, last)
            start = last

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, every value checked.

        Raises DataError with row, gene, value and remedy at a value that is no count.
        """
        with self._telling(start, stop):
            block = self._matrix.read_rows(start, stop)
        check_counts(block, self, self._title, self._whole_numbers, self._layers())
        return block

    def close(self) -> None:
        """Closes the file; blocks already read stay good."""
        if hasattr(self, "_matrix"):
            self._matrix.close()
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

    @contextmanager
    def _telling(self, start: int, stop: int) -> Iterator[None]:
        try:
            yield
        except READ_FAILURES as error:
            raise_if_outside(self._title, error)
            raise DataError(
                f"{self._title}: rows {start} to {stop - 1} cannot be read: {error}. Remedy: "
                "the file is truncated or damaged; get it again."
            ) from error

    def _find_counts(self, layer: str | None) -> tuple[str, tuple[str, ...], StoredMatrix]:
        """(location, places passed over, matrix)."""
        wanted = _PLACES if layer is None else {_layer_name(layer): _layer_name(layer)}
        places = [name for name, path in wanted.items() if is_matrix(self._get(path))]
        if not places and not {"obs", "var"} <= set(self._file):
            raise DataError(
                f"{self.path}: an HDF5 file, and no AnnData file: it holds "
                f"{', '.join(self._file) or 'nothing'}; obs, var and a matrix are needed. Remedy: "
                "read it with scanpy or anndata, and write what that gives with write_h5ad."
            )
        if not places:
            raise DataError(
                f"{self.path}: no matrix in {' or '.join(wanted)}; layers of the file: "
                f"{', '.join(self._layers()) or 'none'}. Remedy: name the layer of the raw counts "
                "with --layer."
            )
        for i, name in enumerate(places):
            matrix = open_matrix(self._get(wanted[name]), f"{self.path}: {name}")
            if name == places[-1] or not self._whole_numbers or not looks_normalised(matrix.some()):
                return name, tuple(places[:i]), matrix
        raise AssertionError("the last place is always taken")

    def _get(self, path: str) -> Any:
        return self._file.get(path, self._file.get(_BEFORE_0_7.get(path, path)))

    def _layers(self) -> list[str]:
        layers = self._file.get("layers")
        return list(layers) if isinstance(layers, h5py.Group) else []

    def _frame(self, path: str) -> StoredFrame:
        item = self._get(path)
        if not isinstance(item, (h5py.Group, h5py.Dataset)):
            raise DataError(
                f"{self.path}: has no `{path}`. Remedy: check that anndata.read_h5ad opens it."
            )
        return StoredFrame(item, f"{self.path}: {path}", self._file.get("uns"))


def _open_hdf5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file. Remedy: check the path.") from None
    except OSError as error:
        raise_if_outside(str(path), error)
        size = path.stat().st_size if path.is_file() else 0
        raise DataError(
            f"{path}: not a whole HDF5 (h5ad) file ({size:,} bytes): {error}. Remedy: get it "
            "again; other formats are converted with anndata."
        ) from error


def _layer_name(layer: str) -> str:
    return layer if layer == "X" else f"layers/{layer}"
