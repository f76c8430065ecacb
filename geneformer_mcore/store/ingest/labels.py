"""Label columns: the inputs' obs columns as Arrow columns of one type each over all files.

obs of a file  ->  type of each column: integer | number | boolean | text  ->  of a block
               ->  one type over all files (text where they differ)  ->  of the store
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import pyarrow as pa

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.frames import label_texts
from geneformer_mcore.store.layout import OBS_COLUMNS, TOKENS

RESERVED = frozenset({*OBS_COLUMNS, TOKENS, "soma_joinid"})
"""Columns that the store itself fills; an input's column of that name is not kept as a label."""

RESERVED_PREFIXES = ("soma_", "__")
"""Columns so named are refused by SOMA and by TileDB."""

INTEGER, NUMBER, TRUTH, TEXT = pa.int64(), pa.float64(), pa.bool_(), pa.large_string()


def label_kinds(obs: pd.DataFrame) -> dict[str, pa.DataType]:
    """{column: its Arrow type} of the columns of `obs` that can be kept as labels.

    Left out: the store's own columns, names SOMA and TileDB keep for themselves, and columns of
    lists or objects that are no text.
    """
    kinds = {}
    for name in obs.columns:
        is_name = isinstance(name, str) and name and name not in RESERVED
        if is_name and not name.startswith(RESERVED_PREFIXES):
            kind = _kind(obs[name])
            if kind is not None:
                kinds[name] = kind
    return kinds


def _kind(column: pd.Series) -> pa.DataType | None:
    try:
        found = pa.Array.from_pandas(column).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return None
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_boolean(found):
        return TRUTH
    if pa.types.is_integer(found):
        return NUMBER if pa.types.is_uint64(found) else INTEGER
    if pa.types.is_floating(found):
        return NUMBER
    if pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found):
        return TEXT
    return TEXT if pa.types.is_temporal(found) else None


def unify_kinds(kinds_of_files: Iterable[Mapping[str, pa.DataType]]) -> dict[str, pa.DataType]:
    """{column: type} over all files, sorted: integers and numbers become numbers, others text."""
    unified: dict[str, pa.DataType] = {}
    for kinds in kinds_of_files:
        for name, kind in kinds.items():
            before = unified.get(name, kind)
            if before != kind:
                kind = NUMBER if {before, kind} == {INTEGER, NUMBER} else TEXT
            unified[name] = kind
    return dict(sorted(unified.items()))


def label_columns(
    obs: pd.DataFrame, kinds: Mapping[str, pa.DataType], rows: str
) -> dict[str, pa.Array]:
    """One Arrow array per column of `kinds`, all of which are in `obs`; missing values are null.

    rows: their name in messages. Raises DataError where values are not of their column's type.
    """
    columns = {}
    for name, kind in kinds.items():
        try:
            columns[name] = _convert(obs[name], kind)
        except (KeyError, pa.ArrowException) as error:
            raise DataError(
                f"{rows}: obs column {name!r} holds other values than {kind} ({error}). Remedy: "
                "give the column one kind of value, or remove it."
            ) from error
    return columns


def _convert(column: pd.Series, kind: pa.DataType) -> pa.Array:
    array = pa.Array.from_pandas(column)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(kind, safe=kind != NUMBER)


def unify_labels(cells: pa.Table, kinds: Mapping[str, pa.DataType]) -> pa.Table:
    """The table with exactly the label columns of `kinds` behind its others, as these kinds.

    A column that the table lacks is null. A whole number beyond 2^53 may be rounded where its
    column holds numbers.
    """
    own = [name for name in cells.column_names if name in RESERVED]
    unified = cells.select(own)
    for name, kind in kinds.items():
        if name in cells.column_names:
            column = cells[name].cast(kind, safe=kind != NUMBER)
        else:
            column = pa.nulls(len(cells), kind)
        unified = unified.append_column(name, column)
    return unified


def as_text(column: pa.ChunkedArray, store: str, name: str) -> np.ndarray:
    """str [N], "" where a cell has no value. Raises DataError for numbers with a fraction."""
    values_N = label_texts(pd.Series(column.to_pylist(), dtype=object))
    are_whole = all(each.lstrip("-").isdigit() for each in set(values_N) - {""})
    if pa.types.is_floating(column.type) and not are_whole:
        raise DataError(
            f"{store}: obs column {name!r} holds numbers with a fraction, and a label is a "
            "name, a whole number or a truth value. Remedy: another `label=`."
        )
    return values_N.astype(str)
