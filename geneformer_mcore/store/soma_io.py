"""A store's data frames in TileDB-SOMA: created, written and read.

    SomaWriter: create  ->  write rows in order, all into one fragment  ->  close
    SomaReader: open    ->  count  ->  rows a..b as Arrow

Every attribute, offset, validity and dimension has a SHA-256 filter: a flipped bit is an error when
read and never a wrong cell.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiledbsoma
from tiledbsoma._managed_query import ManagedQuery

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.elements import check_members
from geneformer_mcore.io.soma import soma_context
from geneformer_mcore.store.layout import OBS, TOKENS

TILE_CAPACITY = 1024
"""Cells per tile, the unit that is read and checked."""

WHOLE_COPY = "copy the store again, with the files that links stand for (cp -rL), or build it again"
"""The remedy for a store with parts elsewhere."""

_CHECKSUM = {"_type": "ChecksumSHA256Filter"}
_TEXT_FILTERS: list[dict[str, Any]] = [{"_type": "ZstdFilter", "level": 3}, _CHECKSUM]


def _create_config(schema: pa.Schema) -> dict[str, Any]:
    def filters(field: pa.Field) -> list[dict[str, Any]]:
        return _TEXT_FILTERS if pa.types.is_large_string(field.type) else [_CHECKSUM]

    return {
        "tiledb": {
            "create": {
                "capacity": TILE_CAPACITY,
                "offsets_filters": [_CHECKSUM],
                "validity_filters": [_CHECKSUM],
                "attrs": {field.name: {"filters": filters(field)} for field in schema},
                "dims": {"soma_joinid": {"tile": TILE_CAPACITY, "filters": [_CHECKSUM]}},
            }
        }
    }


class SomaWriter:
    """Writes both data frames of a new store, rows in ascending order, one fragment each.

    A context manager; the rows are there once the last of `num_rows` is written, and not before.
    """

    def __init__(self, folder: Path, num_rows: int, obs_columns: dict[str, pa.DataType]) -> None:
        """folder: must not exist as a SOMA object yet; num_rows: rows both frames will have."""
        self._folder = folder
        self._num_rows = num_rows
        self._columns = {TOKENS: {TOKENS: pa.large_binary()}, OBS: obs_columns}
        self._schemas = {
            name: pa.schema({"soma_joinid": pa.int64(), **fields})
            for name, fields in self._columns.items()
        }
        self._opened = ExitStack()
        self._queries: dict[str, Any] = {}

    def __enter__(self) -> SomaWriter:
        address = str(self._folder)
        with tiledbsoma.Collection.create(address, context=soma_context()) as collection:
            for name, schema in self._schemas.items():
                collection.add_new_dataframe(
                    name,
                    schema=schema,
                    index_column_names=["soma_joinid"],
                    domain=[(0, self._num_rows - 1)],
                    platform_config=_create_config(schema),
                ).close()
        for name in self._schemas:
            address = str(self._folder / name)
            frame = self._opened.enter_context(
                tiledbsoma.open(address, "w", context=soma_context())
            )
            # DataFrame.write makes a fragment per call, which then have to be merged, at the cost
            # of writing all once more. Its query takes any number of batches (tiledbsoma 2.3.0).
            self._queries[name] = ManagedQuery(frame)._handle
            self._queries[name].set_layout(tiledbsoma.pytiledbsoma.ResultOrder.globalorder)
        return self

    def write(self, start: int, cells: pa.Table) -> None:
        """Rows start.. of both frames: `tokens` large_binary, and obs' columns."""
        rows = pa.array(np.arange(start, start + len(cells), dtype=np.int64))
        is_last = start + len(cells) == self._num_rows
        cells = cells.append_column("soma_joinid", rows)
        for name, schema in self._schemas.items():
            query = self._queries[name]
            submit = query.submit_and_finalize_batch if is_last else query.submit_batch
            submit(cells.select(schema.names).cast(schema).combine_chunks().to_batches()[0])

    def __exit__(self, *_error: object) -> None:
        self._queries.clear()
        self._opened.close()


class SomaReader:
    """Both data frames of a store, open for reading. Reads may come from several threads."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if the folder cannot be opened as a store's collection."""
        self._folder = folder
        try:
            self._collection = tiledbsoma.open(str(folder), context=soma_context())
            check_members(self._collection, str(folder), WHOLE_COPY)
            self._frames = {name: self._collection[name] for name in (TOKENS, OBS)}
        except (tiledbsoma.SOMAError, KeyError, RuntimeError, TypeError) as error:
            raise self._unreadable("it cannot be opened", error) from error

    def count(self, name: str) -> int:
        """Rows of the frame `name`, by its committed fragments."""
        try:
            return int(self._frames[name].count)
        except (tiledbsoma.SOMAError, RuntimeError) as error:
            raise self._unreadable(f"{name} cannot be counted", error) from error

    def columns(self, name: str) -> list[str]:
        """Columns of the frame `name`, soma_joinid left out."""
        return [column for column in self._frames[name].schema.names if column != "soma_joinid"]

    def read(self, name: str, start: int, stop: int, columns: list[str]) -> pa.Table:
        """Rows start..stop-1 of the frame `name`, in order.

        Raises DataError if a checksum does not hold or a row is missing.
        """
        try:
            table = (
                self._frames[name]
                .read((slice(start, stop - 1),), column_names=["soma_joinid", *columns])
                .concat()
            )
        except (tiledbsoma.SOMAError, RuntimeError) as error:
            what = f"rows {start:,} to {stop - 1:,} of {name} cannot be read"
            raise self._unreadable(what, error) from error
        rows = table["soma_joinid"].to_numpy()
        if len(rows) != stop - start or np.any(rows != np.arange(start, stop)):
            raise DataError(
                f"{self._folder}: {name} holds {len(rows):,} of the {stop - start:,} rows "
                f"{start:,} to {stop - 1:,}, or not in order. Remedy: build the store again."
            )
        return table.drop_columns("soma_joinid")

    def close(self) -> None:
        for frame in self._frames.values():
            frame.close()
        self._collection.close()

    def __enter__(self) -> SomaReader:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _unreadable(self, what: str, error: Exception) -> DataError:
        return DataError(
            f"{self._folder}: {what}: {error}. Remedy: a file of the store is damaged or missing; "
            "copy it again, or build the store again (data_prep/check_store.py reports details)."
        )
