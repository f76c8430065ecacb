"""Counts of a SOMA Experiment (also a Census' human one), read by joinids in bounded memory.

    path | s3://...  ->  open_experiment, with the one TileDB context of the process
    obs (filter | joinids)  ->  JoinIds: the cells, in ascending order, whatever gaps there are
    rows a..b  ->  SomaMatrix: one query of X  ->  entries by rows  ->  CSR;  CellFrame: one of obs

Not `axis_query(...).X(layer).blockwise(...).scipy()`: that takes half as long again, and leaves
out entries in columns that var has not, which must be refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma

from geneformer_mcore.backends import compiled
from geneformer_mcore.errors import DataError
from geneformer_mcore.io.blocks import BLOCK_ENTRIES, CountBlock
from geneformer_mcore.io.count_matrix import Entries, StoredMatrix, count_rows, place_entries
from geneformer_mcore.io.elements import check_folder, check_members
from geneformer_mcore.io.frames import MAX_CATEGORIES, Column, Frame
from geneformer_mcore.io.h5ad import Counts
from geneformer_mcore.io.retry import raise_if_io_error

_THREADS = 2
_MIB = 1 << 20
_SETTINGS = {
    # TileDB's default for each of these is one thread per core.
    "sm.compute_concurrency_level": str(_THREADS),
    "sm.io_concurrency_level": str(_THREADS),
    "soma.compute_concurrency_level": str(_THREADS),
    "soma.init_buffer_bytes": str(32 * _MIB),
    # Consolidation takes its buffers out of this; the default of 10 GiB makes it slow and greedy.
    "sm.mem.total_budget": str(512 * _MIB),
    # No parallel merge of tiles before a read: in TileDB 2.30 its threads at times give back memory
    # to an allocator that is gone (MergeUnit's destructor), and the process ends with SIGSEGV.
    # Without it reads are as fast.
    "sm.query.sparse_global_order.preprocess_tile_merge": "0",
}
_PUBLIC_S3 = {
    # The Census' bucket, open to all.
    "vfs.s3.region": "us-west-2",
    "vfs.s3.no_sign_request": "true",
    # Remote reads are bound by latency.
    "sm.io_concurrency_level": "16",
}

HUMAN = "census_data/homo_sapiens"
"""Path of the human Experiment in a Census."""

FAILURES = (tiledbsoma.SOMAError, RuntimeError, KeyError, TypeError, ValueError, OSError)
"""What reading a damaged or missing SOMA object raises."""

JOINID = "soma_joinid"
PLACES = ("X/raw", "X/counts", "ms/raw/X/raw", "ms/raw/X/counts", "ms/raw/X/", "X/data", "X/")
"""Where the counts may be, in this order; with no name at the end, the only layer there.
tiledbsoma.io makes a measurement `raw` of an AnnData's raw."""

CELL_ID_COLUMNS = ("observation_joinid", "obs_id", "cell_id")
"""Columns of obs with the ids of cells, in this order, behind the one that tiledbsoma.io recorded
as its index; where missing, the soma_joinid."""

_INDEX_NAME = "soma_dataframe_original_index_name"
"""What it calls that, as JSON, in the metadata of obs and var."""

_SPARSE = ("soma_dim_0", "soma_dim_1", "soma_data")
_FIRST_ROWS = 512
_PROBED_PLACES = 16
_BAND_VALUES = 4 << 20
"""Of a dense array, so many values are read at once."""

_contexts: dict[bool, tuple[int, tiledbsoma.SOMATileDBContext]] = {}


def soma_context(address: str = "") -> tiledbsoma.SOMATileDBContext:
    """This process' context for `address` (a path or URI).

    s3:// is read unsigned in the Census' region, unless the environment names a user of AWS: then
    TileDB's own rules hold. DataError in a child forked after TileDB was used: it would hang.
    """
    has_aws_user = any(name in os.environ for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"))
    is_public = address.startswith("s3://") and not has_aws_user
    if is_public not in _contexts:
        settings = _SETTINGS | (_PUBLIC_S3 if is_public else {})
        context = tiledbsoma.SOMATileDBContext(tiledb_config=settings)
        _contexts[is_public] = (os.getpid(), context)
    if any(owner != os.getpid() for owner, _ in _contexts.values()):
        raise DataError(
            "a store cannot be used in a process forked after TileDB was used in its parent: it "
            "would hang. Remedy: start the process with the method `spawn`, or use a thread."
        )
    return _contexts[is_public][1]


def open_experiment(address: str, allow_external: bool = False) -> Any:
    """The Experiment at `address`, or the human one of the Census there, open for reading.

    allow_external: members and files may lie elsewhere. DataError if there is neither.
    """
    try:
        if os.path.isdir(address) and not allow_external:
            check_folder(Path(address))
        found = tiledbsoma.open(address, context=soma_context(address))
        for part in HUMAN.split("/"):
            if found.soma_type == "SOMACollection" and part in found:
                if not allow_external:
                    check_members(found, address)
                found = found[part]
        is_experiment = found.soma_type == "SOMAExperiment" and "obs" in found
    except FAILURES as error:
        what = "cannot be opened as a SOMA Experiment"
        if address.rstrip("/").endswith(".zarr"):
            what += ", nor as a zarr store: .zgroup or zarr.json is missing in it"
        raise unreadable(address, what, error) from error
    if not is_experiment:
        kind = found.soma_type
        found.close()
        raise DataError(
            f"{address}: a {kind}, and a SOMAExperiment with obs is needed. Remedy: name the "
            f"Experiment, or a Census, which holds one as {HUMAN}."
        )
    return found


def unreadable(name: str, what: str, error: Exception) -> DataError:
    """The error for a SOMA object that fails when it is read. Raises a transient I/O error at once
    (see raise_if_io_error)."""
    raise_if_io_error(name, error)
    reason = str(error).split("\n")[0]
    return DataError(
        f"{name}: {what}: {reason}. Remedy: check the address and the filter; get a damaged copy "
        "again."
    )


def last_write_ms(address: str) -> int:
    """When the array at `address` was last changed, in ms since 1970, by the names of its
    fragments, commits (deletions too), schemas and metadata; 0 for one on another machine: to list
    it would cost a request."""
    path = address.removeprefix("file://")  # TileDB quotes nothing in it.
    if "://" in path:
        return 0
    parts = ("__fragments", "__commits", "__schema", "__meta")
    names = (each.name for part in parts for each in Path(path, part).glob("__*_*"))
    return max((int(name.split("_")[3]) for name in names if name[2].isdigit()), default=0)


# Data frames: obs of chosen cells, var of all genes

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


class JoinIds:
    """Ascending ids by their positions 0, 1, ...; 16 bytes for each run of neighbours: the Census'
    data sets are few runs of many cells."""

    def __init__(self, ids: np.ndarray) -> None:
        """ids: int64, strictly ascending (else ValueError)."""
        if len(ids) and (int(ids[0]) < 0 or np.any(np.diff(ids) <= 0)):
            raise ValueError("joinids must ascend from 0 or above, each once")
        breaks = np.flatnonzero(np.diff(ids) != 1) + 1
        self._places = np.concatenate([np.zeros(min(1, len(ids)), np.int64), breaks])
        self._firsts = ids[self._places].astype(np.int64)
        self._length = len(ids)

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64: the ids of positions start..stop-1."""
        places = np.arange(start, stop)
        runs = np.searchsorted(self._places, places, side="right") - 1
        return self._firsts[runs] + places - self._places[runs]

    def describe(self) -> bytes:
        """Bytes that are equal for equal ids only."""
        return self._places.tobytes() + self._firsts.tobytes() + str(self._length).encode()


class SomaFrame:
    """An open SOMA DataFrame indexed by soma_joinid; `name` is used in messages."""

    def __init__(self, frame: Any, name: str) -> None:
        """index: the column that was the index of a pandas frame. DataError if it is indexed by
        other columns."""
        self.name, self.address, self._frame = name, str(frame.uri), frame
        if tuple(frame.index_column_names) != (JOINID,):
            raise DataError(
                f"{name} is indexed by {', '.join(frame.index_column_names)}, and {JOINID} is "
                "needed. Remedy: write it again with tiledbsoma.io."
            )
        self.kinds = {field.name: field.type for field in frame.schema if field.name != JOINID}
        recorded = json.loads(frame.metadata.get(_INDEX_NAME, "null"))
        self.index = recorded if recorded in self.kinds else None

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
                f"{self.name} holds {len(found):,} of the {len(ids):,} rows requested. Remedy: get "
                "or write it again."
            )
        return table.take(np.argsort(found)).drop_columns(JOINID)

    def read_all(self) -> pa.Table:
        """Every row, in order, with its joinid."""
        return self._query((), [JOINID, *self.kinds], None).sort_by(JOINID)

    def _query(self, coordinates: tuple[Any, ...], columns: list[str], where: str | None) -> Any:
        if coordinates and isinstance(coordinates[0], np.ndarray) and not len(coordinates[0]):
            return self._frame.schema.empty_table().select(columns)
        try:
            found = self._frame.read(coordinates, column_names=columns, value_filter=where)
            return found.concat()
        except FAILURES as error:
            what = f"cannot be read by the filter {where!r}" if where else "cannot be read"
            raise unreadable(self.name, what, error) from error


class CellFrame(Frame):
    """obs of the cells `ids`, by their positions."""

    def __init__(self, obs: SomaFrame, ids: JoinIds) -> None:
        self.columns, self.num_rows = list(obs.kinds), len(ids)
        self._obs, self._ids = obs, ids
        names = (name for name in (obs.index, *CELL_ID_COLUMNS) if name in obs.kinds)
        self._id_column = next(names, None)

    @property
    def readable(self) -> dict[str, Column]:
        """{column: its reader, of text}"""
        return {name: partial(self._texts, name) for name in self.columns}

    def read(self, start: int, stop: int) -> pd.DataFrame:
        """Rows start..stop-1, of every column by one query."""
        if start == stop:
            return self.read(0, 1).iloc[:0]  # With the categories of the others.
        ids = self._ids.read(start, stop)
        table = self._obs.read(ids, self.columns)
        columns = {name: as_pandas(table[name]) for name in table.column_names}
        index = pd.Index(self._names(table, ids), dtype=object)
        return pd.DataFrame({n: c for n, c in columns.items() if c is not None}, index=index)

    def row_names(self, start: int, stop: int) -> list[str]:
        """The ids of rows start..stop-1 (see CELL_ID_COLUMNS)."""
        ids = self._ids.read(start, stop)
        columns = [] if self._id_column is None else [self._id_column]
        return self._names(self._obs.read(ids, columns), ids)

    def _names(self, table: pa.Table, ids: np.ndarray) -> list[str]:
        found = [""] * len(ids) if self._id_column is None else texts(table[self._id_column])
        return [text or str(joinid) for text, joinid in zip(found, ids.tolist(), strict=True)]

    def _texts(self, name: str, start: int, stop: int) -> list[str]:
        return texts(self._obs.read(self._ids.read(start, stop), [name])[name])


class GeneFrame(Frame):
    """The text of var, a row per column of X: "" where var has none, as it may have gaps."""

    def __init__(self, var: SomaFrame, num_columns: int) -> None:
        self.num_rows, self._var = num_columns, var
        self.columns = [name for name in var.kinds if var.holds_text(name)]

    @property
    def readable(self) -> dict[str, Column]:
        return {name: partial(self._texts, name) for name in self.columns}

    def row_names(self, start: int, stop: int) -> list[str]:
        """The index that tiledbsoma.io recorded, else `var_id`, else `feature_id`, else numbers."""
        usual = (self._var.index, "var_id", "feature_id")
        name = next((name for name in usual if name in self.columns), None)
        return [*map(str, range(start, stop))] if name is None else self._texts(name, start, stop)

    def _texts(self, name: str, start: int, stop: int) -> list[str]:
        table = self._table
        by_place = dict(zip(table[JOINID].to_pylist(), texts(table[name]), strict=True))
        return [by_place.get(place, "") for place in range(start, stop)]

    @cached_property
    def _table(self) -> pa.Table:
        return self._var.read_all()


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


def as_coordinates(ids: np.ndarray) -> slice | np.ndarray:
    """The ids as SOMA reads them fastest: a slice, its end included, where they are neighbours."""
    if len(ids) and int(ids[-1]) - int(ids[0]) == len(ids) - 1:
        return slice(int(ids[0]), int(ids[-1]))
    return ids


# A layer of X


class SomaMatrix(StoredMatrix):
    """The rows of an open SOMA SparseNDArray or DenseNDArray for `ids`; its shape may have room
    for more columns than there are genes."""

    def __init__(self, array: Any, ids: JoinIds, name: str) -> None:
        self.name, self.address, self._array, self._ids = name, str(array.uri), array, ids
        self.shape = (len(ids), int(array.shape[1]))
        self._longest = 0.0  # Entries per row of the longest block read so far.

    def fitting(self, start: int, stop: int) -> int:
        """Rows of BLOCK_ENTRIES at most, if they are as long as those of the longest block so far:
        the length of rows is known only after reading."""
        fitting = max(1, int(BLOCK_ENTRIES / self._longest)) if self._longest else _FIRST_ROWS
        return min(stop, start + fitting)

    def some(self) -> np.ndarray:
        rows = range(0, len(self._ids), max(1, len(self._ids) // _PROBED_PLACES))
        return self._read(np.array([self._ids.read(row, row + 1)[0] for row in rows]), 0).data

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Implements StoredMatrix. DataError if they cannot be read."""
        block = self._read(self._ids.read(start, stop), start)
        self._longest = max(self._longest, len(block.data) / max(1, len(block)), 1.0)
        return block

    def _read(self, ids: np.ndarray, start: int) -> CountBlock:
        try:
            is_dense = self._array.soma_type == "SOMADenseNDArray"
            parts = self._dense(ids) if is_dense else self._sparse(ids)
        except FAILURES as error:
            what = f"the rows of joinids {ids[0]:,} to {ids[-1]:,} cannot be read"
            raise unreadable(self.name, what, error) from error
        indptr = np.zeros(len(ids) + 1, np.int64)
        for rows, _, _ in parts:
            count_rows(rows, indptr[1:])
        indptr = np.cumsum(indptr)
        values, columns = np.empty(int(indptr[-1])), np.empty(int(indptr[-1]), np.int32)
        nexts = indptr[:-1].copy()
        while parts:  # Each is freed once its entries are placed.
            place_entries(*parts.pop(0), nexts, columns, values)
        _sort_columns(indptr, columns, values)
        return CountBlock(values, columns, indptr, start)

    def _sparse(self, ids: np.ndarray) -> list[Entries]:
        coordinates, parts = as_coordinates(ids), []
        for table in self._array.read((coordinates,)).tables():
            rows, columns, values = (table[name].to_numpy() for name in _SPARSE)
            is_run = isinstance(coordinates, slice)
            places = rows - ids[0] if is_run else np.searchsorted(ids, rows)
            parts.append(_part(places, columns, values))
        return parts

    def _dense(self, ids: np.ndarray) -> list[Entries]:
        parts = []
        most = max(1, _BAND_VALUES // self.shape[1])
        place = 0
        for run in np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1):
            for first in range(int(run[0]), int(run[-1]) + 1, most):
                last = min(first + most - 1, int(run[-1]))
                rows = self._array.read((slice(first, last),)).to_numpy()
                places, columns = np.nonzero(rows)
                parts.append(_part(places + place, columns, rows[places, columns]))
                place += len(rows)
        return parts


def _part(places: np.ndarray, columns: np.ndarray, values: np.ndarray) -> Entries:
    # Two kinds of value, so that the compiled loops exist in two variants.
    kind = np.float32 if values.dtype == np.float32 else np.float64
    # What int32 does not hold must not become another column: the highest is none, and refused.
    columns = np.minimum(columns, np.iinfo(np.int32).max)
    return places.astype(np.int32), columns.astype(np.int32), values.astype(kind)


@compiled
def _sort_columns(indptr: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
    """Puts the entries of every CSR row whose columns do not ascend in order of its columns."""
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        ascends = True
        for entry in range(start + 1, stop):
            ascends &= columns[entry] > columns[entry - 1]
        if not ascends:
            order = np.argsort(columns[start:stop], kind="mergesort")
            columns[start:stop] = columns[start:stop][order]
            values[start:stop] = values[start:stop][order]


class ExperimentCounts(Counts):
    """A SOMA Experiment, open for reading; num_columns: up to the last gene of var."""

    _matrix: SomaMatrix

    def __init__(
        self,
        address: str | Path,
        layer: str | None = None,
        allow_normalised: bool = False,
        value_filter: str | None = None,
        joinids: np.ndarray | None = None,
        allow_external: bool = False,
    ) -> None:
        """Opens the Experiment at `address`, a path or URI, or the human one of a Census there.

        layer:         of X ("raw" or "X/raw"), or "ms/MEASUREMENT/X/LAYER"; None: see PLACES
        value_filter:  SOMA's, over obs: only cells for which it holds
        joinids:       int64, ascending: only these cells
        allow_external:  members and files may lie elsewhere
        Raises DataError if it cannot be read, or has no such layer or cells.
        """
        super().__init__(allow_normalised)
        self.name = str(address)
        self.stem = self.name.rstrip("/").rsplit("/", 1)[-1]
        self._experiment = open_experiment(self.name, allow_external)
        try:
            if not allow_external:
                self._check_members()
            self._measurements = self._find_measurements()
            self._choose_cells(value_filter, joinids)
            self._open_matrix(layer)
        except BaseException as error:
            self.close()
            if isinstance(error, FAILURES):
                raise unreadable(self.name, "cannot be read", error) from error
            raise

    def _choose_cells(self, where: str | None, among: np.ndarray | None) -> None:
        obs = SomaFrame(self._experiment["obs"], f"{self.name}: obs")
        self._ids = JoinIds(obs.joinids(where, among))
        self.num_cells, self._obs_address = len(self._ids), obs.address
        if among is not None and where is None and self.num_cells != len(among):
            raise DataError(
                f"{self.name}: obs holds {self.num_cells:,} of the {len(among):,} cells requested."
            )
        if not self.num_cells:
            chosen = " for which the filter holds" if where else ""
            raise DataError(
                f"{self.name}: no cells{chosen}: there is nothing to encode. Remedy: leave it out."
            )
        self._obs = CellFrame(obs, self._ids)

    def _open_matrix(self, layer: str | None) -> None:
        there = self._measurements
        wanted: Sequence[str] = PLACES
        if layer is not None:
            wanted = [layer if layer in there else f"X/{layer.removeprefix('X/')}"]
        places = list(dict.fromkeys(filter(None, map(self._place, wanted))))
        if not places:
            raise self._no_matrix(wanted)

        def open_place(place: str) -> SomaMatrix:
            array = there[place]["X"][place.rpartition("X/")[2]]
            return SomaMatrix(array, self._ids, f"{self.name}: {place}")

        self.location, self.passed_over, self._matrix = self._first_of_counts(places, open_place)
        measurement = there[self.location]
        var = SomaFrame(measurement["var"], f"{self.name}: var")
        genes = var.joinids(None, None)
        if not len(genes):
            raise DataError(
                f"{self.name}: var names no genes: there is nothing to encode. Remedy: leave it "
                "out."
            )
        # tiledbsoma.io once gave every X room for 2,147,483,646 genes.
        self.num_columns = min(self._matrix.shape[1], int(genes[-1]) + 1)
        self._var, self._var_address = GeneFrame(var, self.num_columns), var.address

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The cells chosen and, where it is on this machine, the time of the last write in ms.

        A Census in S3 is never written again.
        """
        addresses = (self._obs_address, self._var_address, self._matrix.address)
        return {
            "cells": self.num_cells,
            "chosen": sha256(self._ids.describe()).hexdigest()[:16],
            "written_ms": max(map(last_write_ms, addresses)),
        }

    def close(self) -> None:
        self._experiment.close()

    def _layers(self) -> list[str]:
        return list(self._measurements)

    def _check_members(self) -> None:
        check_members(self._experiment, self.name)
        if "ms" in self._experiment:
            check_members(self._experiment["ms"], self.name)
            for measurement in self._experiment["ms"].values():
                check_members(measurement, self.name)
                if "X" in measurement:
                    check_members(measurement["X"], self.name)

    def _place(self, wanted: str) -> str | None:
        there = [place for place in self._measurements if place.startswith(wanted)]
        if wanted.endswith("X/"):
            return there[0] if len(there) == 1 else None
        return wanted if wanted in there else None

    def _find_measurements(self) -> dict[str, Any]:
        """{place of a layer: its measurement}: X/LAYER of RNA, or of the only one besides `raw`,
        and ms/MEASUREMENT/X/LAYER of the others."""
        measurements = self._experiment.get("ms", {})
        others = [name for name in measurements if name != "raw"]
        main = "RNA" if "RNA" in others or len(others) != 1 else others[0]
        found: dict[str, Any] = {}
        for name, measurement in measurements.items():
            prefix = "" if name == main else f"ms/{name}/"
            layers = measurement.get("X", {})
            found |= {f"{prefix}X/{layer}": measurement for layer in layers}
        return found

    def _no_matrix(self, wanted: Iterable[str]) -> DataError:
        return DataError(
            f"{self.name}: no layer {' or '.join(wanted)}; it has: "
            f"{', '.join(self._measurements) or 'none'}. Remedy: name the layer of the raw "
            "counts with `counts_layer=`, as it is listed here."
        )
