"""What is to be fetched of a Census: which cells, in which pieces; the same for all who fetch.

    release, filter  ->  cells by data set, in order of their joinids  ->  pieces of bounded size
                     ->  plan.json  <->  CensusPlan

A piece is the cells of one data set between two joinids, for which the filter holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from geneformer_mcore.cells.census import (
    CARD_FILTER,
    ORGANISM,
    STABLE,
    TABLE_COLUMNS,
    Release,
    read_cells,
)
from geneformer_mcore.errors import DataError
from geneformer_mcore.store.sealed_json import read_sealed, write_sealed

PLAN_FILE = "plan.json"
CELLS_PER_UNIT = 32_768
VERSION = 1

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Selection:
    """Which cells of which Census, as it was asked for.

    source:         a version of the Census, or the address of an Experiment
    value_filter:   SOMA's, over obs; "" for all cells
    limit_cells:    at most so many cells, of the first data sets by id; None: all
    """

    source: str = STABLE
    organism: str = ORGANISM
    value_filter: str = CARD_FILTER
    cells_per_unit: int = CELLS_PER_UNIT
    limit_cells: int | None = None

    def __post_init__(self) -> None:
        for name in ("cells_per_unit", "limit_cells"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise DataError(f"--{name.replace('_', '-')} must be 1 or more, not {number}.")


@dataclass(frozen=True)
class CensusUnit:
    """One file to fetch: `cells` cells of a data set, their joinids in first..last."""

    name: str
    dataset_id: str
    cells: int
    first: int
    last: int

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
    table: tuple[tuple[str, str, str, int], ...]

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
        kept: dict[str, Any] = {field.name: content[field.name] for field in fields(cls)}
        kept["selection"] = Selection(**kept["selection"])
        kept["units"] = tuple(CensusUnit(**unit) for unit in kept["units"])
        kept["table"] = tuple(tuple(row) for row in kept["table"])
        return cls(**kept)

    def check_given(self, given: Mapping[str, Any], folder: Path) -> None:
        """Raises DataError if the plan was made for other cells; given: fields of Selection."""
        ours = asdict(self.selection)
        different = [name for name in given if given[name] != ours[name]]
        if different:
            told = "; ".join(f"{name} {ours[name]!r}, not {given[name]!r}" for name in different)
            raise DataError(
                f"{folder / PLAN_FILE} is of another selection: {told}. Remedy: the same options "
                "as before (or none, to go on), or another --out."
            )


def prepare_plan(
    folder: Path,
    given: Mapping[str, Any],
    find: Callable[[Selection], Release],
    progress: Callable[[int], None] = lambda cells: None,
) -> CensusPlan:
    """The plan that stands in `folder`, or a new one, which is left there.

    given:  the fields of Selection that were asked for, all others are the plan's or the defaults
    find:   finds the Census, asked only for a new plan
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
    """Reads what each cell is of; 12 bytes of memory per cell. progress: with cells seen so far.

    DataError if nothing is left by the filter, or a data set cannot name a file.
    """
    seen = _Seen()
    for table in read_cells(address, selection.value_filter or None):
        seen.add(table.to_pandas())
        progress(seen.cells)
    units: list[CensusUnit] = []
    rows: list[tuple[str, str, str, int]] = []
    left = seen.cells if selection.limit_cells is None else selection.limit_cells
    for dataset_id in sorted(seen.parts):
        joinids, kinds = seen.of(dataset_id, left)
        units += _pieces(dataset_id, joinids, selection.cells_per_unit)
        rows += [(dataset_id, *labels, cells) for labels, cells in seen.count(kinds)]
        left -= len(joinids)
    if not units:
        raise DataError(
            f"{address}: no cell for which the filter {selection.value_filter!r} holds. Remedy: "
            "check --filter."
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
        for names, places in rows.groupby(
            [name for name in TABLE_COLUMNS if name in rows], observed=True, dropna=False
        ).indices.items():
            named = dict(
                zip((c for c in TABLE_COLUMNS if c in rows), _as_tuple(names), strict=True)
            )
            dataset_id, *labels = (_text(named.get(column)) for column in TABLE_COLUMNS)
            kind = self._kinds.setdefault((labels[0], labels[1]), len(self._kinds))
            kinds = np.full(len(places), kind, np.int32)
            self.parts.setdefault(dataset_id, []).append((joinids[places], kinds))

    def of(self, dataset_id: str, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `most` cells of a data set: (joinids, ascending; kinds)."""
        joinids, kinds = (
            np.concatenate(part) for part in zip(*self.parts[dataset_id], strict=True)
        )
        order = np.argsort(joinids)[:most]
        return joinids[order], kinds[order]

    def count(self, kinds: np.ndarray) -> list[tuple[tuple[str, str], int]]:
        """[((assay, tissue), cells)], sorted."""
        numbers = np.bincount(kinds, minlength=len(self._kinds))
        return sorted(
            (labels, int(numbers[kind])) for labels, kind in self._kinds.items() if numbers[kind]
        )


def _as_tuple(names: Any) -> tuple[Any, ...]:
    return names if isinstance(names, tuple) else (names,)


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _pieces(dataset_id: str, joinids: np.ndarray, cells_per_unit: int) -> list[CensusUnit]:
    if not _SAFE_NAME.fullmatch(dataset_id):
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
