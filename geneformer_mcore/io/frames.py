"""A data frame of an AnnData file (its obs or var), read by rows and never as a whole.

    group (HDF5, zarr) | table  ->  a reader per column, by its kind  ->  rows a..b as pandas

Kinds: arrays (numbers, booleans, text), categories (codes + categories), nullable arrays (values +
mask). A column of another kind (lists, records, matrices) is listed and not read. All forms that
AnnData has written are known: tables (before 0.7), `__categories` (0.7), encodings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import h5py
import numpy as np
import pandas as pd

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.blocks import READ_FAILURES
from geneformer_mcore.io.elements import as_text, check_encoding
from geneformer_mcore.io.retry import raise_if_io_error

NAME_COLUMNS = ("feature_name", "gene_symbol", "gene_symbols", "gene_name")
"""Columns of `var` with gene names (symbols), in order of preference; else its row names."""

MAX_CATEGORIES = 10_000
"""A column of more categories is read as plain values: its categories are as long as itself."""

_ROWS_PER_CHECK = 1 << 20
_NO_LABEL = ("nan", "NaN", "<NA>", "None")
"""Missing values that became text on their way."""

_INDEX_NAMES = ("_index", "index")
_OLD_CATEGORIES = "__categories"

Column = Callable[[int, int], Any]
"""Rows start..stop-1 of a column, as a numpy or pandas array whose dtype is always the same."""


class Frame(ABC):
    """obs or var, read by rows.

    columns:  the names of all columns, in order, also of those that cannot be read
    """

    columns: list[str]
    num_rows: int

    @property
    @abstractmethod
    def readable(self) -> dict[str, Column]:
        """{column: its reader}, of the columns that can be read."""

    @abstractmethod
    def row_names(self, start: int, stop: int) -> list[str]:
        """The names of rows start..stop-1."""

    def check(self) -> None:  # noqa: B027
        """Raise DataError where a row, however far down, has a category that there is not."""

    def read(self, start: int, stop: int) -> pd.DataFrame:
        """Rows start..stop-1 of every readable column; the index holds the row names, as text."""
        columns = {name: column(start, stop) for name, column in self.readable.items()}
        return pd.DataFrame(columns, index=pd.Index(self.row_names(start, stop), dtype=object))


class StoredFrame(Frame):
    """A data frame in an open HDF5 file or zarr store; `name` is used in messages.

    Raises DataError where columns differ in length or there are no row names, and KeyError,
    ValueError, TypeError or OSError where the file is no AnnData file.
    """

    def __init__(self, item: Any, name: str, old_categories: Any = None) -> None:
        """old_categories: the file's `uns`, where AnnData before 0.7 kept `COLUMN_categories`."""
        self.name, self._item = name, item
        self._old_categories = {} if old_categories is None else old_categories
        self._coded: set[str] = set()
        if _is_array(item):
            self._index = _first_of(_INDEX_NAMES, item.dtype.names) or item.dtype.names[0]
            self.columns = [column for column in item.dtype.names if column != self._index]
            self.num_rows = int(item.shape[0])
            return
        check_encoding(item, name, "dataframe")
        self._index = as_text(item.attrs.get("_index"))
        if self._index is None or self._index not in item:
            raise DataError(f"{name} has no row names. Remedy: write the file again with anndata.")
        order = item.attrs.get("column-order")
        names = sorted(item) if order is None else [as_text(column) for column in order]
        self.columns = [n for n in names if n not in (self._index, _OLD_CATEGORIES)]
        self.num_rows = (_shape(item[self._index]) or (0,))[0]
        self.check_chunks(self._index)
        for column in self.columns:
            self._check_shape(column)

    def _check_shape(self, column: str) -> None:
        shape = _shape(self._item[column]) or (self.num_rows,)
        if len(shape) > 1:
            raise DataError(
                f"{self.name}: column {column} must have one dimension, and has {len(shape)}. "
                "Remedy: keep such an array in obsm or varm, and write the file again."
            )
        if shape[0] != self.num_rows:
            raise DataError(
                f"{self.name}: column {column} holds {shape[0]:,} values, and there are "
                f"{self.num_rows:,} row names. Remedy: write the file again."
            )

    def check(self) -> None:
        for name, column in self.readable.items():
            for start in range(0, self.num_rows if name in self._coded else 0, _ROWS_PER_CHECK):
                column(start, min(start + _ROWS_PER_CHECK, self.num_rows))

    @cached_property
    def readable(self) -> dict[str, Column]:
        found = {name: self._open(name) for name in self.columns}
        return {name: column for name, column in found.items() if column is not None}

    def row_names(self, start: int, stop: int) -> list[str]:
        return [str(name) for name in self._names(start, stop)]

    @cached_property
    def _names(self) -> Column:
        column = self._open(self._index)
        if column is None:
            raise DataError(
                f"{self.name}: the row names are no text. Remedy: write the file again."
            )
        return column

    def _open(self, name: str) -> Column | None:
        with self._naming(f"column {name} cannot be read"):
            column = self._find(name)
        if column is None:
            return None

        def read(start: int, stop: int) -> Any:
            with self._naming(f"column {name}, rows {start} to {stop - 1}, cannot be read"):
                return column(start, stop)

        return read

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        try:
            yield
        except READ_FAILURES as error:
            raise_if_io_error(self.name, error)
            raise DataError(
                f"{self.name}: {what}: {error}. Remedy: the file is damaged; get it again."
            ) from error

    def _find(self, name: str) -> Column | None:
        if _is_array(self._item):
            return self._open_field(name)
        item = self._item[name]
        if _is_array(item):
            if "categories" not in item.attrs:
                return _array(item)
            # AnnData 0.7: a reference to the categories, in zarr a path.
            place = item.attrs["categories"]
            categories = self._item[place] if isinstance(place, str) else item.file[place]
            if categories.name is None:
                raise ValueError("its categories are no element of the file")
            return self._categories(name, item, categories)
        if _holds(item, "codes", "categories"):
            return self._categories(name, item["codes"], item["categories"])
        return _nullable(item)

    def check_chunks(self, column: str) -> None:
        """Raise DataError if zarr chunks of a text column are missing, as in a copy in part: they
        would be read as empty texts."""
        array = self._item[column]
        there, number = getattr(array, "nchunks_initialized", 0), getattr(array, "nchunks", 0)
        if _is_array(array) and array.dtype.kind in "OSTU" and there < number:
            raise DataError(
                f"{self.name}: {number - there:,} of the {number:,} chunks of column {column} are "
                "missing. Remedy: get or write the file again."
            )

    def _open_field(self, name: str) -> Column | None:
        field, kind = self._item.fields(name), self._item.dtype[name]
        categories = self._old_categories.get(f"{name}_categories")
        if _is_array(categories) and kind.kind in "iu":
            return self._categories(name, field, categories)
        if h5py.check_string_dtype(kind) or kind.kind in "SU":
            return lambda start, stop: _decoded(field[start:stop])
        return None if kind.shape or kind.kind not in "biuf" else _numbers(field)

    def _categories(self, name: str, codes: Any, categories: Any) -> Column:
        read = _array(categories) if _is_array(categories) else _nullable(categories)
        if read is None:
            raise ValueError("its categories are no list of values")
        values = pd.Index(read(0, (_shape(categories) or (0,))[0]))
        if codes.dtype.kind not in "iu":
            raise ValueError(f"its codes must be whole numbers, and are {codes.dtype}")
        if not values.is_unique or values.hasnans:
            twice = ", ".join(map(repr, values[values.duplicated() | values.isna()][:3]))
            raise ValueError(f"each category must be there once, and be a value: see {twice}")
        self._coded.add(name)

        def codes_of(start: int, stop: int) -> np.ndarray:
            found = np.asarray(codes[start:stop])
            is_wrong = (found < -1) | (found >= len(values))
            if is_wrong.any():
                raise DataError(
                    f"{self.name}: column {name} has code {int(found[is_wrong][0])} for one of "
                    f"{len(values):,} categories. Remedy: get or write the file again."
                )
            return found.astype(np.int64)

        if len(values) > MAX_CATEGORIES:
            plain = pd.array(values.tolist())
            return lambda start, stop: plain.take(codes_of(start, stop), allow_fill=True)
        dtype = pd.CategoricalDtype(values)
        return lambda start, stop: pd.Categorical.from_codes(codes_of(start, stop), dtype=dtype)


def _array(item: Any) -> Column | None:
    if len(item.shape) != 1:
        return None
    if as_text(item.attrs.get("encoding-type")) == "string-array" and item.dtype.kind in "biufc":
        raise ValueError(f"it must be text by its encoding-type, and is {item.dtype}")
    if isinstance(item, h5py.Dataset) and h5py.check_string_dtype(item.dtype):
        # UTF-8 whatever the mark: R writes it into fields that are marked as ASCII.
        return lambda start, stop: item.asstr("utf-8")[start:stop].astype(object)
    if not isinstance(item, h5py.Dataset) and item.dtype.kind in "OSTU":  # Text of zarr.
        return lambda start, stop: _decoded(item[start:stop])
    return _numbers(item) if item.dtype.kind in "biuf" else None


def _numbers(item: Any) -> Column:
    def read(start: int, stop: int) -> np.ndarray:
        values = np.asarray(item[start:stop])
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    return read


def _nullable(item: Mapping[str, Any]) -> Column | None:
    read = _array(item["values"]) if _holds(item, "values", "mask") else None
    if read is None:
        return None
    mask = item["mask"]
    if mask.shape != item["values"].shape:
        raise ValueError(f"its mask has shape {mask.shape}, its values {item['values'].shape}")

    def read_masked(start: int, stop: int) -> Any:
        values, is_missing = read(start, stop), np.asarray(mask[start:stop], dtype=bool)
        if values.dtype == object:
            return pd.array(np.where(is_missing, None, values), dtype="string")
        if values.dtype == bool:
            return pd.arrays.BooleanArray(values, is_missing)
        if values.dtype.kind in "iu":
            return pd.arrays.IntegerArray(values, is_missing)
        return np.where(is_missing, np.nan, values)

    return read_masked


def label_texts(column: pd.Series) -> np.ndarray:
    """object [N], each cell's label as text; "" for none. Whole numbers are written as such: where
    some are missing, h5ad has floats."""
    codes, labels = pd.factorize(column.astype(object))
    texts = [_label_text(label) for label in labels]
    return np.array([*texts, ""], dtype=object)[codes]


def _label_text(label: object) -> str:
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    text = str(label).strip()
    return "" if text in _NO_LABEL else text


def _decoded(values: np.ndarray) -> np.ndarray:
    texts = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    return np.array(texts, dtype=object)


def _is_array(item: Any) -> bool:
    return hasattr(item, "shape")


def _holds(group: Any, *parts: str) -> bool:
    return all(part in group for part in parts)


def _shape(item: Any) -> tuple[int, ...] | None:
    """Of a column; None where it has none, or is of a kind that is not known."""
    if _is_array(item):
        return tuple(map(int, item.shape)) or None
    part = _first_of(("codes", "values"), item)
    return None if part is None else _shape(item[part])


def _first_of(names: tuple[str, ...], there: Any) -> str | None:
    return next((name for name in names if name in there), None)
