"""The split of a cell, a pure function of its key: at random, or by the role of its data set.

cell_key  ->  RandomSplit  ->  train | validation | test
cell_key, dataset_id  ->  SplitTable: role  ->  train | test | held out: validation or test
roles of data sets  ->  SplitTable  <->  split.json (with its checksum)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.files import checksum_of, read_sealed, whole_file
from geneformer_mcore.io.schema import Count, Share, as_type
from geneformer_mcore.store.keys import split_draws

SPLITS = ("train", "validation", "test")
"""In the order of their rows in a store; a split's code is its index here."""


class SplitRule(Protocol):
    """Assigns cells to splits."""

    def assign(self, keys_N: np.ndarray, dataset_ids: Sequence[str]) -> np.ndarray:
        """int8 [N], the code of each cell's split; a pure function of the arguments."""
        ...

    def describe(self) -> dict[str, object]:
        """The rule in the manifest (plain JSON)."""
        ...


@dataclass(frozen=True)
class RandomSplit:
    """Cells at random, by a hash of their key: the same cell always falls into the same split.

    validation_fraction, test_fraction: expected shares, each >= 0, together < 1 (else DataError).
    """

    validation_fraction: float = 0.05
    test_fraction: float = 0.05

    def __post_init__(self) -> None:
        held_out = self.validation_fraction + self.test_fraction
        if not (self.validation_fraction >= 0 and self.test_fraction >= 0 and held_out < 1):
            raise DataError(
                "the fractions of validation and test must be >= 0 and together below 1, not "
                f"{self.validation_fraction} and {self.test_fraction}."
            )

    def assign(self, keys_N: np.ndarray, dataset_ids: Sequence[str]) -> np.ndarray:
        """int8 [N], the code of each cell's split."""
        draws = split_draws(keys_N)
        in_validation = draws < self.validation_fraction
        in_test = ~in_validation & (draws < self.validation_fraction + self.test_fraction)
        return (in_validation * 1 + in_test * 2).astype(np.int8)

    def describe(self) -> dict[str, object]:
        """The rule's name and fractions."""
        return {
            "policy": "random",
            "validation_fraction": self.validation_fraction,
            "test_fraction": self.test_fraction,
        }


TRAIN, HELD_OUT, TEST = "train", "held-out", "test"
ROLES = (TRAIN, HELD_OUT, TEST)
"""Use of a data set's cells: training; validation and test, assigned at random; test alone."""

REFUSE = "refuse"
UNLISTED = (REFUSE, TRAIN)
"""Treatment of a data set that the table does not list."""

FORMAT = "geneformer_mcore split"
VERSION = 1
_CODES = {HELD_OUT: np.int8(-1)} | {split: np.int8(code) for code, split in enumerate(SPLITS)}


@dataclass(frozen=True)
class SplitTable:
    """Assigns cells to splits by their data set (a SplitRule).

    policy, seed, held_out_fraction: how the roles were chosen (see policy.choose_roles)
    roles:             {dataset_id: "train", "held-out" or "test"}
    cells:             {dataset_id: cells} of the corpus the roles were chosen for
    labels:            {column: how many labels are known, all of which occur in training}
    validation_share:  of the cells of held-out data sets, the expected part for validation
    unlisted:          "refuse" or "train": a data set without a role
    Raises DataError for roles, shares or numbers that cannot be.
    """

    policy: str
    seed: int
    held_out_fraction: Share
    roles: Mapping[str, str]
    cells: Mapping[str, Count]
    labels: Mapping[str, Count]
    validation_share: Share = 0.5
    unlisted: str = REFUSE

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise DataError(f"split: {problem}")

    def assign(self, keys_N: np.ndarray, dataset_ids: Sequence[str]) -> np.ndarray:
        """int8 [N], the code of each cell's split. DataError for a data set without a role."""
        distinct = set(dataset_ids)
        self.check(distinct)
        code_of = {name: _CODES[self.roles.get(name, self.unlisted)] for name in distinct}
        codes_N = np.array([code_of[name] for name in dataset_ids], np.int8)
        in_validation_N = split_draws(keys_N) < self.validation_share
        held_out_N = np.where(in_validation_N, _CODES["validation"], _CODES["test"])
        return np.where(codes_N == _CODES[HELD_OUT], held_out_N, codes_N).astype(np.int8)

    def check(self, dataset_ids: Iterable[str]) -> None:
        """Raises DataError if one of the data sets has no role, and unlisted ones are refused."""
        missing = sorted(set(dataset_ids) - set(self.roles)) if self.unlisted == REFUSE else []
        if missing:
            raise DataError(
                f"the split names {len(self.roles):,} data sets, and {len(missing):,} of the "
                f"input are not among them: {', '.join(missing[:3])}. Remedy: make_split.py over "
                "all inputs, or with --unlisted train."
            )

    def describe(self) -> dict[str, object]:
        """How the split was made, and the checksum of the whole table."""
        return {
            "policy": self.policy,
            "seed": self.seed,
            "held_out_fraction": self.held_out_fraction,
            "validation_share": self.validation_share,
            "unlisted": self.unlisted,
            "datasets": self.count_datasets(),
            "checksum": self.checksum,
        }

    @property
    def checksum(self) -> str:
        """SHA-256, as hex, of all fields in their canonical JSON form."""
        return checksum_of(asdict(self))

    def count_datasets(self) -> dict[str, int]:
        """{role: data sets}."""
        return {role: sum(found == role for found in self.roles.values()) for role in ROLES}

    def count_cells(self) -> dict[str, int]:
        """{role: cells of the corpus}."""
        return {
            role: sum(self.cells[name] for name, found in self.roles.items() if found == role)
            for role in ROLES
        }

    def save(self, path: str | Path) -> None:
        """Writes JSON, whole or not at all. Raises DataError if it cannot be written."""
        counted = {"datasets": self.count_datasets(), "cells": self.count_cells()}
        content = {"format": FORMAT, "version": VERSION, "counted": counted, "table": asdict(self)}
        text = json.dumps(content | {"checksum": checksum_of(content)}, indent=1)
        with whole_file(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SplitTable:
        """Reads what `save` wrote. Raises DataError unless it is whole and its checksum holds."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: there is no such file. Remedy: data_prep/make_split.py.")
        content = read_sealed(path)
        if content is None or content.get("format") != FORMAT:
            raise DataError(
                f"{path}: not a whole split.json, or changed since it was written. Remedy: make it "
                "again with data_prep/make_split.py."
            )
        if content.get("version") != VERSION:
            raise DataError(
                f"{path}: version {content.get('version')!r} of split.json, this program reads "
                f"{VERSION}. Remedy: make it again with data_prep/make_split.py."
            )
        return as_type(content, _File, path, "make it again with data_prep/make_split.py").table


@dataclass(frozen=True)
class _File:
    """split.json without its checksum. counted: for people."""

    format: str
    version: int
    counted: dict[str, Any]
    table: SplitTable


def _problem(table: SplitTable) -> str | None:
    if not table.roles or set(table.roles.values()) - set(ROLES):
        return f"every data set's role is one of {', '.join(ROLES)}, and there is at least one."
    if set(table.roles) != set(table.cells):
        return "roles and cells must be of the same data sets."
    if not 0 <= table.validation_share <= 1:
        return f"the share of validation must lie in 0 to 1, not {table.validation_share:g}."
    if table.unlisted not in UNLISTED:
        return f"unlisted data sets are for {' or '.join(UNLISTED)}, not {table.unlisted!r}."
    return None
