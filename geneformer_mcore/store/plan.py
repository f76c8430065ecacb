"""What is to be done for a store: its inputs cut into units of work, each with a name of its own.

    inputs, vocabulary, options, split  ->  units of rows  ->  name: a digest of what they depend on
                                        ->  plan.json, for the processes that share the work

A unit's name holds for any store that wants these rows told in this way, so finished units outlive
a killed build, and also one to which an input was added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from geneformer_mcore import __version__
from geneformer_mcore.cells.corpus import InputOptions
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.errors import DataError
from geneformer_mcore.store.buckets import count_buckets
from geneformer_mcore.store.sealed_json import checksum_of, read_sealed, write_sealed
from geneformer_mcore.store.sources import Refusal, Source
from geneformer_mcore.store.split import SplitRule

MOST_ROWS_PER_UNIT = 16_384
"""About 50 MB of cells, of which a worker holds two copies for a moment."""

LEAST_ROWS_PER_UNIT = 4096
_UNITS_WANTED = 64
"""So many at least, as long as they do not become too small: none is waited for at the end then."""

PLAN_FILE = "plan.json"
_UNIT_FORMAT = 1
"""To be raised when the same rows come to make another file."""


@dataclass(frozen=True)
class Recipe:
    """All that a cell's tokens and split depend on beside its own input."""

    vocabulary: Vocabulary
    seq_length: int
    options: InputOptions
    split_rule: SplitRule

    def describe(self) -> dict[str, Any]:
        """The same as plain JSON."""
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
    """Rows start..stop-1 of a source, done by one worker at one go.

    index:  its place among all units
    name:   digest of all that its cells depend on
    """

    index: int
    name: str
    source: Source
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"rows {self.start:,} to {self.stop - 1:,} of {self.source.name}"


@dataclass(frozen=True)
class Plan:
    """The units of a store, and the inputs it has to do without."""

    recipe: Recipe
    sources: tuple[Source, ...]
    refusals: tuple[Refusal, ...]
    num_buckets: int
    units: tuple[Unit, ...]

    def describe(self) -> dict[str, Any]:
        """What processes that share the work must agree on, as plain JSON."""
        inputs = {source.address: source.identity for source in self.sources}
        refused = [refusal.name for refusal in self.refusals]
        return self.recipe.describe() | {"inputs": inputs, "refused": refused}


@dataclass(frozen=True)
class Part:
    """Every `number`th unit, from `index` on: what one of several commands does."""

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
    sources: Sequence[Source],
    refusals: Sequence[Refusal],
) -> Plan:
    """The plan for these inputs; sources must be in order of their addresses."""
    num_cells = sum(source.num_cells for source in sources)
    num_buckets = count_buckets(num_cells)
    told = checksum_of(recipe.describe())
    units: list[Unit] = []
    for source in sources:
        for start, stop in _cut(source.num_cells, _rows_per_unit(num_cells)):
            name = _unit_name(told, source, start, stop, num_buckets)
            units.append(Unit(len(units), name, source, start, stop))
    return Plan(recipe, tuple(sources), tuple(refusals), num_buckets, tuple(units))


def _rows_per_unit(num_cells: int) -> int:
    # A power of two, so that it rarely changes when an input comes in or goes out.
    rows = 1 << max(0, (num_cells // _UNITS_WANTED).bit_length() - 1)
    return min(max(rows, LEAST_ROWS_PER_UNIT), MOST_ROWS_PER_UNIT)


def _cut(num_rows: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of spans of nearly equal length, none longer than `most`."""
    number = -(-num_rows // most)
    edges = [num_rows * place // number for place in range(number + 1)]
    return list(pairwise(edges))


def _unit_name(told: str, source: Source, start: int, stop: int, num_buckets: int) -> str:
    return checksum_of([told, source.address, source.identity, start, stop, num_buckets])[:32]


def declare(plan: Plan, folder: Path) -> None:
    """Leaves the plan in `folder`, for parts to compare theirs with."""
    write_sealed(folder / PLAN_FILE, plan.describe())


def join(plan: Plan, folder: Path) -> None:
    """Declares the plan, or raises DataError if another one stands in `folder`."""
    theirs, ours = read_sealed(folder / PLAN_FILE), plan.describe()
    if theirs is None:
        declare(plan, folder)
        return
    different = sorted(key for key in ours if ours[key] != theirs.get(key))
    if different:
        raise DataError(
            f"{folder}: the parts done so far were asked for otherwise: {', '.join(different)} "
            "differ. All parts must be given the same inputs and options. Remedy: give them, or "
            f"remove {folder} if those parts are of no use any more."
        )
