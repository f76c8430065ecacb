"""Some cells of a file of counts: those with a label, a number of them drawn at random.

obs column = value, at most so many  ->  row numbers, ascending  ->  cell by cell: counts, sentence
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from geneformer_mcore.cells.normalise import CountBlock
from geneformer_mcore.contracts import RaggedCells
from geneformer_mcore.downstream.cells import CountedCells, naming_our_options
from geneformer_mcore.errors import ConfigError, DataError

MOST_LISTED = 12


@dataclass(frozen=True)
class CountedCell:
    """One cell, before and after it was ranked.

    place:      its number among the chosen cells
    columns_E:  int32, the columns in which it has entries;  counts_E: float64, what stands there
    tokens_T:   uint16, its sentence, [CLS] first
    """

    place: int
    columns_E: np.ndarray
    counts_E: np.ndarray
    tokens_T: np.ndarray


class ChosenCells:
    """The cells of `rows_N` (int64, ascending) of a file of counts. Implements cells.Cells."""

    path: Path | None = None

    def __init__(self, cells: CountedCells, rows_N: np.ndarray) -> None:
        self.cells, self.rows_N = cells, rows_N

    def __len__(self) -> int:
        return len(self.rows_N)

    def counted(self, start: int, stop: int) -> Iterator[CountedCell]:
        """The chosen cells start..stop-1, one by one."""
        place = start
        for block in self._blocks(start, stop):
            ranked = self.cells.encoder.encode(block, self.cells.genes.token_of_column)
            sentences = pairwise(ranked.offsets)
            for entries, tokens in zip(pairwise(block.indptr), sentences, strict=True):
                here = slice(*entries)
                yield CountedCell(
                    place, block.indices[here], block.data[here], ranked.tokens_T[slice(*tokens)]
                )
                place += 1

    def read(self, start: int, stop: int) -> RaggedCells:
        """Implements Cells."""
        found = [cell.tokens_T for cell in self.counted(start, stop)]
        return ragged(found)

    def obs(self) -> pd.DataFrame:
        """Implements Cells."""
        return self.cells.obs().iloc[self.rows_N]

    def close(self) -> None:
        """Implements Cells. The file belongs to whoever opened it."""

    def _blocks(self, start: int, stop: int) -> Iterator[CountBlock]:
        rows_N = self.rows_N[start:stop]
        # Neighbours in the file are read together.
        breaks = np.flatnonzero(np.diff(rows_N) != 1) + 1
        with naming_our_options():
            for run in np.split(rows_N, breaks):
                if len(run):
                    yield from self.cells.counts.blocks(start=int(run[0]), stop=int(run[-1]) + 1)


def ragged(sentences: list[np.ndarray]) -> RaggedCells:
    """Sentences (uint16 each) laid end to end; their keys are their numbers."""
    lengths = [len(tokens) for tokens in sentences]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens_T = np.concatenate([np.empty(0, np.uint16), *sentences])
    return RaggedCells(tokens_T, offsets, np.arange(len(sentences), dtype=np.uint64))


def rows_with(obs: pd.DataFrame, label: str, source: str) -> np.ndarray:
    """int64, the rows whose column has the value of `label`, "COLUMN=VALUE". Raises ConfigError
    for another form, DataError where there is no such column, or no cell with the value."""
    column, equals, value = label.partition("=")
    if not (column and equals and value):
        raise ConfigError(
            f"cells are named by COLUMN=VALUE, a column of obs and one of its values, such as "
            f"cell_type=fibroblast, and got {label}."
        )
    if column not in obs.columns:
        raise DataError(
            f"{source}: obs has no column {column} that can be read. It has "
            f"{_some(obs.columns)}. Remedy: COLUMN=VALUE with one of these."
        )
    values = obs[column].astype(str)
    rows = np.flatnonzero(values.to_numpy() == value)
    if not len(rows):
        there = values.value_counts()
        found = [f"{name} ({number:,})" for name, number in there.items()]
        raise DataError(
            f"{source}: no cell of obs column {column} is {value}. Values and cells: "
            f"{_some(found)}. Remedy: one of these, written as here."
        )
    return rows.astype(np.int64)


def drawn(rows_N: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of the rows, drawn at random by `seed`, ascending; 0: all."""
    if most == 0 or len(rows_N) <= most:
        return rows_N
    return np.sort(np.random.default_rng(seed).choice(rows_N, most, replace=False))


def _some(names: object) -> str:
    listed = [str(name) for name in names]  # type: ignore[attr-defined]
    more = len(listed) - MOST_LISTED
    return ", ".join(listed[:MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")
