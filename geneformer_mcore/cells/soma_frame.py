"""A SOMA data frame (an Experiment's obs or var), read by joinids.

joinids  ->  one query  ->  in order of joinids, none missing?  ->  Arrow  ->  pandas, dtypes fixed
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from geneformer_mcore.cells.joinids import as_coordinates
from geneformer_mcore.cells.obs import MAX_CATEGORIES
from geneformer_mcore.cells.soma import FAILURES, unreadable
from geneformer_mcore.errors import DataError

JOINID = "soma_joinid"

# Where values can be missing, a slice with some must have the dtype of one with none.
_NULLABLE = {
    pa.bool_(): pd.BooleanDtype(),
    pa.int8(): pd.Int8Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
}


class SomaFrame:
    """An open SOMA DataFrame indexed by soma_joinid; `name` is what messages call it."""

    def __init__(self, frame: Any, name: str) -> None:
        """DataError if it is indexed by other columns."""
        self.name, self.address, self._frame = name, str(frame.uri), frame
        if tuple(frame.index_column_names) != (JOINID,):
            raise DataError(
                f"{name} is indexed by {', '.join(frame.index_column_names)}, and {JOINID} is "
                "needed. Remedy: write it anew with tiledbsoma.io."
            )
        self.kinds = {field.name: field.type for field in frame.schema if field.name != JOINID}

    def holds_text(self, column: str) -> bool:
        """Whether `column` holds text, or categories that are text."""
        kind = self.kinds[column]
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def joinids(self, value_filter: str | None, among: np.ndarray | None) -> np.ndarray:
        """int64, ascending: those of the rows (of `among`) for which the filter holds."""
        coordinates = () if among is None else (as_coordinates(among),)
        return np.sort(self._query(coordinates, [JOINID], value_filter)[JOINID].to_numpy())

    def read(self, ids: np.ndarray, columns: list[str]) -> pa.Table:
        """The rows of `ids` (ascending), in order. DataError if one is not there."""
        table = self._query((as_coordinates(ids),), [JOINID, *columns], None)
        found = table[JOINID].to_numpy()
        if len(found) != len(ids) or not np.array_equal(np.sort(found), ids):
            raise DataError(
                f"{self.name} holds {len(found):,} of the {len(ids):,} rows asked for. Remedy: get "
                "or write it again."
            )
        return table.take(np.argsort(found)).drop_columns(JOINID)

    def read_all(self) -> pa.Table:
        """Every row, in order, with its joinid."""
        table = self._query((), [JOINID, *self.kinds], None)
        return table.sort_by(JOINID)

    def _query(self, coordinates: tuple[Any, ...], columns: list[str], where: str | None) -> Any:
        if coordinates and isinstance(coordinates[0], np.ndarray) and not len(coordinates[0]):
            return self._frame.schema.empty_table().select(columns)
        try:
            found = self._frame.read(coordinates, column_names=columns, value_filter=where)
            return found.concat()
        except FAILURES as error:
            what = f"cannot be read by the filter {where!r}" if where else "cannot be read"
            raise unreadable(self.name, what, error) from error


def texts(column: pa.ChunkedArray) -> list[str]:
    """The values as text, "" where missing."""
    return ["" if value is None else str(value) for value in column.to_pylist()]


def as_pandas(column: pa.ChunkedArray) -> Any:
    """The column as a pandas array of a dtype that its type alone decides; None: of no known kind.

    Dictionaries become categories, of their whole dictionary, up to MAX_CATEGORIES.
    """
    array = column.unify_dictionaries().combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.chunks else pa.array([], column.type)
    if pa.types.is_dictionary(array.type):
        if len(array.dictionary) <= MAX_CATEGORIES:
            codes = array.indices.fill_null(-1).to_numpy()
            return pd.Categorical.from_codes(codes, array.dictionary.to_pandas())
        array = array.dictionary_decode()
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return pd.array(array.to_numpy(zero_copy_only=False), dtype="string")
    known = array.type in _NULLABLE or pa.types.is_floating(array.type)
    if not known and not pa.types.is_temporal(array.type):
        return None
    return array.to_pandas(types_mapper=_NULLABLE.get).array
