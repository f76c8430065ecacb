"""Fetching the units of a Census: each a file of its own, whole or not there, and provably so.

    unit  ->  done before? (record: bytes, SHA-256)  ->  skipped
          ->  fetched, with retries  ->  .NAME.partial  ->  NAME.h5ad  ->  done/NAME.json

A unit that is missing, cut or changed is fetched again by the next call.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from geneformer_mcore.cells.census import fetch_cells
from geneformer_mcore.cells.output import UnwritableError, whole_file
from geneformer_mcore.errors import DataError, NetworkError
from geneformer_mcore.store.census_plan import CensusPlan, CensusUnit
from geneformer_mcore.store.lock import FolderLock
from geneformer_mcore.store.progress import Progress, no_progress
from geneformer_mcore.store.retry import Retry
from geneformer_mcore.store.sealed_json import checksum_of, read_sealed, write_sealed
from geneformer_mcore.store.workers import Workers

DONE_FOLDER = "done"
_WRITE_FAILED = "file write failed"
_HDF5_BYTES = 1 << 20
"""What HDF5 takes for itself, generously."""

GIVE_UP_AFTER = 3
"""So many units in a row that the network spoils, and no more are begun."""


@dataclass(frozen=True)
class Outcome:
    """What became of the units: how many were there already, fetched, and failed, and why."""

    there: int
    fetched: int
    not_begun: int
    network: list[str]
    wrong: list[str]


@dataclass(frozen=True)
class Fetching:
    """The work of fetching one unit of a plan into `folder` (a workers.Work)."""

    folder: Path
    plan_head: tuple[str, str]
    retry: Retry = field(default_factory=Retry)

    @classmethod
    def of(cls, plan: CensusPlan, folder: Path, retry: Retry | None = None) -> Fetching:
        """For the units of `plan`."""
        return cls(folder, (plan.address, plan.selection.value_filter), retry or Retry())

    def __call__(self, job: CensusUnit, tell: Callable[[int], None]) -> None:
        """Raises NetworkError, or another DataError if the cells are not those of the plan."""
        address, value_filter = self.plan_head
        wanted = (address, value_filter or None, job.dataset_id, job.first, job.last)
        attempts = _Attempts(tell)
        cells = self.retry.call(job.name, lambda: fetch_cells(*wanted, attempts.begin()))
        if cells.n_obs != job.cells:
            raise DataError(
                f"{job.name}: the Census gives {cells.n_obs:,} cells, the plan says "
                f"{job.cells:,}: it is another one now. Remedy: a new --out."
            )
        self._write(job, cells)

    def _write(self, unit: CensusUnit, cells: Any) -> None:
        path = self.folder / unit.file
        with whole_file(path) as partial:
            _check_room(partial, cells)
            try:
                cells.write_h5ad(partial, compression="lzf")
            except RuntimeError as error:
                # HDF5's word for a full disk, where it notices as it closes the file.
                if _WRITE_FAILED not in str(error):
                    raise
                raise OSError(" ".join(str(error).split())) from error
            size, digest = partial.stat().st_size, _digest(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        record = {"of": self._identity(unit), "bytes": size, "sha256": digest}
        write_sealed(_record_path(self.folder, unit), record)

    def problem(self, unit: CensusUnit) -> str | None:
        """Why the unit is not there as it should be; None if it is. Reads all of its file."""
        path = self.folder / unit.file
        record = read_sealed(_record_path(self.folder, unit))
        if record is None or record.get("of") != self._identity(unit) or not path.is_file():
            return "not fetched"
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"{size:,} bytes of {record['bytes']:,}"
        return None if _digest(path) == record["sha256"] else "changed since it was fetched"

    def _identity(self, unit: CensusUnit) -> str:
        return checksum_of([*self.plan_head, asdict(unit)])


class _Attempts:
    """Tells of cells once, however often they are read."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell, self._told, self._read = tell, 0, 0

    def begin(self) -> Callable[[int], None]:
        self._read = 0
        return self._count

    def _count(self, cells: int) -> None:
        self._read += cells
        self._tell(max(0, self._read - self._told))
        self._told = max(self._read, self._told)


def fetch_units(
    fetching: Fetching,
    units: Sequence[CensusUnit],
    workers: int = 1,
    part: str | None = None,
    progress: Progress = no_progress,
) -> Outcome:
    """Fetches those of `units` that are not there. A unit's failure does not keep others back,
    unless its file cannot be written: no more are begun then, to be downloaded in vain.

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

    def tell(_: CensusUnit, cells: int) -> None:
        nonlocal done
        done += cells
        progress("fetching", done, total)

    def is_wanted(_: CensusUnit) -> bool:
        return is_writable and in_a_row < GIVE_UP_AFTER

    with Workers(workers) as pool:
        for _, result in pool.run(fetching, missing, tell, is_wanted):
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
    """Raises OSError if the disk has no room for `cells`, not compressed. To let HDF5 find out may
    end the process: after a write that fails, it follows stray pointers (seen in version 2.0)."""
    matrix = cells.X
    tables = sum(int(table.memory_usage(deep=True).sum()) for table in (cells.obs, cells.var))
    needed = matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes + tables
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, needed + _HDF5_BYTES)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            # This file system cannot reserve room, which says nothing of what there is.


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
