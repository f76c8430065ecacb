"""Input cells of a trained model, by row number, in the order of the file.

file | SOMA Experiment | AnnData  ->  counts, ranked by the model's vocabulary  ->  RaggedCells
token store                       ->  tokens, if they are of that vocabulary    ->  RaggedCells
obs COLUMN=VALUE, a random sample  ->  row numbers  ->  ChosenCells of a file of counts
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from geneformer_mcore.data.collate import truncate
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.io.frames import label_texts
from geneformer_mcore.store.layout import MANIFEST_FILE, OBS, VOCABULARY_FILE
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.soma_io import SomaReader
from geneformer_mcore.tokenizer.genes import InputOptions, find_genes, known_counts, map_genes
from geneformer_mcore.tokenizer.rank_encoder import RankEncoder
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import RaggedCells

MOST_LISTED = 12
"""Columns or values that an error lists."""


class Cells(Protocol):
    """Cells in a fixed order. A cell without a known gene is its [CLS] alone.

    path: their h5ad file, if any
    """

    path: Path | None

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1, at most the model's seq_length tokens each."""
        ...

    def obs(self) -> pd.DataFrame:
        """Metadata of every cell, indexed by its name."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def open_cells(
    source: Any, vocabulary: Vocabulary, seq_length: int, options: InputOptions
) -> Cells:
    """Open a token store, a file of counts or an Experiment (path or URI), or an AnnData. Raises
    DataError if its cells do not suit the vocabulary, or cannot be read."""
    is_path = isinstance(source, str) and "://" not in source
    if is_path and (Path(source) / MANIFEST_FILE).exists():
        return StoredCells(source, vocabulary, seq_length)
    return CountedCells(source, vocabulary, seq_length, options)


class CountedCells:
    """Cells of a file of counts, ranked as they are read.

    counts: the open file;  genes: its columns as tokens;  encoder: of the vocabulary
    """

    def __init__(
        self, source: Any, vocabulary: Vocabulary, seq_length: int, options: InputOptions
    ) -> None:
        self.counts = options.open(source)
        self.counts.check()
        genes = find_genes(self.counts, options, vocabulary)
        self.genes = map_genes(genes, vocabulary, self.counts, options)
        self.encoder = RankEncoder(vocabulary, seq_length)
        self.path = self.counts.path

    def __len__(self) -> int:
        return self.counts.num_cells

    def read(self, start: int, stop: int) -> RaggedCells:
        """Implements Cells. Keys are 0, as nothing is masked."""
        tokens, lengths = [np.empty(0, np.uint16)], [np.empty(0, np.int64)]
        for block in self.counts.blocks(start=start, stop=stop):
            ranked = self.encoder.encode(block, self.genes.token_of_column)
            tokens.append(ranked.tokens_T)
            lengths.append(np.diff(ranked.offsets))
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        return RaggedCells(np.concatenate(tokens), offsets, np.zeros(stop - start, np.uint64))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """For uns: where counts and gene ids were found, and how much of both the model knows."""
        genes = self.genes
        return {
            "counts_location": self.counts.location,
            "passed_over": ", ".join(self.counts.passed_over),
            "gene_ids_location": f"var {genes.location}",
            "genes_known": genes.num_known,
            "genes_unknown": genes.num_unknown,
            "genes_of_vocabulary": genes.share_of_vocabulary,
            "counts_covered": known_counts(self.counts, genes.token_of_column),
        }

    def obs(self) -> pd.DataFrame:
        return self.counts.read_obs(0, len(self))

    def close(self) -> None:
        self.counts.close()


class StoredCells:
    """Cells of a token store, or of one split of it, in its order."""

    path: Path | None = None

    def __init__(
        self, source: str, vocabulary: Vocabulary, seq_length: int, split: str = ""
    ) -> None:
        self.store = TokenStore.open(source)
        self._start, self._stop = self.store.rows(split) if split else (0, len(self.store))
        self._seq_length = seq_length
        found = self.store.vocabulary.checksum
        if found != vocabulary.checksum:
            raise DataError(
                f"{source}: its {VOCABULARY_FILE} (checksum {found[:12]}) must be the model's "
                f"(checksum {vocabulary.checksum[:12]}): its token ids mean other genes. Remedy: "
                "give the h5ad files of these cells, or build a store of them with `vocabulary=` "
                "and the model's vocabulary."
            )

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, start: int, stop: int) -> RaggedCells:
        return self._read(self._start + start, self._start + stop)

    def training_cells(self, most: int) -> RaggedCells:
        """The first `most` of the store's training cells."""
        start, stop = self.store.rows("train")
        return self._read(start, min(stop, start + most))

    def _read(self, start: int, stop: int) -> RaggedCells:
        return truncate(self.store.read(start, stop), self._seq_length)

    def obs(self) -> pd.DataFrame:
        with SomaReader(self.store.path) as reader:
            table = reader.read(OBS, self._start, self._stop, reader.columns(OBS))
        return table.to_pandas().set_index("cell_id")

    def close(self) -> None:
        self.store.close()


@dataclass(frozen=True)
class CountedCell:
    """Counts and tokens of one cell.

    place:      its number among the chosen cells
    columns_E:  int32, columns of its entries;  counts_E: float64, their values
    tokens_T:   uint16, its ranked genes, [CLS] first
    """

    place: int
    columns_E: np.ndarray
    counts_E: np.ndarray
    tokens_T: np.ndarray


class ChosenCells:
    """The cells of `rows_N` (int64, ascending) of a file of counts. Implements Cells."""

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
            tokens = np.split(ranked.tokens_T, ranked.offsets[1:-1])
            for (first, last), tokens_T in zip(pairwise(block.indptr), tokens, strict=True):
                columns_E, counts_E = block.indices[first:last], block.data[first:last]
                yield CountedCell(place, columns_E, counts_E, tokens_T)
                place += 1

    def read(self, start: int, stop: int) -> RaggedCells:
        return ragged([cell.tokens_T for cell in self.counted(start, stop)])

    def obs(self) -> pd.DataFrame:
        return self.cells.obs().iloc[self.rows_N]

    def close(self) -> None:
        """Implements Cells. The file stays open for its owner."""

    def _blocks(self, start: int, stop: int) -> Iterator[CountBlock]:
        rows_N = self.rows_N[start:stop]
        # Neighbouring rows are read together.
        breaks = np.flatnonzero(np.diff(rows_N) != 1) + 1
        for run in np.split(rows_N, breaks):
            if len(run):
                yield from self.cells.counts.blocks(start=int(run[0]), stop=int(run[-1]) + 1)


def ragged(cells: list[np.ndarray]) -> RaggedCells:
    """Tokens of cells (uint16 each) laid end to end; their keys are their numbers."""
    offsets = np.cumsum([0, *map(len, cells)], dtype=np.int64)
    tokens_T = np.concatenate([np.empty(0, np.uint16), *cells])
    return RaggedCells(tokens_T, offsets, np.arange(len(cells), dtype=np.uint64))


def facts_of_cells(cells: Cells) -> dict[str, Any]:
    """{"input": CountedCells.facts}; {} of a token store, whose manifest holds that."""
    return {"input": cells.facts} if isinstance(cells, CountedCells) else {}


def coverage_lines(cells: Cells) -> list[str]:
    """The same as a line for the user; none of a token store."""
    if not isinstance(cells, CountedCells):
        return []
    found = cells.facts
    genes = found["genes_known"] + found["genes_unknown"]
    passed_over = f" ({found['passed_over']} passed over)" if found["passed_over"] else ""
    return [
        f"{found['genes_known']:,} of {genes:,} genes are known "
        f"({found['genes_of_vocabulary']:.1%} of the model's), with {found['counts_covered']:.1%} "
        f"of the counts of some cells; counts in {found['counts_location']}{passed_over}, gene ids "
        f"in {found['gene_ids_location']}"
    ]


def rows_with(obs: pd.DataFrame, label: str, source: str) -> np.ndarray:
    """int64, the rows with `label`, "COLUMN=VALUE". Raises ConfigError for another form, DataError
    where there is no such column, or no cell with the value."""
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
    values = pd.Series(label_texts(obs[column]))
    rows = np.flatnonzero(values == value)
    if not len(rows):
        found = [f"{name} ({number:,})" for name, number in values.value_counts().items()]
        raise DataError(
            f"{source}: no cell of obs column {column} is {value}. Values and cells: "
            f"{_some(found)}. Remedy: one of these, written as here."
        )
    return rows.astype(np.int64)


def drawn(rows_N: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` of the rows, drawn by `seed`, ascending; 0: all."""
    if most == 0 or len(rows_N) <= most:
        return rows_N
    return np.sort(np.random.default_rng(seed).choice(rows_N, most, replace=False))


def _some(names: Iterable[object]) -> str:
    listed = [*map(str, names)]
    more = len(listed) - MOST_LISTED
    return ", ".join(listed[:MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")
