"""Cells straight from raw counts, tokenised as they are read, without a token store.

    files, Experiments  ->  names of all cells -> keys, splits       (when opened)
    rows of a split     ->  counts -> rank tokens -> RaggedCells     (when read)

Tokens, keys and masks of a cell are those in a store of the same vocabulary. The order is another:
rows are the cells of a split as stored in the inputs, inputs sorted by name; long spans and their
windows mix them. A cell without known genes, which a store leaves out, comes as [CLS] alone.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from geneformer_mcore.errors import DataError, naming_options
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.io.h5ad import FILE_ENDINGS, Counts
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.split.table import SPLITS, SplitRule
from geneformer_mcore.tokenizer.genes import InputOptions, find_genes, map_genes
from geneformer_mcore.tokenizer.rank_encoder import RankEncoder
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import RaggedCells

MIN_SPAN_CELLS = 4096
"""Least neighbouring cells per read: a SOMA query or a compressed chunk costs the same for one."""

_ROWS_PER_READ = 4096
_NAMES_PER_READ = 65_536
_PROBES, _ROWS_PER_PROBE = 8, 64

_REMEDY = (
    "Options that begin with -- are those of data_prep/build_store.py: build a store with it from "
    "these inputs and data.vocabulary, and train with data.source=tokens data.store=STORE."
)


class CountsSource:
    """Cells of several inputs as one numbered sequence, tokenised on the fly (a TokenSource)."""

    def __init__(
        self,
        inputs: Sequence[str],
        vocabulary: Vocabulary,
        seq_length: int,
        split_rule: SplitRule,
        options: InputOptions | None = None,
    ) -> None:
        """Open all inputs and read the names of their cells. Raises DataError if one cannot be
        used, or two cells have one name."""
        options = options or InputOptions()
        self.name = ", ".join(inputs)
        self.vocabulary = vocabulary
        self.seq_length = seq_length
        self._encoder = RankEncoder(vocabulary, seq_length)
        # The prefetch thread and validation may read at the same time.
        self._lock = threading.Lock()
        with _naming_the_command():
            opened = [_Input(name, vocabulary, options) for name in inputs]
        self._inputs = sorted(opened, key=lambda each: (each.counts.stem, each.counts.name))
        self._first_cell = np.cumsum([0, *(each.counts.num_cells for each in self._inputs)])
        keys = np.concatenate([each.keys_N for each in self._inputs])
        _check_distinct(keys, self.name)
        codes = np.concatenate([each.split_codes(split_rule) for each in self._inputs])
        self._cells = np.argsort(codes, kind="stable")
        self._keys = keys[self._cells]
        self._stops = np.cumsum(np.bincount(codes, minlength=len(SPLITS)))
        self.content_hash = self._hash(codes)

    def rows(self, split: str) -> tuple[int, int]:
        code = SPLITS.index(split)
        start = self._stops[code - 1] if code else 0
        return int(start), int(self._stops[code])

    def __len__(self) -> int:
        return len(self._cells)

    def read(self, start: int, stop: int) -> RaggedCells:
        # Within a split cells ascend.
        borders = [start, *(int(s) for s in self._stops if start < s < stop), stop]
        parts = [self._cells[a:b] for a, b in pairwise(borders)]
        with self._lock, _naming_the_command():
            blocks = [block for cells in parts for block in self._blocks(cells)]
        keys_N = self._keys[start:stop]
        if not blocks:
            return RaggedCells(np.empty(0, np.uint16), np.zeros(1, np.int64), keys_N)
        tokens_T = np.concatenate([tokens for tokens, _ in blocks])
        lengths = np.concatenate([lengths for _, lengths in blocks])
        return RaggedCells(tokens_T, np.concatenate([[0], np.cumsum(lengths)]), keys_N)

    def cell_ids(self, rows: np.ndarray) -> list[str]:
        """Names of the cells of `rows` (int64 [N], any order), one read each: for messages."""
        names = []
        for cell in self._cells[rows].tolist():
            number = int(np.searchsorted(self._first_cell, cell, side="right")) - 1
            place = cell - int(self._first_cell[number])
            with self._lock:
                names += self._inputs[number].counts.read_cell_ids(place, place + 1)
        return names

    def datasets(self, start: int, stop: int) -> list[str]:
        """The input of each cell of rows start..stop-1."""
        numbers = np.searchsorted(self._first_cell, self._cells[start:stop], side="right") - 1
        return [self._inputs[number].counts.name for number in numbers]

    def close(self) -> None:
        for each in self._inputs:
            each.counts.close()

    def _blocks(self, cells: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, lengths) of `cells`, ascending, block by block."""
        bounds = np.searchsorted(cells, self._first_cell)
        for number, each in enumerate(self._inputs):
            wanted = cells[bounds[number] : bounds[number + 1]] - self._first_cell[number]
            yield from each.tokens(wanted, self._encoder)

    def _hash(self, codes: np.ndarray) -> str:
        """Of the cells, their splits and the form of the inputs, not of their paths."""
        digest = hashlib.sha256(self._keys.astype("<u8").tobytes() + codes.tobytes())
        with _naming_the_command():
            forms = [each.form() for each in self._inputs]
        digest.update(json.dumps([self.vocabulary.checksum, self.seq_length, forms]).encode())
        return digest.hexdigest()


class _Input:
    """One file or Experiment, open."""

    def __init__(self, name: str, vocabulary: Vocabulary, options: InputOptions) -> None:
        self.counts: Counts = options.open(name)
        genes = find_genes(self.counts, options, vocabulary)
        self._token_of_column = map_genes(genes, vocabulary, self.counts).token_of_column
        self._datasets: list[str] = []
        keys = []
        for start in range(0, self.counts.num_cells, _NAMES_PER_READ):
            stop = min(start + _NAMES_PER_READ, self.counts.num_cells)
            datasets = self.counts.read_dataset_ids(start, stop)
            keys.append(cell_keys(datasets, self.counts.read_cell_ids(start, stop)))
            self._datasets += datasets
        self.keys_N = np.concatenate(keys)

    def split_codes(self, rule: SplitRule) -> np.ndarray:
        """int8 [cells], each cell's place in SPLITS."""
        codes = rule.assign(self.keys_N, self._datasets)
        self._datasets = []  # Not needed any more, and large.
        return codes

    def form(self) -> list[object]:
        """Identity of the input besides its cells: genes of columns, and counts of some rows.
        Changes in other rows are not noticed: reading all takes as long as an epoch."""
        digest = hashlib.sha256(self._token_of_column.astype("<i4").tobytes())
        num_cells = self.counts.num_cells
        for place in range(_PROBES):
            start = place * max(0, num_cells - _ROWS_PER_PROBE) // max(1, _PROBES - 1)
            block = self.counts.read_rows(start, min(start + _ROWS_PER_PROBE, num_cells))
            digest.update(block.data.astype("<f8").tobytes() + block.indptr.tobytes())
            digest.update(block.indices.astype("<i4").tobytes())
        shape = [num_cells, self.counts.num_columns]
        return [self.counts.stem, self.counts.location, shape, digest.hexdigest()]

    def tokens(
        self, wanted: np.ndarray, encoder: RankEncoder
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens_T, lengths_N) of the rows `wanted` (ascending), block by block."""
        done = 0
        while done < len(wanted):
            first = int(wanted[done])
            stop = int(np.searchsorted(wanted, first + _ROWS_PER_READ))
            rows = wanted[done:stop]
            block = _take_rows(self.counts.read_rows(first, int(rows[-1]) + 1), rows - first)
            ranked = encoder.encode(block, self._token_of_column)
            yield ranked.tokens_T, np.diff(ranked.offsets)
            done = stop


@contextmanager
def _naming_the_command() -> Iterator[None]:
    """Add to errors that name a parameter without a setting the command that has the option."""
    try:
        yield
    except DataError as error:
        if not error.names_parameter:
            raise
        with naming_options(counts_layer="--layer"):
            raise DataError(f"{error} {_REMEDY}") from error


def _take_rows(block: CountBlock, rows: np.ndarray) -> CountBlock:
    if len(rows) == len(block):
        return block
    lengths = np.diff(block.indptr)[rows]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    entries = np.arange(indptr[-1]) + np.repeat(block.indptr[rows] - indptr[:-1], lengths)
    return CountBlock(block.data[entries], block.indices[entries], indptr, block.start)


def _check_distinct(keys_N: np.ndarray, name: str) -> None:
    repeated = len(keys_N) - len(np.unique(keys_N))
    if repeated:
        raise DataError(
            f"{name}: {repeated:,} cells have the dataset and the name of another one: names must "
            "be unique within a dataset. Remedy: make the obs names unique, or leave the second "
            "copy out."
        )


def find_inputs(store: str) -> list[str]:
    """Inputs that `data.store` names for data.source=counts: a file, an Experiment (folder or URI),
    a folder of h5ad or zarr files, or several of these with commas between. DataError if none."""
    found: list[str] = []
    for name in filter(None, (part.strip() for part in store.split(","))):
        files: list[str] = []
        if "://" not in name:
            with suppress(OSError):  # reported when it is opened
                there = sorted(map(str, Path(name).glob("*")))
                files = [path for path in there if path.endswith(FILE_ENDINGS)]
        found += files or [name]
    if not found:
        raise DataError(
            f"data.store must name cells for data.source=counts, and {store!r} names nothing. "
            "Remedy: name a file of counts, a SOMA Experiment or a folder of h5ad files; several "
            "go with commas between."
        )
    return found
