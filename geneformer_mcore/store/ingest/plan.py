"""Units of work of a store: their plan, and the file of a finished one.

    inputs, vocabulary, options, split  ->  units of rows  ->  name: a digest of what they depend on
                                        ->  plan.json, for the processes that share the work
    cells, ordered by bucket  ->  NAME.arrows: an Arrow IPC stream, one record batch per bucket
                              ->  NAME.json: offset of each batch, SHA-256 of the file, UnitReport

By their names finished units outlive a killed build, and are used by any store that needs the same
rows encoded alike. The JSON is written last: a unit without it, or that does not fit it, is redone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.files import checksum_of, file_digest, read_sealed, replacing, write_sealed
from geneformer_mcore.io.schema import Count, Digest, Finite, as_type
from geneformer_mcore.store.ingest.buckets import count_buckets
from geneformer_mcore.store.ingest.sources import InputSource, Refusal
from geneformer_mcore.store.split.table import SplitRule
from geneformer_mcore.tokenizer.genes import InputOptions
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.version import __version__

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True)
class UnitReport:
    """The content of a unit's file, and numbers of its rows.

    offsets:          byte at which each bucket's batch starts, then where the last one ends
    cells_of_split:   cells in the file, by split
    tokens:           token ids of them all
    skipped:          {reason: cells} of the others
    counts, known_counts:  sum of all counts read; of those the genes of the vocabulary hold
    cells_cut:        cells with more known genes than seq_length has room for
    lengths:          cells in the file by number of tokens, 0 .. seq_length
    datasets:         names of data sets, sorted
    """

    sha256: Digest
    offsets: list[Count]
    cells_in: Count
    cells_of_split: dict[str, Count]
    tokens: Count
    skipped: dict[str, Count]
    counts: Finite
    known_counts: Finite
    cells_cut: Count
    lengths: list[Count]
    datasets: list[str]

    @property
    def num_bytes(self) -> int:
        """Size of the file of cells."""
        return self.offsets[-1] + len(_END_OF_STREAM)

    @property
    def cells_stored(self) -> int:
        """Cells in the file."""
        return sum(self.cells_of_split.values())


def write_cells(
    folder: Path, name: str, cells: pa.Table, starts: np.ndarray
) -> tuple[str, list[int]]:
    """Writes the file of cells; (its SHA-256, its offsets), see UnitReport.

    cells: in one chunk, ordered by bucket; starts: int64 [buckets + 1], the first row of each.
    """
    digest, offsets = hashlib.sha256(), []
    with replacing(folder / f"{name}.arrows") as partial, partial.open("wb") as file:

        def write(part: pa.Buffer | bytes) -> None:
            digest.update(part)
            file.write(part)

        write(cells.schema.serialize())
        batch = pa.RecordBatch.from_struct_array(cells.to_struct_array().combine_chunks())
        # A slice of no rows would be written with all offsets of its text (pyarrow 26).
        empty = pa.RecordBatch.from_pylist([], cells.schema).serialize()
        for start, stop in pairwise(starts.tolist()):
            offsets.append(file.tell())
            write(batch.slice(start, stop - start).serialize() if stop > start else empty)
        offsets.append(file.tell())
        write(_END_OF_STREAM)
    return digest.hexdigest(), offsets


def write_report(folder: Path, name: str, report: UnitReport) -> None:
    """Declares the unit finished; to be called after `write_cells`."""
    write_sealed(folder / f"{name}.json", asdict(report))


def read_report(folder: Path, name: str) -> UnitReport | None:
    """The report of a unit that is there in full length; None if it must be done (again)."""
    path = folder / f"{name}.json"
    try:
        report = as_type(read_sealed(path), UnitReport, path, "do the unit again")
        size = (folder / f"{name}.arrows").stat().st_size
    except (DataError, OSError):
        return None
    return report if report.offsets and size == report.num_bytes else None


def read_sound_report(folder: Path, name: str) -> UnitReport | None:
    """The same, if also the cells fit their checksum: reads all of its file."""
    report = read_report(folder, name)
    if report is None:
        return None
    try:
        found = file_digest(folder / f"{name}.arrows")
    except OSError:
        return None
    return report if found == report.sha256 else None


class UnitReader:
    """Batches of a finished unit's file, by bucket."""

    def __init__(self, folder: Path, name: str, report: UnitReport, keep_open: bool) -> None:
        """keep_open: between reads, at the cost of an open file."""
        self.path = folder / f"{name}.arrows"
        self._offsets = np.array(report.offsets, np.int64)
        self._keep_open = keep_open
        self._descriptor = -1
        self.schema = pa.ipc.read_schema(pa.py_buffer(self._read(0, report.offsets[0])))

    def read(self, bucket: int) -> pa.RecordBatch:
        """The cells of one bucket (split * num_buckets + bucket); ValueError if it is damaged."""
        start, stop = self._offsets[bucket : bucket + 2].tolist()
        return pa.ipc.read_record_batch(pa.py_buffer(self._read(start, stop)), self.schema)

    def _read(self, start: int, stop: int) -> bytes:
        if self._descriptor < 0:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(self._descriptor, stop - start, start)
        finally:
            if not self._keep_open:
                self.close()

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def unit_names(folder: Path) -> list[str]:
    """Names of the units that are declared finished in `folder`."""
    return [path.stem for path in folder.glob("*.json")]


def remove_partial(folder: Path) -> None:
    """Removes files of killed writers."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def remove_others(folder: Path, names: Sequence[str]) -> None:
    """Removes all files of units but those of `names`."""
    wanted = {f"{name}{suffix}" for name in names for suffix in (".arrows", ".json")}
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink(missing_ok=True)


MOST_ROWS_PER_UNIT = 16_384
"""About 50 MB of cells, of which a worker holds two copies for a moment."""

LEAST_ROWS_PER_UNIT = 4096
_UNITS_WANTED = 64
"""At least so many, unless they become too small: for an even load at the end."""

PLAN_FILE = "plan.json"
_UNIT_FORMAT = 1
"""To be raised when the content of a unit's file changes."""


@dataclass(frozen=True)
class Recipe:
    """All that a cell's tokens and split depend on, besides its input."""

    vocabulary: Vocabulary
    seq_length: int
    options: InputOptions
    split_rule: SplitRule

    def describe(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "format": [_UNIT_FORMAT, __version__],
            "vocabulary": self.vocabulary.checksum,
            "seq_length": self.seq_length,
            "layer": self.options.layer,
            "allow_normalised": self.options.allow_normalised,
            "split": self.split_rule.describe(),
        }


@dataclass(frozen=True, eq=False)
class Unit:
    """Rows start..stop-1 of a source, the `index`th of all units; name: see the module."""

    index: int
    name: str
    source: InputSource
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"rows {self.start:,} to {self.stop - 1:,} of {self.source.name}"


@dataclass(frozen=True)
class Plan:
    """The units of a store, and the inputs that are left out."""

    recipe: Recipe
    sources: tuple[InputSource, ...]
    refusals: tuple[Refusal, ...]
    num_buckets: int
    units: tuple[Unit, ...]

    def describe(self) -> dict[str, Any]:
        """What all processes of a store must agree on, as plain JSON."""
        inputs = {source.address: source.identity for source in self.sources}
        refused = [refusal.name for refusal in self.refusals]
        return self.recipe.describe() | {"inputs": inputs, "refused": refused}


@dataclass(frozen=True)
class Part:
    """Every `number`th unit, from `index` on: the share of one of several commands."""

    index: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From "I/N", 0 <= I < N (else DataError)."""
        try:
            index, number = map(int, text.split("/"))
        except ValueError:
            index, number = 0, 0
        if not 0 <= index < number:
            raise DataError(
                f"a part is I/N with 0 <= I < N (0/8, 1/8, ... 7/8 for eight parts), not {text!r}."
            )
        return cls(index, number)

    def of(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """This part's units."""
        return units[self.index :: self.number]

    def __str__(self) -> str:
        return f"{self.index}/{self.number}"


def make_plan(
    recipe: Recipe,
    sources: Sequence[InputSource],
    refusals: Sequence[Refusal],
) -> Plan:
    """The plan for these inputs; sources must be in order of their addresses."""
    num_cells = sum(source.num_cells for source in sources)
    num_buckets = count_buckets(num_cells)
    recipe_hash = checksum_of(recipe.describe())
    units: list[Unit] = []
    for source in sources:
        for start, stop in _spans(source.num_cells, _rows_per_unit(num_cells)):
            parts = [recipe_hash, source.address, source.identity, start, stop, num_buckets]
            name = checksum_of(parts)[:32]
            units.append(Unit(len(units), name, source, start, stop))
    return Plan(recipe, tuple(sources), tuple(refusals), num_buckets, tuple(units))


def _rows_per_unit(num_cells: int) -> int:
    # A power of two, so that it rarely changes when an input is added or removed.
    rows = 1 << max(0, (num_cells // _UNITS_WANTED).bit_length() - 1)
    return min(max(rows, LEAST_ROWS_PER_UNIT), MOST_ROWS_PER_UNIT)


def _spans(num_rows: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of spans of nearly equal length, none longer than `most`."""
    number = -(-num_rows // most)
    return list(pairwise(num_rows * place // number for place in range(number + 1)))


def declare(plan: Plan, folder: Path) -> None:
    """Writes the plan to `folder`, for parts to compare theirs with."""
    write_sealed(folder / PLAN_FILE, plan.describe())


def join(plan: Plan, folder: Path) -> None:
    """Declares the plan, or raises DataError if another one is in `folder`."""
    theirs, ours = read_sealed(folder / PLAN_FILE), plan.describe()
    if theirs is None:
        declare(plan, folder)
        return
    different = sorted(key for key in ours if ours[key] != theirs.get(key))
    if different:
        raise DataError(
            f"{folder}: the parts done so far had other arguments: {', '.join(different)} "
            "differ. All parts must be given the same inputs and options. Remedy: give them, or "
            f"remove {folder} if those parts are of no use any more."
        )
