"""One hash for all a store holds, whatever the blocks its rows come in.

    rows in order  ->  per column: is it there? | its lengths | its bytes  ->  SHA-256 each
                   ->  SHA-256 over the columns' names, types and digests

A column is hashed as three streams over all rows: validity (one byte per row); for text and tokens
the lengths in bytes (int64); the values, little-endian, laid end to end, missing ones as zero.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class _ColumnHash:
    def __init__(self) -> None:
        self._streams = tuple(hashlib.sha256() for _ in range(3))

    def update(self, column: pa.ChunkedArray) -> None:
        validity, lengths, values = self._streams
        for array in column.chunks:
            validity.update(array.is_valid().cast(pa.uint8()).to_numpy(zero_copy_only=False).data)
            if pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type):
                offsets, raw = text_buffers(array)
                lengths.update(np.diff(offsets).astype("<i8").data)
                values.update(raw.data)
            else:
                filled = pc.fill_null(array, pa.scalar(0).cast(array.type))
                numbers = filled.to_numpy(zero_copy_only=False)
                values.update(np.ascontiguousarray(numbers).astype(_little(numbers.dtype)).data)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(part.digest() for part in self._streams)).hexdigest()


def text_buffers(array: pa.LargeBinaryArray | pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int64 [rows + 1] from 0, bytes uint8) of text or binary; missing values are empty"""
    if array.null_count:
        array = pc.fill_null(array, b"" if pa.types.is_large_binary(array.type) else "")
    _, offsets_buffer, raw_buffer = array.buffers()
    window = slice(array.offset, array.offset + len(array) + 1)
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[window]
    raw = np.frombuffer(raw_buffer, dtype=np.uint8) if raw_buffer else np.empty(0, np.uint8)
    return offsets - offsets[0], raw[offsets[0] : offsets[-1]]


def _little(dtype: np.dtype) -> np.dtype:
    return dtype.newbyteorder("<")


class ContentHash:
    """Takes in a store's rows in order, as Arrow tables of any size with the same columns."""

    def __init__(self) -> None:
        self._columns: dict[str, _ColumnHash] = {}
        self._types: dict[str, str] = {}

    def update(self, table: pa.Table) -> None:
        """The next rows. Columns are known by name; their order does not matter."""
        for name in table.column_names:
            column = self._columns.setdefault(name, _ColumnHash())
            self._types[name] = str(table.schema.field(name).type)
            column.update(table[name])

    def hexdigest(self) -> str:
        """SHA-256 over the canonical JSON of {column: [type, digest]}."""
        columns = {
            name: [self._types[name], column.hexdigest()] for name, column in self._columns.items()
        }
        return hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()
