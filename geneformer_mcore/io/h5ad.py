"""Counts as checked CSR blocks; those of an h5ad file or zarr store, never loaded whole.

    a.h5ad | a.zarr | a.zarr.zip  ->  _find_counts: layers/counts | raw.X | X  ->  StoredMatrix
                                  ->  obs, var  ->  Frame: cell ids, labels, gene ids and names
    blocks | read_rows(a, b)  ->  StoredMatrix.read_rows  ->  check_counts  ->  CountBlock

Counts is the base of every kind of input, CountsFile an AnnData in a file. Files are only read.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import h5py
import pandas as pd

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.blocks import READ_FAILURES, CountBlock, check_counts, looks_normalised
from geneformer_mcore.io.count_matrix import StoredMatrix, is_matrix, open_matrix
from geneformer_mcore.io.elements import check_encoding, check_folder, check_hdf5, check_sources
from geneformer_mcore.io.frames import NAME_COLUMNS, Frame, StoredFrame
from geneformer_mcore.io.retry import raise_if_io_error

ROWS_PER_BLOCK = 4096

_PLACES = {"layers/counts": "layers/counts", "raw.X": "raw/X", "X": "X"}
_BEFORE_0_7 = {"raw/X": "raw.X", "raw/var": "raw.var"}
"""Their names in AnnData that kept both at the top of the file."""

_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"PK": "unzip"}
"""The first bytes of compressed files, and what decompresses them."""

OF_10X = "read its folder (scanpy: read_10x_mtx) and write that (write_h5ad)"

_WRITE_AGAIN = "Remedy: the file is damaged, and anndata refuses it, too: get or write it again."

FILE_ENDINGS = (".h5ad", ".zarr.zip", ".zarr")
"""Of files and folders that hold an AnnData."""

M = TypeVar("M", bound=StoredMatrix)


class Counts(AbstractContextManager["Counts"]):
    """Cells x genes of counts, open for reading: of a file, an Experiment or an AnnData.

    name:         the path or URI as it was given, or "the AnnData"
    path:         the h5ad file, where it is one, else None
    stem:         the dataset id of cells without one
    location:     where the counts were found: "layers/counts", "raw.X", "X", "layers/NAME"; of an
                  Experiment "X/LAYER"
    passed_over:  places before it in the order whose values are plainly no counts
    num_cells, num_columns:  shape of the count matrix

    A subclass sets these, `_matrix`, `_obs` (a row per cell) and `_var` (a row per column).
    """

    name: str
    stem: str
    location: str
    passed_over: tuple[str, ...]
    num_cells: int
    num_columns: int
    path: Path | None = None
    _matrix: StoredMatrix
    _obs: Frame
    _var: Frame

    def __init__(self, allow_normalised: bool) -> None:
        """allow_normalised: values need not be whole numbers. Meant for counts scaled per cell,
        whose ranks are those of the counts; logarithms rank otherwise and must not be given."""
        self._whole_numbers = not allow_normalised

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Plain JSON that changes when the content does, as far as can be found out cheaply."""

    @abstractmethod
    def _layers(self) -> list[str]:
        """The layers that messages offer."""

    @property
    def is_sequential(self) -> bool:
        """Whether one process should read all rows, in order (see StoredMatrix)."""
        return self._matrix.is_sequential

    @property
    def obs_columns(self) -> list[str]:
        """The columns of obs, also those that cannot be read."""
        return list(self._obs.columns)

    def read_obs(self, start: int, stop: int) -> pd.DataFrame:
        """Rows start..stop-1 of obs, indexed by cell id."""
        return self._obs.read(start, stop)

    def check(self) -> None:
        """Raises DataError for what would be found in the midst of work, or after it: a category
        that there is not; of a file, a matrix in another place that is none."""
        self._obs.check()

    def read_cell_ids(self, start: int, stop: int) -> list[str]:
        """The obs names of rows start..stop-1."""
        return self._obs.row_names(start, stop)

    def read_dataset_ids(self, start: int, stop: int) -> list[str]:
        """The dataset of each cell: obs' `dataset_id`, else the stem."""
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
        found: dict[str, list[object]] = {}
        for name, column in self._var.readable.items():
            values = pd.Series(column(0, self.num_columns)).astype(object).tolist()
            if any(isinstance(value, str) for value in values):
                found[name] = values
        return found | {"index": [*self._var.row_names(0, self.num_columns)]}

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
            with self._naming_rows(start, stop):
                last = self._matrix.fitting(start, min(start + num_rows, stop))
            yield self.read_rows(start, last)
            start = last

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, every value checked.

        Raises DataError with row, gene, value and remedy at a value that is no count.
        """
        with self._naming_rows(start, stop):
            block = self._matrix.read_rows(start, stop)
        check_counts(block, self, self._title, self._whole_numbers, self._layers())
        return block

    def close(self) -> None:
        """Frees what reading took; blocks already read stay valid."""
        if hasattr(self, "_matrix"):
            self._matrix.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _naming_rows(self, start: int, stop: int) -> Iterator[None]:
        try:
            yield
        except READ_FAILURES as error:
            raise_if_io_error(self._title, error)
            raise DataError(
                f"{self._title}: rows {start} to {stop - 1} cannot be read: {error}. Remedy: "
                "the file is truncated or damaged; get it again."
            ) from error

    def _first_of_counts(
        self, places: Sequence[str], open_place: Callable[[str], M]
    ) -> tuple[str, tuple[str, ...], M]:
        """(place, those passed over, its matrix): the first that does not look normalised."""
        for i, place in enumerate(places):
            matrix = open_place(place)
            is_last = i == len(places) - 1
            if is_last or not self._whole_numbers or not looks_normalised(matrix.some()):
                break
        return place, tuple(places[:i]), matrix

    @property
    def _title(self) -> str:
        return f"{self.name}: {self.location}"


class AnnDataCounts(Counts):
    """Counts in the places that AnnData has for them, in a file or in memory."""

    @abstractmethod
    def _get(self, path: str) -> Any:
        """What is at "X", "raw/X" or "layers/NAME", of a form that open_matrix takes, or None."""

    @abstractmethod
    def _frame(self, path: str) -> Frame:
        """That of "obs", "var" or "raw/var"."""

    def _open(self, layer: str | None, in_memory: bool = False) -> None:
        """Finds the counts: in `layer` (raw.X and X too) if given, else layers["counts"], raw.X,
        X."""
        self.location, self.passed_over, self._matrix = self._find_counts(layer, in_memory)
        self.num_cells, self.num_columns = self._matrix.shape
        self._obs = self._frame("obs")
        self._var = self._frame("raw/var" if self.location == "raw.X" else "var")
        if self.num_cells == 0 or self.num_columns == 0:
            raise DataError(
                f"{self.name}: {self.num_cells} cells x {self.num_columns} genes: there is nothing "
                "to encode. Remedy: leave the file out."
            )
        named = (self._obs.num_rows, self._var.num_rows)
        if named != self._matrix.shape:
            raise DataError(
                f"{self._title} is {self.num_cells:,} x {self.num_columns:,}, and the file "
                f"names {named[0]:,} cells and {named[1]:,} genes. Remedy: write the file again."
            )

    def _find_counts(
        self, layer: str | None, in_memory: bool
    ) -> tuple[str, tuple[str, ...], StoredMatrix]:
        """(location, places passed over, matrix)."""
        place = f"layers/{layer}" if layer not in _PLACES else layer
        wanted = _PLACES if layer is None else {place: _PLACES.get(place, place)}
        found = {name: self._get(path) for name, path in wanted.items()}
        places = [name for name, item in found.items() if is_matrix(item)]
        if not places:
            raise self._no_matrix(wanted)

        return self._first_of_counts(
            places, lambda name: open_matrix(found[name], f"{self.name}: {name}", in_memory)
        )

    def _no_matrix(self, wanted: Iterable[str]) -> DataError:
        return DataError(
            f"{self.name}: no matrix in {' or '.join(wanted)}; layers of the file: "
            f"{', '.join(self._layers()) or 'none'}. Remedy: name the layer of the raw counts, "
            "raw.X or X with `counts_layer=`."
        )


class CountsFile(AnnDataCounts):
    """An h5ad file or zarr store of counts, open for reading; stem: its name without ending."""

    def __init__(
        self,
        path: str | Path,
        layer: str | None = None,
        allow_normalised: bool = False,
        allow_external: bool = False,
    ) -> None:
        """allow_external: elements may lie in other files.

        Raises DataError if it cannot be read, or has no counts where they are expected."""
        super().__init__(allow_normalised)
        self.source, self.name = Path(path), str(path)
        ending = next((end for end in FILE_ENDINGS if self.source.name.endswith(end)), "")
        self.stem = self.source.name.removesuffix(ending)
        is_zarr = self.source.is_dir() or ending not in ("", ".h5ad")
        self.path = None if is_zarr else self.source
        self._file = _open_file(self.source, is_zarr, allow_external)
        try:
            if not is_zarr:
                if not allow_external:
                    check_hdf5(self._file, self.name)
                check_sources(self._file, self.name)
            self._open(layer)
            check_encoding(self._file, self.name, "anndata")
        except DataError:
            self.close()
            raise
        except READ_FAILURES as error:
            self.close()
            raise_if_io_error(self.name, error)
            kind, reader = ("zarr", "read_zarr") if is_zarr else ("", "read_h5ad")
            raise DataError(
                f"{self.name}: cannot be read as an AnnData {kind or 'file'}: {error}. Remedy: "
                f"check that it is whole, and that anndata.{reader} opens it."
            ) from error

    def check(self) -> None:
        super().check()
        for name, path in _PLACES.items():
            title = f"{self.name}: {name}"
            try:
                item = self._get(path)
                if item is None or name == self.location:
                    continue
                genes = self._frame("raw/var" if name == "raw.X" else "var").num_rows
                shape = open_matrix(item, title).shape if is_matrix(item) else None
            except READ_FAILURES as error:
                raise_if_io_error(title, error)
                raise DataError(f"{title} cannot be read: {error}. {_WRITE_AGAIN}") from error
            if shape != (self.num_cells, genes):
                found = "none" if shape is None else f"{shape[0]:,} x {shape[1]:,}"
                raise DataError(
                    f"{title} must be a matrix of {self.num_cells:,} cells x {genes:,} genes, "
                    f"and is {found}. {_WRITE_AGAIN}"
                )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Size in bytes and time of the last change in ns; of a folder, of the files in it."""
        files = self.source.rglob("*") if self.source.is_dir() else [self.source]
        found = [file.stat() for file in files if file.is_file()]
        return {
            "size": sum(status.st_size for status in found),
            "mtime_ns": max((status.st_mtime_ns for status in found), default=0),
        }

    def close(self) -> None:
        super().close()
        file = self._file if isinstance(self._file, h5py.File) else self._file.store
        file.close()

    def _get(self, path: str) -> Any:
        found = self._file.get(path)
        return self._file.get(_BEFORE_0_7[path]) if found is None and path in _BEFORE_0_7 else found

    def _layers(self) -> list[str]:
        layers = self._file.get("layers")
        return _names(layers) if hasattr(layers, "keys") else []

    def _frame(self, path: str) -> StoredFrame:
        item = self._get(path)
        if item is None:
            raise DataError(
                f"{self.name}: has no `{path}`. Remedy: check that anndata.read_h5ad opens it."
            )
        frame = StoredFrame(item, f"{self.name}: {path}", self._file.get("uns"))
        if path != "obs" and not isinstance(item, h5py.Dataset):
            # Which gene a column is must not be lost; obs may have columns of empty texts.
            for column in frame.columns:
                frame.check_chunks(column)
        return frame

    def _no_matrix(self, wanted: Iterable[str]) -> DataError:
        there = _names(self._file)
        if "mod" in there:
            found = _names(self._file["mod"])
            raise DataError(
                f"{self.name}: a MuData of {', '.join(found) or 'no modality'}, and an AnnData is "
                f"needed. Remedy: write the modality of gene counts as h5ad: "
                "mudata.read_h5mu(FILE)['rna'].write_h5ad(...)."
            )
        if {"obs", "var"} <= set(there):
            return super()._no_matrix(wanted)
        kind = "a zarr store" if self.path is None else "an HDF5 file"
        return DataError(
            f"{self.name}: {kind}, and no AnnData file: it holds "
            f"{', '.join(there) or 'nothing'}; obs, var and a matrix are needed. Remedy: "
            "read it with scanpy or anndata, and write what that gives with write_h5ad."
        )


def _names(group: Any) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of zarr, about files that it does not know.
        return list(group)


def _open_file(path: Path, is_zarr: bool, allow_external: bool) -> Any:
    if not path.exists():
        raise DataError(f"{path}: there is no such file. Remedy: check the path.")
    try:
        if not is_zarr:
            return h5py.File(path, "r")
        if path.is_dir() and not allow_external:
            check_folder(path)
        import zarr  # takes half a second

        store: Any = path if path.is_dir() else zarr.storage.ZipStore(path, mode="r")
        return zarr.open_group(store, mode="r")
    except READ_FAILURES as error:
        raise_if_io_error(str(path), error)
        if is_zarr:
            raise DataError(
                f"{path}: cannot be opened as a zarr store: {error or type(error).__name__}. "
                "Remedy: get it again, and check that anndata.read_zarr opens it."
            ) from error
        remedy, size = _remedy_of(path), path.stat().st_size if path.is_file() else 0
        raise DataError(
            f"{path}: not a whole HDF5 (h5ad) file ({size:,} bytes): {error}. Remedy: {remedy}."
        ) from error


def _remedy_of(path: Path) -> str:
    """For a file that is no HDF5, by its first bytes."""
    with suppress(OSError), path.open("rb") as file:
        first = file.read(16)
        if ".mtx" in path.suffixes or first.startswith(b"%%MatrixMarket"):
            return f"for a matrix of 10x, {OF_10X}"
        for magic, tool in _PACKED.items():
            if first.startswith(magic):
                return f"it is compressed; decompress it ({tool})"
    return "get it again; other formats are converted with anndata"
