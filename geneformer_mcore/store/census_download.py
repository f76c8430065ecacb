"""Download of Census cells as h5ad files: the plan that all downloaders share, then its units.

    release, filter  ->  cells by data set, in order of their joinids  ->  units of bounded size
                     ->  plan.json  <->  CensusPlan
    unit  ->  done before? (record: bytes, SHA-256)  ->  skipped
          ->  fetched, with retries  ->  .NAME.partial  ->  NAME.h5ad  ->  done/NAME.json

A unit is the cells of one data set between two joinids that pass the filter. One that is missing,
truncated or changed is fetched again by the next call.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd

from geneformer_mcore.errors import DataError, NetworkError
from geneformer_mcore.io.census import (
    CARD_FILTER,
    ORGANISM,
    STABLE,
    TABLE_COLUMNS,
    Release,
    fetch_cells,
    read_cells,
)
from geneformer_mcore.io.files import (
    FolderLock,
    UnwritableError,
    checksum_of,
    file_digest,
    read_sealed,
    whole_file,
    write_sealed,
)
from geneformer_mcore.io.progress import Progress, no_progress
from geneformer_mcore.io.retry import Retry
from geneformer_mcore.io.schema import Count, Digest, Matching, Positive, as_type
from geneformer_mcore.io.workers import Workers

PLAN_FILE = "plan.json"
CELLS_PER_UNIT = 32_768
VERSION = 1

_SAFE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class Selection:
    """The requested cells of a Census.

    source:         a version of the Census, or the address of an Experiment
    value_filter:   SOMA's, over obs; "" for all cells
    limit_cells:    at most so many cells, of the first data sets by id; None: all
    """

    source: str = STABLE
    organism: str = ORGANISM
    value_filter: str = CARD_FILTER
    cells_per_unit: Positive = CELLS_PER_UNIT
    limit_cells: Positive | None = None

    def __post_init__(self) -> None:
        for name in ("cells_per_unit", "limit_cells"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise DataError(f"--{name.replace('_', '-')} must be 1 or more, not {number}.")


@dataclass(frozen=True)
class CensusUnit:
    """One file to fetch: `cells` cells of a data set, their joinids in first..last."""

    name: Annotated[str, Matching(_SAFE_NAME, "a name that files can have")]
    dataset_id: str
    cells: Positive
    first: Count
    last: Count

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.h5ad"


@dataclass(frozen=True)
class CensusPlan:
    """build, address: see census.Release; table: (dataset_id, assay, tissue_general, cells)."""

    selection: Selection
    build: str
    address: str
    units: tuple[CensusUnit, ...]
    table: tuple[tuple[str, str, str, Count], ...]

    @property
    def cells(self) -> int:
        """Of all units."""
        return sum(unit.cells for unit in self.units)

    def save(self, folder: Path) -> None:
        """Writes plan.json, whole or not at all. DataError if it cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_sealed(folder / PLAN_FILE, {"version": VERSION, **asdict(self)})
        except OSError as error:
            raise DataError(
                f"{folder / PLAN_FILE}: cannot be written: {error.strerror}."
            ) from error

    @classmethod
    def load(cls, folder: Path) -> CensusPlan:
        """Reads what `save` wrote. DataError if it is not there, damaged or of another version."""
        path = folder / PLAN_FILE
        if not path.is_file():
            raise DataError(
                f"{folder}: holds no {PLAN_FILE}. Remedy: data_prep/download_census.py."
            )
        content = read_sealed(path)
        if content is None or content.get("version") != VERSION:
            raise DataError(
                f"{path}: damaged, or of another version than {VERSION}. Remedy: remove it and "
                "start again; finished files stay."
            )
        del content["version"]
        return as_type(content, cls, path, "remove it and start again; finished files stay")

    def check_given(self, given: Mapping[str, Any], folder: Path) -> None:
        """Raises DataError if the plan was made for other cells; given: fields of Selection."""
        ours = asdict(self.selection)
        different = [name for name in given if given[name] != ours[name]]
        if different:
            what = "; ".join(f"{name} {ours[name]!r}, not {given[name]!r}" for name in different)
            raise DataError(
                f"{folder / PLAN_FILE} is of another selection: {what}. Remedy: the same options "
                "as before (or none, to go on), or another `out=`."
            )


def prepare_plan(
    folder: Path,
    given: Mapping[str, Any],
    find: Callable[[Selection], Release],
    progress: Callable[[int], None] = lambda cells: None,
) -> CensusPlan:
    """The plan in `folder`, or a new one, saved there.

    given:  the requested fields of Selection; all others are the plan's or the defaults
    find:   finds the Census, for a new plan
    DataError if the plan there is of another selection, or none can be made.
    """
    if (folder / PLAN_FILE).is_file():
        plan = CensusPlan.load(folder)
        plan.check_given(given, folder)
        return plan
    selection = Selection(**given)
    found = find(selection)
    plan = make_plan(selection, found.build, found.address, progress)
    plan.save(folder)
    return plan


def make_plan(
    selection: Selection, build: str, address: str, progress: Callable[[int], None]
) -> CensusPlan:
    """Reads the data set, assay and tissue of each cell, in 12 bytes per cell; progress: called
    with the cells so far. DataError if no cell passes, or a data set cannot name a file."""
    seen = _Seen()
    for table in read_cells(address, selection.value_filter or None):
        seen.add(table.to_pandas())
        progress(seen.cells)
    units: list[CensusUnit] = []
    rows: list[tuple[str, str, str, int]] = []
    left = seen.cells if selection.limit_cells is None else selection.limit_cells
    for dataset_id in sorted(seen.parts):
        joinids, kinds = seen.of(dataset_id, left)
        units += _units_of(dataset_id, joinids, selection.cells_per_unit)
        rows += [(dataset_id, *labels, cells) for labels, cells in seen.count(kinds)]
        left -= len(joinids)
    if not units:
        raise DataError(
            f"{address}: no cell for which the filter {selection.value_filter!r} holds. Remedy: "
            "check `value_filter=`."
        )
    return CensusPlan(selection, build, address, tuple(units), tuple(rows))


class _Seen:
    """parts: {dataset_id: [(joinids, kind of each cell)]}; a kind is an assay with a tissue."""

    def __init__(self) -> None:
        self.cells = 0
        self.parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._kinds: dict[tuple[str, str], int] = {}

    def add(self, rows: pd.DataFrame) -> None:
        self.cells += len(rows)
        joinids = rows["soma_joinid"].to_numpy()
        there = [name for name in TABLE_COLUMNS if name in rows]
        for names, places in rows.groupby(there, observed=True, dropna=False).indices.items():
            labels_of = names if isinstance(names, tuple) else (names,)
            named = dict(zip(there, labels_of, strict=True))
            dataset_id, *labels = (_text(named.get(column)) for column in TABLE_COLUMNS)
            kind = self._kinds.setdefault((labels[0], labels[1]), len(self._kinds))
            kinds = np.full(len(places), kind, np.int32)
            self.parts.setdefault(dataset_id, []).append((joinids[places], kinds))

    def of(self, dataset_id: str, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `most` cells of a data set: (joinids, ascending; kinds)."""
        joinids, kinds = map(np.concatenate, zip(*self.parts[dataset_id], strict=True))
        order = np.argsort(joinids)[:most]
        return joinids[order], kinds[order]

    def count(self, kinds: np.ndarray) -> list[tuple[tuple[str, str], int]]:
        """[((assay, tissue), cells)], sorted."""
        numbers = np.bincount(kinds, minlength=len(self._kinds))
        return sorted(
            (labels, int(numbers[kind])) for labels, kind in self._kinds.items() if numbers[kind]
        )


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _units_of(dataset_id: str, joinids: np.ndarray, cells_per_unit: int) -> list[CensusUnit]:
    if not re.fullmatch(_SAFE_NAME, dataset_id):
        raise DataError(
            f"the data set {dataset_id!r} cannot name a file (letters, digits, dot, dash and "
            "underscore can). Remedy: build_store.py reads the Experiment without files between."
        )
    starts = range(0, len(joinids), cells_per_unit)
    units = []
    for number, start in enumerate(starts):
        piece = joinids[start : start + cells_per_unit]
        name = dataset_id if len(starts) == 1 else f"{dataset_id}.{number:04}"
        units.append(CensusUnit(name, dataset_id, len(piece), int(piece[0]), int(piece[-1])))
    return units


DONE_FOLDER = "done"
_HDF5_BYTES = 1 << 20
"""What HDF5 takes for itself, generously."""

GIVE_UP_AFTER = 3
"""After so many network failures in a row no more units are begun."""


@dataclass(frozen=True)
class Outcome:
    """Numbers of units there before, fetched and not begun; messages of those that failed."""

    there: int
    fetched: int
    not_begun: int
    network: list[str]
    wrong: list[str]


@dataclass(frozen=True)
class _Record:
    """Of a finished unit. of: checksum of what was to be fetched; bytes, sha256: of its file."""

    of: str
    bytes: Count
    sha256: Digest


@dataclass(frozen=True)
class Fetching:
    """Fetches one unit of a plan into `folder` (a workers.Work)."""

    folder: Path
    plan_head: tuple[str, str]
    retry: Retry = field(default_factory=Retry)

    @classmethod
    def of(cls, plan: CensusPlan, folder: Path, retry: Retry | None = None) -> Fetching:
        """For the units of `plan`."""
        return cls(folder, (plan.address, plan.selection.value_filter), retry or Retry())

    def __call__(self, job: CensusUnit, advance: Callable[[int], None]) -> None:
        """Raises NetworkError, or another DataError if the cells are not those of the plan."""
        address, value_filter = self.plan_head
        wanted = (address, value_filter or None, job.dataset_id, job.first, job.last)
        attempts = _Attempts(advance)
        cells = self.retry.call(job.name, lambda: fetch_cells(*wanted, attempts.begin()))
        if cells.n_obs != job.cells:
            raise DataError(
                f"{job.name}: the Census gives {cells.n_obs:,} cells, the plan says "
                f"{job.cells:,}: it is another one now. Remedy: a new `out=`."
            )
        self._write(job, cells)

    def _write(self, unit: CensusUnit, cells: Any) -> None:
        path = self.folder / unit.file
        with whole_file(path, durable=True) as partial:
            _check_room(partial, cells)
            cells.write_h5ad(partial, compression="lzf")
            size, digest = partial.stat().st_size, file_digest(partial)
        record = _Record(self._identity(unit), size, digest)
        write_sealed(_record_path(self.folder, unit), asdict(record))

    def problem(self, unit: CensusUnit) -> str | None:
        """What is wrong with the unit's file, which is read; None if nothing is."""
        path = self.folder / unit.file
        try:
            place = _record_path(self.folder, unit)
            record = as_type(read_sealed(place), _Record, place, "fetch the unit again")
        except DataError:
            return "not fetched"
        if record.of != self._identity(unit) or not path.is_file():
            return "not fetched"
        size = path.stat().st_size
        if size != record.bytes:
            return f"{size:,} bytes of {record.bytes:,}"
        return None if file_digest(path) == record.sha256 else "changed since it was fetched"

    def _identity(self, unit: CensusUnit) -> str:
        return checksum_of([*self.plan_head, asdict(unit)])


class _Attempts:
    """Reports each cell once, however often it is read."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._reported, self._read = advance, 0, 0

    def begin(self) -> Callable[[int], None]:
        self._read = 0
        return self._count

    def _count(self, cells: int) -> None:
        self._read += cells
        self._advance(max(0, self._read - self._reported))
        self._reported = max(self._read, self._reported)


def fetch_units(
    fetching: Fetching,
    units: Sequence[CensusUnit],
    workers: int = 1,
    part: str | None = None,
    progress: Progress = no_progress,
) -> Outcome:
    """Fetches the missing `units`; a failure does not stop others, unless a file cannot be written.

    part: "I/N", where other processes fetch the other parts; None: no other may be at it.
    """
    lock = FolderLock(fetching.folder / DONE_FOLDER, str(fetching.folder), part)
    try:
        lock.take()
        return _fetch_missing(fetching, units, workers, progress)
    except OSError as error:
        raise DataError(f"{fetching.folder}: cannot be written: {error.strerror}.") from error
    finally:
        lock.release()


def _fetch_missing(
    fetching: Fetching, units: Sequence[CensusUnit], workers: int, progress: Progress
) -> Outcome:
    missing = [unit for unit, _ in find_missing(fetching, units, progress)]
    total, done = sum(unit.cells for unit in missing), 0
    network: list[str] = []
    wrong: list[str] = []
    in_a_row = fetched = 0
    is_writable = True

    def advance(_: CensusUnit, cells: int) -> None:
        nonlocal done
        done += cells
        progress("fetching", done, total)

    def is_wanted(_: CensusUnit) -> bool:
        return is_writable and in_a_row < GIVE_UP_AFTER

    with Workers(workers) as pool:
        for _, result in pool.run(fetching, missing, advance, is_wanted):
            if isinstance(result, NetworkError):
                network.append(str(result))
                in_a_row += 1
                continue
            in_a_row = 0
            is_writable &= not isinstance(result, UnwritableError)
            if isinstance(result, DataError):
                wrong.append(str(result))
            else:
                fetched += 1
    not_begun = len(missing) - fetched - len(network) - len(wrong)
    return Outcome(len(units) - len(missing), fetched, not_begun, network, wrong)


def _check_room(path: Path, cells: Any) -> None:
    """Raises OSError if the disk has no room for `cells`, not compressed: after a failed write HDF5
    may follow stray pointers and end the process (seen in version 2.0)."""
    matrix = cells.X
    tables = sum(int(table.memory_usage(deep=True).sum()) for table in (cells.obs, cells.var))
    needed = matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes + tables
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, needed + _HDF5_BYTES)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            # This file system cannot reserve room.


def find_missing(
    fetching: Fetching, units: Sequence[CensusUnit], progress: Progress = no_progress
) -> Iterator[tuple[CensusUnit, str]]:
    """(unit, what is wrong with it) of those that are not there as they should be."""
    for number, unit in enumerate(units):
        progress("checking", number, len(units))
        problem = fetching.problem(unit)
        if problem:
            yield unit, problem


def _record_path(folder: Path, unit: CensusUnit) -> Path:
    return folder / DONE_FOLDER / f"{unit.name}.json"
