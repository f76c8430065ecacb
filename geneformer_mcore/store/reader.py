"""Token store reader: opened once, verified cheaply, then rows by number.

TokenStore.open(path)  ->  manifest, files, row counts, vocabulary agree
                       ->  read(start, stop)  ->  RaggedCells
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.elements import check_folder
from geneformer_mcore.store.layout import (
    OBS,
    TOKENS,
    VOCABULARY_FILE,
    Manifest,
    find_changes,
    text_buffers,
)
from geneformer_mcore.store.soma_io import WHOLE_COPY, SomaReader
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import RaggedCells

_ROWS_PER_PART = 65_536
_PART_TYPES = {"cell_key": np.uint64, "n_tokens": np.uint16}
_ROWS_PER_NAME_READ = 1024
_MOST_LISTED = 5


class TokenStore:
    """A store open for reading (a types.TokenSource); pickled by its path. Cells come as stored, up
    to the store's seq_length."""

    def __init__(self, path: str | Path) -> None:
        """Raises DataError unless manifest and vocabulary are sound, no file is missing, added,
        truncated or (but for tiles) changed, and both data frames have the manifest's rows. Every
        value is checked against its checksum when it is read."""
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self._check_files()
        self.vocabulary = Vocabulary.load(self.path / VOCABULARY_FILE)
        if self.vocabulary.checksum != self.manifest.vocabulary_hash:
            raise DataError(
                f"{self.path}: the manifest is of vocabulary {self.manifest.vocabulary_hash[:12]}, "
                f"{VOCABULARY_FILE} is {self.vocabulary.checksum[:12]}. Remedy: build the store "
                "again; never exchange its vocabulary."
            )
        self._soma = SomaReader(self.path)
        self._parts: dict[tuple[str, int], np.ndarray] = {}
        for name in (TOKENS, OBS):
            found = self._soma.count(name)
            if found != self.manifest.cells:
                raise DataError(
                    f"{self.path}: {name} holds {found:,} rows, the manifest says "
                    f"{self.manifest.cells:,}. Remedy: files are missing; copy the store again, or "
                    "build it again."
                )

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """The store at `path`, verified (see __init__)."""
        return cls(path)

    def rows(self, split: str) -> tuple[int, int]:
        """(start, stop) of the rows of "train", "validation" or "test"."""
        try:
            start, stop = self.manifest.rows[split]
        except KeyError:
            raise DataError(
                f"{self.path}: no split {split!r}; there are {', '.join(self.manifest.rows)}."
            ) from None
        return start, stop

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1 in row order; DataError if a checksum does not hold.

        Spans of 512 rows and more are fast: a query costs about two milliseconds by itself.
        """
        self._check_span(start, stop)
        if start == stop:
            empty = np.empty(0, np.uint16)
            return RaggedCells(empty, np.zeros(1, np.int64), np.empty(0, np.uint64))
        column = self._soma.read(TOKENS, start, stop, [TOKENS])[TOKENS].combine_chunks()
        array = column.chunk(0) if hasattr(column, "chunk") else column
        byte_offsets, raw = text_buffers(array)
        if byte_offsets[-1] % 2 or np.any(byte_offsets & 1):
            raise DataError(f"{self.path}: a cell's tokens are not whole uint16 numbers.")
        tokens_T = raw.view("<u2").astype(np.uint16, copy=False)
        return RaggedCells(tokens_T, byte_offsets >> 1, self._read_keys(start, stop))

    def cell_ids(self, rows: np.ndarray) -> list[str]:
        """The names of the cells of `rows` (int64 [N], any order), as their inputs have them."""
        names: dict[int, str] = {}
        for part in np.unique(rows // _ROWS_PER_NAME_READ).tolist():
            first = part * _ROWS_PER_NAME_READ
            last = min(first + _ROWS_PER_NAME_READ, len(self))
            column = self._soma.read(OBS, first, last, ["cell_id"])["cell_id"].to_pylist()
            names |= {row: column[row - first] for row in rows[rows // _ROWS_PER_NAME_READ == part]}
        return [names[row] for row in rows]

    def datasets(self, start: int, stop: int) -> list[str]:
        """The data set of each cell of rows start..stop-1, as their inputs name it."""
        self._check_span(start, stop)
        if start == stop:
            return []
        return self._soma.read(OBS, start, stop, ["dataset_id"])["dataset_id"].to_pylist()

    def labels(self, name: str) -> pa.Table:
        """`cell_key` and a label column of all cells, null where a cell has none.

        Raises DataError if there is no such column."""
        labels = self.manifest.labels
        if name not in labels:
            there = ", ".join(sorted(labels)) or "none"
            raise DataError(
                f"{self.path}: its obs has no label column {name!r}; label columns: {there}. "
                "Remedy: name one of these, or build the store of files whose obs has it."
            )
        return self._soma.read(OBS, 0, len(self), ["cell_key", name])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """int64 [N], tokens of the cells of `rows` (int64 [N], any order), [CLS] included."""
        lengths_N = np.empty(len(rows), np.int64)
        parts_N = rows // _ROWS_PER_PART
        for part in np.unique(parts_N).tolist():
            here = parts_N == part
            lengths_N[here] = self._part("n_tokens", part)[rows[here] - part * _ROWS_PER_PART]
        return lengths_N

    def _read_keys(self, start: int, stop: int) -> np.ndarray:
        """uint64 [stop - start]."""
        parts = []
        for part in range(start // _ROWS_PER_PART, (stop - 1) // _ROWS_PER_PART + 1):
            first = part * _ROWS_PER_PART
            keys = self._part("cell_key", part)
            parts.append(keys[max(0, start - first) : stop - first])
        return np.concatenate(parts)

    def _part(self, name: str, part: int) -> np.ndarray:
        """A large part of a column of obs, read once and kept, a few bytes per cell of the store: a
        query per span would cost as much as reading its tokens."""
        if (name, part) not in self._parts:
            first = part * _ROWS_PER_PART
            last = min(first + _ROWS_PER_PART, len(self))
            column = self._soma.read(OBS, first, last, [name])[name].to_numpy()
            self._parts[name, part] = column.astype(_PART_TYPES[name], copy=False)
        return self._parts[name, part]

    def close(self) -> None:
        """Closes the store's files."""
        self._soma.close()

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.manifest.cells

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.path,)

    def _check_files(self) -> None:
        try:
            check_folder(self.path, WHOLE_COPY)
            if not self.manifest.files:  # Built before files were listed.
                return
            changes = find_changes(self.path, self.manifest.files)
        except OSError as error:
            changes = [f"{error.filename} cannot be read: {error.strerror}"]
        if changes:
            rest = len(changes) - _MOST_LISTED
            more = f", and {rest:,} more" if rest > 0 else ""
            raise DataError(
                f"{self.path}: {'; '.join(changes[:_MOST_LISTED])}{more}. Remedy: copy the store "
                "again, or build it again; a store is never changed once it is built."
            )

    def _check_span(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise DataError(
                f"{self.path}: rows {start} to {stop} requested, there are 0 to {len(self)}."
            )
