"""All that touches TileDB-SOMA: one context per process, creating, writing and reading data frames.

    SomaWriter: create  ->  write rows in order  ->  consolidate to one fragment  ->  close
    SomaReader: open    ->  count  ->  rows a..b as Arrow

Every attribute, offset, validity and dimension passes a SHA-256 filter on its way to disk, so that
a flipped bit is an error when read and never a wrong cell.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import tiledbsoma

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.layout import OBS, TOKENS

TILE_CAPACITY = 1024
"""Cells per tile, the unit that is read and checked."""

_CHECKSUM = {"_type": "ChecksumSHA256Filter"}
_TEXT_FILTERS: list[dict[str, Any]] = [{"_type": "ZstdFilter", "level": 3}, _CHECKSUM]
_THREADS = 2
_MIB = 1 << 20
_SETTINGS = {
    # TileDB starts one thread per core for each of these unless told otherwise.
    "sm.compute_concurrency_level": str(_THREADS),
    "sm.io_concurrency_level": str(_THREADS),
    "soma.compute_concurrency_level": str(_THREADS),
    "soma.init_buffer_bytes": str(64 * _MIB),
    # Consolidation takes its buffers out of this; the default of 10 GiB makes it slow and greedy.
    "sm.mem.total_budget": str(512 * _MIB),
}

_context: tuple[int, tiledbsoma.SOMATileDBContext] | None = None


def soma_context() -> tiledbsoma.SOMATileDBContext:
    """This process' context. DataError in a child forked after TileDB was used: it would hang."""
    global _context
    if _context is None:
        _context = (os.getpid(), tiledbsoma.SOMATileDBContext(tiledb_config=_SETTINGS))
    owner, context = _context
    if owner != os.getpid():
        raise DataError(
            "a store cannot be used in a process forked after TileDB was used in its parent: it "
            "would hang. Remedy: start the process with the method `spawn`, or use a thread."
        )
    return context


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
    """Writes both data frames of a new store, rows in ascending order."""

    def __init__(self, folder: Path, num_rows: int, obs_columns: dict[str, pa.DataType]) -> None:
        """folder: must not exist as a SOMA object yet; num_rows: rows both frames will have."""
        self._folder = folder
        columns = {TOKENS: {TOKENS: pa.large_binary()}, OBS: obs_columns}
        with tiledbsoma.Collection.create(str(folder), context=soma_context()) as collection:
            for name, fields in columns.items():
                schema = pa.schema({"soma_joinid": pa.int64(), **fields})
                collection.add_new_dataframe(
                    name,
                    schema=schema,
                    index_column_names=["soma_joinid"],
                    domain=[(0, num_rows - 1)],
                    platform_config=_create_config(schema),
                ).close()

    def write(self, start: int, tokens: pa.ChunkedArray, obs: pa.Table) -> None:
        """Rows start.. of both frames: tokens large_binary, obs without soma_joinid."""
        rows = pa.array(np.arange(start, start + len(tokens), dtype=np.int64))
        self._append(TOKENS, pa.table({"soma_joinid": rows, TOKENS: tokens}))
        self._append(OBS, obs.add_column(0, "soma_joinid", rows))

    def _append(self, name: str, table: pa.Table) -> None:
        with tiledbsoma.open(str(self._folder / name), "w", context=soma_context()) as frame:
            options = {"tiledb": {"write": {"sort_coords": False}}}
            frame.write(table.combine_chunks(), platform_config=options)

    def consolidate(self) -> None:
        """Merges each frame's fragments into one, so that a span of rows is read from one place."""
        for name in (TOKENS, OBS):
            with tiledbsoma.open(str(self._folder / name), "w", context=soma_context()) as frame:
                # tiledbsoma's own write option consolidates metadata and commits alone; only its
                # handle also merges the fragments (2.3.0).
                frame._handle.consolidate_and_vacuum(["fragments"])
                frame._handle.consolidate_and_vacuum(["fragment_meta", "commits"])


class SomaReader:
    """Both data frames of a store, open for reading. Reads may come from several threads."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if the folder cannot be opened as a store's collection."""
        self._folder = folder
        try:
            self._collection = tiledbsoma.open(str(folder), context=soma_context())
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
        """Closes the collection and its frames."""
        for frame in self._frames.values():
            frame.close()
        self._collection.close()

    def __enter__(self) -> SomaReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _unreadable(self, what: str, error: Exception) -> DataError:
        return DataError(
            f"{self._folder}: {what}: {error}. Remedy: a file of the store is damaged or missing; "
            "copy it again, or build the store again (data_prep/check_store.py says more)."
        )
